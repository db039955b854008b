"""Rounds and the best setting, as pure functions of made-up losses."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from itertools import pairwise
from statistics import mean
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from token_superposition.experiment.grid import Cell
from token_superposition.experiment.halving import Best, Design, Difference, ranked

CELLS = tuple(Cell(s, r, "uniform", "switch", lr) for s in (2, 4, 8) for r in (0.1, 0.3) for lr in (1e-3, 2e-3))
BASELINES = tuple(Cell(1, 0.0, "uniform", "switch", lr) for lr in (1e-3, 2e-3))
DESIGNS = st.builds(
    lambda n, seeds, keep, first, selection: (
        CELLS[:n],
        Design.of(n, tuple(range(first, first + seeds)), keep, min(selection, seeds)),
    ),
    st.integers(1, len(CELLS)),
    st.integers(1, 7),
    st.sampled_from([0.1, 0.34, 0.5, 0.75, 0.99, 1.0]),
    st.integers(0, 3),
    st.integers(0, 7),
)


def run_all(
    cells: tuple[Cell, ...], design: Design, loss: Callable[[Cell, int], float]
) -> dict[tuple[Cell, int], float]:
    """What the command does: train what the last round lacks, until nothing lacks."""
    losses: dict[tuple[Cell, int], float] = {}
    while True:
        last = design.rounds(cells, losses)[-1]
        wanted = [(c, seed) for c in (*BASELINES, *last.cells) for seed in last.seeds]
        missing = [key for key in wanted if key not in losses]
        if not missing:
            return losses
        assert len(missing) == len(wanted)  # no run is asked for twice
        losses |= {key: loss(*key) for key in missing}


@settings(deadline=None)
@given(DESIGNS, st.integers(0, 2**32))
def test_each_round_keeps_the_best_by_the_mean_of_the_seeds_so_far(setting: Any, state: int) -> None:
    cells, design = setting
    generator = random.Random(state)
    values = {(c, seed): generator.choice([3.0, generator.gauss(3, 1), math.nan]) for c in (*BASELINES, *cells)
              for seed in design.seeds}  # fmt: skip
    losses = run_all(cells, design, lambda c, seed: values[c, seed])
    rounds = design.rounds(cells, losses)
    assert [seed for r in rounds for seed in r.seeds] == list(design.seeds)  # each seed once, hence each run once
    assert set(losses) >= {(b, seed) for b in BASELINES for seed in design.seeds}
    assert rounds[0].cells == cells
    for i, (before, after) in enumerate(pairwise(rounds), 1):
        so_far = design.seeds[:i]

        def score(cell: Cell, seeds: tuple[int, ...] = so_far) -> float:
            total = mean(losses[cell, seed] for seed in seeds)
            return total if math.isfinite(total) else math.inf

        dropped = set(before.cells) - set(after.cells)
        assert 1 <= len(after.cells) <= len(before.cells) and set(after.cells) <= set(before.cells)
        assert all(score(a) <= score(d) for a in after.cells for d in dropped)
    if not design.full:
        assert len(rounds[-1].cells) == 1 or not design.judging
    best = Best.of(design, cells, BASELINES, losses)
    assert not set(best.judged.seeds) & set(best.chosen.seeds)
    assert set(best.judged.seeds) | set(best.chosen.seeds) == set(design.seeds)
    assert best.cell == ranked(design.finalists(cells, losses), losses, design.choosing)[0]
    # More on disk than the rounds ask for, as a larger sweep leaves, changes nothing.
    assert design.rounds(cells, values) == rounds and Best.of(design, cells, BASELINES, values).cell == best.cell


def test_how_many_cells_and_seeds() -> None:
    assert Design.of(16, tuple(range(6)), 0.5).counts == (16, 8, 4)
    assert Design.of(16, tuple(range(6)), 0.5).judging == (3, 4, 5)
    assert Design.of(4, tuple(range(9)), 0.25).counts == (4,)  # one is left: all other seeds judge
    assert Design.of(4, (0, 1, 2)).counts == (4,) and Design.of(4, (0, 1, 2, 3)).counts == (4, 4)
    assert Design.of(4, (7,)).choosing == (7,) and Design.of(4, (7,)).judging == ()
    assert Design.of(1, (7, 8)).choosing == () and Design.of(1, (7, 8)).judging == (7, 8)  # nothing to choose
    assert Design.of(4, (0, 1, 2, 3), 1.0, selection_seeds=3).judging == (3,)


def test_the_interval_is_of_the_seeds_that_did_not_choose() -> None:
    a, b = Cell(4, 0.3, "uniform", "switch", 2e-3), Cell(8, 0.3, "uniform", "switch", 1e-3)
    slow, fast = BASELINES
    losses = {
        **{(slow, seed): 3.0 for seed in range(5)},
        **{(fast, seed): 3.4 for seed in range(5)},  # mistuned
        **{(a, seed): x for seed, x in enumerate((2.5, 2.5, 2.9, 2.8, 2.85))},  # lucky where it is chosen
        **{(b, seed): x for seed, x in enumerate((2.7, 2.7, 2.6, 2.6, 2.6))},
    }
    best = Best.of(Design.of(2, tuple(range(5))), (a, b), BASELINES, losses)
    assert (best.cell, best.baseline) == (a, slow)  # not the baseline of its own learning rate
    assert (best.chosen.seeds, best.judged.seeds) == ((0, 1), (2, 3, 4))
    assert best.chosen.mean == pytest.approx(-0.5)
    deltas = [-0.1, -0.2, -0.15]
    expected = stats.ttest_1samp(deltas, 0).confidence_interval(0.95)
    assert best.judged.per_seed == pytest.approx(deltas)
    assert best.judged.interval == pytest.approx((expected.low, expected.high))
    assert best.same_rate.mean == pytest.approx(-0.55)
    one = Best.of(Design.of(2, (0,)), (a, b), BASELINES, losses)
    assert (one.cell, one.judged.interval) == (a, None) and math.isnan(one.judged.mean)
    assert Difference.of(losses | {(a, 2): math.nan}, a, slow, (2, 3)).interval is None


def test_settings_that_are_all_equal_flatter_only_where_they_are_chosen() -> None:
    """400 sweeps of nothing but noise: the choosing seeds see a gain, the judging seeds see none."""
    generator = random.Random(0)
    design, cells = Design.of(len(CELLS), (0, 1, 2, 3)), (*BASELINES, *CELLS)

    def simulated() -> Best:
        losses = {(c, seed): 0.0 if c.is_baseline else generator.gauss(0, 1) for c in cells for seed in design.seeds}
        return Best.of(design, CELLS, BASELINES, losses)

    found = [simulated() for _ in range(400)]
    assert mean(v for b in found for v in b.chosen.per_seed) < -0.9
    assert abs(mean(v for b in found for v in b.judged.per_seed)) < 4 / math.sqrt(800)


def test_seeds_that_judge_do_not_choose_the_baseline() -> None:
    slow, fast = BASELINES
    losses = {(CELLS[i], seed): 2.9 + i for i in (0, 1) for seed in range(4)}
    losses |= {(b, seed): 3.0 for b in BASELINES for seed in range(4)}
    losses |= {(slow, 0): 2.99, **{(fast, seed): 2.0 for seed in (2, 3)}}
    assert Best.of(Design.of(2, (0, 1, 2, 3)), CELLS[:2], BASELINES, losses).baseline == slow
