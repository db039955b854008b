"""The tables of ``tst compare --dry-run`` and ``tst sweep --dry-run`` on the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from token_superposition.experiment.dry_run import DryRun, JobCost
from token_superposition.report.contents import duration, short


def print_dry_run(dry: DryRun, console: Console) -> None:
    """A line for each run of a comparison."""
    table = _table("run")
    for job in dry.jobs:
        part = f"{job.steps:,} of " if 0 < job.steps < job.total_steps else ""
        time = duration(job.seconds(dry.step_seconds)) if job.steps else "done"
        table.add_row(escape(job.directory), f"{part}{job.total_steps:,}", *_counts([job]), time)
    _print(table, dry, console, "compare")


def print_rounds(dry: DryRun, console: Console) -> None:
    """A line for each round of a sweep."""
    table = _table("round")
    for number, jobs in enumerate(dry.rounds, 1):
        left = [job for job in jobs if job.steps]
        steps = sum(job.steps for job in jobs)
        time = duration(sum(job.seconds(dry.step_seconds) for job in left)) if left else "done"
        what = f"{number}: {len(jobs)} runs" + (f", {len(left)} to train" if len(left) < len(jobs) else "")
        table.add_row(what, f"{steps:,}", *_counts(jobs), time)
    _print(table, dry, console, "sweep")
    if len(dry.rounds) > 1:
        console.print(
            "Which settings later rounds train is decided by the earlier ones; their raw tokens are a guess.",
            highlight=False,
            soft_wrap=True,
        )


def _table(what: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for header in (what, "steps", "latent", "raw", "FLOPs", "time"):
        table.add_column(header, justify="left" if header == what else "right", no_wrap=True)
    return table


def _counts(jobs: Sequence[JobCost]) -> tuple[str, str, str]:
    return (
        short(sum(j.latent_tokens for j in jobs)),
        short(sum(j.raw_tokens for j in jobs)),
        f"{sum(j.flops for j in jobs):.3g}",
    )


def _print(table: Table, dry: DryRun, console: Console, command: str) -> None:
    table.add_section()
    total = f"{sum(j.steps for j in dry.jobs):,}"
    table.add_row(f"{len(dry.jobs)} runs", total, *_counts(dry.jobs), duration(dry.seconds))
    console.print(table)
    if dry.seconds == 0:
        console.print(f"Every run is done; tst {command} would write the report again. Nothing was written.")
        return
    runs = f"{dry.parallel} runs" if dry.parallel > 1 else "1 run"
    console.print(
        f"{short(dry.parameters)} parameters; {dry.step_seconds:.2g} s a step on this machine with {runs} at a time, "
        "measured on random tokens. The rows add up the time of each run by itself, start and validation included; the "
        f"total, about {duration(dry.seconds)}, is that of all with {runs} at a time. A run of which fewer steps are "
        "trained branches off a longer one or goes on from a checkpoint. latent and raw count tokens. Nothing was "
        "written.",
        highlight=False,
        soft_wrap=True,
    )
