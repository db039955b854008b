"""The table of ``tst compare --dry-run`` on the terminal."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table

from token_superposition.experiment.dry_run import DryRun
from token_superposition.report.contents import duration, short


def print_dry_run(dry: DryRun, console: Console) -> None:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for header in ("run", "seed", "steps", "to train", "latent", "raw tokens", "FLOPs", "time"):
        table.add_column(header, justify="left" if header == "run" else "right", no_wrap=True)
    for job in dry.jobs:
        how = "" if job.steps else " (done)"
        if job.trunk is not None and job.steps:
            how = " (branch)"
        table.add_row(
            job.name + how,
            str(job.seed),
            f"{job.total_steps:,}",
            f"{job.steps:,}",
            short(job.latent_tokens),
            short(job.raw_tokens),
            f"{job.flops:.3g}",
            duration(job.step_equivalents * dry.step_seconds) if job.steps else "",
        )
    table.add_section()
    steps = sum(j.steps for j in dry.jobs)
    latent, raw = sum(j.latent_tokens for j in dry.jobs), sum(j.raw_tokens for j in dry.jobs)
    total = f"{sum(j.flops for j in dry.jobs):.3g}"
    table.add_row(f"{len(dry.jobs)} runs", "", "", f"{steps:,}", short(latent), short(raw), total, "")
    console.print(table)
    console.print(
        f"{short(dry.parameters)} parameters, {dry.step_seconds:.2g} s a step here with {dry.parallel} "
        f"run{'s' if dry.parallel > 1 else ''} at a time (measured on random tokens); the runs left take about "
        f"{duration(dry.seconds)}, validation included. A branch trains only its decay. Nothing was written.",
        highlight=False,
        soft_wrap=True,
    )
