"""What to mistrust in a comparison: what else was run, what was left out, and where its runs are not alike."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any

from token_superposition.experiment.files import DIVERGED, RESULT
from token_superposition.report.contents import at_equal_flops, interval

if TYPE_CHECKING:
    from token_superposition.experiment.summary import Run
    from token_superposition.report.contents import Contents

NAMED = 3


def cautions(contents: Contents) -> list[tuple[str, str]]:
    """(label, sentence) for each; most comparisons have none."""
    runs = {r.directory: r for r in contents.runs}
    left_out = {d: sum(len(line.get("skipped", ())) for line in lines) for d, lines in contents.metrics.items()}
    found = {
        "steps left out": ", ".join(f"{n} of {runs[d].steps:,} in {d}" for d, n in left_out.items() if n),
        "the baseline": _mistuned(contents),
        "several variants": _several(contents),
        "not alike": _not_alike(contents.runs),
        "not shown": not_shown(contents.directory, runs),
    }
    if found["steps left out"]:
        found["steps left out"] += " (train.on_nonfinite): such a run has learned from fewer"
    return [(label, sentence) for label, sentence in found.items() if sentence]


def not_shown(directory: Path, shown: Collection[str]) -> str:
    """What ``runs/`` holds of finished runs beside those ``shown``."""
    finished = {p.parent.name for name in (RESULT, DIVERGED) for p in directory.glob(f"runs/*/{name}")}
    if not (others := sorted(finished - set(shown))):
        return ""
    names = ", ".join(others[:NAMED]) + (", ..." if len(others) > NAMED else "")
    return (
        f"{len(others)} more finished run{'s' if len(others) > 1 else ''} in {directory / 'runs'} ({names}); if they "
        "had a part in choosing what is shown, these figures are too good"
    )


def _mistuned(contents: Contents) -> str:
    """Whether a variant without bags, which differs from the baseline by its learning rates alone, ends below it."""
    without = {r.name for r in contents.runs if r.bag_size == 1 or r.ratio == 0}
    variants = contents.comparison["variants"].items()
    alike = {name: at_equal_flops(c) for name, c in variants if name in without and c["flops_ratio"] == 1}  # no heads
    lower = {name: e for name, e in alike.items() if e is not None and e["delta_val_loss"] < 0}
    if not lower:
        return ""
    name, best = min(lower.items(), key=lambda x: x[1]["delta_val_loss"])
    over = f"95% interval {interval(best['interval'], '+.3f')}" if best["interval"] else "one seed"
    clear = best["interval"] is not None and best["interval"][1] < 0
    suits, is_rate = ("suits", "is") if clear else ("may suit", "may be")
    return (
        f"{name} has no bags either and ends {-best['delta_val_loss']:.3f} nats below it ({over}"
        f"{'' if clear or not best['interval'] else ', no clear difference'}): its learning rate {suits} the ordinary "
        f"run better, so part of what the others gain over the baseline {is_rate} the rate"
    )


def _several(contents: Contents) -> str:
    """Which of several variants differ clearly, from the baseline and from tst, counting how many were tried."""
    variants = contents.comparison["variants"]
    from_baseline = _differ({name: at_equal_flops(c) for name, c in variants.items()})
    from_tst = _differ({name: c["against_tst"] for name, c in variants.items()})
    if not from_baseline:
        return ""
    more = f", and {from_tst} from tst" if from_tst else ""
    return (
        f"each interval is as if that variant alone had been tried; {from_baseline} from the baseline at equal "
        f"FLOPs{more} (Holm's correction)"
    )


def _differ(found: dict[str, dict[str, Any] | None]) -> str:
    """Nothing of fewer than two, of which there is nothing to correct."""
    from token_superposition.experiment.intervals import chance, holm

    values = {name: e["delta_val_loss_per_seed"] for name, e in found.items() if e is not None and e["interval"]}
    if len(values) < 2:
        return ""
    kept = holm([chance(v) for v in values.values()])
    told = [name for name, one in zip(values, kept, strict=True) if one]
    verb = "differs" if len(told) < 2 else "differ"
    return f"with {len(values)} of them {' and '.join(told) if told else 'none'} {verb} clearly"


def _not_alike(runs: Sequence[Run]) -> str:
    versions = dict.fromkeys(map(versions_of, runs))
    return f"the runs are of several versions, {'; '.join(versions)}" if len(versions) > 1 else ""


def versions_of(run: Run) -> str:
    return ", ".join(f"{name} {v}" for name, v in run.versions.items())


ARM_HEADERS = ("run", "seeds", "steps", "mean loss", "sd", "bits/byte")


def arms(runs: Sequence[Run]) -> list[tuple[str, ...]]:
    """A row for each way of training: mean and standard deviation of the loss over seeds; none with one seed."""
    by_name: dict[str, list[Run]] = {}
    for r in runs:
        by_name.setdefault(r.name, []).append(r)
    if all(len(of) == 1 for of in by_name.values()):
        return []
    rows: list[tuple[str, ...]] = []
    for name, of in by_name.items():
        losses = [r.val_loss for r in of]
        figures = ("diverged", "", "")
        if all(map(math.isfinite, losses)):
            spread = f"{stdev(losses):.4f}" if len(of) > 1 else ""
            figures = (f"{mean(losses):.4f}", spread, f"{mean(r.val_bpb for r in of):.4f}")
        rows.append((name, str(len(of)), f"{of[0].steps:,}", *figures))
    return rows
