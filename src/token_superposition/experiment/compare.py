"""Baseline and variants at equal compute: same model, data, learning rate and number of steps, paired by seed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace
from math import lcm
from pathlib import Path

from rich.console import Console

from token_superposition.data.store import Meta, TokenStore
from token_superposition.errors import TokenSuperpositionError
from token_superposition.experiment.config import BASELINE, Config, load_config, save_config
from token_superposition.experiment.generate import generate, load_model
from token_superposition.experiment.metrics import read_metrics
from token_superposition.experiment.progress import RunProgress
from token_superposition.experiment.run import CONFIG, METRICS, MODEL, RESULT, write_json
from token_superposition.experiment.speed import cores, default_parallel, gpus
from token_superposition.experiment.summary import Run, comparison, load_runs

SUMMARY = "summary.json"


@dataclass(frozen=True)
class Job:
    """One run of a comparison."""

    name: str
    directory: str
    """Its place under runs/."""
    config: Config
    trunk: str | None = None
    """Directory of the longer baseline off which it branches before its decay."""

    @property
    def branch_step(self) -> int:
        return self.config.train.steps - self.config.wsd.decay_steps


def jobs_of(config: Config) -> list[Job]:
    """The runs of a comparison, those that others branch off first."""
    variants = {"tst": config.superposition} | {v.name: v.superposition for v in config.compare.variants}
    bags = [v.schedule(config.train.steps).common_bag for v in variants.values()]
    config = replace(config, data=replace(config.data, common_bag=lcm(config.data.common_bag, *bags)))
    lengths = sorted({1.0, *config.compare.baseline_lengths}, reverse=True)
    jobs: list[Job] = []
    seeds = config.compare.seeds or (config.train.seed,)
    for seed in seeds:
        ending = f"-seed{seed}" if len(seeds) > 1 else ""
        seeded = replace(config, train=replace(config.train, seed=seed))
        baselines: list[Job] = []
        for length in lengths:
            steps = round(length * config.train.steps)
            name = "baseline" if length == 1 else f"baseline-x{length:g}"
            run = replace(seeded, superposition=BASELINE, train=replace(seeded.train, steps=steps))
            baselines.append(Job(name, name + ending, run, baselines[0].directory if baselines else None))
        save_at = tuple(b.branch_step for b in baselines[1:])
        longest = baselines[0]
        trunk = replace(longest.config, train=replace(longest.config.train, save_at=save_at))
        jobs += [replace(longest, config=trunk), *baselines[1:]]
        jobs += [Job(n, n + ending, replace(seeded, superposition=v)) for n, v in variants.items()]
    return sorted(jobs, key=lambda j: j.trunk is not None)


def checked_jobs(config: Config, out: Path) -> list[Job]:
    """Raises ``TokenSuperpositionError`` for what cannot be trained, or not into ``out``."""
    config.check()
    Meta.load(Path(config.data.path))
    jobs = jobs_of(config)
    for job in jobs:
        job.config.check()
        saved = out / "runs" / job.directory / CONFIG
        if saved.exists() and load_config(saved) != job.config:
            raise TokenSuperpositionError(f"{saved.parent} is a run of another configuration; choose another --out")
    return jobs


def compare(config: Config, out: str | Path, console: Console, note: str | None = None) -> list[Run]:
    """Run what is not done yet, side by side where that is faster, and write ``summary.json``.

    Runs are resumed and finished ones kept, if their configuration is the same. ``note`` is shown in the report.
    Raises ``TokenSuperpositionError`` before any run for a configuration that cannot be trained.
    """
    out = Path(out)
    jobs = checked_jobs(config, out)
    out.mkdir(parents=True, exist_ok=True)
    save_config(config, out / CONFIG)
    run_jobs(jobs, out, config.compare.parallel, console)
    jobs.sort(key=lambda job: job.name.startswith("baseline-"))  # what is compared first, then the other lengths
    jobs.sort(key=lambda job: job.name != "baseline")
    runs = load_runs(out, [(job.name, job.directory) for job in jobs])
    write_summary(config, out, runs, note)
    for job in jobs:  # finished: only the models are of use
        shutil.rmtree(out / "runs" / job.directory / "checkpoints", ignore_errors=True)
    return runs


def write_summary(config: Config, out: Path, runs: list[Run], note: str | None = None) -> None:
    meta = Meta.load(Path(config.data.path))
    write_json(
        out / SUMMARY,
        {
            "format": 1,
            "runs": [asdict(r) for r in runs],
            "comparison": comparison(runs),
            "config": asdict(config),
            "data": {
                split: {
                    "tokens": s.tokens,
                    "documents": s.documents,
                    "bytes": s.bytes,
                    "bytes_per_token": s.bytes_per_token,
                }
                for split, s in (("train", meta.train), ("validation", meta.validation))
            }
            | {"vocab_size": meta.vocab_size},
            "samples": samples(config, out, runs),
            "note": note,
        },
    )


def samples(config: Config, out: Path, runs: list[Run], prompt_tokens: int = 24) -> list[dict[str, str]]:
    """What the baseline and each variant of the first seed make of the start of the held-out text."""
    prompt_ids = TokenStore(config.data.path, "validation")[:prompt_tokens].tolist()
    result: list[dict[str, str]] = []
    for run in runs:
        if run.seed == runs[0].seed and not run.name.startswith("baseline-"):
            model, tokenizer = load_model(out / "runs" / run.directory / MODEL)
            prompt = str(tokenizer.decode(prompt_ids))
            room = config.data.sequence_length - len(prompt_ids)
            text = generate(model, tokenizer, prompt, max_new_tokens=max(min(64, room), 1))
            result.append({"name": run.name, "prompt": prompt, "text": text.removeprefix(prompt)})
    return result


def run_jobs(jobs: list[Job], out: Path, parallel: int, console: Console) -> None:
    """Train every unfinished job with ``tst train`` in a process of its own."""
    waiting = unfinished(jobs, out)
    parallel = parallel or default_parallel(len(startable(waiting, out)))
    running: dict[int, tuple[Job, subprocess.Popen[bytes]]] = {}
    try:
        with RunProgress(console) as progress:
            while waiting or running:
                for slot in set(range(parallel)) - running.keys():
                    if ready := startable(waiting, out):
                        waiting.remove(ready[0])
                        running[slot] = ready[0], _start(ready[0], out, slot, parallel)
                for slot, (job, process) in list(running.items()):
                    lines = read_metrics(out / "runs" / job.directory / METRICS)
                    progress.update(job.directory, job.config.train.steps, lines)
                    if process.poll() is not None:
                        del running[slot]
                        if process.returncode:
                            raise TokenSuperpositionError(_failure(job, out))
                time.sleep(0.5)
    finally:
        for _, process in running.values():
            process.terminate()
        for _, process in running.values():
            process.wait()


def unfinished(jobs: list[Job], out: Path) -> list[Job]:
    return [j for j in jobs if not _finished(out, j.directory)]


def startable(jobs: list[Job], out: Path) -> list[Job]:
    """Those that wait for no trunk."""
    return [j for j in jobs if j.trunk is None or _finished(out, j.trunk)]


def _finished(out: Path, directory: str) -> bool:
    return (out / "runs" / directory / RESULT).exists()


def branch_checkpoint(job: Job, out: Path) -> Path | None:
    """Where its trunk leaves it; a finished comparison has removed it."""
    if job.trunk is None:
        return None
    return out / "runs" / job.trunk / "checkpoints" / f"checkpoint-{job.branch_step}"


def _start(job: Job, out: Path, slot: int, parallel: int) -> subprocess.Popen[bytes]:
    directory = out / "runs" / job.directory
    directory.mkdir(parents=True, exist_ok=True)
    save_config(job.config, directory / CONFIG)
    command = [sys.executable, "-m", "token_superposition", "train", str(directory / CONFIG), "--out", str(directory)]
    trunk = branch_checkpoint(job, out)
    if trunk is not None and trunk.exists():  # else it trains from the start
        command += ["--branch-from", str(trunk)]
    if gpus():
        share = {"CUDA_VISIBLE_DEVICES": str(slot % gpus())}
    else:
        share = {"OMP_NUM_THREADS": str(max(cores() // parallel, 1))}
    with (directory / "log.txt").open("ab") as log:
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=os.environ | share)


def _failure(job: Job, out: Path) -> str:
    log = out / "runs" / job.directory / "log.txt"
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return f"the run {job.directory} failed ({lines[-1] if lines else 'no message'}); see {log}"
