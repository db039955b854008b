"""The table of ``tst compare --dry-run`` on the terminal."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table

from token_superposition.experiment.dry_run import DryRun
from token_superposition.report.contents import duration, short


def print_dry_run(dry: DryRun, console: Console) -> None:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for header in ("run", "steps", "latent", "raw", "FLOPs", "time"):
        table.add_column(header, justify="left" if header == "run" else "right", no_wrap=True)
    for job in dry.jobs:
        part = f"{job.steps:,} of " if 0 < job.steps < job.total_steps else ""
        table.add_row(
            job.directory,
            f"{part}{job.total_steps:,}",
            short(job.latent_tokens),
            short(job.raw_tokens),
            f"{job.flops:.3g}",
            duration(job.step_equivalents * dry.step_seconds) if job.steps else "done",
        )
    table.add_section()
    table.add_row(
        f"{len(dry.jobs)} runs",
        f"{sum(j.steps for j in dry.jobs):,}",
        short(sum(j.latent_tokens for j in dry.jobs)),
        short(sum(j.raw_tokens for j in dry.jobs)),
        f"{sum(j.flops for j in dry.jobs):.3g}",
        duration(dry.seconds),
    )
    console.print(table)
    if dry.seconds == 0:
        console.print("Every run is done; tst compare would write the report again. Nothing was written.")
        return
    console.print(
        f"{short(dry.parameters)} parameters; {dry.step_seconds:.2g} s a step on this machine with {dry.parallel} "
        f"run{'s' if dry.parallel > 1 else ''} at a time, measured on random tokens. What is left takes about "
        f"{duration(dry.seconds)}, validation included. A run of which fewer steps are trained branches off a "
        "longer one or goes on from a checkpoint. latent and raw count tokens. Nothing was written.",
        highlight=False,
        soft_wrap=True,
    )
