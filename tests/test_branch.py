"""A run that starts from another one's checkpoint, or from a saved model: what is its own, what must be the same."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch.optim.optimizer import register_optimizer_step_pre_hook

from tests.conftest import tiny
from token_superposition.errors import TokenSuperpositionError
from token_superposition.experiment.compare import checked_jobs, compare, jobs_of
from token_superposition.experiment.config import Config, ModelConfig, load_config
from token_superposition.experiment.files import read_metrics
from token_superposition.experiment.jobs import branch_checkpoint
from token_superposition.experiment.result import read_result
from token_superposition.experiment.resume import model_digest
from token_superposition.experiment.run import train

Write = Callable[..., Path]
CHANGED: dict[str, Any] = {"learning_rate": 1e-3, "weight_decay": 0.5, "beta1": 0.8, "beta2": 0.5, "decay_ratio": 0.5}


def changed(config: Config, **settings: Any) -> Config:
    return replace(config, train=replace(config.train, **settings))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_branch_trains_as_its_own_configuration_says(optimizer: Any, write_config: Write, tmp_path: Path) -> None:
    """From its first step on: learning rate and its decay, betas and weight decay, also where the trunk had none."""
    config = changed(load_config(write_config()), optimizer=optimizer, save_every=4, weight_decay=0.0)
    train(config, tmp_path / "trunk")
    used: list[dict[str, Any]] = []
    hook = register_optimizer_step_pre_hook(lambda o, *_: used.extend(dict(g) for g in o.param_groups))
    branch = changed(config, **CHANGED)
    try:
        train(branch, tmp_path / "branch", branch_from=tmp_path / "trunk/checkpoints/checkpoint-8")
    finally:
        hook.remove()
    rates = [1e-3 * branch.wsd(step) for step in (8, 9, 10, 11)]
    # The decay began after step 6, beside the trunk's 11; the token embeddings have four times the rate.
    both = [rate * factor for rate in rates for factor in (1, 4)]
    assert list(dict.fromkeys(g["lr"] for g in used)) == list(dict.fromkeys(both))
    assert {g["betas"] for g in used if "betas" in g} == {(0.8, 0.5)}
    assert {g["weight_decay"] for g in used} == {0.5, 0.0}
    lines = [m for m in read_metrics(tmp_path / "branch/metrics.jsonl") if "loss" in m]
    assert [m["learning_rate"] for m in lines[8:]] == rates
    saved = torch.load(tmp_path / "branch/checkpoints/checkpoint-12/optimizer.pt", weights_only=True)
    assert {g["initial_lr"] for g in saved["param_groups"]} == {1e-3, 4e-3}


def test_a_branch_with_the_same_settings_is_the_same_run(write_config: Write, tmp_path: Path) -> None:
    config = changed(load_config(write_config()), save_every=4)
    train(config, tmp_path / "trunk")
    for step in (4, 8):
        branch = tmp_path / f"branch-{step}"
        train(config, branch, branch_from=tmp_path / f"trunk/checkpoints/checkpoint-{step}")
        for name in ("model/model.safetensors", "checkpoints/checkpoint-12/optimizer.pt"):
            assert (branch / name).read_bytes() == (tmp_path / "trunk" / name).read_bytes()


def test_a_checkpoint_that_was_moved_away_leaves_the_metrics_of_its_run(write_config: Write, tmp_path: Path) -> None:
    config, out = changed(load_config(write_config()), save_at=(8,), log_every=3), tmp_path / "run"
    train(config, out)
    whole = [m["step"] for m in read_metrics(out / "metrics.jsonl")]
    moved = tmp_path / "backup/checkpoint-8"
    moved.parent.mkdir()
    shutil.move(out / "checkpoints/checkpoint-8", moved)
    shutil.rmtree(out / "model")
    (out / "run.json").unlink()
    train(config, out, resume=moved)
    assert [m["step"] for m in read_metrics(out / "metrics.jsonl")] == whole
    with pytest.warns(UserWarning, match=r"the metrics from step 0 to 8 are not beside .*backup/checkpoint-8"):
        train(config, tmp_path / "other", resume=moved)
    assert [m["step"] for m in read_metrics(tmp_path / "other/metrics.jsonl")] == [s for s in whole if s > 8]


def test_a_damaged_checkpoint_of_the_trunk_is_passed_over(two_seeds: tuple[Path, Path, str], tmp_path: Path) -> None:
    """The shorter baseline is trained from its start, to the same loss."""
    out = shutil.copytree(two_seeds[1], tmp_path / "out")
    before = read_result(out / "runs/baseline-seed3/run.json").val_loss
    shutil.rmtree(out / "runs/baseline-seed3")
    (out / "runs/baseline-x1.5-seed3/checkpoints/checkpoint-11").mkdir(parents=True)
    config = load_config(two_seeds[0])
    (left,) = [j for j in jobs_of(config, out) if j.directory == "baseline-seed3"]
    assert branch_checkpoint(left, out) == out / "runs/baseline-x1.5-seed3/checkpoints/checkpoint-11"
    with pytest.warns(UserWarning, match=r"no manifest.json.*; baseline-seed3 is trained from its start"):
        compare(config, out, Console(quiet=True))
    assert read_result(out / "runs/baseline-seed3/run.json").val_loss == before


def saved_model(path: Path, scale: float = 1.0) -> Path:
    model = tiny("llama")
    model.lm_head.weight.data *= scale  # pyright: ignore
    model.save_pretrained(path)
    return path


def test_the_weights_a_run_began_with_are_those_of_all_their_files(tmp_path: Path) -> None:
    files = ("config.json", "model-00002-of-00002.safetensors", "pytorch_model.bin")
    for name in files:
        (tmp_path / name).write_text("a")
    before = model_digest(str(tmp_path))
    for name in files:
        (tmp_path / name).write_text("b")
        assert model_digest(str(tmp_path)) != before, name
        (tmp_path / name).write_text("a")
    assert model_digest(str(tmp_path)) == before


def test_runs_that_began_with_other_weights_are_not_compared(write_config: Write, tmp_path: Path) -> None:
    """The same path, another model behind it; put back, it goes on."""
    start, out = saved_model(tmp_path / "start"), tmp_path / "out"
    config = replace(load_config(write_config(steps=4)), model=ModelConfig(path=str(start)))
    job = jobs_of(config, out)[0]
    directory = out / "runs" / job.directory
    train(job.config, directory)
    assert checked_jobs(config, out)
    saved_model(start, 0.5)
    with pytest.raises(
        TokenSuperpositionError, match=r"baseline does not say that it began with the weights that .*st"
    ):
        checked_jobs(config, out)
    saved_model(start)
    assert checked_jobs(config, out)
    content = json.loads((directory / "run.json").read_text())
    del content["model_sha256"]  # as of an earlier version
    (directory / "run.json").write_text(json.dumps(content))
    assert read_result(directory / "run.json").steps == 4
    with pytest.raises(TokenSuperpositionError, match="baseline does not say that it began with"):
        checked_jobs(config, out)


def test_a_run_does_not_go_on_that_began_with_other_weights(write_config: Write, tmp_path: Path) -> None:
    start, out = saved_model(tmp_path / "start"), tmp_path / "run"
    config = changed(replace(load_config(write_config(steps=4)), model=ModelConfig(path=str(start))), save_at=(2,))
    train(config, out)
    shutil.rmtree(out / "model")
    (out / "run.json").unlink()
    saved_model(start, 0.5)
    with pytest.raises(
        TokenSuperpositionError, match=r"checkpoint-\d was .* \(weights of model.path \w{12} -> \w{12}\)"
    ):
        train(config, out)
    saved_model(start)
    assert train(config, out).steps == 4
