"""The sentences of a comparison: the bottom line, and each variant by equal FLOPs, loss, data and time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from token_superposition.report.contents import Contents, at_equal_flops, duration, interval, speedup_in_flops


def bottom_line(contents: Contents) -> list[tuple[str, str]]:
    """(variant, sentence): who is ahead at equal FLOPs, by how many steps, and at equal text."""
    return [(f"{name} in short", in_short(c)) for name, c in contents.comparison["variants"].items()]


def in_short(c: dict[str, Any]) -> str:
    """The bottom line of one variant."""
    equal, seeds = at_equal_flops(c), len(c["delta_val_loss_per_seed"])
    if equal is None:
        return (
            f"its steps cost {c['flops_ratio']:.2f} x the FLOPs of the baseline's, and no baseline of as many was run"
        )
    if not math.isfinite(equal["delta_val_loss"]):
        return "diverged, or its baseline did"
    parts = [f"{_difference(equal)} the baseline at equal FLOPs ({_sure(equal['interval'], seeds)})"]
    if equal["delta_val_loss"] < 0 and _is_clear(equal["interval"]) and (times := _times(speedup_in_flops(c), seeds)):
        parts.append(f"for its loss the baseline needs {times}")
    if (text := c["equal_data"])["delta_val_loss"] is not None and text["ratio"] != 1:
        unclear = "" if _is_clear(text["interval"]) else " (no clear difference)"
        parts.append(f"at equal text {_difference(text)} it{unclear}")
    return "; ".join(parts)


def _is_clear(ends: Sequence[float] | None) -> bool:
    """Of one seed there is no interval."""
    return ends is None or not ends[0] <= 0 <= ends[1]


def _difference(of: dict[str, Any]) -> str:
    delta = of["delta_val_loss"]
    return f"{abs(delta):.3f} nats {'below' if delta < 0 else 'above'}"


def _sure(ends: Sequence[float] | None, seeds: int) -> str:
    if ends is None:
        return "one seed: a lead, without an interval"
    sure = ": no clear difference" if not _is_clear(ends) else "; a lead" if seeds == 2 else ""
    return f"95% interval {interval(ends, '+.3f')} over {seeds} seeds{sure}"


def _times(s: dict[str, Any] | None, seeds: int) -> str:
    """Where seeds are bounds the end that is sure, if there is one; else the mean with its interval."""
    if s is None or (s["bound"] == "at least" and s["low"] is None and seeds > 1):
        return ""
    if s["bound"] == "at least" and seeds > 1:
        return f"at least {s['low']:.2f} x the FLOPs (95% lower bound)"
    ends = (s["low"], s["high"])
    known = f" (95% interval {interval(ends, '.2f')})" if ends != (None, None) else ""
    return f"{_about(s)}{s['geometric_mean']:.2f} x the FLOPs{known}"


def _about(s: dict[str, Any]) -> str:
    """Over several seeds a bound counts in the mean as if it were measured, so that the mean is none."""
    if s["bound"] == "measured":
        return ""
    return "about " if s["seeds"] > 1 else f"{s['bound']} "


def verdicts(contents: Contents) -> list[tuple[str, str]]:
    """(accounting, sentence) for each variant: equal FLOPs, loss, data and time, and the cost of a step."""
    result: list[tuple[str, str]] = []
    variants: dict[str, dict[str, Any]] = contents.comparison["variants"]
    epochs = {r.name: r.epochs for r in contents.runs}
    for name, c in variants.items():
        label = f"{name}: " if len(variants) > 1 else ""
        several = c["speedup"] is not None and len(c["delta_val_loss_per_seed"]) > 1
        length = c["steps_ratio"]
        more = c["flops_ratio"] != 1  # heads for further tokens, or a length of its own
        equal = f"in {length:.3g} x the steps" if length != 1 else f"equal {'steps' if more else 'FLOPs'}"
        result.append((f"{label}{equal}", equal_steps(name, c)))
        if not math.isfinite(c["delta_val_loss"]):
            continue
        if more:
            result.append((f"{label}equal FLOPs", equal_flops(c)))
        steps = round(length * contents.baseline.steps)
        result.append((f"{label}equal loss", speedup(c) if several else equal_loss(name, c, steps, contents)))
        for longer in c["longer_baselines"]:
            other = f"a baseline of {longer['baseline_steps']:,} steps"
            result.append((f"{label}{longer['ratio']:.3g} x the steps", paired(name, other, longer)))
        if plain := c["against_tst"]:
            result.append((f"{label}against tst", paired(name, "tst", plain)))
        result.append((f"{label}equal data", equal_data(c["equal_data"])))
        if epochs[name] > 1:
            text = f"{name} reads its text {epochs[name]:.1f} times, the baseline {epochs['baseline']:.1f} times"
            result.append((f"{label}repeated text", f"{text}; fresh text is what TST pays with, so prepare more"))
        result.append((f"{label}equal time", equal_time(c["equal_time"])))
        if c["phase_step_time_ratio"] is not None:
            result.append(
                (f"{label}a step", f"{c['phase_step_time_ratio']:.2f} x the time of an ordinary one while superposed")
            )
    return result


def equal_flops(c: dict[str, Any]) -> str:
    """Of a variant whose steps together cost more (or less) than the baseline's."""
    equal, ratio = c["equal_flops"], c["flops_ratio"]
    text = f"its steps take {ratio:.2f} x the FLOPs of the baseline's, which in as many takes "
    return text + against(equal)


def equal_steps(name: str, c: dict[str, Any]) -> str:
    delta, seeds = c["delta_val_loss"], len(c["delta_val_loss_per_seed"])
    ends = c["delta_val_loss_interval"]
    if not math.isfinite(delta):
        lost = sum(not math.isfinite(d) for d in c["delta_val_loss_per_seed"])
        return f"{name} or its baseline diverged with {lost} of {seeds} seeds, so there is no difference to tell"
    known = (
        f" (mean of {seeds} paired seeds; 95% interval of the difference {interval(ends, '+.4f')}, "
        f"{clear(ends, seeds)})"
        if ends is not None
        else " (one seed: there is no interval, and another seed may differ by more; --compare.seeds 0 1 2 3 4)"
    )
    if delta == 0:
        return f"{name} and the baseline end at the same loss{known}"
    return f"{name} ends {abs(delta):.4f} nats {'below' if delta < 0 else 'above'} the baseline{known}"


def paired(name: str, other: str, difference: dict[str, Any]) -> str:
    delta, ends = difference["delta_val_loss"], difference["interval"]
    if not math.isfinite(delta):
        return f"{name} or {other} diverged"
    known = (
        f"95% interval {interval(ends, '+.4f')}, {clear(ends, difference['seeds'])}" if ends is not None else "one seed"
    )
    return f"{name} ends {abs(delta):.4f} nats {'below' if delta < 0 else 'above'} {other} ({known})"


def clear(ends: Sequence[float], seeds: int) -> str:
    if ends[0] <= 0 <= ends[1]:
        return "which contains 0: no clear difference"
    return "which excludes 0" + ("; of two seeds, which may be close by luck, a lead" if seeds == 2 else "")


def speedup(c: dict[str, Any]) -> str:
    """Over several seeds, each against its own baselines."""
    s, per_seed, in_flops = c["speedup"], c["speedup_per_seed"], speedup_in_flops(c)
    mean_of = f"geometric mean of {s['seeds']} seeds, each against its own baselines of several lengths"
    if s["bound"] == "at least" and s["low"] is not None:
        text = f"at least {s['low']:.2f} x the steps (95% lower bound; {mean_of}, {s['geometric_mean']:.2f} x"
    else:
        ends = (s["low"], s["high"])
        known = f"95% interval {interval(ends, '.2f')}" if ends != (None, None) else "no interval"
        text = f"{_about(s)}{s['geometric_mean']:.2f} x the steps ({mean_of}; {known}"
    for bound, why in (
        ("at least", "even the longest baseline ends above the variant's loss"),
        ("at most", "even the shortest baseline ends below the variant's loss"),
    ):
        found = [p["speedup"] for p in per_seed if p["bound"] == bound]
        if found:
            only = f"only known to be {bound} {found[0]:.2f} x, as which they count"
            text += f"; {len(found)} of {s['seeds']} seeds {only}: {why}"
    if in_flops is not None and not math.isclose(in_flops["geometric_mean"], s["geometric_mean"], rel_tol=1e-3):
        text += f"; its steps cost more: {in_flops['geometric_mean']:.2f} x in FLOPs"
    return f"the baseline needs {text})"


def equal_loss(name: str, c: dict[str, Any], steps: int, contents: Contents) -> str:
    """Of one seed, or of the means over several."""
    equal: dict[str, Any] | None = c["equal_loss"]
    diverged = any(r.name.startswith("baseline") and not math.isfinite(r.val_loss) for r in contents.runs)
    if equal is None and diverged:
        return "not measured: a baseline of another length diverged"
    if equal is None and contents.lengths > 1:
        return "not measured: the baselines of more steps do not end lower"
    if equal is None:
        return (
            f"not measured; longer baselines (--compare.baseline-lengths 1 1.5 2) show what they need for {name}'s loss"
        )
    n, how = equal["baseline_steps"], equal["how"]
    about = how.partition(",")[0] if how.startswith("at ") else "about"
    source = SOURCES["extrapolated" if "extrapolated" in how else how]
    a_step = c["flops_ratio"] / c["steps_ratio"]
    cost = (
        ""
        if math.isclose(a_step, 1, rel_tol=1e-3)
        else f"; its steps cost more: {equal['speedup'] / a_step:.2f} x in FLOPs"
    )
    return f"the baseline would need {about} {n:,} steps, {equal['speedup']:.2f} x the {steps:,} ({source}{cost})"


SOURCES = {
    "extrapolated": "extrapolated from shorter baselines",
    "interpolated": "between baselines that were run",
    "at least": "the longest that was run, which is still above",
    "at most": "the shortest that was run, which is below already",
}


def equal_time(equal: dict[str, Any]) -> str:
    apart = equal["seeds_on_other_hardware"]
    seeds = f"{apart} seed{'s' if apart > 1 else ''}"
    of_apart = f"with {seeds} it ran on other hardware, or with another number of cores, than its baseline"
    if not math.isfinite(equal["ratio"]):
        return f"not measured: {of_apart if apart else 'a phase of a run has too few logged steps to time'}"
    per_seed: list[float] = equal["ratio_per_seed"]
    if len(per_seed) > 1:
        low, high = min(per_seed), max(per_seed)
        disagree = ", which do not agree that it is slower or faster" if low < 1 < high else ""
        how = f"median of the seeds' own ratios, {low:.2f} to {high:.2f}{disagree}"
    else:
        how = f"{duration(equal['seconds'])} against {duration(equal['baseline_seconds'])}"
    left_out = f"; {of_apart}: left out" if apart else ""
    text = f"its steps take {equal['ratio']:.2f} x the time of the baseline's ({how}; without compiling{left_out})"
    return f"{text}; in that time the baseline takes {against(equal)}"


def equal_data(equal: dict[str, Any]) -> str:
    return f"a baseline that reads as much text takes {against(equal)}"


def against(equal: dict[str, Any]) -> str:
    """Where the baseline of another length ends."""
    n, loss = equal["baseline_steps"], equal["baseline_val_loss"]
    if loss is None:
        return f"{n:,} steps, {missing(equal)}"
    how = "" if equal["how"] == "measured" else f" ({equal['how']})"
    return f"{n:,} steps and ends at {loss:.4f}{how}, against {equal['val_loss']:.4f}{paired_difference(equal)}"


def paired_difference(equal: dict[str, Any]) -> str:
    """Of one seed there is no interval."""
    if not (ends := equal["interval"]):
        return ""
    seeds = len(equal["delta_val_loss_per_seed"])
    return f": {equal['delta_val_loss']:+.4f}, 95% interval {interval(ends, '+.4f')}, {clear(ends, seeds)}"


def missing(equal: dict[str, Any]) -> str:
    """Why nothing is known of a baseline of another length, and what tells it."""
    if equal["how"] == "diverged":
        return "with which it diverged"
    ratio = math.ceil(100 * equal["ratio"]) / 100  # not below it, where it would tell nothing
    remedy = f" (to measure it, add {ratio:g} to --compare.baseline-lengths)" if ratio else ""
    return f"a length that was not run{remedy}"
