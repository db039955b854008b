"""A table of positions ends: what is longer is refused in one line; a short one is trained, exported and continued."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, RobertaConfig, RobertaForCausalLM

from tests.conftest import CONFIG, TINY, once, tiny, toml, tst
from token_superposition import TokenSuperpositionError
from token_superposition.cli import main
from token_superposition.engines.transformers.fit import reads
from token_superposition.experiment.config import Config, DataConfig, ModelConfig
from token_superposition.experiment.evaluate import length_of
from token_superposition.experiment.model import build_model

POSITIONS = 16


@pytest.fixture(scope="module")
def run(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of GPT-2, with one learned vector for each of the 16 positions of a sequence."""
    options = "\n".join(f"{k} = {toml(v)}" for k, v in TINY["gpt2"].items())

    def make(root: Path) -> None:
        (root / "config.toml").write_text(CONFIG.format(architecture="gpt2", options=options, data=prepared))
        tst("train", root / "config.toml", "--out", root / "run")

    return once(tmp_path_factory, "gpt2-run", make) / "run"


def test_a_model_of_few_positions_is_exported(run: Path, tmp_path: Path) -> None:
    assert main(["export", str(run), str(tmp_path / "exported")]) == 0
    ids = torch.arange(POSITIONS)[None]
    trained, exported = (AutoModelForCausalLM.from_pretrained(d) for d in (run / "model", tmp_path / "exported"))
    assert torch.equal(trained(ids).logits, exported(ids).logits)


def test_text_ends_with_the_positions(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, prompt = str(run / "model"), "def"
    assert main(["generate", model, prompt]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "positions, the model has 16; give at most that in all" in error
    fitting = int(json.loads((run / "model/config.json").read_text())["n_positions"]) - 2
    assert main(["generate", model, prompt, "--max-new-tokens", str(fitting)]) == 0


@pytest.mark.parametrize(
    ("architecture", "options", "whole"),
    [
        ("gpt2", {}, False),
        ("gptj", {"n_embd": 32, "n_layer": 1, "n_head": 2, "rotary_dim": 8}, False),
        ("opt", {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 1, "num_attention_heads": 2}, False),
        ("llama", {}, True),
        ("mamba", {}, True),
        ("bloom", {"hidden_size": 32, "n_layer": 1, "n_head": 2}, True),
    ],
)
def test_a_saved_model_reads_longer_sequences_only_without_a_table(
    architecture: str, options: dict[str, Any], whole: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(TINY, architecture, TINY.get(architecture, {}) | options)
    tiny(architecture, max_position_embeddings=POSITIONS).save_pretrained(tmp_path)
    config = Config(ModelConfig(path=str(tmp_path)), DataConfig(sequence_length=POSITIONS))
    meta: Any = SimpleNamespace(vocab_size=320, eos_id=0, bos_id=None)
    model = build_model(config, meta)
    assert reads(model, POSITIONS)
    longer = replace(config, data=DataConfig(sequence_length=2 * POSITIONS))
    if whole:
        model = build_model(longer, meta)
        assert model(torch.zeros(1, 2 * POSITIONS, dtype=torch.long)).logits.shape[1] == 2 * POSITIONS
    else:
        with pytest.raises(TokenSuperpositionError, match="is 32; the model has 16 positions, give at most that"):
            build_model(longer, meta)


def test_a_table_with_positions_for_no_token_has_one_line() -> None:
    config = RobertaConfig(
        vocab_size=320, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=34, is_decoder=True, pad_token_id=1,
    )  # fmt: skip
    model = RobertaForCausalLM(config)
    assert length_of(model, 32) == 32
    for wanted in (None, 33):
        with pytest.raises(TokenSuperpositionError, match=r"the model cannot read 3\d tokens, though it names 34"):
            length_of(model, wanted)
