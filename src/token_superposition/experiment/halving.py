"""Which runs a sweep needs next, and which setting is best: pure functions of the losses so far.

Successive halving goes over seeds, not over steps: TST loses in short runs where it wins in long ones, so a rank after
a few steps says nothing of the rank at the end. The seeds that choose the best setting say too much good of it, the
more so the more settings there were; hence other seeds judge it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean

from token_superposition.experiment.grid import Cell
from token_superposition.experiment.intervals import t_interval

Losses = Mapping[tuple[Cell, int], float]
"""Final validation loss by cell and seed."""


@dataclass(frozen=True)
class Round:
    """Cells that are trained with each of these seeds, and every baseline with them."""

    cells: tuple[Cell, ...]
    seeds: tuple[int, ...]


@dataclass(frozen=True)
class Design:
    """How a sweep goes about it; known before the first run."""

    seeds: tuple[int, ...]
    counts: tuple[int, ...]
    """Cells with the first seed, the second, and so on, as long as there is something to choose."""
    full: bool
    """Every cell gets every seed."""

    @classmethod
    def of(cls, cells: int, seeds: tuple[int, ...], keep: float = 1.0, selection_seeds: int = 0) -> Design:
        """
        >>> Design.of(cells=25, seeds=(0, 1, 2, 3, 4, 5), keep=0.5).counts
        (25, 12, 6)
        """
        counts: list[int] = []
        while cells > 1 and len(counts) < (selection_seeds or max(len(seeds) // 2, 1)):
            counts.append(cells)
            cells = max(int(keep * cells), 1)
        return cls(seeds, tuple(counts), keep == 1)

    @property
    def choosing(self) -> tuple[int, ...]:
        """Seeds that choose the best setting; none where there is only one."""
        return self.seeds[: len(self.counts)]

    @property
    def judging(self) -> tuple[int, ...]:
        """Seeds that take no part in it."""
        return self.seeds[len(self.counts) :]

    def rounds(self, cells: Sequence[Cell], losses: Losses) -> list[Round]:
        """The rounds that these losses decide: all but the last are done, and the last may be."""
        if self.full:
            return [Round(tuple(cells), self.seeds)]
        kept = list(cells)
        rounds: list[Round] = []
        for i, count in enumerate(self.counts):
            kept = ranked(kept, losses, self.seeds[:i])[:count]
            rounds.append(Round(tuple(kept), self.seeds[i : i + 1]))
            if any((cell, self.seeds[i]) not in losses for cell in kept):
                return rounds
        if self.judging:
            rounds.append(Round(tuple(ranked(kept, losses, self.choosing)[:1]), self.judging))
        return rounds

    def finalists(self, cells: Sequence[Cell], losses: Losses) -> tuple[Cell, ...]:
        """The cells among which the last choosing seed decides, once it has been trained with."""
        return self.rounds(cells, losses)[0 if self.full else max(len(self.counts) - 1, 0)].cells


def ranked(cells: Sequence[Cell], losses: Losses, seeds: Sequence[int]) -> list[Cell]:
    """From the lowest mean loss over ``seeds`` up; a run that diverged comes last, equal ones in the order given."""

    def place(cell: Cell) -> float:
        found = mean(losses[cell, seed] for seed in seeds) if seeds else 0.0
        return found if math.isfinite(found) else math.inf

    return sorted(cells, key=place)


@dataclass(frozen=True)
class Difference:
    """Loss less that of a baseline with the same seed, nats per token."""

    seeds: tuple[int, ...]
    per_seed: tuple[float, ...]
    mean: float
    """nan without a seed, or where a run diverged; null in JSON."""
    interval: tuple[float, float] | None
    """At 95%, over the seeds; None for fewer than two."""

    @classmethod
    def of(cls, losses: Losses, cell: Cell, baseline: Cell, seeds: Sequence[int]) -> Difference:
        values = tuple(losses[cell, seed] - losses[baseline, seed] for seed in seeds)
        known = all(map(math.isfinite, values))
        return cls(tuple(seeds), values, mean(values) if values else math.nan, t_interval(values) if known else None)


@dataclass(frozen=True)
class Best:
    """The best setting, and by how much."""

    cell: Cell
    baseline: Cell
    """With its own best learning rate, chosen by the same seeds."""
    chosen: Difference
    """On the seeds that chose both: too good."""
    judged: Difference
    """On the seeds that did not."""
    same_rate: Difference
    """Judged against the baseline with the setting's own learning rate, where that is another one."""

    @classmethod
    def of(cls, design: Design, cells: Sequence[Cell], baselines: Sequence[Cell], losses: Losses) -> Best:
        """Once every round is done."""
        cell = ranked(design.finalists(cells, losses), losses, design.choosing)[0]
        baseline = ranked(baselines, losses, design.choosing)[0]
        same = next(b for b in baselines if b.learning_rate == cell.learning_rate)
        return cls(
            cell,
            baseline,
            Difference.of(losses, cell, baseline, design.choosing),
            Difference.of(losses, cell, baseline, design.judging),
            Difference.of(losses, cell, same, design.judging or design.choosing),
        )
