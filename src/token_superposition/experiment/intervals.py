"""Means over paired seeds with their 95% t-intervals, and the speed-up to equal loss where part of it is a bound."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from statistics import mean, stdev
from typing import Literal, cast

import numpy as np
from scipy import optimize, stats

CONFIDENCE = 0.95
Bound = Literal["measured", "at least", "at most", "not comparable"]


def t_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Student's interval of the mean at ``CONFIDENCE``, two-sided; None for fewer than two values, or infinite ones.

    >>> low, high = t_interval([1.0, 2.0, 3.0])
    >>> f"{low:.4f} {high:.4f}"
    '-0.4841 4.4841'
    """
    n = len(values)
    if n < 2 or not all(map(math.isfinite, values)):
        return None
    half = _quantile(n - 1) * stdev(values) / math.sqrt(n)
    return mean(values) - half, mean(values) + half


@cache
def _quantile(degrees: int) -> float:
    return float(stats.t.ppf((1 + CONFIDENCE) / 2, degrees))


def chance(differences: Sequence[float]) -> float:
    """The p-value, two-sided, of Student's test that their mean is 0: below 0.05 where ``t_interval`` excludes 0.

    >>> f"{chance([1.0, 2.0, 3.0]):.4f}", chance([1.0, 1.0]), chance([0.0, 0.0])
    ('0.0742', 0.0, 1.0)
    """
    if stdev(differences) == 0:
        return float(mean(differences) == 0)
    return float(stats.ttest_1samp(differences, 0).pvalue)  # pyright: ignore[reportAttributeAccessIssue]


def holm(chances: Sequence[float], level: float = 1 - CONFIDENCE) -> list[bool]:
    """Which of several hypotheses are rejected, by Holm's step-down procedure (Scand. J. Statist. 6, 1979).

    >>> holm([0.01, 0.04, 0.03]), holm([0.04, 0.01, 0.02])
    ([True, False, False], [True, True, True])
    """
    order = sorted(range(len(chances)), key=chances.__getitem__)
    passed = [chances[i] <= level / (len(chances) - place) for place, i in enumerate(order)]
    kept = passed.index(False) if False in passed else len(passed)
    return [order.index(i) < kept for i in range(len(chances))]


@dataclass(frozen=True)
class SeedSpeedup:
    """How many steps the baseline of one seed needs for the loss that a variant reached with the same seed."""

    seed: int
    baseline_steps: int
    speedup: float
    """baseline_steps / steps of the variant, hence also the ratio of FLOPs."""
    bound: Bound
    """measured (between two baselines that were run, or one of them), at least (the longest baseline is still above
    the variant's loss), or at most (the shortest one is below it already)."""


def seed_speedup(seed: int, curve: Sequence[tuple[int, float]], loss: float, steps: int) -> SeedSpeedup | None:
    """Where the (steps, loss) baselines of one seed, each with its own decay, first come down to ``loss``.

    Linear in log steps between two lengths that were run, and never beyond them: outside it is a bound. None without
    a curve of two lengths, or where one of the losses is not finite.
    """
    if len(curve) < 2 or not all(map(math.isfinite, (loss, *(x for _, x in curve)))):
        return None
    n, bound = comes_down_to(loss, curve)
    return SeedSpeedup(seed, round(n), n / steps, bound)


def comes_down_to(loss: float, curve: Sequence[tuple[int, float]]) -> tuple[float, Bound]:
    """Steps at which (steps, loss) baselines first reach ``loss``, and whether that is measured or a bound.

    Past it they may rise again, as where a text is repeated too often: that is no second answer.
    """
    if curve[0][1] <= loss:
        return curve[0][0], "measured" if curve[0][1] == loss else "at most"
    for (n0, l0), (n1, l1) in pairwise(curve):
        if l1 <= loss < l0:
            return math.exp(math.log(n0) + (l0 - loss) / (l0 - l1) * math.log(n1 / n0)), "measured"
    return curve[-1][0], "at least"


@dataclass(frozen=True)
class Speedup:
    """The speed-up to equal loss over seeds."""

    geometric_mean: float
    """A seed that is only a bound counts with its bound."""
    bound: Bound
    """measured in every seed; at least or at most, if some seeds are such bounds; not comparable, if both occur: then
    the mean is no bound in either direction."""
    low: float | None
    """Ends of the 95% interval, from the losses (``clear_lengths``), in multiples of the variant's steps. None with one
    seed, and where an end is beyond the lengths that were run."""
    high: float | None
    seeds: int
    measured: int
    """Seeds whose speed-up is measured rather than a bound."""


def speedup(seeds: Sequence[SeedSpeedup], ends: tuple[float | None, float | None]) -> Speedup | None:
    """The geometric mean beside ``ends``, in multiples of the variant's steps.

    A seed at least x times as fast counts as x, so that their spread is too small: no interval can be made of them. The
    losses, of which the ends come, no bound cuts off. The mean loss may gain more by one seed than the mean speed-up:
    an end is not beyond the mean that it belongs to.
    """
    if not seeds:
        return None
    bounds: set[Bound] = {s.bound for s in seeds if s.bound != "measured"}
    bound: Bound = "measured"
    if bounds:
        bound = bounds.pop() if len(bounds) == 1 else "not comparable"
    center = math.exp(mean(math.log(s.speedup) for s in seeds))
    low, high = ends
    return Speedup(
        geometric_mean=center,
        bound=bound,
        low=None if low is None else min(low, center),
        high=None if high is None else max(high, center),
        seeds=len(seeds),
        measured=sum(s.bound == "measured" for s in seeds),
    )


def clear_lengths(
    curves: Sequence[Sequence[tuple[int, float]]], losses: Sequence[float]
) -> tuple[float | None, float | None]:
    """Steps of the longest baseline that a variant ends below, and of the shortest that it ends above, by the whole
    interval of the paired difference.

    ``curves`` are the (steps, loss) baselines of each seed, of the same lengths; ``losses`` the variant's of each.
    Between two lengths a seed's baseline is linear in log steps, beyond them nothing is assumed. All baselines shorter
    than the first length are beaten as well. None where there is no such length, or with one seed. Together they are
    the interval of a ratio by Fieller's argument (J. R. Statist. Soc. B 16, 1954): the lengths at which the paired test
    does not reject that both end alike.
    """
    logs = np.log([steps for steps, _ in curves[0]])
    rows = [[loss for _, loss in curve] for curve in curves]

    def ends(log_steps: float) -> tuple[float, float]:
        differences = [loss - float(np.interp(log_steps, logs, row)) for loss, row in zip(losses, rows, strict=True)]
        return t_interval(differences) or (-math.inf, math.inf)

    def crossing(of: Literal[0, 1]) -> float | None:
        """Where that end of the interval first comes up to 0; None if not even the longest baseline brings it there.

        In between the upper end is convex and the lower one concave: one zero, if it is below 0 at a and not at b.
        """
        if ends(logs[0])[of] >= 0:
            return float(curves[0][0][0])
        for a, b in pairwise(logs):
            if ends(b)[of] >= 0:
                return math.exp(cast(float, optimize.brentq(lambda x: ends(x)[of], a, b)))
        return None

    beaten = crossing(1) or float(curves[0][-1][0])
    return beaten if ends(logs[0])[1] < 0 else None, crossing(0)
