"""Signals of a terminal, of SLURM and of the kernel: what is running is saved, and what ended is told as it was."""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import pty
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tests.processes import begin, command
from tests.reliability.harness import DEADLINE, until
from token_superposition.experiment import jobs
from token_superposition.experiment.checkpoints import newest_whole
from token_superposition.experiment.config import Config
from token_superposition.experiment.files import read_metrics
from token_superposition.experiment.preempt import Preemption
from token_superposition.experiment.watchdog import Watchdog

Write = Callable[..., Path]
LONG: dict[str, object] = {"steps": 100_000, "eval_every": 1}
"""Each step prints a validation, which a terminal that is gone does not take."""


def on_a_terminal(terminal: str, target: Callable[..., None], *args: str) -> None:
    """As a shell starts it, and as the leader of its session, so that it gets the signal of the terminal itself."""
    os.setsid()
    slave = os.open(terminal, os.O_RDWR)
    fcntl.ioctl(slave, termios.TIOCSCTTY, 0)
    for stream in (0, 1, 2):
        os.dup2(slave, stream)
    os.close(slave)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    target(*args)


def command_into_a_pipe(*args: str) -> None:
    """As in ``tst ... | tee``; whoever reads is gone at the same time."""
    reader = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
    assert reader.stdin is not None
    os.dup2(reader.stdin.fileno(), 1)
    reader.stdin.close()
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    signal.signal(signal.SIGUSR2, lambda *_: (reader.kill(), reader.wait(), signal.raise_signal(signal.SIGHUP)))
    command(*args)


def ended(process: Any) -> int:
    process.join(DEADLINE)
    if process.exitcode is None:
        process.kill()
        raise TimeoutError(f"it takes longer than {DEADLINE} s")
    return process.exitcode


def begun(out: Path) -> Callable[[], bool]:
    return lambda: len(read_metrics(out / "metrics.jsonl")) > 3


def test_a_run_whose_terminal_is_closed_saves_a_checkpoint(write_config: Write, tmp_path: Path) -> None:
    out, (master, slave) = tmp_path / "run", pty.openpty()
    args = ("train", str(write_config(**LONG)), "--out", str(out))
    process = begin(tmp_path / "log", on_a_terminal, os.ttyname(slave), command, *args)
    os.close(slave)
    until(process, begun(out))
    os.close(master)
    assert ended(process) == 143
    assert newest_whole(out / "checkpoints") is not None


def test_a_run_saves_a_checkpoint_though_the_reader_of_its_pipe_is_gone(write_config: Write, tmp_path: Path) -> None:
    out = tmp_path / "run"
    process = begin(tmp_path / "log", command_into_a_pipe, "train", str(write_config(**LONG)), "--out", str(out))
    until(process, begun(out))
    os.kill(process.pid, signal.SIGUSR2)
    assert ended(process) == 143, (tmp_path / "log.err").read_text()
    assert newest_whole(out / "checkpoints") is not None


def compare_shells(script: str, *args: str, signalled: bool = False) -> None:
    """``tst compare`` with a shell in place of each ``tst train``, which begins at once.

    ``signalled``: the comparison gets SIGUSR1 while it starts the first.
    """

    def start(job: jobs.Job, out: Path, slot: int, parallel: int) -> subprocess.Popen[bytes]:
        directory = out / "runs" / job.directory
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "log.txt").write_text("what it said\n")
        run = subprocess.Popen(["sh", "-c", script], cwd=directory, stdout=subprocess.DEVNULL)
        if signalled:
            until(multiprocessing.current_process(), (directory / "begun").exists)
            signal.raise_signal(signal.SIGUSR1)
        return run

    jobs._start = start  # pyright: ignore
    command("compare", *args, "--compare.parallel", "1")


SAVES = "trap 'sleep 1; touch saved; exit 143' TERM; trap '' HUP; touch begun; for i in $(seq 600); do sleep 0.05; done"


def test_a_comparison_whose_terminal_is_closed_waits_for_its_runs(write_config: Write, tmp_path: Path) -> None:
    out, (master, slave) = tmp_path / "out", pty.openpty()
    args = (SAVES, str(write_config()), "--out", str(out))
    process = begin(tmp_path / "log", on_a_terminal, os.ttyname(slave), compare_shells, *args)
    os.close(slave)
    until(process, (out / "runs/baseline/begun").exists)
    os.close(master)
    assert ended(process) == 143
    assert (out / "runs/baseline/saved").exists()


@pytest.mark.parametrize("signalled", [False, True], ids=["while it runs", "while it is started"])
def test_sigusr1_stops_the_runs_of_a_comparison(signalled: bool, write_config: Write, tmp_path: Path) -> None:
    """SLURM's --signal=B:USR1@120 sends it to the comparison alone."""
    out, shells = tmp_path / "out", partial(compare_shells, signalled=signalled)
    process = begin(tmp_path / "log", shells, SAVES, str(write_config()), "--out", str(out))
    if not signalled:
        until(process, (out / "runs/baseline/begun").exists)
        os.kill(process.pid, signal.SIGUSR1)
    assert ended(process) == 143
    assert (out / "runs/baseline/saved").exists()
    assert "the same command goes on from there" in (tmp_path / "log.out").read_text()


def test_under_nohup_sighup_is_nothing() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Preemption() as preemption:
            signal.raise_signal(signal.SIGHUP)
            assert not preemption.signalled
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(
    ("script", "status", "told"),
    [
        ("kill -KILL $$", 1, "the run baseline was killed by signal 9 (out of memory?); see"),
        ("kill -SEGV $$", 1, "the run baseline was killed by signal 11; see"),
        ("exit 1", 1, "the run baseline failed (what it said); see"),
        ("exit 2", 2, "the run baseline failed (what it said); see"),
    ],
    ids=["KILL", "SEGV", "1", "2"],
)
def test_a_comparison_ends_with_2_where_its_run_did(
    script: str, status: int, told: str, write_config: Write, tmp_path: Path
) -> None:
    """Else the same command may do: where the kernel wanted memory, say, of which the last line of progress says
    nothing."""
    process = begin(tmp_path / "log", compare_shells, script, str(write_config()), "--out", str(tmp_path / "out"))
    assert ended(process) == status
    (error,) = [line for line in (tmp_path / "log.err").read_text().splitlines() if "error" in line]
    assert error.startswith(f"tst: error: {told} ")
    assert error.endswith("log.txt" if status == 2 else "; the same command goes on from the newest checkpoint")


def test_a_run_that_ends_badly_after_its_result_has_not_diverged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("run", "diverged"):
        script = f"echo what it said > log.txt; echo '{{}}' > {name}.json; exit 1"

        def start(job: jobs.Job, out: Path, *_: int, script: str = script) -> subprocess.Popen[bytes]:
            (out / "runs" / job.directory).mkdir(parents=True)
            return subprocess.Popen(["sh", "-c", script], cwd=out / "runs" / job.directory)

        monkeypatch.setattr(jobs, "_start", start)
        with (tmp_path / f"{name}.txt").open("w") as file:
            jobs.run_jobs([jobs.Job("tst", "tst", Config())], tmp_path / name, 1, Console(file=file))
    assert (tmp_path / "run.txt").read_text() == ""
    assert (tmp_path / "diverged.txt").read_text().startswith("diverged: the run tst failed (what it said)")


def watch(out: str, limit: str, idle: str) -> None:
    """Stops itself at once, and then does nothing for ``idle`` seconds."""
    with Watchdog(float(limit), Path(out)):
        os.kill(os.getpid(), signal.SIGSTOP)
        time.sleep(float(idle))
    sys.exit(0)


@pytest.mark.parametrize(("limit", "idle", "status"), [("3", "1.2", 0), ("0.5", "20", 1)])
def test_time_in_which_a_run_was_stopped_is_not_that_of_a_step(
    limit: str, idle: str, status: int, tmp_path: Path
) -> None:
    """Though it is longer than the run may do nothing; what comes after it counts."""
    process = begin(tmp_path / "log", watch, str(tmp_path), limit, idle)
    stat = Path(f"/proc/{process.pid}/stat")
    until(process, lambda: stat.read_text().rpartition(") ")[2][0] == "T")
    time.sleep(float(limit) + 1)
    os.kill(process.pid, signal.SIGCONT)
    assert ended(process) == status, (tmp_path / "log.err").read_text()
