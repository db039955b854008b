"""Faults in real runs of ``tst train``: what is done to them, and what the run that goes on afterwards has lost."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.conftest import CONFIG, TINY, VOCAB, toml
from tests.processes import begin, command, command_on_a_full_disk
from token_superposition.experiment.checkpoints import ASIDE, checkpoints_in, newest_whole, step_of
from token_superposition.experiment.config import load_config
from token_superposition.experiment.files import read_metrics

STEPS, SWITCH, EVERY = 24, 10, 4
"""Of the run: bags before step 10, which is no multiple of the steps between checkpoints."""
DEADLINE = 240  # seconds for one process
ROOM = 40_000  # bytes: less than the weights


def write_config(path: Path, data: Path) -> Path:
    options = "\n".join(f"{k} = {toml(v)}" for k, v in TINY["llama"].items())
    content = CONFIG.format(architecture="llama", options=options, data=data)
    changes = {"steps": STEPS, "ratio": SWITCH / STEPS, "save_every": EVERY, "eval_every": 8}
    for name, value in changes.items():
        (old,) = [line for line in content.splitlines() if line.startswith(f"{name} = ")]
        content = content.replace(f"\n{old}\n", f"\n{name} = {value}\n")
    path.write_text(content)
    return path


@dataclass(frozen=True)
class Outcome:
    """What a finished run is, but for the time it took."""

    metrics: tuple[str, ...]
    weights: str
    raw_tokens: int


def outcome(run: Path) -> Outcome:
    lines = [{k: v for k, v in m.items() if k != "seconds"} for m in read_metrics(run / "metrics.jsonl")]
    result = json.loads((run / "run.json").read_text())
    weights = hashlib.sha256((run / "model/model.safetensors").read_bytes()).hexdigest()
    return Outcome(tuple(json.dumps(line) for line in lines), weights, result["raw_tokens"])


def steps_done(run: Path) -> int:
    return max((m["step"] for m in read_metrics(run / "metrics.jsonl")), default=0)


@dataclass(frozen=True)
class Recovery:
    """One fault, and the run that went on after it."""

    fault: str
    seed: int
    exit_code: int | None
    """Of the run that had the fault; None where it had none of its own."""
    error: str
    """What was printed on stderr, by the run with the fault and by the one after it."""
    steps_done: int
    steps_kept: int
    """Of the checkpoint that the run went on from."""
    end: Outcome | None
    """None: it did not come to its end."""

    @property
    def steps_lost(self) -> int:
        return max(self.steps_done - self.steps_kept, 0)


class Runs:
    """Runs of one configuration in a directory; the uninterrupted one is trained first."""

    def __init__(self, directory: Path, data: Path):
        self.directory = directory
        self.config = write_config(directory / "config.toml", data)
        self.whole = directory / "whole"
        process = self.begin(self.whole, "--train.keep", "0")
        assert self.wait(process) == 0, self.errors(self.whole)
        self.expected = outcome(self.whole)

    def begin(self, out: Path, *options: str, room: int | None = None) -> Any:
        """``tst train`` in a process of its own; with ``room``, where no file can be longer."""
        args = ("train", str(self.config), "--out", str(out), *options)
        log = self.directory / out.name
        if room is None:
            return begin(log, command, *args)
        return begin(log, command_on_a_full_disk, room, *args)

    def wait(self, process: Any) -> int:
        process.join(DEADLINE)
        if process.exitcode is None:
            process.kill()
            raise TimeoutError(f"a run takes longer than {DEADLINE} s")
        return process.exitcode

    def errors(self, out: Path) -> str:
        return (self.directory / f"{out.name}.err").read_text()

    def stopped(self, out: Path, step: int) -> Path:
        """A run as the uninterrupted one was just after ``step``."""
        shutil.copytree(self.whole, out)
        shutil.rmtree(out / "model")
        (out / "run.json").unlink()
        for checkpoint in checkpoints_in(out / "checkpoints"):
            if step_of(checkpoint) > step:
                shutil.rmtree(checkpoint)
        lines = (out / "metrics.jsonl").read_text().splitlines(keepends=True)
        (out / "metrics.jsonl").write_text("".join(x for x in lines if json.loads(x)["step"] <= step))
        return out

    def recover(self, fault: str, seed: int) -> Recovery:
        """Train with the fault, then give the same command once more; on the data that the fault was in, if it was."""
        out = self.directory / f"{fault.replace(' ', '-')}-{seed}"
        code = FAULTS[fault](self, out, random.Random(f"{fault} {seed}"))
        done = steps_done(out)
        kept = newest_whole(out / "checkpoints")
        options = ("--data.path", str(data_of(out))) if data_of(out).exists() else ()
        finished = self.wait(self.begin(out, *options)) == 0
        return Recovery(
            fault,
            seed,
            code,
            self.errors(out),
            done,
            step_of(kept) if kept is not None else 0,
            outcome(out) if finished else None,
        )


def data_of(out: Path) -> Path:
    """What was prepared for this run alone."""
    return out.with_suffix(".data")


def until(process: Any, condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert process.is_alive(), f"the run ended ({process.exitcode}) before its fault"
        assert time.monotonic() < deadline
        time.sleep(0.0005)


def killed(first: int, last: int) -> Callable[[Runs, Path, random.Random], int]:
    """SIGKILL at a random moment of the steps from ``first`` to ``last``."""

    def fault(runs: Runs, out: Path, chance: random.Random) -> int:
        process = runs.begin(out)
        step = chance.randint(first, last)
        until(process, lambda: steps_done(out) >= step)
        time.sleep(chance.uniform(0, 0.02))
        os.kill(process.pid, signal.SIGKILL)
        return runs.wait(process)

    return fault


def killed_while_writing(runs: Runs, out: Path, chance: random.Random) -> int:
    """SIGKILL when a random checkpoint has come to a random number of files."""
    process = runs.begin(out)
    step, files = chance.choice([4, 8, 10, 12, 16, 20]), chance.randint(1, 8)
    written = out / "checkpoints" / ASIDE / f"checkpoint-{step}"
    until(process, lambda: written.is_dir() and len(list(written.iterdir())) >= files)
    os.kill(process.pid, signal.SIGKILL)
    return runs.wait(process)


def killed_while_preparing(runs: Runs, out: Path, chance: random.Random) -> int:
    """SIGKILL when the tokens have come to a random number of files; then they are prepared, and trained on."""
    text = Path(load_config(runs.config).data.path).parent / "text"
    data = data_of(out)
    args = ("prepare", str(text), "--out", str(data), "--vocab-size", str(VOCAB), "--validation-share", "0.1")
    process = begin(out.with_suffix(".prepare"), command, *args, "--shard-tokens", "500")
    files = chance.randint(1, 12)
    until(process, lambda: len(list(data.with_name(f".{data.name}.partial").glob("*.npy"))) >= files)
    os.kill(process.pid, signal.SIGKILL)
    code = runs.wait(process)
    assert not data.exists()
    assert runs.wait(begin(out.with_suffix(".prepare"), command, *args)) == 0
    return code


def terminated(runs: Runs, out: Path, chance: random.Random) -> int:
    process = runs.begin(out)
    step = chance.randint(1, STEPS - 8)
    until(process, lambda: steps_done(out) >= step)
    process.terminate()
    return runs.wait(process)


def damaged(how: Callable[[Path, random.Random], None]) -> Callable[[Runs, Path, random.Random], None]:
    """The newest checkpoint of a run that was killed is damaged in a random file."""

    def fault(runs: Runs, out: Path, chance: random.Random) -> None:
        runs.stopped(out, chance.choice([20, 24]))
        newest = checkpoints_in(out / "checkpoints")[-1]
        how(chance.choice(sorted(p for p in newest.rglob("*") if p.is_file())), chance)

    return fault


def truncate(path: Path, chance: random.Random) -> None:
    os.truncate(path, chance.randrange(path.stat().st_size))


def flip_a_bit(path: Path, chance: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    path.write_bytes(content)


def full_disk(runs: Runs, out: Path, chance: random.Random) -> int:
    """The disk fills up after a checkpoint."""
    runs.stopped(out, chance.choice([4, 8, 10]))
    return runs.wait(runs.begin(out, room=ROOM))


FAULTS: dict[str, Callable[[Runs, Path, random.Random], int | None]] = {
    "killed in phase 1": killed(1, SWITCH - 1),
    "killed at the switch": killed(SWITCH, SWITCH),
    "killed in phase 2": killed(SWITCH + 1, STEPS - 4),
    "killed while data is prepared": killed_while_preparing,
    "killed while a checkpoint is written": killed_while_writing,
    "SIGTERM": terminated,
    "file truncated": damaged(truncate),
    "bit flipped": damaged(flip_a_bit),
    "file missing": damaged(lambda path, chance: path.unlink()),
    "disk full": full_disk,
}
