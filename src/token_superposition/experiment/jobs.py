"""Runs side by side, each ``tst train`` in a process of its own: what is done is kept, what is not is gone on with."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from token_superposition.data.plan import count_blocks, count_sequences
from token_superposition.data.store import Meta
from token_superposition.errors import TokenSuperpositionError
from token_superposition.experiment.checkpoints import checkpoints_in, damage, step_of
from token_superposition.experiment.config import CompareConfig, Config, SweepConfig, load_written, save_config
from token_superposition.experiment.files import CONFIG, DIVERGED, METRICS, GrowingMetrics
from token_superposition.experiment.launch import Launch
from token_superposition.experiment.model import check_superpositions
from token_superposition.experiment.preempt import SIGNALS
from token_superposition.experiment.progress import RunProgress
from token_superposition.experiment.result import began_with, read_result, result_file
from token_superposition.experiment.resume import changes, data_digest, model_digest, says_all
from token_superposition.experiment.speed import cores, default_parallel, gpus

HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
"""glibc asks Linux for huge pages: fewer page faults for tensors of megabytes. Any other system ignores it."""


@dataclass(frozen=True)
class Job:
    """One run of a comparison or a sweep."""

    name: str
    directory: str
    """Its place under runs/."""
    config: Config
    trunk: str | None = None
    """Directory of the longer baseline off which it branches before its decay."""

    @property
    def branch_step(self) -> int:
        with self.named():
            return self.config.train.steps - self.config.wsd.decay_steps

    @contextmanager
    def named(self) -> Generator[None]:
        """What is wrong with its configuration is told with its name: the user's may be right."""
        try:
            yield
        except TokenSuperpositionError as e:
            raise TokenSuperpositionError(f"the run {self.name}: {e}") from None


def alone(config: Config) -> Config:
    """``config`` without what it says of other runs."""
    return replace(config, compare=CompareConfig(), sweep=SweepConfig())


def refuse_launcher() -> None:
    """Raise ``TokenSuperpositionError`` under torchrun and its like, where each process would start every run."""
    if (processes := int(os.environ.get("WORLD_SIZE", "1"))) > 1:
        raise TokenSuperpositionError(
            f"{processes} processes of this command were started (WORLD_SIZE), each of which would start every run; "
            "give it without torchrun or accelerate launch"
        )


def check_directory(config: Config, out: Path) -> None:
    """Raise ``TokenSuperpositionError`` for what would not stay in ``out``: somebody else's file, or checkpoints."""
    refuse_launcher()
    own = next(out.glob("runs/*/log.txt"), None) is not None or says_all(out / CONFIG, config)
    if (out / CONFIG).exists() and not own:
        raise TokenSuperpositionError(
            f"{out / CONFIG} would be overwritten, and no comparison or sweep wrote it; choose another --out"
        )
    if config.train.save_at:
        raise TokenSuperpositionError(
            f"train.save_at is {list(config.train.save_at)}, and a comparison or sweep keeps no checkpoints; leave it "
            "out, or use tst train"
        )


def check_jobs(jobs: list[Job], out: Path) -> None:
    """Raise ``TokenSuperpositionError`` for what cannot be trained, or not into ``out`` beside what is there."""
    meta = Meta.load(Path(jobs[0].config.data.path))
    data, model_path = data_digest(meta), jobs[0].config.model.path
    model_sha256 = model_digest(model_path)
    for job in jobs:
        with job.named():
            job.config.check()
        directory = out / "runs" / job.directory
        there = load_written(directory / CONFIG) if (directory / CONFIG).exists() else job.config
        if differences := changes(there, job.config):
            raise TokenSuperpositionError(
                f"{directory} is a run of another configuration ({'; '.join(differences)}); choose another --out"
            )
        if there.train.on_nonfinite != job.config.train.on_nonfinite and (directory / DIVERGED).exists():
            raise TokenSuperpositionError(
                f"{directory} diverged with train.on_nonfinite {there.train.on_nonfinite}; remove it, and it is "
                f"trained again with {job.config.train.on_nonfinite}"
            )
        if (path := result_file(directory)) and read_result(path).data_sha256 != data:
            raise TokenSuperpositionError(
                f"{directory} read another text than {job.config.data.path} holds now, so their losses cannot be "
                "compared; prepare that text again, or choose another --out"
            )
        if path and began_with(path) != model_sha256:
            raise TokenSuperpositionError(
                f"{directory} does not say that it began with the weights that {model_path} holds now, so their losses "
                "cannot be compared; put back those it began with, or choose another --out"
            )
        count_blocks(meta.train.tokens, job.config.schedule, job.config.data.sequence_length)
        count_sequences(meta.validation.tokens, job.config.data.sequence_length)
    if left := {job.name: job.config for job in unfinished(jobs, out)}:
        check_superpositions(left)


def run_jobs(
    jobs: list[Job], out: Path, parallel: int, console: Console, finished: Callable[[Job], None] = lambda job: None
) -> None:
    """Train every unfinished job with ``tst train`` in a process of its own; ``finished`` is called after each.

    A run that diverges is told of and is over, too: the others go on. Those that are interrupted, by Ctrl-C, SIGTERM or
    the failure of another one, save a checkpoint each, from which the next call goes on.
    Raises ``TokenSuperpositionError`` where a run ended with status 2, and before any where the finished ones were
    trained in another precision than the others would be; ``SystemExit`` with status 1 where a run was killed, hung or
    failed in another way, so that the same command may do.
    """
    waiting = unfinished(jobs, out)
    for job in jobs if waiting else []:
        check_precision(job, out)
    parallel = slots(parallel, waiting, out)
    running: dict[int, tuple[Job, subprocess.Popen[bytes]]] = {}
    metrics = {job.directory: GrowingMetrics(out / "runs" / job.directory / METRICS) for job in waiting}
    try:
        with RunProgress(console, len(waiting)) as progress:
            while waiting or running:
                for slot in set(range(parallel)) - running.keys():
                    if ready := startable(waiting, out):
                        waiting.remove(ready[0])
                        with _undisturbed():
                            running[slot] = ready[0], _start(ready[0], out, slot, parallel)
                for slot, (job, process) in list(running.items()):
                    progress.update(job.directory, job.config.train.steps, metrics[job.directory].read())
                    if (status := process.poll()) is not None:
                        del running[slot]
                        if status and not _over(out, job.directory):
                            raise _error(job, out, status)
                        if status and (out / "runs" / job.directory / DIVERGED).exists():
                            said = escape(_failure(job, out))
                            console.print(f"[yellow]diverged[/yellow]: {said}", highlight=False, soft_wrap=True)
                        progress.finish(job.directory)
                        finished(job)
                time.sleep(0.5)
    finally:
        if running:
            _stop(list(running.values()), out, console)


def _stop(running: list[tuple[Job, subprocess.Popen[bytes]]], out: Path, console: Console) -> None:
    """Let each run save a checkpoint and end. Ctrl-C stops the waiting alone: they have got their signal."""
    for _, process in running:
        process.terminate()
    console.print("stopping: each run that has begun saves a checkpoint", highlight=False)
    for job, process in running:
        process.wait()
        saved = checkpoints_in(out / "runs" / job.directory / "checkpoints")
        kept = f"saved after step {step_of(saved[-1])}" if saved else "begins anew"
        done = "done" if _over(out, job.directory) else kept
        console.print(f"{job.directory}: {done}", markup=False, highlight=False, soft_wrap=True)
    console.print("the same command goes on from there", highlight=False)


def check_precision(job: Job, out: Path) -> None:
    """Raise ``TokenSuperpositionError`` for a finished run that this machine would train in another precision."""
    if (path := result_file(out / "runs" / job.directory)) is None:
        return
    wanted = job.config.train.precision
    here = Launch.from_environment().precision(wanted)
    if (before := read_result(path).precision) != here:
        raise TokenSuperpositionError(
            f"{path.parent} was trained in {before}, and train.precision {wanted!r} is {here} on this machine, so that "
            "their losses cannot be compared; go on with a machine like that one, or choose another --out"
        )


def slots(parallel: int, waiting: list[Job], out: Path) -> int:
    """How many of the runs go at a time: ``parallel``, or what suits the machine where that is 0."""
    if wanted := min(parallel, len(waiting)):
        return wanted
    ready = startable(waiting, out)
    if not gpus():  # one more slot would take cores from the trunk that its run waits for
        return default_parallel(len(ready))
    branches = Counter(j.trunk for j in waiting if j not in ready)
    return default_parallel(len(ready) + sum(n - 1 for n in branches.values()))  # in the place of their trunk


def unfinished(jobs: list[Job], out: Path) -> list[Job]:
    return [j for j in jobs if not _over(out, j.directory)]


LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""Of a launcher of one process: two runs side by side would want the same port."""


def startable(jobs: list[Job], out: Path) -> list[Job]:
    """Those that wait for no trunk."""
    return [j for j in jobs if j.trunk is None or _over(out, j.trunk)]


def _over(out: Path, directory: str) -> bool:
    return result_file(out / "runs" / directory) is not None


def branch_checkpoint(job: Job, out: Path) -> Path | None:
    """Where its trunk leaves it; a finished comparison has removed it."""
    if job.trunk is None:
        return None
    return out / "runs" / job.trunk / "checkpoints" / f"checkpoint-{job.branch_step}"


def _start(job: Job, out: Path, slot: int, parallel: int) -> subprocess.Popen[bytes]:
    directory = out / "runs" / job.directory
    directory.mkdir(parents=True, exist_ok=True)
    save_config(job.config, directory / CONFIG)
    # -P: a file where the user happens to be, such as datasets.py, is no module of ours or of transformers.
    command = [sys.executable, "-P", "-m", "token_superposition", "train", str(directory / CONFIG)]
    command += ["--out", str(directory)]
    trunk = branch_checkpoint(job, out)
    if trunk is not None and trunk.exists():  # else it trains from the start
        if problem := damage(trunk):
            warnings.warn(f"{problem}; {job.directory} is trained from its start", stacklevel=1)
        else:
            command += ["--branch-from", str(trunk)]
    environment = {k: v for k, v in os.environ.items() if k not in LAUNCHED} | share(slot, parallel)
    with _log(job, out).open("ab") as log:
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment)


@contextmanager
def _undisturbed() -> Generator[None]:
    """What is started inside is known, and stopped, when a signal is acted on: SIGTERM and its like wait for the end.

    It ignores SIGINT for good: a terminal sends Ctrl-C to every process of the group, and a run that it reached would
    end without a checkpoint.
    """
    if threading.current_thread() is not threading.main_thread():  # which alone may set a handler
        yield
        return
    came: list[int] = []
    before = {s: signal.getsignal(s) for s in (signal.SIGINT, *SIGNALS)}
    before = {s: handler for s, handler in before.items() if handler not in (signal.SIG_IGN, None)}  # as under nohup
    for s in before:
        signal.signal(s, signal.SIG_IGN if s == signal.SIGINT else lambda number, _: came.append(number))
    try:
        yield
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)
        for s in came:
            signal.raise_signal(s)


def share(slot: int, parallel: int) -> dict[str, str]:
    """What a run's environment says of its part of the machine: one GPU of those that are ours, or some cores."""
    if count := gpus():
        ours = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(count)))).split(",")
        return {"CUDA_VISIBLE_DEVICES": ours[slot % min(count, len(ours))]}
    pages = {name: value for name, value in HUGE_PAGES.items() if name not in os.environ}
    return {"OMP_NUM_THREADS": str(max(cores() // parallel, 1))} | pages


def _log(job: Job, out: Path) -> Path:
    return out / "runs" / job.directory / "log.txt"


def _error(job: Job, out: Path, status: int) -> BaseException:
    """What a run is told to have ended of, by its exit status."""
    if status == 2:
        return TokenSuperpositionError(f"{_failure(job, out)}; see {_log(job, out)}")
    what = _failure(job, out)
    if status < 0:
        memory = " (out of memory?)" if -status == signal.SIGKILL else ""
        what = f"the run {job.directory} was killed by signal {-status}{memory}"
    return SystemExit(f"tst: error: {what}; see {_log(job, out)}; the same command goes on from the newest checkpoint")


def _failure(job: Job, out: Path) -> str:
    lines = [line for line in _log(job, out).read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return f"the run {job.directory} failed ({lines[-1] if lines else 'no message'})"
