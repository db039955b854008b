"""A run that was killed, terminated or damaged ends as the uninterrupted one: losses, weights and tokens to the bit."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import tst
from tests.processes import begin, begin_group, call, command, command_with_forks
from tests.reliability.harness import DEADLINE, EVERY, FAULTS, STEPS, Runs, outcome, steps_done, until
from tests.test_cli import wait_for
from token_superposition.data.plan import PlannedDataset
from token_superposition.data.store import TokenStore
from token_superposition.experiment.checkpoints import checkpoints_in, damage, step_of
from token_superposition.experiment.config import load_config
from token_superposition.experiment.preempt import SIGNALS, Preemption

KILLS = [name for name in FAULTS if name.startswith("killed")]
DAMAGES = ["bit flipped", "file truncated", "file missing"]
LONG = 5


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """With --long, every kind of fault with 5 seeds; else some once, the others in the run that is killed often."""
    long = metafunc.config.getoption("--long")
    if "seed" in metafunc.fixturenames:
        metafunc.parametrize("seed", range(LONG if long else 1))
    if "kill" in metafunc.fixturenames:
        metafunc.parametrize("kill", KILLS if long else KILLS[-1:])
    if "harm" in metafunc.fixturenames:
        metafunc.parametrize("harm", DAMAGES if long else DAMAGES[:1])


@pytest.fixture(scope="module")
def runs(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("runs"), prepared)


def test_a_run_that_is_killed_again_and_again_ends_as_if_nothing_had_happened(runs: Runs, tmp_path: Path) -> None:
    """In phase 1, at the switch and in phase 2, each time after it has gone on."""
    out, chance = tmp_path / "run", random.Random(0)
    for fault in KILLS[:3]:
        assert FAULTS[fault](runs, out, chance) == -signal.SIGKILL
        assert not (out / "run.json").exists()
    assert runs.wait(runs.begin(out)) == 0
    assert outcome(out) == runs.expected


def test_a_killed_run_ends_as_if_nothing_had_happened(kill: str, seed: int, runs: Runs) -> None:
    found = runs.recover(kill, seed)
    assert found.exit_code == -signal.SIGKILL
    assert found.end == runs.expected, found.error
    assert found.steps_lost <= EVERY, found


def test_a_terminated_run_saves_and_loses_nothing(seed: int, runs: Runs) -> None:
    found = runs.recover("SIGTERM", seed)
    assert found.exit_code == 143 and "terminated after step" in found.error
    assert found.end == runs.expected, found.error
    assert found.steps_lost == 0


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(harm: str, seed: int, runs: Runs) -> None:
    found = runs.recover(harm, seed)
    lines = [line for line in found.error.splitlines() if "is damaged and is passed over" in line]
    assert len(lines) == 1 and lines[0].startswith("tst: warning: checkpoint-2"), found.error
    assert found.end == runs.expected
    assert 0 < found.steps_lost <= EVERY


def test_a_full_disk_stops_the_run_with_the_last_checkpoint_whole(seed: int, runs: Runs) -> None:
    found = runs.recover("disk full", seed)
    errors = [line for line in found.error.splitlines() if line.startswith("tst: error")]
    assert found.exit_code == 2 and len(errors) == 1 and "cannot write checkpoint-" in errors[0], found.error
    assert found.end == runs.expected
    assert found.steps_lost <= EVERY
    assert not [c for c in (runs.directory / f"disk-full-{seed}/checkpoints").iterdir() if damage(c)]


def digest(sample: dict[str, Any]) -> str:
    return sha256(sample["input_ids"].numpy().tobytes()).hexdigest()


def command_that_notes_its_samples(notes: str, *args: str) -> None:
    """``tst`` that writes index and hash of every sample of the plan that is read, to a file of this process."""
    read = PlannedDataset.__getitem__

    def noting(self: PlannedDataset, index: int) -> Any:
        sample = read(self, index)
        with Path(f"{notes}.{os.environ.get('RANK', 0)}").open("a") as f:
            f.write(f"{index} {digest(sample)}\n")
        return sample

    PlannedDataset.__getitem__ = noting
    command(*args)


def numbers(metrics: tuple[str, ...]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in metrics]


def test_two_processes_with_accumulation_read_the_same_samples(runs: Runs, tmp_path: Path) -> None:
    """One process stopped after step 8, in phase 1; two, with the same batch in micro-batches of 1, go on."""
    out, notes = runs.stopped(tmp_path / "run", 8), tmp_path / "notes"
    args = ("train", str(runs.config), "--out", str(out), "--train.micro-batch-size", "1")
    for process in begin_group(2, tmp_path, command_that_notes_its_samples, str(notes), *args):
        assert runs.wait(process) == 0, (tmp_path / "0.err").read_text()
    found = outcome(out)
    for a, b in zip(numbers(found.metrics), numbers(runs.expected.metrics), strict=True):
        assert a == pytest.approx(b, rel=1e-4)
    assert found.raw_tokens == runs.expected.raw_tokens
    config = load_config(runs.config)
    plan = PlannedDataset(TokenStore(config.data.path), config.schedule, 16, 4, seed=0)
    lines = sorted({line for f in tmp_path.glob("notes.*") for line in f.read_text().splitlines()}, key=index_of)
    assert lines == [f"{i} {digest(plan[i])}" for i in range(8 * 4, STEPS * 4)]
    first = [index_of(line) for line in (tmp_path / "notes.0").read_text().splitlines()]
    assert first == list(range(8 * 4, STEPS * 4, 2))  # each step is shared out, in order


def index_of(line: str) -> int:
    return int(line.split()[0])


def test_two_processes_agree_to_stop(runs: Runs, tmp_path: Path) -> None:
    """SIGTERM to one of them; both end with 143 after the same step, and one process goes on to the end."""
    out = tmp_path / "run"
    args = ("train", str(runs.config), "--train.save-every", "0", "--out")
    both = begin_group(2, tmp_path, command, *args, str(out))
    until(both[0], lambda: steps_done(out) >= 3)
    both[1].terminate()
    assert [runs.wait(process) for process in both] == [143, 143]
    (saved,) = checkpoints_in(out / "checkpoints")  # also without save_every
    assert step_of(saved) == steps_done(out) < STEPS and damage(saved) is None
    assert runs.wait(runs.begin(out)) == 0
    for a, b in zip(numbers(outcome(out).metrics), numbers(runs.expected.metrics), strict=True):
        assert a == pytest.approx(b, rel=1e-4)


def test_a_log_that_spans_a_checkpoint_is_whole(runs: Runs, tmp_path: Path) -> None:
    """Every 5 steps a loss is logged, which is the mean of 5 also where the run was stopped between."""
    config = tmp_path / "config.toml"
    config.write_text(runs.config.read_text().replace("log_every = 1\n", "log_every = 5\n"))
    out = tmp_path / "run"
    for _ in range(2):
        done = call(command, "train", str(config), "--out", str(out))
        assert done.returncode == 0, done.stderr
        if not (tmp_path / "first").exists():
            shutil.copytree(out, tmp_path / "first")
            (out / "run.json").unlink()
            for step in (20, 24):
                shutil.rmtree(out / f"checkpoints/checkpoint-{step}")
    assert outcome(out) == outcome(tmp_path / "first")
    assert [m["step"] for m in numbers(outcome(out).metrics) if "loss" in m] == [5, 10, 15, 20]


def command_in_a_group(*args: str) -> None:
    os.setsid()
    command(*args)


def test_a_signal_for_the_whole_group_leaves_the_loader_to_the_run(runs: Runs, tmp_path: Path) -> None:
    """torchrun and SLURM send SIGTERM also to the processes that read data."""
    out = tmp_path / "run"
    options = ("--train.loader-workers", "1", "--out", str(out))
    process = begin(tmp_path / "log", command_in_a_group, "train", str(runs.config), *options)
    until(process, lambda: steps_done(out) >= 3)
    os.killpg(process.pid, signal.SIGTERM)
    assert runs.wait(process) == 143, (tmp_path / "log.err").read_text()
    newest = checkpoints_in(out / "checkpoints")[-1]
    assert step_of(newest) == steps_done(out) and damage(newest) is None


def test_an_interrupted_comparison_loses_no_step(runs: Runs, tmp_path: Path) -> None:
    """A terminal sends Ctrl-C to the comparison and to its runs alike. The same command ends as if it had not been."""
    options = [str(runs.config), "--train.save-every", "0", "--train.steps", "100", "--out"]
    whole, out = tmp_path / "whole", tmp_path / "out"
    tst("train", *options, whole, OMP_NUM_THREADS="1")
    options += [str(out), "--compare.parallel", "2"]
    line = [sys.executable, "-m", "token_superposition", "compare", *options]
    process = subprocess.Popen(
        line, stdout=subprocess.PIPE, text=True, start_new_session=True, preexec_fn=interruptible
    )
    wait_for(lambda: steps_done(out / "runs/tst") >= 3)
    os.killpg(process.pid, signal.SIGINT)
    printed, _ = process.communicate(timeout=DEADLINE)
    assert process.returncode == 130, printed
    (saved,) = checkpoints_in(out / "runs/tst/checkpoints")
    assert step_of(saved) == steps_done(out / "runs/tst") < 100
    assert f"tst: saved after step {step_of(saved)}\n" in printed and "the same command goes on" in printed
    tst("compare", *options, target=command_with_forks)
    assert outcome(out / "runs/tst") == outcome(whole)


def interruptible() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # what runs in the background ignores it


def test_after_ctrl_c_a_run_goes_on_without_having_lost_a_step(runs: Runs, tmp_path: Path) -> None:
    """Which the process that reads its data gets, too."""
    whole, out = tmp_path / "whole", tmp_path / "out"
    options = [str(runs.config), "--train.save-every", "0", "--train.steps", "100", "--train.loader-workers", "1"]
    tst("train", *options, "--out", whole, OMP_NUM_THREADS="1")
    line = [sys.executable, "-m", "token_superposition", "train", *options, "--out", str(out)]
    process = subprocess.Popen(
        line, stderr=subprocess.PIPE, text=True, start_new_session=True, preexec_fn=interruptible,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    wait_for(lambda: steps_done(out) >= 3)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    _, error = process.communicate(timeout=DEADLINE)
    assert process.returncode == 130, error
    (saved,) = checkpoints_in(out / "checkpoints")
    assert step_of(saved) == steps_done(out) < 100
    assert "Ctrl-C again stops at once" in error and f"terminated after step {step_of(saved)}" in error
    tst("train", *options, "--out", out, OMP_NUM_THREADS="1")
    assert outcome(out) == outcome(whole)


def test_a_second_ctrl_c_does_not_wait() -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt), Preemption() as preemption:
            signal.raise_signal(signal.SIGINT)
            assert (preemption.signalled, preemption.status) == (True, 130)
            signal.raise_signal(signal.SIGINT)
        with Preemption(processes=2) as preemption:  # to which torchrun passes on what they have got
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            assert (preemption.signalled, preemption.status) == (True, 130)
        assert signal.getsignal(signal.SIGINT) == signal.default_int_handler
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        with Preemption() as preemption:
            signal.raise_signal(signal.SIGINT)
            assert not preemption.signalled
    finally:
        signal.signal(signal.SIGINT, before)


def test_both_signals_are_caught_only_while_training() -> None:
    before = [signal.getsignal(s) for s in SIGNALS]
    for s in (signal.SIGTERM, signal.SIGUSR1):  # for SIGHUP see test_signals.py
        with Preemption() as preemption:
            os.kill(os.getpid(), s)
            assert preemption.signalled and not preemption.stopped
    assert [signal.getsignal(s) for s in SIGNALS] == before
