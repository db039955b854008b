"""Intervals over paired seeds and the speed-up to equal loss, against scipy and by simulation."""

from __future__ import annotations

import math
import random
from statistics import mean

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from token_superposition.experiment.intervals import SeedSpeedup, beaten_length, seed_speedup, speedup, t_interval


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


def test_the_speedup_is_a_geometric_mean_with_the_interval_of_its_logarithm() -> None:
    s = speedup(seeds(1.5, 1.6, 2.0, 1.8))
    assert s is not None and (s.bound, s.seeds, s.measured) == ("measured", 4, 4)
    assert s.geometric_mean == pytest.approx(stats.gmean([1.5, 1.6, 2.0, 1.8]))
    logs = [math.log(x) for x in (1.5, 1.6, 2.0, 1.8)]
    expected = stats.ttest_1samp(logs, 0).confidence_interval(0.95)
    assert (s.low, s.high) == pytest.approx((math.exp(expected.low), math.exp(expected.high)))
    inverse = speedup(seeds(*(1 / x for x in (1.5, 1.6, 2.0, 1.8))))  # as a ratio should
    assert inverse is not None and (inverse.low, inverse.high) == pytest.approx((1 / s.high, 1 / s.low))  # pyright: ignore


def test_a_bound_in_some_seed_makes_the_mean_a_bound() -> None:
    measured = speedup(seeds(1.5, 1.6, 2.0))
    above = speedup(seeds(1.5, 1.6, (2.0, "at least")))
    below = speedup(seeds(1.5, 1.6, (2.0, "at most")))
    assert measured is not None and above is not None and below is not None
    assert (above.bound, above.measured) == ("at least", 2) and above.geometric_mean == measured.geometric_mean
    assert (above.low, above.high) == (None, None) and measured.low is not None
    assert (below.bound, below.low, below.high) == ("at most", None, None)
    both = speedup(seeds(1.5, 1.6, (1.0, "at most"), (2.0, "at least")))
    assert both is not None and (both.bound, both.low, both.high) == ("not comparable", None, None)
    one = speedup(seeds(1.7))
    assert one is not None and (one.low, one.high) == (None, None)
    assert speedup([]) is None


def test_the_length_that_is_beaten_is_where_the_paired_interval_touches_0() -> None:
    curves = [[(1000, 3.2), (1600, 3.0)], [(1000, 3.18), (1600, 3.02)], [(1000, 3.22), (1600, 2.99)]]
    losses = [3.0, 2.99, 3.0]
    length = beaten_length(curves, losses)
    assert length is not None and 1000 < length < 1600
    share = math.log(length / 1000) / math.log(1.6)
    there = [loss - (a + share * (b - a)) for loss, ((_, a), (_, b)) in zip(losses, curves, strict=True)]
    ends = stats.ttest_1samp(there, 0).confidence_interval(0.95)
    assert ends.high == pytest.approx(0, abs=1e-9)
    assert beaten_length(curves, [x - 1 for x in losses]) == 1600 and beaten_length(curves, [3.3] * 3) is None
    assert beaten_length(curves[:1], losses[:1]) is None


@pytest.mark.parametrize("longest", [1.6, 1.8, 2.5])
def test_the_length_that_is_beaten_is_rarely_above_the_true_one(longest: float) -> None:
    """2,000 experiments of five seeds, where the true means meet at 1.6 x the steps, however long the longest is."""
    generator = random.Random(0)
    missed = reported = 0
    for _ in range(2000):
        curves: list[list[tuple[int, float]]] = []
        for _ in range(5):
            late = generator.gauss(0, 0.03)
            end = 3.05 - 0.15 * math.log(longest) / math.log(1.6) + late
            curves.append([(1000, 3.05 + generator.gauss(0, 0.01) + late / 2), (round(1000 * longest), end)])
        length = beaten_length(curves, [2.9 + generator.gauss(0, 0.01) for _ in curves])
        reported += length is not None
        missed += length is not None and length >= 1600
    assert reported > 1900 and missed <= 0.025 * 2000 * 1.3  # and the noise of the count
