"""The presets are the paper's recipes, written out here a second time, and names that every command takes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

import results
from tests.conftest import tst
from token_superposition import TokenSuperpositionError
from token_superposition.cli.arguments import split_config
from token_superposition.experiment.config import Config, load_config, preset_names, save_config

# Of the paper: layers, width, heads, KV heads, MLP; lr; steps, superposed, s; latent and raw tokens of the run.
PAPER = {
    "270m": ((30, 576, 9, 3, 1536), 2e-3, (20_000, 6_000, 6), 42e9, 105e9),
    "600m": ((32, 960, 15, 5, 2560), 1e-3, (20_000, 6_000, 6), 42e9, 105e9),
    "3b": ((36, 2048, 16, 4, 11008), 2e-4, (20_000, 6_000, 6), 42e9, 105e9),
    "10b-a1b": (None, 3e-4, (49_983, 12_483, 16), 419e9, 2e12),
}


@pytest.mark.parametrize("name", PAPER)
def test_a_preset_is_the_papers_recipe(name: str) -> None:
    config = load_config(name)
    config.check()
    shape, lr, (steps, superposed, s), latent, raw = PAPER[name]
    options, train = config.model.options, config.train
    if shape is not None:
        keys = ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "intermediate_size")
        assert tuple(options[k] for k in keys) == shape and config.model.architecture == "llama"
    else:
        assert config.model.architecture == "qwen3_moe"
    assert options["tie_word_embeddings"] is False
    assert (train.learning_rate, train.beta1, train.beta2, train.warmup_steps) == (lr, 0.9, 0.95, 2000)
    assert config.wsd.decay_steps == round(0.1 * steps) and config.schedule.total_steps == steps
    assert [(p.steps, p.input_bag, p.output_bag) for p in config.schedule.phases] == [
        (superposed, s, s),
        (steps - superposed, 1, 1),
    ]
    counts = (train.batch_size, config.data.sequence_length)
    assert train.batch_size * config.data.sequence_length == (2**23 if name == "10b-a1b" else 2**21)
    assert config.schedule.latent_tokens(*counts) == pytest.approx(latent, rel=5e-3)
    assert config.schedule.raw_tokens(*counts) == pytest.approx(raw, rel=6e-3)


def test_ratio_0_is_the_baseline() -> None:
    config = load_config("600m")
    baseline = replace(config, superposition=replace(config.superposition, ratio=0.0))
    assert [(p.steps, p.input_bag, p.output_bag) for p in baseline.schedule.phases] == [(20_000, 1, 1)]


def test_a_name_is_a_preset_unless_a_file_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert preset_names() == ["10b-a1b", "270m", "3b", "600m", "demo", "proof-cpu"]
    config, rest = split_config(["600m", "--out", "x"])
    assert config.train.learning_rate == 1e-3 and rest == ["--out", "x"]
    Path("3b").mkdir()
    assert load_config("3b").model.options["hidden_size"] == 2048  # a directory is no configuration
    Path("600m").write_text("[train]\nsteps = 7\n")
    assert load_config("600m").train.steps == 7
    with pytest.raises(
        TokenSuperpositionError, match=r"^7b does not exist; .* 10b-a1b, 270m, 3b, 600m, demo, proof-cpu$"
    ):
        load_config("7b")


@pytest.mark.parametrize("name", ["demo", "proof-cpu", *PAPER])
def test_a_preset_survives_the_file(name: str, tmp_path: Path) -> None:
    save_config(load_config(name), tmp_path / "copy.toml")
    assert load_config(tmp_path / "copy.toml") == load_config(name) != Config()


def test_the_shipped_experiment_is_the_one_that_was_measured() -> None:
    """But for the variants that were trained beside it."""
    measured = load_config(Path(results.__file__).parent / "proof-cpu" / "config.toml")
    alone = replace(measured.compare, variants=())
    assert replace(measured, data=replace(measured.data, path="data"), compare=alone) == load_config("proof-cpu")


SHRUNK = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 48, "moe_intermediate_size": 24, "head_dim": 8, "num_experts": 8, "num_experts_per_tok": 2,
}  # fmt: skip


@pytest.mark.parametrize("name", ["600m", "10b-a1b"])
def test_a_preset_trains(name: str, tmp_path: Path, prepared: Path) -> None:
    """The command and the preset as they are, with a smaller model and a shorter run on its flags."""
    options = {k: v for k, v in SHRUNK.items() if k in load_config(name).model.options}
    small = {f"model.options.{k}": v for k, v in options.items()} | {
        "data.path": prepared, "data.sequence_length": 16, "data.eval_tokens": 256, "data.final_eval_tokens": 256,
        "superposition.bag_size": 4, "train.steps": 12, "train.warmup_steps": 2, "train.batch_size": 8,
        "train.micro_batch_size": 4, "train.loader_workers": 0,
    }  # fmt: skip
    flags = [text for k, v in small.items() for text in (f"--{k.replace('_', '-')}", str(v))]
    tst("train", name, *flags, "--out", tmp_path / "run")
    result = json.loads((tmp_path / "run/run.json").read_text())
    superposed = 4 if name == "600m" else 3  # of 12, at r = 0.3 and 0.25
    assert result["raw_tokens"] == 8 * 16 * (12 + superposed * 3) and result["latent_tokens"] == 8 * 16 * 12
    saved = json.loads((tmp_path / "run/model/config.json").read_text())
    assert saved["rope_parameters"]["rope_theta"] == load_config(name).model.options["rope_theta"]
    assert saved["hidden_size"] == 32 and not saved["tie_word_embeddings"] and saved["vocab_size"] == 320
