"""Intervals over paired seeds and the speed-up to equal loss, against scipy and by simulation."""

from __future__ import annotations

import math
import random
from statistics import mean

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from token_superposition.experiment.intervals import SeedSpeedup, clear_lengths, seed_speedup, speedup, t_interval


def test_the_interval_is_that_of_the_paired_t_test() -> None:
    baseline, ours = [3.0197, 3.0036, 2.9841], [2.7431, 2.8391, 2.8709]
    expected = stats.ttest_rel(ours, baseline).confidence_interval(0.95)
    found = t_interval([a - b for a, b in zip(ours, baseline, strict=True)])
    assert found == pytest.approx((expected.low, expected.high), rel=1e-9)
    assert found == pytest.approx((-0.3924, 0.0228), abs=1e-4)  # by hand: -0.18477 -+ 4.3027 x 0.08356 / sqrt(3)
    assert t_interval([0.1]) is None and t_interval([]) is None
    assert t_interval([0.5, 0.5]) == (0.5, 0.5)


LOSSES = st.lists(st.floats(-10, 10, allow_subnormal=False), min_size=2, max_size=9)


@given(LOSSES, st.floats(-5, 5), st.floats(1, 4))
def test_the_interval_contains_the_mean_shifts_with_it_and_widens_with_the_spread(
    values: list[float], shift: float, factor: float
) -> None:
    low, high = t_interval(values)  # pyright: ignore
    assert low <= mean(values) <= high
    assert t_interval([v + shift for v in values]) == pytest.approx((low + shift, high + shift), abs=1e-9)
    wide = t_interval([v * factor for v in values])
    assert wide == pytest.approx((low * factor, high * factor), abs=1e-9)
    assert t_interval([-v for v in values]) == pytest.approx((-high, -low), abs=1e-9)


def test_a_seeds_speedup_is_read_between_its_baselines_and_never_beyond_them() -> None:
    curve = [(1000, 3.2), (1500, 3.1), (2000, 3.0)]

    def found(loss: float, points: list[tuple[int, float]] = curve) -> tuple[int, float, str]:
        s = seed_speedup(0, points, loss, 1000)
        assert s is not None
        return s.baseline_steps, s.speedup, s.bound

    assert found(3.15) == (1225, pytest.approx(1.5**0.5), "measured")  # half-way in log steps
    assert found(3.1) == (1500, pytest.approx(1.5), "measured")
    assert found(3.2) == (1000, 1.0, "measured") and found(3.0)[::2] == (2000, "measured")
    assert found(2.9) == (2000, 2.0, "at least") and found(3.3) == (1000, 1.0, "at most")
    # A longer baseline that ended higher: the first length that comes down to the loss counts.
    assert found(3.25, [(1000, 3.2), (1500, 3.3), (2000, 3.0)])[2] == "at most"
    assert 1500 < found(3.15, [(1000, 3.2), (1500, 3.3), (2000, 3.0)])[0] < 2000
    assert found(3.15, [(1000, 3.2), (1500, 3.1), (2000, 3.19)])[0] == 1225
    assert seed_speedup(0, curve[:1], 3.1, 1000) is None


def seeds(*values: float | tuple[float, str]) -> list[SeedSpeedup]:
    pairs = [v if isinstance(v, tuple) else (v, "measured") for v in values]
    return [SeedSpeedup(i, round(1000 * x), x, bound) for i, (x, bound) in enumerate(pairs)]  # pyright: ignore


def test_the_speedup_is_a_geometric_mean_beside_its_ends() -> None:
    s = speedup(seeds(1.5, 1.6, 2.0, 1.8), (1.4, 1.9))
    assert s is not None and (s.bound, s.seeds, s.measured) == ("measured", 4, 4)
    assert s.geometric_mean == pytest.approx(stats.gmean([1.5, 1.6, 2.0, 1.8]))
    assert (s.low, s.high) == (1.4, 1.9)
    for ends in ((1.8, None), (None, 1.6)):  # of the mean loss, which one seed moves more than the mean speed-up
        beyond = speedup(seeds(1.5, 1.6, 2.0, 1.8), ends)
        assert beyond is not None and {beyond.low, beyond.high} == {s.geometric_mean, None}


def test_a_bound_in_some_seed_counts_as_its_value_and_is_told() -> None:
    def found(*values: float | tuple[float, str]) -> tuple[str, int, float]:
        s = speedup(seeds(*values), (None, None))
        assert s is not None and (s.low, s.high) == (None, None)
        return s.bound, s.measured, s.geometric_mean

    measured = found(1.5, 1.6, 2.0)
    assert found(1.5, 1.6, (2.0, "at least")) == ("at least", 2, measured[2])
    assert found(1.5, 1.6, (2.0, "at most")) == ("at most", 2, measured[2])
    assert found(1.5, 1.6, (1.0, "at most"), (2.0, "at least"))[:2] == ("not comparable", 2)
    assert speedup([], (None, None)) is None


def test_the_clear_lengths_are_where_the_ends_of_the_paired_interval_touch_0() -> None:
    curves = [[(1000, 3.2), (1600, 3.0)], [(1000, 3.18), (1600, 3.02)], [(1000, 3.22), (1600, 2.99)]]
    losses = [3.09, 3.08, 3.09]

    def there(length: float) -> list[float]:
        share = math.log(length / 1000) / math.log(1.6)
        return [loss - (a + share * (b - a)) for loss, ((_, a), (_, b)) in zip(losses, curves, strict=True)]

    low, high = clear_lengths(curves, losses)
    assert low is not None and high is not None and 1000 < low < high < 1600
    assert stats.ttest_1samp(there(low), 0).confidence_interval(0.95).high == pytest.approx(0, abs=1e-9)
    assert stats.ttest_1samp(there(high), 0).confidence_interval(0.95).low == pytest.approx(0, abs=1e-9)
    assert clear_lengths(curves, [x - 1 for x in losses]) == (1600, None)
    assert clear_lengths(curves, [x + 1 for x in losses]) == (None, 1000)
    assert clear_lengths(curves[:1], losses[:1]) == (None, None)
    # A baseline that repeats its text too often rises again: the shorter ones are not beaten, and one that won has won.
    again = [[(1000, 3.2), (1300, 3.0 + d), (1600, 3.2)] for d in (0.001, 0.002, 0.003)]
    low, high = clear_lengths(again, [3.1] * 3)
    assert low is not None and high is not None and 1000 < low < high < 1300


@pytest.mark.parametrize(("truth", "longest"), [(1.6, 1.6), (1.6, 1.8), (1.6, 2.5), (1.0, 1.8), (1.03, 1.8)])
def test_an_end_of_the_speedup_is_rarely_beyond_the_true_one(truth: float, longest: float) -> None:
    """2,000 experiments of five seeds, with the true speed-up also at and near an end of the lengths that are run."""
    generator = random.Random(0)
    above = below = told = 0
    for _ in range(2000):
        curves: list[list[tuple[int, float]]] = []
        for _ in range(5):
            late = generator.gauss(0, 0.03)
            end = 3.05 - 0.15 * math.log(longest) / math.log(1.6) + late
            curves.append([(1000, 3.05 + generator.gauss(0, 0.01) + late / 2), (round(1000 * longest), end)])
        loss = 3.05 - 0.15 * math.log(truth) / math.log(1.6)
        low, high = clear_lengths(curves, [loss + generator.gauss(0, 0.01) for _ in curves])
        told += low is not None or high is not None
        above += low is not None and low > 1000 * truth
        below += high is not None and high < 1000 * truth
    assert told > 1900 and max(above, below) <= 0.025 * 2000 * 1.3  # and the noise of the count
