"""Draws a benchmark's latest rows: python -m benchmarks.plot loss"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot as plt

from benchmarks.measure import read_rows

DOCS = Path(__file__).parent.parent / "docs"


def latest(benchmark: str) -> dict[str, dict[str, dict[str, str]]]:
    """Rows by case and contender; a later row replaces an earlier one."""
    cases: dict[str, dict[str, dict[str, str]]] = {}
    for row in read_rows():
        if row["benchmark"] == benchmark and row["contender"] != "peak":  # a rate to compare with, not a contender
            cases.setdefault(row["case"], {})[row["contender"]] = row
    return cases


def plot(benchmark: str) -> Path:
    """Time with its range, and memory where it was measured, one row of panels a case."""
    plt.rcParams |= {"svg.hashsalt": "token-superposition", "svg.fonttype": "none"}
    cases = latest(benchmark)
    measures = ["median_ms"]
    if any(row["extra_mb"] for rows in cases.values() for row in rows.values()):
        measures.append("extra_mb")
    heights = [len(rows) for rows in cases.values()]
    figure, axes = plt.subplots(
        len(cases), len(measures), squeeze=False, height_ratios=heights, layout="constrained",
        figsize=(5.5 * len(measures), 0.9 * len(cases) + 0.32 * sum(heights)),
    )  # fmt: skip
    for panels, (case, rows) in zip(axes, cases.items(), strict=True):
        names = list(rows)[::-1]
        colours = ["#d1495b" if name.startswith(("ours", "s = 16")) else "#8d99ae" for name in names]
        for panel, measure in zip(panels, measures, strict=False):
            values = [float(rows[n][measure] or 0) for n in names]
            error: Any = None
            if measure == "median_ms":
                low = [v - float(rows[n]["min_ms"]) for n, v in zip(names, values, strict=True)]
                high = [float(rows[n]["max_ms"]) - v for n, v in zip(names, values, strict=True)]
                error = [low, high]
            bars = panel.barh(names, values, color=colours, xerr=error, error_kw={"elinewidth": 1})
            panel.bar_label(bars, [f"{v:,.0f}" for v in values], padding=4, fontsize=8)
            panel.margins(x=0.18)
            panel.locator_params(axis="x", nbins=5)
            panel.set_xlabel("ms, median and range" if measure == "median_ms" else "MB beyond inputs and gradients")
            panel.spines[["top", "right"]].set_visible(False)
        hardware = list(rows.values())[-1]["hardware"]
        panels[0].set_title(f"{case} ({hardware})", loc="left", fontsize=10)
        if len(panels) > 1:
            panels[1].set_yticklabels([])
    path = DOCS / f"benchmark_{benchmark}.svg"
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
    return path


if __name__ == "__main__":
    print(plot(sys.argv[1]))
