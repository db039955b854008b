"""Processes for the tests, forked off one that has imported what takes long: a start takes 0.1 s in place of 7.

They are processes in every other respect: an environment, a directory and an end of their own. What a test says of
launchers, of signals or of an interpreter that starts afresh, it says of ``python -m``.
"""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing
import multiprocessing.forkserver
import os
import resource
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

import torch

ROOT = Path(__file__).parent.parent
TIMEOUT = 600  # seconds
server = multiprocessing.get_context("forkserver")
server.set_forkserver_preload(
    [
        "tests.conftest",
        "tests.olmo_core.launch",
        "token_superposition.cli.compare",
        "token_superposition.cli.train",
        "token_superposition.experiment.compare",
        "token_superposition.report.figures",
        "transformers.models.llama.modeling_llama",
        "tests.frozen",
    ]
)


def start(target: Callable[..., None], *args: Any) -> Any:
    with contextlib.chdir(ROOT):  # where the server, started by the first process, finds the tests
        multiprocessing.forkserver.ensure_running()
    process = server.Process(target=target, args=args)
    process.start()
    return process


def fork(target: Callable[..., None], *args: Any) -> Any:
    """The same from a process that was forked itself; that of the tests has threads, which no fork takes with it."""
    if multiprocessing.parent_process() is None:
        return start(target, *args)
    process = multiprocessing.get_context("fork").Process(target=target, args=args)
    process.start()
    return process


def _call(
    out: str, err: str, environment: dict[str, str], directory: str, target: Callable[..., None], args: Any
) -> None:
    for stream, log in ((1, out), (2, err)):
        os.dup2(os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND), stream)
    os.environ.clear()
    os.environ.update(environment)
    multiprocessing.set_start_method(None, force=True)  # of what it starts: that of any process, not the server's
    os.chdir(directory)
    faulthandler.register(signal.SIGQUIT)  # which nothing here takes for itself
    target(*args)


def _end(process: Any) -> int | None:
    """Its exit status; one that takes too long says where it hangs, and has none."""
    process.join(TIMEOUT)
    if (status := process.exitcode) is None:
        os.kill(process.pid, signal.SIGQUIT)
        process.join(1)
        process.kill()
    return status


def begin(log: Path, target: Callable[..., None], *args: Any, **environment: str) -> Any:
    """``target(*args)`` in a process of its own that prints to ``log``.out and .err; it is not waited for."""
    return start(_call, f"{log}.out", f"{log}.err", os.environ | environment, str(Path.cwd()), target, args)


def call(target: Callable[..., None], *args: Any, **environment: str) -> subprocess.CompletedProcess[str]:
    """``target(*args)`` in a process of its own, with what it printed."""
    with tempfile.TemporaryDirectory() as logs:
        process = begin(Path(logs) / "log", target, *args, **environment)
        status = _end(process)
        printed = [Path(f"{logs}/log.{name}").read_text() for name in ("out", "err")]
    if status is None:
        raise TimeoutError(f"{args} takes longer than {TIMEOUT} s\n{printed[1]}")
    return subprocess.CompletedProcess(args, status, *printed)


def begin_group(processes: int, logs: Path, target: Callable[..., None], *args: Any, **environment: str) -> list[Any]:
    """``target(*args)`` on several processes, as torchrun starts them; they print to ``logs``/0.out, 0.err, 1.out..."""
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    group = {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes, "MASTER_ADDR": store.host}
    group |= {"MASTER_PORT": store.port, "TORCHELASTIC_USE_AGENT_STORE": True}
    started: list[Any] = []
    for rank in range(processes):
        variables = {k: str(v) for k, v in (group | {"RANK": rank, "LOCAL_RANK": rank}).items()}
        started.append(begin(logs / str(rank), target, *args, **environment | variables))
        started[rank].store = store  # as long as they are there, so that nobody else gets its port
    return started


def launch(processes: int, target: Callable[..., None], *args: Any, killed: bool = False, **environment: str) -> None:
    """``target(*args)`` on several processes, as torchrun starts them.

    All must succeed or, with ``killed``, die of SIGKILL.
    """
    with tempfile.TemporaryDirectory() as logs:
        started = begin_group(processes, Path(logs), target, *args, **environment)
        codes = [_end(process) for process in started]
        output = "\n".join(Path(f"{logs}/{rank}.err").read_text()[-3000:] for rank in range(processes))
    assert codes == [-signal.SIGKILL if killed else 0] * processes, f"{codes}\n{output}"


def spawn(worker: Callable[..., None], *args: Any) -> None:
    """``worker(rank, *args)`` on two processes; an error of theirs is raised here."""
    with contextlib.chdir(ROOT):
        multiprocessing.forkserver.ensure_running()
    torch.multiprocessing.start_processes(worker, args, nprocs=2, start_method="forkserver")  # pyright: ignore


def command(*args: str) -> None:
    """What ``python -m token_superposition`` runs."""
    from token_superposition.cli import main

    sys.exit(main(args))


class Fork:
    """Of ``subprocess.Popen`` what a comparison needs for its runs: none takes 7 s to import what is imported."""

    def __init__(self, line: list[str], stdin: int, stdout: IO[bytes], stderr: IO[bytes], env: dict[str, str]) -> None:
        assert line[:4] == [sys.executable, "-P", "-m", "token_superposition"]
        assert (stdin, stdout) == (subprocess.DEVNULL, stderr)
        self._run = fork(_call, stdout.name, stdout.name, env, str(Path.cwd()), command, line[4:])
        self.terminate, self.wait = self._run.terminate, self._run.join

    def poll(self) -> int | None:
        return self._run.exitcode


FORKS = SimpleNamespace(Popen=Fork, DEVNULL=subprocess.DEVNULL)
"""In the place of ``subprocess`` where runs are started."""


def command_with_forks(*args: str) -> None:
    """``tst compare`` or ``tst sweep`` of which the runs are forks."""
    from token_superposition.experiment import jobs

    jobs.subprocess = FORKS  # pyright: ignore
    command(*args)


def command_on_a_full_disk(room: int, *args: str) -> None:
    """The same where no file can be longer than ``room`` bytes."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
    command(*args)
