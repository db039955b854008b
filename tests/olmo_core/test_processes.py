"""OLMo-core on several processes: FSDP2 and tensor parallelism train like one process, and survive being killed."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from olmo_core.train.callbacks import ModelMergeCallback
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.conftest import VOCAB, once
from tests.olmo_core.launch import (
    SignalAt,
    per_token_losses,
    run_config,
    run_diverging,
    run_documented,
    run_training,
    small_model,
)
from tests.processes import launch
from token_superposition import TokenSuperpositionError
from token_superposition.data.plan import ValidationSet
from token_superposition.data.store import TokenStore
from token_superposition.engines.olmo_core.train import train
from token_superposition.experiment.config import load_config, save_config
from token_superposition.experiment.files import read_metrics
from token_superposition.experiment.run import train as train_on_transformers

LAYOUTS = {"one": (1, 1), "fsdp2": (2, 1), "tensor": (2, 2), "both": (4, 2)}
WholeRun = Callable[..., Path]


def metrics(run: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in m.items() if k != "seconds"} for m in read_metrics(run / "metrics.jsonl")]


def column(run: Path, name: str) -> list[Any]:
    """A figure of every logged step, or ``val_loss`` of every validation."""
    return [m[name] for m in metrics(run) if ("loss" in m) != (name == "val_loss")]


@pytest.fixture(scope="module")
def whole_run(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> WholeRun:
    """The directory of an uninterrupted run with checkpoints, made when it is first asked for."""

    def make(architecture: str, layout: str, precision: str = "float32") -> Path:
        processes, tensor = LAYOUTS[layout]
        config = run_config(prepared, architecture, precision=precision, save_every=4)
        name = f"olmo-{architecture}-{layout}-{precision}"
        train = partial(launch, processes, run_training, config)
        return once(tmp_path_factory, name, lambda root: train(root / "run", tensor)) / "run"

    return make


@pytest.mark.parametrize(("architecture", "layout"), [("llama", "fsdp2"), ("qwen3", "tensor")])
def test_killed_in_phase_one_and_resumed_over_the_switch(
    architecture: str, layout: str, whole_run: WholeRun, tmp_path: Path
) -> None:
    """Every logged figure and every weight of the run that died is the uninterrupted run's, bit for bit."""
    whole, broken, (processes, tensor) = whole_run(architecture, layout), tmp_path / "broken", LAYOUTS[layout]
    config = load_config(whole / "config.toml")
    launch(processes, run_training, config, broken, tensor, 5, killed=True)
    assert not (broken / "run.json").exists() and set(column(broken, "input_bag")) == {4}
    assert [p.name for p in (broken / "checkpoints").iterdir()] == ["step4"]
    launch(processes, run_training, config, broken, tensor)
    assert column(whole, "input_bag") == [4] * 6 + [1] * 6
    assert metrics(broken) == metrics(whole)
    for name in ("model.safetensors", "config.json"):
        assert (broken / "model" / name).read_bytes() == (whole / "model" / name).read_bytes()


@pytest.mark.parametrize(("architecture", "layout"), [("llama", "fsdp2"), ("qwen3", "tensor"), ("llama", "both")])
def test_several_processes_train_like_one(architecture: str, layout: str, whole_run: WholeRun) -> None:
    one, several = whole_run(architecture, "one"), whole_run(architecture, layout)
    for name in ("loss", "grad_norm", "val_loss"):
        assert column(several, name) == pytest.approx(column(one, name), rel=1e-5)
    for name in ("flops", "latent_tokens", "raw_tokens", "learning_rate"):
        assert column(several, name) == column(one, name)
    assert column(one, "raw_tokens")[-1] == 4 * 16 * (6 * 4 + 6)
    raw = {m["step"]: m["raw_tokens"] for m in metrics(one) if "loss" in m}
    assert all(m["raw_tokens"] == raw[m["step"]] for m in metrics(one) if "val_loss" in m)


@pytest.mark.parametrize("layout", ["fsdp2", "tensor"])
def test_bfloat16(layout: str, whole_run: WholeRun) -> None:
    """Weights and activations of the computation in bfloat16; losses are summed in float32."""
    exact, low = whole_run("llama", "one"), whole_run("llama", layout, "bfloat16")
    assert column(low, "loss") == pytest.approx(column(exact, "loss"), rel=1e-2)
    assert column(low, "loss") != column(exact, "loss")
    assert AutoModelForCausalLM.from_pretrained(low / "model").dtype == torch.float32


def test_the_run_ends_with_an_ordinary_model(whole_run: WholeRun) -> None:
    """A sharded Qwen3, loaded by transformers, has the validation loss that the run measured."""
    run = whole_run("qwen3", "tensor")
    model = AutoModelForCausalLM.from_pretrained(run / "model").eval()
    assert AutoTokenizer.from_pretrained(run / "model").vocab_size == VOCAB
    config = load_config(run / "config.toml")
    held_out = ValidationSet(TokenStore(config.data.path, "validation"), 16, config.data.final_eval_tokens)
    ids, labels = (torch.stack([s[k] for s in held_out]) for k in ("input_ids", "shift_labels"))
    with torch.no_grad():
        loss = torch.nn.functional.cross_entropy(model(ids).logits.flatten(0, 1).double(), labels.flatten())
    assert column(run, "val_loss")[-1] == pytest.approx(loss.item(), rel=1e-5)


@pytest.mark.parametrize(("architecture", "weighting"), [("llama", "uniform"), ("qwen3", "power")])
def test_one_truth_with_transformers(architecture: str, weighting: str, prepared: Path, tmp_path: Path) -> None:
    """The same initial weights, data and schedule: the same curves in both phases, to 2 parts in a million."""
    small_model(architecture).save_pretrained(tmp_path / "start")
    config = run_config(prepared, architecture, tmp_path / "start", weighting=weighting)
    train_on_transformers(config, tmp_path / "transformers")
    if architecture == "llama":  # by the documented command
        save_config(config, tmp_path / "config.toml")
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        arguments = [tmp_path / "config.toml", "--out", tmp_path / "olmo_core"]
        done = subprocess.run(
            [*torchrun, "-m", "token_superposition.engines.olmo_core", *arguments],
            capture_output=True, text=True, timeout=200, env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        assert "validation loss" in done.stdout
    else:
        launch(2, run_training, config, tmp_path / "olmo_core", 2)
    ours, theirs = tmp_path / "olmo_core", tmp_path / "transformers"
    assert column(ours, "input_bag") == column(theirs, "input_bag") == [4] * 6 + [1] * 6
    for name in ("step", "latent_tokens", "raw_tokens"):
        assert column(ours, name) == column(theirs, name)
    assert column(ours, "learning_rate") == pytest.approx(column(theirs, "learning_rate"), rel=1e-12)
    for name in ("loss", "val_loss"):
        assert column(ours, name) == pytest.approx(column(theirs, name), rel=2e-6)
    assert column(ours, "grad_norm") == pytest.approx(column(theirs, "grad_norm"), rel=5e-6)


def test_the_script_in_the_documentation(prepared: Path, tmp_path: Path) -> None:
    """As it stands there, on two processes: it ends with a model that stock transformers loads."""
    launch(2, run_documented, prepared, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert model.config.model_type == "llama" and model.config.vocab_size == TokenStore(prepared).meta.vocab_size
    last = tmp_path / "checkpoints" / "step12"
    assert last.is_dir()
    (last / ".metadata.json").unlink()  # as where the save was cut short
    shutil.rmtree(tmp_path / "model")
    launch(2, run_documented, prepared, tmp_path)
    assert (last / ".metadata.json").is_file() and (tmp_path / "model").is_dir()


@pytest.mark.parametrize("save_every", [0, 100])
def test_sigterm_ends_a_run_after_the_step(save_every: int, prepared: Path, tmp_path: Path) -> None:
    """With checkpoints it writes one and says so; without, it says that there is none."""
    config = run_config(prepared, steps=60, save_every=save_every)
    remedy = "goes on from the newest checkpoint" if save_every else "nothing was saved, since --train.save-every is 0"
    with pytest.raises(TokenSuperpositionError, match=rf"stopped after step 3 of 60; .*{remedy}"):
        train(config, tmp_path, callbacks={"signal": SignalAt(at=3)})
    assert (tmp_path / "checkpoints" / "step3").is_dir() == bool(save_every)


def test_nothing_is_saved_of_a_run_that_diverged(prepared: Path, tmp_path: Path) -> None:
    """On several processes OLMo-core tells of the loss afterwards, and the next start would go on from it."""
    config = run_config(prepared, learning_rate=1e30, save_every=2, log_every=10)
    for _ in range(2):
        launch(2, run_diverging, config, tmp_path)
        assert {p.name for p in (tmp_path / "checkpoints").iterdir()} <= {"step2"}
    assert not (tmp_path / "model").exists() and not (tmp_path / "run.json").exists()


def test_a_validation_is_written_at_once(prepared: Path, tmp_path: Path) -> None:
    """Also between two logs, behind a checkpoint from which the run then goes on."""
    config = run_config(prepared, save_every=4, log_every=10)
    launch(1, run_training, config, tmp_path, 1, 7, killed=True)
    train(config, tmp_path)
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [m["step"] for m in lines if "val_loss" in m] == [4, 8, 12, 12]
    seconds = [m["seconds"] for m in lines]
    assert seconds == sorted(seconds) and seconds[0] < seconds[1]


def test_sigterm_in_the_last_step_changes_nothing(prepared: Path, tmp_path: Path) -> None:
    """Nor does another start add a line, where the export had failed, say."""
    config = run_config(prepared, steps=6, save_every=6)
    result = train(config, tmp_path, callbacks={"signal": SignalAt(at=6)})
    assert math.isfinite(result.val_loss)
    (tmp_path / "run.json").unlink()
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert train(config, tmp_path).val_loss == result.val_loss
    assert read_metrics(tmp_path / "metrics.jsonl") == lines


def test_a_merged_models_validation_is_not_the_runs(whole_run: WholeRun, prepared: Path, tmp_path: Path) -> None:
    """OLMo-core evaluates it with the same callback, in the same step."""
    merge = ModelMergeCallback(merge_step=8, merge_last_n_steps=5, enabled=True)
    train(run_config(prepared, precision="float32", save_every=4), tmp_path, callbacks={"merge": merge})
    assert column(tmp_path, "val_loss") == column(whole_run("llama", "one"), "val_loss")


def test_stock_evaluators_get_a_loss_per_token(whole_run: WholeRun, tmp_path: Path) -> None:
    """Also where head and sequence are sharded: ``eval_batch`` asks for losses that are not reduced."""
    model = whole_run("llama", "one") / "model"
    launch(2, per_token_losses, model, tmp_path)
    ids = torch.arange(64).reshape(4, 16)
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(model)(ids).logits
    expected = torch.nn.functional.cross_entropy(logits.mT, ids + 1, reduction="none")
    halves = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    torch.testing.assert_close(torch.cat(halves, 1), expected)
