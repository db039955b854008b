"""Gradients that are not finite, losses that jump, loaders that hang, processes that die."""

from __future__ import annotations

import json
import math
import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, TrainerControl, TrainerState

from tests.conftest import tiny
from tests.processes import begin_group, call, command
from tests.reliability.harness import until
from token_superposition import TokenSuperpositionError
from token_superposition.data.plan import PlannedDataset
from token_superposition.data.store import TokenStore
from token_superposition.experiment.checkpoints import checkpoints_in, damage, step_of
from token_superposition.experiment.config import Config, load_config
from token_superposition.experiment.files import read_metrics
from token_superposition.experiment.health import GradientGuard, is_spike
from token_superposition.experiment.metrics import MetricsWriter
from token_superposition.experiment.run import train
from token_superposition.experiment.watchdog import Watchdog

Write = Callable[..., Path]


def poisoned(write_config: Write, tmp_path: Path, **changes: Any) -> tuple[Config, list[int]]:
    """A run from weights in which one token's embedding is infinite, and the steps (1-based) that read that token.

    The token is one that some steps read and others do not.
    """
    config = load_config(write_config())
    config = replace(config, train=replace(config.train, **changes))
    plan = PlannedDataset(TokenStore(config.data.path), config.schedule, 16, 4, seed=0)

    def readers(token: int) -> list[int]:
        samples = (plan[i]["input_ids"] for i in range(len(plan)))
        return sorted({i // 4 + 1 for i, ids in enumerate(samples) if (ids == token).any()})

    token = next(t for t in range(320) if len(readers(t)) > 1 and readers(t)[0] > 2)  # a checkpoint is saved before
    model = tiny("llama")
    with torch.no_grad():
        model.get_input_embeddings().weight[token] = torch.inf
    model.save_pretrained(tmp_path / "poisoned")
    model_config = replace(config.model, path=str(tmp_path / "poisoned"), options={})
    return replace(config, model=model_config), readers(token)


@pytest.mark.parametrize(("optimizer", "log_every"), [("adamw", 12), ("muon", 1)])
def test_a_gradient_that_is_not_finite_stops_the_run_before_the_weights_change(
    optimizer: str, log_every: int, write_config: Write, tmp_path: Path
) -> None:
    config, bad = poisoned(write_config, tmp_path, optimizer=optimizer, log_every=log_every, save_every=2)
    out = tmp_path / "run"
    with pytest.raises(TokenSuperpositionError) as e:
        train(config, out)
    first = bad[0]
    message = str(e.value)
    assert f"the gradient of step {first} has the norm nan" in message
    assert f"samples {4 * first - 4} to {4 * first - 1} of the plan" in message
    saved = [step_of(c) for c in checkpoints_in(out / "checkpoints")]
    assert saved and max(saved) < first and not any(damage(c) for c in checkpoints_in(out / "checkpoints"))
    # The command that the message gives leads to the same message.
    words = message.partition("tst train ")[2].partition(";")[0].split()
    again = call(command, "train", *words)
    assert again.returncode == 2 and f"the gradient of step {first} has the norm nan" in again.stderr


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_steps_can_be_left_out(optimizer: str, write_config: Write, tmp_path: Path) -> None:
    """Only the embedding that was infinite from the beginning is; what was left out stands in the metrics."""
    settings = {"optimizer": optimizer, "on_nonfinite": "skip", "log_every": 2, "save_every": 2}
    config, bad = poisoned(write_config, tmp_path, **settings)
    with pytest.warns(UserWarning, match=f"left out: the gradient of step {bad[0]} has the norm nan, samples"):
        train(config, tmp_path / "run")
    lines = [m for m in read_metrics(tmp_path / "run/metrics.jsonl") if "loss" in m]
    for line in (tmp_path / "run/metrics.jsonl").open():
        json.loads(line, parse_constant=pytest.fail)  # NaN is no JSON
    assert [s for m in lines for s in m.get("skipped", [])] == bad
    assert [math.isfinite(m["loss"]) for m in lines] == ["skipped" not in m for m in lines]
    weights = AutoModelForCausalLM.from_pretrained(tmp_path / "run/model").state_dict()
    before = AutoModelForCausalLM.from_pretrained(tmp_path / "poisoned").state_dict()
    for name, w in weights.items():
        finite = w.isfinite()
        assert finite.all() == ("embed_tokens" not in name), name
        assert not torch.equal(w[finite], before[name][finite]), name


def test_steps_that_are_left_out_after_the_last_log_stand_with_a_validation(
    write_config: Write, tmp_path: Path
) -> None:
    config, bad = poisoned(write_config, tmp_path, on_nonfinite="skip", log_every=100)
    with pytest.warns(UserWarning, match="left out: the gradient of step"):
        train(config, tmp_path / "run")
    lines = read_metrics(tmp_path / "run/metrics.jsonl")
    assert [s for m in lines for s in m.get("skipped", [])] == bad


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("action", ["stop", "skip"])
def test_the_optimizer_does_as_if_the_step_had_not_been(fused: bool, action: Any) -> None:
    """Bit for bit, weights and state; a stopped run takes no later step either."""

    def run(steps: list[int], guard: GradientGuard) -> tuple[torch.Tensor, dict[str, Any]]:
        p = torch.nn.Parameter(torch.ones(5))
        optimizer = torch.optim.AdamW([p], lr=0.1, fused=fused)
        for step in steps:
            p.grad = torch.full((5,), torch.nan if step == 2 else float(step))
            guard.check(torch.linalg.vector_norm(p.grad), optimizer, [p])
            optimizer.step()
        return p.detach(), optimizer.state[p]

    kept = [1, 3] if action == "skip" else [1]
    (got, state), (want, expected) = (run(steps, GradientGuard(action, lambda step: "")) for steps in ([1, 2, 3], kept))
    assert torch.equal(got, want)
    assert all(torch.equal(state[name], value) for name, value in expected.items())


def test_spikes_are_marked_within_their_phase() -> None:
    chance = random.Random(0)
    lines: list[dict[str, Any]] = []
    marked: list[int] = []
    for step in range(1, 101):
        bag = 4 if step <= 40 else 1
        loss = chance.gauss(5.0 if bag == 4 else 9.0, 0.05) + (2.0 if step in (10, 30, 50, 90) else 0.0)
        line = {"step": step, "loss": loss, "input_bag": bag, "output_bag": bag}
        if is_spike(lines, line):
            marked.append(step)
        lines.append(line)
    assert marked == [30, 90]  # before 20 losses of the phase nothing is said; the switch itself is no spike
    assert not is_spike(lines, {"loss": float("nan"), "input_bag": 1, "output_bag": 1})


def test_a_spike_is_a_word_in_the_metrics(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path / "metrics.jsonl", 1.0, 1.0)
    state = TrainerState(is_world_process_zero=True)
    everything: Any = (None, state, TrainerControl())
    bags = {"input_bag": 1, "output_bag": 1}
    for step in range(1, 31):
        state.global_step = step
        writer.on_log(*everything, logs={"loss": 3.0 + step % 2 / 10, **bags})
    state.global_step = 31
    with pytest.warns(UserWarning, match="the loss jumped to 5.000 at step 31"):
        writer.on_log(*everything, logs={"loss": 5.0, **bags})
    assert [m["step"] for m in read_metrics(writer.path) if "spike" in m] == [31]


def hang(config: str, out: str) -> None:
    """``tst train`` whose data stops coming after 5 steps."""
    read = PlannedDataset.__getitem__

    def slow(self: PlannedDataset, index: int) -> Any:
        if index >= 20:
            time.sleep(1000)
        return read(self, index)

    PlannedDataset.__getitem__ = slow
    command("train", config, "--out", out, "--train.timeout-minutes", "0.15")


def test_a_stalled_loader_ends_the_run(write_config: Write, tmp_path: Path) -> None:
    start = time.monotonic()
    done = call(hang, str(write_config(save_every=4)), str(tmp_path / "run"))
    assert done.returncode == 1, done.stderr
    (error,) = [line for line in done.stderr.splitlines() if line.startswith("tst: error")]
    assert "nothing was done for 0.15 minutes after step 4" in error  # a batch is read one step ahead
    assert "in slow" in (tmp_path / "run/stalled.txt").read_text()
    assert time.monotonic() - start < 120
    assert not damage(tmp_path / "run/checkpoints/checkpoint-4")


def test_the_time_before_training_is_not_that_of_a_step(tmp_path: Path) -> None:
    """Checkpoints may take long to be read."""
    done = call(watch_after_a_pause, str(tmp_path))
    assert done.returncode == 0, done.stderr


def watch_after_a_pause(out: str) -> None:
    watchdog = Watchdog(1.0, Path(out))
    time.sleep(1.2)
    with watchdog:
        time.sleep(0.5)


def test_a_dead_process_ends_the_others(write_config: Write, tmp_path: Path) -> None:
    """One of two over gloo gets SIGKILL."""
    out = tmp_path / "run"
    config = write_config(steps=400, eval_every=400, warmup_steps=2)
    first, second = begin_group(
        2, tmp_path, command, "train", str(config), "--out", str(out), "--train.timeout-minutes", "1"
    )
    until(first, lambda: len(read_metrics(out / "metrics.jsonl")) > 3)
    os.kill(second.pid, signal.SIGKILL)
    first.join(120)
    assert first.exitcode == 1
    errors = (tmp_path / "0.err").read_text()
    assert "another process of the run is gone or does not answer" in errors and "Traceback" not in errors, errors


def test_a_spike_is_one_among_the_latest_losses() -> None:
    lines = [{"loss": 9.0 + i % 2, "input_bag": 1, "output_bag": 1} for i in range(60)]
    lines += [{"loss": 2.0 + i % 2 / 10, "input_bag": 1, "output_bag": 1} for i in range(50)]
    assert is_spike(lines, lines[-1] | {"loss": 6.0})
