"""What is kept of comparisons: the folders of results, read."""

from __future__ import annotations

import csv
import io
import json
import math
import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import mean
from typing import Any

from token_superposition.experiment.files import write_whole
from token_superposition.experiment.form import restored
from token_superposition.experiment.intervals import t_interval
from token_superposition.experiment.summary import Run, comparison
from token_superposition.report.contents import interval, short

SEEDS = 3
"""Fewer have no interval that is of use: that of two lies by chance close around their mean now and then."""


@dataclass(frozen=True)
class Result:
    name: str
    about: dict[str, Any]
    summary: dict[str, Any]
    curves: list[dict[str, str]]
    strings: list[dict[str, str]]
    """What was memorised (results.memorisation), where that was measured."""
    copying: list[dict[str, str]]
    """Losses by what can be copied from the window (results.copying), where that was measured."""

    @cached_property
    def variants(self) -> dict[str, dict[str, Any]]:
        """What the comparison says of each variant, by its runs."""
        since_added = {"data_sha256": "", "precision": "", "steady_seconds": 0.0}  # the runs kept before lack them
        return comparison([Run(**since_added | r) for r in self.summary["runs"]])["variants"]

    @property
    def baseline(self) -> dict[str, Any]:
        return next(r for r in self.summary["runs"] if r["name"] == "baseline")

    @property
    def hardware(self) -> list[str]:
        return list(dict.fromkeys(r["hardware"] for r in self.summary["runs"]))

    @property
    def setting(self) -> str:
        """Model, batch and length in one line."""
        c = self.summary["config"]
        options = c["model"]["options"]
        t, bags = c["train"], c["superposition"]
        factor = t.get("embedding_lr_factor", 1.0)
        own = f", the embeddings at {factor:g} times that" if factor != 1 else ""
        of_input = bags.get("input_weighting", "uniform")  # older ones lack it
        precision = self.baseline.get("precision")  # the oldest lack it: float32, on cores that have no other
        precision = f" in {precision}" if precision not in (None, "", "float32") else ""
        read = "" if of_input == "uniform" else f" of the targets, {of_input} ones of what is read"
        return (
            f"{c['model']['architecture']} {options['num_hidden_layers']} x {options['hidden_size']}, "
            f"{short(self.baseline['parameters'])} parameters, {t['batch_size']} x {c['data']['sequence_length']} "
            f"tokens a step, {t['steps']:,} steps, {t['optimizer']} at {t['learning_rate']:g}{own}{precision}; tst: "
            f"s = {bags['bag_size']}, r = {bags['ratio']:g}, {bags['weighting']} weights{read}"
        )

    @property
    def in_blocks(self) -> bool:
        """Read in the order of the text before 2026-11-27, which probably flatters TST (LOG.md)."""
        return "common_bag" in self.summary["config"]["data"]

    @property
    def label(self) -> str:
        """The name, marked where it was read in blocks."""
        return f"{self.name}†" if self.in_blocks else self.name

    @property
    def seeds(self) -> list[int]:
        return sorted({r["seed"] for r in self.summary["runs"]})

    def losses(self, name: str) -> tuple[float, ...]:
        """Final validation losses of that run, seed by seed."""
        by_seed = {r["seed"]: r["val_loss"] for r in self.summary["runs"] if r["name"] == name}
        return tuple(by_seed[seed] for seed in self.seeds)


def at_equal_flops(name: str, c: dict[str, Any]) -> tuple[str, list[float]]:
    """A variant's name and its differences, seed by seed, to the baseline of as many FLOPs.

    Where no baseline tells that, the differences are those of equal steps, and the name says so.
    """
    ratio: float = c["flops_ratio"]
    if math.isclose(ratio, 1):
        return name, c["delta_val_loss_per_seed"]
    if (values := c["equal_flops"]["delta_val_loss_per_seed"]) is not None:
        return f"{name} (a baseline of {ratio:.3g} x the steps)", values
    return f"{name} (in {ratio:.3g} x the FLOPs)", c["delta_val_loss_per_seed"]


def first_shown(found: Sequence[Result]) -> dict[tuple[str, str], str]:
    """(comparison, run) -> the comparison before it that has the very same runs, where there is one."""
    again: dict[tuple[str, str], str] = {}
    seen: dict[float, str] = {}
    for r in found:
        for name in r.variants:
            losses = r.losses(name)
            if all(x in seen for x in losses):
                again[r.name, name] = seen[losses[0]]
            seen = dict.fromkeys(losses, r.name) | seen
    return again


def load(root: Path) -> list[Result]:
    """Comparisons in the order of their names, the shipped proof first, those read in blocks last."""
    found: list[Result] = []
    for folder in sorted(root.iterdir()):
        if (folder / "summary.json").is_file():
            about = tomllib.loads((folder / "about.toml").read_text())
            summary = restored(json.loads((folder / "summary.json").read_text()), {"runs": [Run]})
            tables = (rows(folder / f"{name}.csv") for name in ("curves", "strings", "copying"))
            found.append(Result(folder.name, about, summary, *tables))
    return sorted(found, key=lambda r: (r.name != "proof-cpu", r.in_blocks, r.name))


def unfinished_in(root: Path) -> list[Path]:
    return [p.parent for p in sorted(root.glob("*/curves.csv")) if not (p.parent / "summary.json").is_file()]


def rows(path: Path) -> list[dict[str, str]]:
    """Of a CSV file; none if there is no such file."""
    if not path.is_file():
        return []
    with path.open() as f:
        return list(csv.DictReader(f))


def write_rows(path: Path, names: Sequence[str], content: Iterable[Sequence[object]]) -> None:
    """A CSV file for ``rows``, which is not begun before the last of ``content`` is known."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(names)
    writer.writerows(content)
    write_whole(path, text.getvalue())


def verdict(values: Sequence[float]) -> str:
    """What differences say, seed by seed.

    >>> verdict((-0.2, -0.19, -0.21)), verdict((-0.1, 0.1, 0.0)), verdict((-0.1, -0.1))
    ('better', 'no clear difference', 'two seeds: a lead')
    """
    if not all(map(math.isfinite, values)):
        return "diverged"
    if len(values) < SEEDS:
        return f"{('one seed', 'two seeds')[len(values) - 1]}: a lead"
    low, high = t_interval(values) or (-math.inf, math.inf)
    return "better" if high < 0 else "worse" if low > 0 else "no clear difference"


def kept_at(about: dict[str, Any]) -> str:
    return f", kept at commit {about['commit']}" if "commit" in about else ""


def told(values: list[float]) -> str:
    """Mean and interval of differences.

    >>> told([-0.1, -0.12]), told([0.25])
    ('-0.110 (-0.237 to +0.017)', '+0.250')
    """
    ends = t_interval(values)
    return f"{mean(values):+.3f}" + (f" ({interval(ends, '+.3f')})" if ends else "")
