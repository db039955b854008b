"""What a comparison directory holds, and the rows that table and page share."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tomli_w

from token_superposition.errors import TokenSuperpositionError
from token_superposition.experiment.files import METRICS, SUMMARY, line_of
from token_superposition.experiment.form import misfit, restored
from token_superposition.experiment.tree import without_none

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
        form = FORM | {"runs": [Run]}
        summary: Any = restored(json.loads(path.read_text(encoding="utf-8")), form)
        wrong = misfit(summary, form, path.name)
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
        lines = [line_of(line) for line in path.read_text(encoding="utf-8").splitlines()]
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
    """Headers and a row for each variant: mean loss difference at equal FLOPs and speed-up to equal loss in FLOPs, with
    intervals; its time. Its FLOPs only where not all are the baseline's.
    """
    rows = [
        (
            name,
            *difference_cells(c),
            str(len(c["delta_val_loss_per_seed"])),
            mean_speedup(s) if (s := speedup_in_flops(c)) else "not measured",
            interval((s["low"], s["high"]), ".2f") if s else "none",
            f"{x:.2f}" if math.isfinite(x := c["equal_time"]["ratio"]) else "not measured",
            f"{c['flops_ratio']:.2f}",
        )
        for name, c in contents.comparison["variants"].items()
    ]
    shown = len(INTERVAL_HEADERS) - all(row[-1] == "1.00" for row in rows)
    return [row[:shown] for row in (INTERVAL_HEADERS, *rows)]


def at_equal_flops(c: dict[str, Any]) -> dict[str, Any] | None:
    """The mean difference of the losses, that of each seed, and the interval; None where no baseline of as many FLOPs
    was run."""
    if c["flops_ratio"] == 1 or not math.isfinite(c["delta_val_loss"]):
        names = {"delta_val_loss": "", "delta_val_loss_per_seed": "_per_seed", "interval": "_interval"}
        return {name: c[f"delta_val_loss{end}"] for name, end in names.items()}
    equal = c["equal_flops"]
    return equal if equal["delta_val_loss"] is not None else None


def difference_cells(c: dict[str, Any]) -> tuple[str, str]:
    if (equal := at_equal_flops(c)) is None:
        return "not run", "none"
    known = math.isfinite(equal["delta_val_loss"])
    return f"{equal['delta_val_loss']:+.3f}" if known else "diverged", interval(equal["interval"], "+.3f")


def speedup_in_flops(c: dict[str, Any]) -> dict[str, Any] | None:
    """The speed-up to equal loss, which counts steps, of a variant whose steps may cost more than the baseline's.

    None, too, where no baseline of more steps tells more than that the variant ends below all.
    """
    if (s := c["speedup"]) is None or (s["bound"] == "at least" and not c["longer_baselines"]):
        return None
    a_step = c["flops_ratio"] / c["steps_ratio"]
    ends = {end: None if s[end] is None else s[end] / a_step for end in ("low", "high")}
    return s | ends | {"geometric_mean": s["geometric_mean"] / a_step}


def mean_speedup(s: dict[str, Any]) -> str:
    """Of one seed it is a bound where the seed is; of several a rough mean, for a bound counts there as if measured.

    >>> mean_speedup({"bound": "at least", "geometric_mean": 1.5, "seeds": 1})
    '>= 1.50'
    >>> mean_speedup({"bound": "at least", "geometric_mean": 1.5, "seeds": 5})
    '~ 1.50'
    """
    mark = {"measured": "", "at least": ">= ", "at most": "<= ", "not comparable": "~ "}[s["bound"]]
    return f"{'~ ' if mark and s['seeds'] > 1 else mark}{s['geometric_mean']:.2f}"


def interval(ends: Sequence[float | None] | None, form: str) -> str:
    """
    >>> interval((0.5, 1.25), ".2f"), interval((0.5, None), ".2f"), interval(None, ".2f")
    ('0.50 to 1.25', '0.50 or more', 'none')
    """
    low, high = ends if ends is not None else (None, None)
    if low is None:
        return "none" if high is None else f"{high:{form}} or less"
    return f"{low:{form}} or more" if high is None else f"{low:{form}} to {high:{form}}"


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
