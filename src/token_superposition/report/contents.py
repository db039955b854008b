"""What a comparison directory holds, and the sentences and rows that table and page share."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tomli_w

from token_superposition.errors import TokenSuperpositionError
from token_superposition.experiment.config import without_none
from token_superposition.experiment.files import METRICS, SUMMARY
from token_superposition.experiment.form import misfit

if TYPE_CHECKING:
    from token_superposition.experiment.summary import Run

FORM = {
    "format": Literal[1],
    "config": dict[str, Any],
    "data": {
        "train": {"tokens": int, "documents": int},
        "validation": {"bytes_per_token": float},
        "vocab_size": int,
    },
    "samples": [{"name": str, "prompt": str, "text": str}],
    "note": str | None,
}
"""Of summary.json, beside the runs; the comparison is made of these again."""
LINE = {"step": int, "seconds": float, "flops": float, "raw_tokens": float}
"""Of metrics.jsonl; that of a validation has val_loss, too."""


@dataclass(frozen=True)
class Contents:
    summary: dict[str, Any]
    runs: list[Run]
    comparison: dict[str, Any]
    metrics: dict[str, list[dict[str, Any]]]
    """Lines of metrics.jsonl by run directory."""
    config_text: str
    directory: Path

    @property
    def baseline(self) -> Run:
        """The first seed's. It has the steps of every variant that has no length of its own."""
        return next(r for r in self.runs if r.name == "baseline")

    @property
    def lengths(self) -> int:
        """In how many lengths the baseline was run."""
        return len({r.steps for r in self.runs if r.name.startswith("baseline")})


def read(directory: Path) -> Contents:
    """Raises ``TokenSuperpositionError`` if ``directory`` holds no finished comparison, or files of another form."""
    # Not above: it imports transformers' trainer, for which tst plan does not wait.
    from token_superposition.experiment.summary import Run, comparison

    path = directory / SUMMARY
    try:
        summary: Any = json.loads(path.read_text(encoding="utf-8"))
        wrong = misfit(summary, FORM | {"runs": [Run]}, path.name)
    except OSError as e:
        raise TokenSuperpositionError(
            f"{directory} holds no finished comparison ({e}); make one with tst compare or tst demo"
        ) from None
    except (ValueError, RecursionError) as e:
        summary, wrong = None, str(e)
    if not wrong and not _paired(summary["runs"]):
        wrong = f"{path.name}: runs are not all beside a baseline of their seed"
    if wrong:
        raise TokenSuperpositionError(
            f"{path} has not the form that tst compare writes ({wrong}); give tst compare again, which keeps the "
            "finished runs"
        )
    runs = [Run(**r) for r in summary["runs"]]
    metrics = {r.directory: _metrics(directory / "runs" / r.directory / METRICS) for r in runs}
    config_text = tomli_w.dumps(without_none(summary["config"]))  # config.toml may already ask for more
    return Contents(summary, runs, comparison(runs), metrics, config_text, directory)


def _paired(runs: list[dict[str, Any]]) -> bool:
    seeds = {r["seed"] for r in runs}
    return bool(seeds) and seeds == {r["seed"] for r in runs if r["name"] == "baseline"}


def _metrics(path: Path) -> list[dict[str, Any]]:
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        wrong = next((bad for i, m in enumerate(lines, 1) if (bad := _no_metrics(m, f"line {i}"))), None)
    except (OSError, ValueError, RecursionError) as e:
        lines, wrong = [], str(e)
    if wrong:
        raise TokenSuperpositionError(
            f"{path} has lines that are no metrics of a run ({wrong}); remove {path.parent} and give tst compare "
            "again, which trains that run anew"
        )
    return lines


def _no_metrics(line: Any, where: str) -> str | None:
    return misfit(line, LINE, where) or ("val_loss" in line and misfit(line, {"val_loss": float}, where)) or None


def rows(contents: Contents) -> list[tuple[str, ...]]:
    """A row for each run: name, seed, bag, steps, latent tokens, raw tokens, time, loss, bits per byte."""
    return [
        (
            r.name,
            str(r.seed),
            f"{r.bag_size} x {r.ratio:.0%}" if r.bag_size > 1 else "1",
            f"{r.steps:,}",
            short(r.latent_tokens),
            short(r.raw_tokens),
            duration(r.train_seconds),
            *((f"{r.val_loss:.4f}", f"{r.val_bpb:.4f}") if math.isfinite(r.val_loss) else ("diverged", "")),
        )
        for r in contents.runs
    ]


HEADERS = ("run", "seed", "bags", "steps", "latent tokens", "raw tokens", "time", "val. loss", "bits/byte")


INTERVAL_HEADERS = ("variant", "difference", "95% interval", "seeds", "speed-up", "95% interval", "time", "FLOPs")


def interval_table(contents: Contents) -> list[tuple[str, ...]]:
    """Headers and a row for each variant: mean loss difference and speed-up to equal loss in FLOPs, with intervals; its
    time. Its FLOPs only where not all are the baseline's.
    """
    rows = [
        (
            name,
            f"{c['delta_val_loss']:+.3f}" if math.isfinite(c["delta_val_loss"]) else "diverged",
            interval(c["delta_val_loss_interval"], "+.3f"),
            str(len(c["delta_val_loss_per_seed"])),
            f"{BOUNDS[s['bound']]}{s['geometric_mean']:.2f}" if (s := speedup_in_flops(c)) else "not measured",
            interval((s["low"], s["high"]), ".2f") if s else "none",
            f"{x:.2f}" if math.isfinite(x := c["equal_time"]["ratio"]) else "not measured",
            f"{c['flops_ratio']:.2f}",
        )
        for name, c in contents.comparison["variants"].items()
    ]
    shown = len(INTERVAL_HEADERS) - all(row[-1] == "1.00" for row in rows)
    return [row[:shown] for row in (INTERVAL_HEADERS, *rows)]


def speedup_in_flops(c: dict[str, Any]) -> dict[str, Any] | None:
    """The speed-up to equal loss, which counts steps, of a variant whose steps may cost more than the baseline's.

    None, too, where no baseline of more steps tells more than that the variant ends below all.
    """
    if (s := c["speedup"]) is None or (s["bound"] == "at least" and not c["longer_baselines"]):
        return None
    a_step = c["flops_ratio"] / c["steps_ratio"]
    ends = {end: None if s[end] is None else s[end] / a_step for end in ("low", "high")}
    return s | ends | {"geometric_mean": s["geometric_mean"] / a_step}


BOUNDS = {"measured": "", "at least": ">= ", "at most": "<= ", "not comparable": "~ "}


def interval(ends: Sequence[float | None] | None, form: str) -> str:
    """
    >>> interval((0.5, 1.25), ".2f"), interval((0.5, None), ".2f"), interval(None, ".2f")
    ('0.50 to 1.25', '0.50 or more', 'none')
    """
    low, high = ends if ends is not None else (None, None)
    if low is None:
        return "none" if high is None else f"{high:{form}} or less"
    return f"{low:{form}} or more" if high is None else f"{low:{form}} to {high:{form}}"


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
        result.append(
            (f"{label}equal loss", speedup(c) if several else equal_loss(name, c["equal_loss"], steps, contents))
        )
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
        f"{told_from_chance(ends, seeds)})"
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
        f"95% interval {interval(ends, '+.4f')}, {told_from_chance(ends, difference['seeds'])}"
        if ends is not None
        else "one seed"
    )
    return f"{name} ends {abs(delta):.4f} nats {'below' if delta < 0 else 'above'} {other} ({known})"


def told_from_chance(ends: Sequence[float], seeds: int) -> str:
    if ends[0] <= 0 <= ends[1]:
        return "which contains 0: not told from chance"
    return "which excludes 0" + ("; of two seeds, which may be close by luck, a lead" if seeds == 2 else "")


def speedup(c: dict[str, Any]) -> str:
    """Over several seeds, each against its own baselines."""
    s, per_seed, in_flops = c["speedup"], c["speedup_per_seed"], speedup_in_flops(c)
    about = {"measured": "", "at least": "at least ", "at most": "at most ", "not comparable": "about "}[s["bound"]]
    text = (
        f"the baseline needs {about}{s['geometric_mean']:.2f} x the steps (geometric mean of {s['seeds']} seeds, each "
        "against its own baselines of several lengths; "
    )
    if s["low"] is None and s["high"] is None:
        text += "no interval"
    elif s["bound"] == "at least":  # which is not the mean's: that of a bound has none
        text += f"with its whole 95% interval the variant ends below baselines of up to {s['low']:.2f} x"
    else:
        text += f"95% interval {interval((s['low'], s['high']), '.2f')}"
    for bound, why in (
        ("at least", "its longest baseline is still above the variant's loss"),
        ("at most", "its shortest baseline is below the variant's loss already"),
    ):
        found = [p["speedup"] for p in per_seed if p["bound"] == bound]
        if found:
            text += f"; {len(found)} of {s['seeds']} seeds only known to be {bound} {found[0]:.2f} x: {why}"
    if in_flops is not None and not math.isclose(in_flops["geometric_mean"], s["geometric_mean"], rel_tol=1e-3):
        text += f"; its steps cost more: {in_flops['geometric_mean']:.2f} x in FLOPs"
    return text + ")"


def equal_loss(name: str, equal: dict[str, Any] | None, steps: int, contents: Contents) -> str:
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
    return f"the baseline would need {about} {n:,} steps, {equal['speedup']:.2f} x the {steps:,} ({source})"


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
        return f"not measured: {of_apart if apart else 'no step of the baseline was timed'}"
    per_seed: list[float] = equal["ratio_per_seed"]
    several = f" ({min(per_seed):.2f} to {max(per_seed):.2f} by seed)" if len(per_seed) > 1 else ""
    several += f" ({of_apart}: left out)" if apart else ""
    text = (
        f"{duration(equal['seconds'])} of steps against {duration(equal['baseline_seconds'])} (medians over seeds, "
        f"without compiling), {equal['ratio']:.2f} x{several}; in that time, "
        "taken as exact, the baseline takes "
    )
    return text + against(equal)


def equal_data(equal: dict[str, Any]) -> str:
    return f"a baseline that reads as much text takes {against(equal)}"


def against(equal: dict[str, Any]) -> str:
    """Where the baseline of another length ends."""
    n, loss = equal["baseline_steps"], equal["baseline_val_loss"]
    if loss is None:
        return f"{n:,} steps; {missing(equal)}"
    how = "" if equal["how"] == "measured" else f" ({equal['how']})"
    return f"{n:,} steps and ends at {loss:.4f}{how}, against {equal['val_loss']:.4f}{paired_difference(equal)}"


def missing(equal: dict[str, Any]) -> str:
    """Why nothing is known of a baseline of another length, and what tells it."""
    if equal["how"] == "diverged":
        return "it diverged with some seed"
    ratio = math.ceil(100 * equal["ratio"]) / 100  # not below it, where it would tell nothing
    remedy = f" (--compare.baseline-lengths with {ratio:g} among them tells)" if ratio else ""
    return f"it was not run{remedy}"


def paired_difference(equal: dict[str, Any]) -> str:
    """Of one seed there is no interval."""
    if not (ends := equal["interval"]):
        return ""
    seeds = len(equal["delta_val_loss_per_seed"])
    return f": {equal['delta_val_loss']:+.4f}, 95% interval {interval(ends, '+.4f')}, {told_from_chance(ends, seeds)}"


def short(n: float) -> str:
    """Three digits; what they round up to a thousand of a unit is one of the next.

    >>> short(1_234_567), short(2_097_152), short(999_600), short(999.5), short(999)
    ('1.23M', '2.1M', '1M', '1k', '999')
    """
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if float(digits := f"{n / size:.3g}") >= 1:
            return digits + unit
    return f"{n:g}"


def duration(seconds: float) -> str:
    """
    >>> duration(4.56), duration(80), duration(95), duration(7182)
    ('4.6 s', '80 s', '1.6 min', '2 h 0 min')
    """
    if seconds < 10:
        return f"{seconds:.2g} s"
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.1f} min"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min"
