"""Bag size, ratio, place weighting, schedule and learning rate: a full grid, or successive halving over seeds."""

from __future__ import annotations

import csv
import io
import json
import shutil
import typing
from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass, fields
from pathlib import Path

from rich.console import Console

from token_superposition.data.store import Meta
from token_superposition.errors import TokenSuperpositionError
from token_superposition.experiment.budget import shape_of
from token_superposition.experiment.config import Config, SweepSchedule, save_config
from token_superposition.experiment.dry_run import DryRun, cost_of_rounds
from token_superposition.experiment.files import CONFIG, MODEL, SUMMARY, SWEEP, write_json, write_whole
from token_superposition.experiment.grid import Cell, Grid, directory, grid_of
from token_superposition.experiment.halving import Best, Design, Round
from token_superposition.experiment.intervals import CONFIDENCE
from token_superposition.experiment.jobs import Job, check_directory, check_jobs, run_jobs, unfinished
from token_superposition.experiment.result import RunResult, read_result, result_file
from token_superposition.experiment.tree import from_dict
from token_superposition.weights import Weighting

TABLE = "sweep.csv"
Results = dict[tuple[Cell, int], RunResult]


@dataclass(frozen=True)
class Row:
    """A cell with one seed: a line of sweep.csv. Cells that are the same run each have a line."""

    bag_size: int
    ratio: float
    weighting: Weighting
    schedule: SweepSchedule
    learning_rate: float
    seed: int
    round: int
    run: str
    """Its directory under runs/, with the whole configuration."""
    steps: int
    latent_tokens: int
    raw_tokens: int
    epochs: float
    flops: float
    train_seconds: float
    val_loss: float
    val_bpb: float
    baseline_loss: float
    """Of the same learning rate and seed."""
    difference: float
    """val_loss less baseline_loss, nats per token; below 0 is better."""
    parameters: int
    hardware: str
    versions: str

    @property
    def cell(self) -> Cell:
        return Cell(self.bag_size, self.ratio, self.weighting, self.schedule, self.learning_rate)


def sweep(config: Config, out: str | Path, console: Console, command: str = "") -> Best:
    """Run what is not done yet, round by round, and write ``sweep.csv`` and ``sweep.json``.

    The finished models are removed: what is kept of a run are its configuration, metrics and result.
    Raises ``TokenSuperpositionError`` before any run for a configuration that cannot be swept.
    """
    out = Path(out)
    grid, design = checked(config, out)
    body = shape_of(config, Meta.load(Path(config.data.path)).vocab_size).body_parameters
    out.mkdir(parents=True, exist_ok=True)
    save_config(config, out / CONFIG)

    def finished(job: Job) -> None:
        for name in (MODEL, "checkpoints"):
            shutil.rmtree(out / "runs" / job.directory / name, ignore_errors=True)

    while True:
        rounds = design.rounds(grid.candidates, losses_of(results(grid, out)))
        # Of all rounds: one that was interrupted may have its cells, but not yet all of its baselines.
        jobs = [job for one in rounds for job in jobs_of(grid, one)]
        if not unfinished(jobs, out):
            break
        cells, seeds = len(rounds[-1].cells), ", ".join(map(str, rounds[-1].seeds))
        console.print(f"round {len(rounds)}: {_count(cells, 'setting')}, seed {seeds}", highlight=False)
        run_jobs(jobs, out, config.compare.parallel, console, finished)
        if not (out / SWEEP).exists():  # else the table stays that of the finished sweep which is enlarged
            write_rows(out / TABLE, rows_of(grid, rounds, results(grid, out)))
    for job in jobs:  # also of those that finished after the sweep itself was killed
        finished(job)
    return write_sweep(out, grid, design, results(grid, out), body, command)


def write_sweep(out: Path, grid: Grid, design: Design, found: Results, body_parameters: int, command: str = "") -> Best:
    """Write ``sweep.csv`` and ``sweep.json`` of a sweep of which every round is done."""
    losses = losses_of(found)
    rounds = design.rounds(grid.candidates, losses)
    rows = rows_of(grid, rounds, found)
    best = Best.of(design, grid.candidates, grid.baselines, losses)
    chosen = sorted(chosen_by(out) | {*best.chosen.seeds})
    write_rows(out / TABLE, rows)
    write_json(
        out / SWEEP,
        {
            "format": 1,
            "command": command,
            "best": asdict(best),
            "have_chosen": chosen,
            "confidence": CONFIDENCE,
            "rounds": [{"cells": len(r.cells), "seeds": r.seeds} for r in rounds],
            "body_parameters": body_parameters,
            "hardware": sorted({r.hardware for r in rows}),
            "versions": sorted({r.versions for r in rows}),
            "config": asdict(grid.config),
        },
    )
    return best


def checked(config: Config, out: Path) -> tuple[Grid, Design]:
    """Raises ``TokenSuperpositionError`` for what cannot be swept, or not into ``out``."""
    config.check()
    of_comparison = [p for p in out.glob("runs/baseline*") if not p.name.startswith("baseline-lr")]
    if of_comparison or (out / SUMMARY).exists():
        raise TokenSuperpositionError(f"{out} holds a comparison; choose another --out for the sweep")
    check_directory(config, out)
    grid = grid_of(config).of_runs_in(out)
    check_jobs([grid.job(c, seed) for c in (*grid.baselines, *grid.candidates) for seed in grid.seeds], out)
    wanted = config.sweep
    design = Design.of(len(grid.candidates), grid.seeds, wanted.keep, wanted.selection_seeds)
    if design.choosing and (known := sorted(chosen_by(out) & {*design.judging})):
        raise TokenSuperpositionError(
            f"seeds {known} have chosen the best setting of a sweep in {out}, and would judge one now; name them "
            "first among --compare.seeds, let as many choose (--sweep.selection-seeds), or choose another --out"
        )
    return grid, design


def chosen_by(out: Path) -> set[int]:
    """The seeds that chose the best setting of a finished sweep in ``out``, this one's or one's before it."""
    try:
        content = json.loads((out / SWEEP).read_text(encoding="utf-8"))
        return {*content["best"]["chosen"]["seeds"], *content.get("have_chosen", ())}
    except (OSError, ValueError, TypeError, KeyError, RecursionError):  # none, or of another form: see read_sweep
        return set()


def jobs_of(grid: Grid, one: Round) -> list[Job]:
    """The runs of a round, the baselines first."""
    return [grid.job(cell, seed) for seed in one.seeds for cell in (*grid.baselines, *one.cells)]


def dry_run(config: Config, out: str | Path) -> DryRun:
    """What the sweep would cost. Cells stand in for those that later rounds choose: the same steps and FLOPs, but
    other raw tokens. Writes nothing.

    Raises ``TokenSuperpositionError`` as ``sweep`` would, and for a model too large for this machine.
    """
    out = Path(out)
    grid, design = checked(config, out)
    known = losses_of(results(grid, out))
    guessed = {(c, seed): float("inf") for c in grid.candidates for seed in grid.seeds} | known
    rounds = design.rounds(grid.candidates, guessed)
    return cost_of_rounds(config, [jobs_of(grid, r) for r in rounds], out)


def results(grid: Grid, out: Path) -> Results:
    """Of the finished runs."""
    found: Results = {}
    for cell in (*grid.baselines, *grid.candidates):
        for seed in grid.seeds:
            if path := result_file(out / "runs" / directory(cell, seed)):
                found[cell, seed] = read_result(path)
    return found


def losses_of(found: Results) -> dict[tuple[Cell, int], float]:
    return {key: result.val_loss for key, result in found.items()}


def rows_of(grid: Grid, rounds: Sequence[Round], found: Results) -> list[Row]:
    """A row for every cell and seed of these rounds, which must be done; baselines first in each round."""
    rows: list[Row] = []
    for number, one in enumerate(rounds, 1):
        cells = {b: b for b in grid.baselines} | {c: run for c, run in grid.run_of.items() if run in one.cells}
        for cell, run in cells.items():
            for seed in one.seeds:
                result, baseline = found[run, seed], found[grid.baseline_of(cell), seed]
                rows.append(
                    Row(
                        **asdict(cell),
                        seed=seed,
                        round=number,
                        run=directory(run, seed),
                        steps=result.steps,
                        latent_tokens=result.latent_tokens,
                        raw_tokens=result.raw_tokens,
                        epochs=result.epochs,
                        flops=result.flops,
                        train_seconds=result.train_seconds,
                        val_loss=result.val_loss,
                        val_bpb=result.val_bpb,
                        baseline_loss=baseline.val_loss,
                        difference=result.val_loss - baseline.val_loss,
                        parameters=result.parameters,
                        hardware=result.hardware,
                        versions=", ".join(f"{name} {v}" for name, v in result.versions.items()),
                    )
                )
    return rows


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(f.name for f in fields(Row))
    writer.writerows(astuple(row) for row in rows)
    write_whole(path, text.getvalue())


def read_rows(path: Path) -> list[Row]:
    kinds = typing.get_type_hints(Row)
    numbers = {name: kind for name, kind in kinds.items() if kind in (int, float)}
    with path.open(encoding="utf-8", newline="") as file:
        lines = [{k: numbers.get(k, str)(v) for k, v in line.items()} for line in csv.DictReader(file)]
    return [from_dict(Row, line, path.name) for line in lines]


def _count(n: int, what: str) -> str:
    return f"{n:,} {what}" + ("s" if n != 1 else "")
