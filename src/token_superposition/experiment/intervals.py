"""Means over paired seeds with their 95% t-intervals, and the speed-up to equal loss where part of it is a bound."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
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
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, n - 1)) * stdev(values) / math.sqrt(n)
    return mean(values) - half, mean(values) + half


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
    """Lower end of the t-interval on log speed-up; None with one seed, or where a seed is a bound. In a summary
    it is then, if the mean is "at least", ``beaten_length`` in multiples of the variant's steps."""
    high: float | None
    """Upper end, likewise; None where a seed is a bound."""
    seeds: int
    measured: int
    """Seeds whose speed-up is measured rather than a bound."""


def speedup(seeds: Sequence[SeedSpeedup]) -> Speedup | None:
    """The geometric mean and, where every seed is measured, its interval.

    A seed at least x times as fast counts as x: the mean of such values is no larger than the true one. Their spread
    is too small as well, so that no interval can be made of them.
    """
    if not seeds:
        return None
    logs = [math.log(s.speedup) for s in seeds]
    bounds: set[Bound] = {s.bound for s in seeds if s.bound != "measured"}
    bound: Bound = "measured"
    if bounds:
        bound = bounds.pop() if len(bounds) == 1 else "not comparable"
    interval = t_interval(logs) if bound == "measured" else None
    low, high = (math.exp(interval[0]), math.exp(interval[1])) if interval is not None else (None, None)
    return Speedup(
        geometric_mean=math.exp(mean(logs)),
        bound=bound,
        low=low,
        high=high,
        seeds=len(seeds),
        measured=sum(s.bound == "measured" for s in seeds),
    )


def beaten_length(curves: Sequence[Sequence[tuple[int, float]]], losses: Sequence[float]) -> float | None:
    """Steps of the longest baseline that a variant ends below with the whole interval of the paired difference.

    ``curves`` are the (steps, loss) baselines of each seed, of the same lengths; ``losses`` the variant's of each.
    Between two lengths a seed's baseline is linear in log steps, beyond them nothing is assumed. All shorter baselines
    are beaten as well. None where not even the shortest is, or with one seed.
    """
    logs = np.log([steps for steps, _ in curves[0]])
    rows = [[loss for _, loss in curve] for curve in curves]

    def upper(log_steps: float) -> float:
        differences = [loss - float(np.interp(log_steps, logs, row)) for loss, row in zip(losses, rows, strict=True)]
        ends = t_interval(differences)
        return ends[1] if ends is not None else math.inf

    if upper(logs[0]) >= 0:
        return None
    for a, b in pairwise(logs):  # upper is convex in between: there is one zero if it is below 0 at a and not at b
        if upper(b) >= 0:
            return math.exp(cast(float, optimize.brentq(upper, a, b)))
    return float(curves[0][-1][0])
