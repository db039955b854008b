"""Figures of the findings page over all comparisons."""

from __future__ import annotations

import itertools
from collections import defaultdict
from statistics import mean

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from results.kept import SEEDS, Result, at_equal_flops, verdict
from token_superposition.experiment.intervals import t_interval
from token_superposition.report.figures import COLOURS, svg


def forest(found: list[Result], again: dict[tuple[str, str], str], widest: float = 0.4) -> str:
    """Every difference with its interval, one line each; one further off than ``widest`` stands at the edge."""
    entries = [
        (
            f"{r.label}: {label.replace('a baseline of ', 'baseline ').replace(' x the steps', ' x')}",
            values,
        )
        for r in found
        for name, c in r.variants.items()
        if (r.name, name) not in again
        for label, values in (at_equal_flops(name, c),)
    ][::-1]
    figure = Figure(figsize=(7.6, 1.2 + 0.3 * len(entries)), layout="constrained")
    axes = figure.subplots()
    colours = {"better": COLOURS[1], "worse": COLOURS[2]}
    for y, (_, values) in enumerate(entries):
        colour = colours.get(verdict(values), COLOURS[0])
        if abs(mean(values)) > widest:
            axes.annotate(f"{mean(values):+.2f} →", (widest, y), ha="right", va="center", fontsize=8, color=colour)
            continue
        if len(values) >= SEEDS and (ends := t_interval(values)):
            axes.plot(ends, (y, y), color=colour, lw=2)
        axes.plot(values, [y] * len(values), ".", color=colour, alpha=0.5)
        # Hollow: too few seeds for an interval.
        axes.plot(mean(values), y, "o", color=colour, ms=6, mfc=colour if len(values) >= SEEDS else "none")
    axes.axvline(0, color="#000000", lw=1)
    axes.set_xlim(-widest, widest)
    axes.set_ylim(-0.7, len(entries) - 0.3)
    axes.set_yticks(range(len(entries)), [name for name, _ in entries], fontsize=9)
    axes.set_xlabel(
        "loss less the baseline's, nats per token\n"
        "(left is better; hollow: too few seeds for an interval; †: read in blocks)"
    )
    bare(axes)
    return svg(figure)


def after_switch(r: Result, steps: int = 150) -> tuple[str, str]:
    """Training loss after the switch of the run tst and the baseline's at the same steps, means over seeds."""
    c = r.summary["config"]
    at = round(c["superposition"]["ratio"] * c["train"]["steps"])
    longest = max((x for x in r.summary["runs"] if x["name"].startswith("baseline")), key=lambda x: x["steps"])["name"]
    figure = Figure(figsize=(7.2, 3.6), layout="constrained")
    axes = figure.subplots()
    losses: dict[str, dict[int, float]] = {}
    for name, label, colour in ((longest, "baseline", COLOURS[0]), ("tst", "tst", COLOURS[1])):
        shown: dict[int, list[float]] = defaultdict(list)
        for x in r.curves:
            if x["name"] == name and x["loss"] and at < int(x["step"]) <= at + steps:
                shown[int(x["step"]) - at].append(float(x["loss"]))
        losses[name] = {step: mean(values) for step, values in sorted(shown.items())}
        axes.plot(list(losses[name]), list(losses[name].values()), ".-", color=colour, label=label)
    axes.set_xlabel("steps after the switch")
    axes.set_ylabel("training loss (nats per token)")
    axes.legend(frameon=False)
    bare(axes)
    gaps = [(step, loss - losses[longest][step]) for step, loss in losses["tst"].items()]
    seeds = f"mean of {len(r.seeds)} seeds" if len(r.seeds) > 1 else f"seed {r.seeds[0]}"
    told = ", ".join(f"{gap:+.2f} after {step} steps" for step, gap in (gaps[0], gaps[len(gaps) // 2], gaps[-1]))
    return svg(figure), (
        f"{r.name}, {seeds}: training loss less the baseline's at the same step (each logged loss "
        f"is the mean since the one before): {told}."
    )


def differences_by_step(r: Result) -> dict[int, list[float]]:
    """Validation loss of the run tst less the baseline's, seed by seed, before the learning rate decays."""
    c = r.summary["config"]["train"]
    constant = c["steps"] - round(c["decay_ratio"] * c["steps"])
    losses: dict[tuple[str, str, int], float] = {
        (x["name"], x["seed"], int(x["step"])): float(x["val_loss"]) for x in r.curves if x["val_loss"]
    }
    found: dict[int, list[float]] = defaultdict(list)
    for (name, seed, step), loss in sorted(losses.items(), key=lambda item: item[0][1:]):
        if name == "tst" and step <= constant:
            found[step].append(loss - losses["baseline", seed, step])
    return dict(sorted(found.items()))


def ahead(found: list[Result]) -> tuple[str, str]:
    """Where TST passes the baseline on the way: a table, and a figure of those in today's order of enough seeds."""
    figure = Figure(figsize=(8.6, 4.4), layout="constrained")
    axes = figure.subplots()
    styles = itertools.cycle(itertools.product("osD^", COLOURS))
    lines = [
        "| comparison | switch after step | last validation behind | first step ahead beyond chance |",
        "|---|---|---|---|",
    ]
    for r in found:
        by_step = differences_by_step(r)
        steps = r.summary["config"]["train"]["steps"]
        switch = round(r.summary["config"]["superposition"]["ratio"] * steps)
        after = [step for step in by_step if step > switch]
        if len(by_step[after[0]]) >= SEEDS and not r.in_blocks:
            marker, colour = next(styles)
            done = [step / steps for step in after]
            axes.plot(done, [mean(by_step[step]) for step in after], f"{marker}-", color=colour, ms=4, label=r.name)
        behind = [step for step in by_step if mean(by_step[step]) >= 0]
        unsure = [step for step in after if (ends := t_interval(by_step[step])) is None or ends[1] >= 0]
        first = next((step for step in after if step > max(unsure, default=0)), None)
        few = {1: "one seed", 2: "two seeds"}.get(len(by_step[after[0]]))
        found_at = few or (f"{first:,}" if first else "never")
        lines.append(f"| {r.label} | {switch:,} | {max(behind, default=0):,} | {found_at} |")
    axes.axhline(0, color="#000000", lw=1)
    axes.set_xlabel("share of the steps done, up to where the learning rate decays")
    axes.set_ylabel("validation loss minus the baseline's\n(nats per token, mean over seeds)")
    if axes.get_legend_handles_labels()[0]:
        figure.legend(loc="outside right center", frameon=False, fontsize=8)
    bare(axes)
    return svg(figure), "\n".join([*lines, ""])


def bare(axes: Axes) -> None:
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
