"""The cells of a sweep: every swept value with every other one, each different run once, and the baselines."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from token_superposition.errors import TokenSuperpositionError, require_int
from token_superposition.experiment.config import Config, SweepSchedule
from token_superposition.experiment.jobs import Job, alone
from token_superposition.experiment.superposition import BASELINE, SuperpositionConfig
from token_superposition.weights import Weighting

MIXTURE: dict[SweepSchedule, float] = {"halving": 0.0, "fading": 0.5, "random": 1.0}
MAX_RUNS = 10_000


@dataclass(frozen=True)
class Cell:
    """One setting of a sweep."""

    bag_size: int
    """1 for the baseline."""
    ratio: float
    weighting: Weighting
    schedule: SweepSchedule
    learning_rate: float

    @property
    def is_baseline(self) -> bool:
        return self.bag_size == 1

    @property
    def name(self) -> str:
        """Of the directory of its runs, whatever else is swept: s4-r0.3-lr0.002, s4-r0.3-power-halving-lr0.002."""
        if self.is_baseline:
            return f"baseline-lr{self.learning_rate}"
        special = [x for x in (self.weighting, self.schedule) if x not in ("uniform", "switch")]
        return "-".join([f"s{self.bag_size}", f"r{self.ratio}", *special, f"lr{self.learning_rate}"])

    def superposition(self, base: SuperpositionConfig) -> SuperpositionConfig:
        """``base`` with this cell's values."""
        if self.is_baseline:
            return BASELINE
        values: dict[str, Any] = {"bag_size": self.bag_size, "ratio": self.ratio, "weighting": self.weighting}
        if self.schedule != "switch":
            values |= {"anneal": halved(self.bag_size), "mixture": MIXTURE[self.schedule]}
        return replace(base, **values)


def halved(bag_size: int) -> tuple[int, ...]:
    """
    >>> halved(16), halved(6), halved(2)
    ((16, 8, 4, 2), (6, 3), (2,))
    """
    return (bag_size, *halved(bag_size // 2)) if bag_size > 1 else ()


@dataclass(frozen=True)
class Grid:
    """The cells of a sweep."""

    config: Config
    """Without what it says of other runs."""
    seeds: tuple[int, ...]
    run_of: dict[Cell, Cell]
    """Every cell beside the baselines, and the cell whose runs are its runs: itself, or one that trains the same."""
    baselines: tuple[Cell, ...]
    """One for each learning rate."""

    @property
    def candidates(self) -> tuple[Cell, ...]:
        """The cells that differ from each other and from the baseline."""
        return tuple(dict.fromkeys(self.run_of.values()))

    def of_runs_in(self, out: Path) -> Grid:
        """With those runs, of cells that train the same, that a smaller sweep has left in ``out``."""
        alike: dict[Cell, list[Cell]] = {}
        for cell, run in self.run_of.items():
            alike.setdefault(run, []).append(cell)

        def runs(cell: Cell) -> int:
            return sum((out / "runs" / directory(cell, seed)).exists() for seed in self.seeds)

        chosen = {run: max(cells, key=runs) for run, cells in alike.items()}  # the first of equals
        return replace(self, run_of={cell: chosen[run] for cell, run in self.run_of.items()})

    def baseline_of(self, cell: Cell) -> Cell:
        """The baseline with the same learning rate."""
        return next(b for b in self.baselines if b.learning_rate == cell.learning_rate)

    def job(self, cell: Cell, seed: int) -> Job:
        """A run that knows nothing of the sweep, so that a larger sweep in the same directory finds it done."""
        train = replace(self.config.train, learning_rate=cell.learning_rate, seed=seed)
        superposition = cell.superposition(self.config.superposition)
        run = replace(self.config, train=train, superposition=superposition)
        return Job(cell.name, directory(cell, seed), alone(run))


def directory(cell: Cell, seed: int) -> str:
    return f"{cell.name}-seed{seed}"


def grid_of(config: Config) -> Grid:
    """Raises ``TokenSuperpositionError`` for a grid that cannot be swept: empty, with duplicates, or too large."""
    _check(config)
    wanted, base = config.sweep, config.superposition
    rates = wanted.learning_rates or (config.train.learning_rate,)
    values = (
        wanted.weightings or (base.weighting,),
        wanted.schedules or ("switch",),
        rates,
        wanted.ratios or (base.ratio,),
        wanted.bag_sizes or (base.bag_size,),
    )
    seeds = config.compare.seeds or (config.train.seed,)
    count = math.prod(map(len, values)) * len(seeds)
    if count > MAX_RUNS:
        raise TokenSuperpositionError(
            f"the sweep has {count:,} runs, at most {MAX_RUNS:,} are accepted; leave out values or seeds"
        )
    same: dict[object, Cell] = {}
    run_of: dict[Cell, Cell] = {}
    for weighting, schedule, rate, ratio, s in product(*values):
        cell = Cell(s, ratio, weighting, schedule, rate)
        superposition = cell.superposition(base)
        superposition.check()
        steps = superposition.schedule(config.train.steps)
        if s == 1 or not any(p.is_superposed for p in steps.phases):
            continue  # the baseline
        run_of[cell] = same.setdefault((steps, weighting, rate), cell)
    if not run_of:
        raise TokenSuperpositionError(
            "the sweep has nothing but the baseline: bag size 1 or ratio 0 everywhere; "
            "give more, such as --sweep.bag-sizes 2 4 8"
        )
    baselines = tuple(Cell(1, 0.0, "uniform", "switch", rate) for rate in rates)
    return Grid(config, seeds, run_of, baselines)


def _check(config: Config) -> None:
    wanted, base = config.sweep, config.superposition
    for name in ("bag_sizes", "ratios", "weightings", "schedules", "learning_rates"):
        _distinct(f"sweep.{name}", getattr(wanted, name))
    _distinct("compare.seeds", config.compare.seeds)
    for s in wanted.bag_sizes:
        require_int("sweep.bag_sizes", s, 1)
    if any(not rate > 0 for rate in wanted.learning_rates):
        raise TokenSuperpositionError(f"sweep.learning_rates are {wanted.learning_rates}; give numbers above 0")
    if not 0 < wanted.keep <= 1:
        raise TokenSuperpositionError(f"sweep.keep is {wanted.keep}; give a share in (0, 1], 1 for the full grid")
    seeds = max(len(config.compare.seeds), 1)
    if require_int("sweep.selection_seeds", wanted.selection_seeds, 0) > seeds:
        raise TokenSuperpositionError(
            f"sweep.selection_seeds is {wanted.selection_seeds}, there are {seeds} seeds; give more compare.seeds"
        )
    if base.trained_heads:
        raise TokenSuperpositionError(
            f"superposition.mtp_heads is {base.mtp_heads}: heads add FLOPs to every setting and none to the baseline; "
            "leave them out, or give such a run to tst compare"
        )
    if base.anneal:
        raise TokenSuperpositionError(
            f"superposition.anneal is {base.anneal}, which fixes the bag sizes; leave it out and sweep "
            "bag_sizes with sweep.schedules halving"
        )


def _distinct(name: str, values: Sequence[object]) -> None:
    if len(set(values)) < len(values):
        raise TokenSuperpositionError(f"{name} are {values}; leave out what is there twice")
