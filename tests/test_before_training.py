"""What a comparison or a sweep refuses before its baseline is trained, which would not have refused it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

from tests.conftest import TINY
from token_superposition import TokenSuperpositionError
from token_superposition.experiment.compare import checked_jobs
from token_superposition.experiment.config import CompareConfig, Config, ModelConfig, SweepConfig, Variant, load_config
from token_superposition.experiment.sweep import checked

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
FALCON_H1 = SMALL | {
    "num_key_value_heads": 1, "head_dim": 16, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 4,
    "mamba_n_groups": 1, "mamba_chunk_size": 4, "mamba_d_ssm": 64, "embedding_multiplier": 2.0,
}  # fmt: skip


@pytest.fixture
def config(write_config: Callable[..., Path]) -> Config:
    return load_config(write_config())


def test_a_model_that_cannot_read_bags(config: Config, tmp_path: Path) -> None:
    """It scales what it makes of ids, not what it is given. Bags in the output alone it can be trained on."""
    config = replace(config, model=ModelConfig("falcon_h1", cast(Any, FALCON_H1)), sweep=SweepConfig(bag_sizes=(2, 4)))
    out = tmp_path / "out"
    with pytest.raises(TokenSuperpositionError, match=r"FalconH1\w+ cannot read the bags of tst: .*; superpose the"):
        checked_jobs(config, out)
    with pytest.raises(TokenSuperpositionError, match=r"cannot read the bags of s2-r0.5-lr0.003: .*; superpose the"):
        checked(config, out)
    output = replace(config, superposition=replace(config.superposition, sides="output"))
    checked_jobs(output, out)
    both = replace(output, compare=CompareConfig(variants=(Variant("both", config.superposition),)))
    with pytest.raises(TokenSuperpositionError, match="cannot read the bags of both"):
        checked_jobs(both, out)
    assert not out.exists()


def test_a_model_without_hidden_states_for_further_heads(config: Config, tmp_path: Path) -> None:
    config = replace(config, model=ModelConfig("bert", cast(Any, TINY["bert"])))
    checked_jobs(config, tmp_path / "out")
    heads = replace(config, superposition=replace(config.superposition, mtp_heads=2))
    with pytest.raises(TokenSuperpositionError, match="mtp_heads of tst is 2, but BertLMHeadModel shows no hidden"):
        checked_jobs(heads, tmp_path / "out")


def test_boundaries_that_cannot_be_found(config: Config, tmp_path: Path) -> None:
    sentences = replace(config, superposition=replace(config.superposition, boundaries=cast(Any, "sentence")))
    with pytest.raises(TokenSuperpositionError, match="boundaries is 'sentence'; choose one of"):
        checked_jobs(sentences, tmp_path / "out")


def test_a_warm_up_that_a_shorter_run_has_no_room_for(config: Config, tmp_path: Path) -> None:
    """The run that is to blame is named: that of the configuration itself has room."""
    config = replace(config, train=replace(config.train, steps=20, warmup_steps=12))
    shorter = replace(config, compare=CompareConfig(baseline_lengths=(1.0, 0.5)))
    with pytest.raises(TokenSuperpositionError, match=r"run baseline-x0.5: warm-up of 12 .* do not fit in 10 steps"):
        checked_jobs(shorter, tmp_path / "out")
    half = replace(config, compare=CompareConfig(variants=(Variant("half", config.superposition, 0.5),)))
    with pytest.raises(TokenSuperpositionError, match=r"the run half: warm-up of 12 .* do not fit in 10 steps"):
        checked_jobs(half, tmp_path / "out")


def test_a_model_that_only_another_device_runs_is_left_to_its_runs(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one of kernels for a GPU."""
    from transformers.models.llama.modeling_llama import LlamaMLP

    def only_there(*args: Any) -> Any:
        raise RuntimeError("not compiled for this device")

    monkeypatch.setattr(LlamaMLP, "forward", only_there)
    assert len(checked_jobs(config, tmp_path / "out")) == 2


def test_what_is_done_is_not_asked_again(two_seeds: tuple[Path, Path, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """No model is built for a report that is written again."""
    path, out, _ = two_seeds
    monkeypatch.setattr("token_superposition.experiment.model.build_model", pytest.fail)
    assert checked_jobs(load_config(path), out)
