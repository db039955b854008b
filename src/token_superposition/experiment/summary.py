"""What a comparison says: four accountings (equal FLOPs, loss, data and time), with intervals over paired seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

from token_superposition.errors import TokenSuperpositionError
from token_superposition.experiment.intervals import (
    CONFIDENCE,
    clear_lengths,
    comes_down_to,
    seed_speedup,
    speedup,
    t_interval,
)
from token_superposition.experiment.result import RunResult, read_result, result_file


@dataclass(frozen=True)
class Run(RunResult):
    """A finished run of a comparison."""

    name: str = ""
    """baseline, tst, or the variant's; longer and shorter baselines are baseline-xF."""
    directory: str = ""


@dataclass(frozen=True)
class EqualLoss:
    """How many steps the baseline needs for the loss of a variant; both losses are means over seeds."""

    baseline_steps: int
    speedup: float
    """baseline_steps / steps of the variant; also the ratio of FLOPs, unless the variant has heads of its own."""
    how: str
    """interpolated (between baselines that were run), at least (the longest was still above), at most (the shortest
    was below already), or extrapolated."""


def load_runs(out: Path, jobs: Sequence[tuple[str, str]]) -> list[Run]:
    """Results of (name, directory) pairs under ``out/runs``.

    Raises ``TokenSuperpositionError`` for a run that has neither finished nor diverged.
    """
    runs: list[Run] = []
    for name, directory in jobs:
        if (path := result_file(out / "runs" / directory)) is None:
            raise TokenSuperpositionError(f"{out / 'runs' / directory} holds no result; give the same command again")
        runs.append(Run(**asdict(read_result(path)), name=name, directory=directory))
    return runs


def comparison(runs: Sequence[Run]) -> dict[str, Any]:
    """Every variant against the baseline; the figures of ``tst`` stand at the top, each variant's under its name."""
    names = list(dict.fromkeys(r.name for r in runs if not r.name.startswith("baseline")))
    variants = {name: compare_variant(runs, name) for name in names}
    return {**variants.get("tst", {}), "variants": variants}


def compare_variant(runs: Sequence[Run], name: str) -> dict[str, Any]:
    ours = {r.seed: r for r in runs if r.name == name}
    baseline = {r.seed: r for r in runs if r.name == "baseline"}
    deltas = [r.val_loss - baseline[seed].val_loss for seed, r in ours.items() if seed in baseline]
    curve = baseline_curve(runs)
    loss, steps = mean(r.val_loss for r in ours.values()), next(iter(ours.values())).steps
    found = [seed_speedup(seed, baseline_curve(runs, seed), r.val_loss, r.steps) for seed, r in ours.items()]
    per_seed = [s for s in found if s is not None]
    # Without the seeds that diverged, those that are left would say too much good.
    over_seeds = speedup(per_seed, clear_speedups(runs, ours)) if len(per_seed) == len(ours) else None
    equal = equal_loss(curve, loss, steps)
    one, of_baseline = next(iter(ours.values())), next(iter(baseline.values()))
    data_ratio, flops_ratio = one.raw_tokens / of_baseline.raw_tokens, one.flops / of_baseline.flops
    plain = {r.seed: r for r in runs if r.name == "tst"} if name != "tst" else {}
    ends = [(r.phase_step_seconds[0], r.phase_step_seconds[-1]) for r in ours.values() if len(r.phase_step_seconds) > 1]
    ratios = [first / last for first, last in ends if first is not None and last is not None]
    return {
        "delta_val_loss": mean(deltas),
        "delta_val_loss_per_seed": deltas,
        "delta_val_loss_sd": stdev(deltas) if t_interval(deltas) else None,
        "delta_val_loss_interval": t_interval(deltas),
        "confidence": CONFIDENCE,
        "equal_loss_speedup": equal.speedup if equal is not None and "extrapolated" not in equal.how else None,
        "equal_loss": asdict(equal) if equal is not None else None,
        "speedup": asdict(over_seeds) if over_seeds is not None else None,
        "speedup_per_seed": [asdict(s) for s in per_seed],
        "longer_baselines": longer_baselines(runs, ours),
        "against_tst": paired(ours, plain),
        "steps_ratio": steps / of_baseline.steps,
        "flops_ratio": flops_ratio,
        "equal_flops": baseline_of(flops_ratio, runs, ours, baseline),
        "equal_data": baseline_of(data_ratio, runs, ours, baseline),
        "equal_time": equal_time(runs, ours, baseline),
        "phase_step_time_ratio": mean(ratios) if ratios else None,
    }


def baseline_of(ratio: float, runs: Sequence[Run], ours: dict[int, Run], baseline: dict[int, Run]) -> dict[str, Any]:
    """The baseline of ``ratio`` x the steps beside the variant: mean losses, and their paired difference."""
    steps = round(ratio * next(iter(baseline.values())).steps) if math.isfinite(ratio) else 0
    loss, how = loss_at(baseline_curve(runs), steps)
    if loss is None and any(r.name.startswith("baseline") and same_length(r.steps, steps) for r in runs):
        how = "diverged"
    by_seed = {seed: loss_at(baseline_curve(runs, seed), steps)[0] for seed in ours}
    deltas = [r.val_loss - other for seed, r in ours.items() if (other := by_seed[seed]) is not None]
    whole = loss is not None and len(deltas) == len(ours)
    return {
        "ratio": ratio,
        "baseline_steps": steps,
        "baseline_val_loss": loss,
        "val_loss": mean(r.val_loss for r in ours.values()),
        "delta_val_loss": mean(deltas) if whole else None,
        "delta_val_loss_per_seed": deltas if whole else None,
        "interval": t_interval(deltas) if whole else None,
        "how": how,
    }


def longer_baselines(runs: Sequence[Run], ours: dict[int, Run]) -> list[dict[str, Any]]:
    """The variant less each baseline of more steps, over the seeds that have both."""
    steps = next(iter(ours.values())).steps
    lengths = sorted({r.steps for r in runs if r.name.startswith("baseline") and r.steps > steps})
    found: list[dict[str, Any]] = []
    for n in lengths:
        longer = {r.seed: r for r in runs if r.name.startswith("baseline") and r.steps == n}
        if difference := paired(ours, longer):
            found.append({"baseline_steps": n, "ratio": n / steps, **difference})
    return found


def clear_speedups(runs: Sequence[Run], ours: dict[int, Run]) -> tuple[float | None, float | None]:
    """``clear_lengths`` in multiples of the variant's steps, among the lengths that all seeds have."""
    curves = [baseline_curve(runs, seed) for seed in ours]
    lengths = set.intersection(*({steps for steps, _ in curve} for curve in curves))  # one may have diverged
    if not lengths:
        return None, None
    common = [[point for point in curve if point[0] in lengths] for curve in curves]
    low, high = clear_lengths(common, [r.val_loss for r in ours.values()])
    steps = next(iter(ours.values())).steps
    return None if low is None else low / steps, None if high is None else high / steps


def paired(ours: dict[int, Run], others: dict[int, Run]) -> dict[str, Any] | None:
    """Mean difference of the losses with its interval, over the seeds that have both; None if none has."""
    deltas = [r.val_loss - others[seed].val_loss for seed, r in ours.items() if seed in others]
    if not deltas:
        return None
    return {
        "delta_val_loss": mean(deltas),
        "delta_val_loss_per_seed": deltas,
        "interval": t_interval(deltas),
        "seeds": len(deltas),
    }


def equal_time(runs: Sequence[Run], ours: dict[int, Run], baseline: dict[int, Run]) -> dict[str, Any]:
    """Seconds of the steps, and where the baseline is after the variant's: medians over seeds.

    Without what a run does once: the first one compiles for all, and a baseline that branched off was loaded midway.
    Each seed's ratio is its own: runs of one seed are trained beside each other, those of others at another time.
    Where they had not the same hardware or number of cores, as when one was added later, there is none; nor where one
    has a phase of too few logged steps for a pace.
    """
    paired_seeds = [seed for seed in ours if seed in baseline]
    alike = [seed for seed in paired_seeds if ours[seed].hardware == baseline[seed].hardware]
    timed = [(a, b) for seed in alike if (a := steady_of(ours[seed])) and (b := steady_of(baseline[seed]))]
    per_seed = [a / b for a, b in timed]
    found = baseline_of(median(per_seed) if per_seed else math.nan, runs, ours, baseline)
    return {
        "seconds": median(a for a, _ in timed) if timed else math.nan,
        "baseline_seconds": median(b for _, b in timed) if timed else math.nan,
        "ratio_per_seed": per_seed,
        "seeds_on_other_hardware": len(paired_seeds) - len(alike),
        **found,
    }


def steady_of(r: Run) -> float | None:
    """None for a phase without a pace: runs of before have the time with compiling there."""
    return None if None in r.phase_step_seconds else r.steady_seconds


def baseline_curve(runs: Sequence[Run], seed: int | None = None) -> list[tuple[int, float]]:
    """(steps, loss) of the baselines of all lengths, each with its own decay: of one seed, or the mean over seeds.

    A length with which one diverged is left out.
    """
    by_steps: dict[int, list[float]] = {}
    for r in runs:
        if r.name.startswith("baseline") and seed in (None, r.seed):
            by_steps.setdefault(r.steps, []).append(r.val_loss)
    return sorted((steps, mean(losses)) for steps, losses in by_steps.items() if all(map(math.isfinite, losses)))


def equal_loss(curve: Sequence[tuple[int, float]], loss: float, steps: int) -> EqualLoss | None:
    """Steps at which the baseline's losses, linear in log steps between the lengths that were run, reach ``loss``.

    Before the shortest one: "at most" its steps. Past the longest: "at least" its steps if it is longer than the
    variant, else the line through the two longest is followed up to 4 x the steps ("extrapolated"). None with one
    baseline, where that line never comes down to the loss, or where one of the losses is not finite.
    """
    if len(curve) < 2 or not all(map(math.isfinite, (loss, *(x for _, x in curve)))):
        return None
    found, bound = comes_down_to(loss, curve)
    (n0, l0), (n1, l1) = curve[-2:]
    if bound != "at least" or n1 > steps:
        return EqualLoss(round(found), found / steps, "interpolated" if bound == "measured" else bound)
    if l1 >= l0:
        return None
    log_n = _line(loss, l0, math.log(n0), l1, math.log(n1))
    if log_n >= math.log(4 * steps):
        return EqualLoss(4 * steps, 4.0, "at least, extrapolated")
    n = math.exp(log_n)
    return EqualLoss(round(n), n / steps, "extrapolated")


def loss_at(curve: Sequence[tuple[int, float]], steps: int) -> tuple[float | None, str]:
    """The baseline's loss after ``steps``, linear in log steps between lengths that were run; and how it is known."""
    for n, loss in curve:
        if same_length(n, steps):
            return loss, "measured"
    for (n0, l0), (n1, l1) in pairwise(curve):
        if n0 < steps < n1:
            return _line(math.log(steps), math.log(n0), l0, math.log(n1), l1), "interpolated"
    return None, "not run"


def same_length(steps: int, others: int) -> bool:
    """But for a step or a thousandth: a length of 1.9 x the steps and what bags read in as many are rounded apart."""
    return abs(steps - others) <= max(1, others / 1000)


def _line(x: float, x0: float, y0: float, x1: float, y1: float) -> float:
    return y0 + (x - x0) * (y1 - y0) / (x1 - x0)
