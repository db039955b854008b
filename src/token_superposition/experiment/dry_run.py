"""What a comparison or a sweep would cost, before it is started: runs, tokens, FLOPs and time on this machine."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from token_superposition.data.store import Meta
from token_superposition.experiment.budget import shape_of
from token_superposition.experiment.checkpoints import damage, newest_whole, step_of
from token_superposition.experiment.compare import checked_jobs
from token_superposition.experiment.config import Config
from token_superposition.experiment.jobs import Job, branch_checkpoint, slots, unfinished
from token_superposition.experiment.launch import Launch
from token_superposition.experiment.speed import seconds_per_step

START_SECONDS = 10.0  # of a run's process: importing, building the model, writing the result


@dataclass(frozen=True)
class JobCost:
    """What is left of one run. A branch has only its decay to train, a finished run nothing."""

    directory: str
    total_steps: int
    steps: int
    """To train now."""
    latent_tokens: int
    raw_tokens: int
    flops: float
    """By the formula of ``tst plan``."""
    step_equivalents: float
    """Ordinary steps and validation together: a validated token takes a third of the time of a trained one, and a
    step with heads for further tokens longer by its FLOPs."""
    trunk: str | None

    def seconds(self, step_seconds: float) -> float:
        """Of what is left of the run, with the start of its process."""
        return START_SECONDS + self.step_equivalents * step_seconds


@dataclass(frozen=True)
class DryRun:
    rounds: list[list[JobCost]]
    """Runs that are trained side by side; a comparison has one round."""
    parameters: int
    step_seconds: float
    """Of one run, while ``parallel`` of them share the machine; measured, 0 if nothing is left."""
    parallel: int
    seconds: float
    """Estimated time of all that is left."""

    @property
    def jobs(self) -> list[JobCost]:
        return [job for jobs in self.rounds for job in jobs]


def dry_run(config: Config, out: str | Path) -> DryRun:
    """Writes nothing; times a few steps on random tokens.

    Raises ``TokenSuperpositionError`` as ``compare`` would, and for a model too large for this machine.
    """
    return cost_of_rounds(config, [checked_jobs(config, Path(out))], Path(out))


def cost_of_rounds(config: Config, rounds: list[list[Job]], out: Path) -> DryRun:
    """Of runs with the model and batch of ``config``; a round begins when the one before is done."""
    meta = Meta.load(Path(config.data.path))
    shape, held_out = shape_of(config, meta.vocab_size), meta.validation.tokens
    length = config.data.sequence_length
    plain = float(shape.flops_per_token(length))
    waiting = [unfinished(jobs, out) for jobs in rounds]
    parallel = max(slots(config.compare.parallel, jobs, out) for jobs in waiting)
    local = 1 if torch.accelerator.is_available() else parallel
    Launch(local_processes=local, device_memory=Launch.from_environment().device_memory).check_memory(shape.parameters)
    step = seconds_per_step(config, shape.vocab_size, parallel) if any(waiting) else 0.0
    costs: list[list[JobCost]] = []
    seconds = 0.0
    for jobs, unfinished_jobs in zip(rounds, waiting, strict=True):
        names = {j.directory for j in unfinished_jobs}
        left = [_left(j, out, j.trunk in names) if j.directory in names else 0 for j in jobs]
        flops = [float(shape.flops_per_token(length, j.config.superposition.trained_heads)) for j in jobs]
        costs.append([cost_of_job(j, n, f, f / plain, held_out) for j, n, f in zip(jobs, left, flops, strict=True)])
        seconds += makespan([c for c in costs[-1] if c.directory in names], parallel, step)
    return DryRun(costs, shape.parameters, step, parallel, seconds)


def cost_of_job(job: Job, steps: int, flops_per_token: float, step: float = 1.0, held_out: float = math.inf) -> JobCost:
    """Of the last ``steps`` steps of a run, each of which takes the time of ``step`` ordinary ones.

    ``held_out`` tokens can be validated on.
    """
    config, schedule = job.config, job.config.schedule
    total, batch, length = config.train.steps, config.train.batch_size, config.data.sequence_length
    before = total - steps
    latent = steps * batch * length
    validations = total // config.train.eval_every - before // config.train.eval_every
    each, last = min(config.data.eval_tokens, held_out), min(config.data.final_eval_tokens, held_out)
    validated = validations * each + last if steps else 0
    return JobCost(
        directory=job.directory,
        total_steps=total,
        steps=steps,
        latent_tokens=latent,
        raw_tokens=schedule.raw_tokens(batch, length) - schedule.raw_tokens(batch, length, before),
        flops=flops_per_token * latent,
        step_equivalents=steps * step + validated / (3 * batch * length),
        trunk=job.trunk,
    )


def _left(job: Job, out: Path, trunk_unfinished: bool) -> int:
    """Steps from its newest checkpoint, from where it branches off, or all of them."""
    directory = out / "runs" / job.directory / "checkpoints"
    if checkpoint := newest_whole(directory, check=partial(damage, content=False)):
        return job.config.train.steps - step_of(checkpoint)
    trunk = branch_checkpoint(job, out)
    whole = trunk is not None and trunk.exists() and not damage(trunk, content=False)
    branches = whole or (trunk is not None and trunk_unfinished)
    return job.config.train.steps - (job.branch_step if branches else 0)


def makespan(jobs: list[JobCost], parallel: int, step_seconds: float) -> float:
    """Seconds until all are done: each free slot takes the first job whose trunk is done, as ``run_jobs`` does."""
    waiting, ends = list(jobs), dict[str, float]()
    own = {j.directory for j in jobs}
    running: list[tuple[float, str]] = []
    now = 0.0
    while waiting or running:
        ready = [j for j in waiting if j.trunk not in own or ends.get(j.trunk or "", now + 1) <= now]
        for job in ready[: parallel - len(running)]:
            waiting.remove(job)
            running.append((now + job.seconds(step_seconds), job.directory))
        running.sort()
        now, directory = running.pop(0)
        ends[directory] = now
    return now
