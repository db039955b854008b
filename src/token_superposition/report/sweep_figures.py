"""The pictures of a sweep, as SVG: heat maps of bag size and ratio, the U-curves with the paper's beside them, and the
losses over the learning rate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from statistics import mean

import matplotlib
import numpy as np
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from token_superposition.experiment.grid import Cell
from token_superposition.report.figures import COLOURS, Picture, svg
from token_superposition.report.sweep import Facet, SweepContents

# Blue is better, vermilion is worse, white is the baseline: told apart by the colour-blind, too.
DIVERGING = LinearSegmentedColormap.from_list(
    "tst", ["#00497a", COLOURS[1], "#ffffff", COLOURS[2], "#8a3c00"]
).with_extremes(bad="#dddddd")


def sweep_pictures(contents: SweepContents) -> list[Picture]:
    """For each weighting, schedule and learning rate a heat map, and a curve over every axis of several values."""
    limit = colour_limit([contents.difference(c) for c in contents.cells])
    found = [picture for facet in contents.facets for picture in _pictures(contents, facet, limit)]
    return [*found, *over_rates(contents)] if contents.several("learning_rate") else found


def _pictures(contents: SweepContents, facet: Facet, limit: float) -> list[Picture]:
    cells = [c for c in contents.cells if Facet(c.weighting, c.schedule, c.learning_rate) == facet]
    at = {(c.bag_size, c.ratio): c for c in cells}
    sizes, ratios = sorted({s for s, _ in at}), sorted({r for _, r in at})
    where = f" ({contents.label(facet)})" if contents.label(facet) else ""
    finite = [c for c in cells if math.isfinite(contents.difference(c))]
    lowest = "All diverged." if all(map(contents.diverged, cells)) else "The baseline of their learning rate diverged."
    if finite:
        low = min(finite, key=contents.difference)
        where_low = f"s = {low.bag_size}, r = {low.ratio:g}"
        lowest = f"The lowest of {len(cells)} is {contents.difference(low):+.3f} at {where_low}."
        if contents.best in cells and low != contents.best:
            best = contents.best
            lowest += f" The best setting, by the seeds that chose, is s = {best.bag_size}, r = {best.ratio:g}."

    def picture(figure: Figure, title: str) -> Picture:
        return Picture(title, svg(figure), f"{title}. {lowest}")

    result: list[Picture] = []
    if len(at) > 1:
        figure = Figure(figsize=(max(5.4, 1.8 + 0.75 * len(sizes)), 1.5 + 0.55 * len(ratios)), layout="constrained")
        heat_map(figure, contents, at, sizes, ratios, limit)
        result.append(picture(figure, f"Difference to the baseline by bag size and ratio{where}"))

    table = contents.published(facet)
    source = f"the paper's {table.model}, {table.steps:,} steps, {table.weighting.replace('_', '-')} weights"
    if len(sizes) > 1:
        published = [1, *sorted({c.bag_size for c in table.cells if c.bag_size <= sizes[-1]})]
        figure = u_curves(
            contents,
            {f"r = {r:g}": [(s, at[s, r]) for s in sizes if (s, r) in at] for r in ratios},
            [[(s, table.gain(r, s)) for s in published] for r in ratios],
            start=1,
        )
        axes = figure.axes[0]
        axes.set_xscale("log", base=2)
        axes.set_xticks([1, *sizes], [str(s) for s in [1, *sizes]])
        axes.set_xticks([], minor=True)
        axes.set_xlabel("bag size s")
        result.append(picture(figure, f"Over the bag size{where}; dashed: {source}"))
    if len(ratios) > 1:
        shares = [0.0, *sorted({c.ratio for c in table.cells if c.ratio <= ratios[-1]})]
        figure = u_curves(
            contents,
            {f"s = {s}": [(r, at[s, r]) for r in ratios if (s, r) in at] for s in sizes},
            [[(r, table.gain(r, s)) for r in shares] for s in sizes],
            start=0,
        )
        axes = figure.axes[0]
        axes.set_xticks([0, *ratios], [f"{r:g}" for r in [0, *ratios]])
        axes.set_xlabel("ratio r, share of the steps on bags")
        result.append(picture(figure, f"Over the ratio{where}; dashed: {source}"))
    return result


def colour_limit(differences: Sequence[float]) -> float:
    """The difference of the strongest colour: a few very bad settings do not wash out all others."""
    finite = np.array([d for d in differences if math.isfinite(d)] or [0.0])
    return max(float(-finite.min()), float(np.quantile(abs(finite), 0.8, method="lower")), 1e-6)


def heat_map(
    figure: Figure,
    contents: SweepContents,
    at: dict[tuple[int, float], Cell],
    sizes: list[int],
    ratios: list[float],
    limit: float,
) -> None:
    """Mean difference in each cell, the best marked, and how many seeds where that is not the same everywhere."""
    axes = figure.subplots()
    values = np.array([[_value(contents, at.get((s, r))) for s in sizes] for r in ratios])
    norm = Normalize(-limit, limit)
    image = axes.imshow(np.ma.masked_invalid(values), DIVERGING, norm, aspect="auto", origin="lower")
    several = len({len(contents.by_cell[c]) for c in contents.cells}) > 1
    for y, r in enumerate(ratios):
        for x, s in enumerate(sizes):
            if (cell := at.get((s, r))) is None:
                continue
            value, seeds = values[y, x], len(contents.by_cell[cell])
            best = cell == contents.best
            colour = text_colour(DIVERGING(norm(value))) if math.isfinite(value) else "#000000"
            without = "diverged" if contents.diverged(cell) else "no baseline"
            number = f"{value:+.3f}" if math.isfinite(value) else without
            weight = "bold" if best else "normal"
            axes.text(
                x, y + 0.14 * several, number, ha="center", va="center", color=colour, fontsize=10, fontweight=weight
            )
            if several:
                note = f"{seeds} seed{'s' if seeds > 1 else ''}"
                axes.text(x, y - 0.24, note, ha="center", va="center", color=colour, fontsize=8)
            if best:
                for colour, width in (("#1a1a1a", 5.0), ("#ffffff", 2.0)):  # seen on dark and on light cells
                    axes.add_patch(Rectangle((x - 0.46, y - 0.44), 0.92, 0.88, fill=False, ec=colour, lw=width))
    axes.set_xticks(range(len(sizes)), [str(s) for s in sizes])
    axes.set_yticks(range(len(ratios)), [f"{r:g}" for r in ratios])
    axes.set_xticks([x + 0.5 for x in range(len(sizes) - 1)], minor=True)
    axes.set_yticks([y + 0.5 for y in range(len(ratios) - 1)], minor=True)
    axes.grid(which="minor", color="white", lw=1.5)
    axes.tick_params(which="both", length=0)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("bag size s")
    axes.set_ylabel("ratio r")
    finite = values[np.isfinite(values)]
    beyond = finite.size > 0 and finite.max() > limit
    bar = figure.colorbar(image, ax=axes, extend="max" if beyond else "neither", pad=0.02)
    bar.set_label("nats per token")
    bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue]


def u_curves(
    contents: SweepContents,
    lines: dict[str, list[tuple[float, Cell]]],
    published: Sequence[Sequence[tuple[float, float | None]]],
    start: float,
) -> Figure:
    """A line by label through its (place, cell) pairs, from the baseline at ``start``; a dot for each seed.

    Thin and dashed in the same colour, the published (place, gain) pairs of each line.
    """
    figure = Figure(figsize=(5.4, 3.9), layout="constrained")
    axes = figure.subplots()
    axes.axhline(0, color=COLOURS[0], lw=1.2)
    means: list[float] = []
    gains: list[float] = [0.0]
    for (label, cells), paper, colour in zip(lines.items(), published, colours(len(lines)), strict=True):
        x = [start, *(place for place, _ in cells)]
        y = [0.0, *(contents.difference(cell) for _, cell in cells)]
        axes.plot(x, y, "-", color=colour, lw=2, label=label)
        axes.plot(x[1:], y[1:], "o", color=colour, ms=5)
        for place, cell in cells:
            dots = [r.difference for r in contents.by_cell[cell]]
            axes.plot([place] * len(dots), dots, "o", color=colour, ms=3, alpha=0.45, mew=0)
        means += [v for v in y if math.isfinite(v)]
        points = [(place, -gain) for place, gain in paper if gain is not None]
        if len(points) > 1:
            axes.plot([x for x, _ in points], [y for _, y in points], "--", color=colour, lw=1, alpha=0.8)
            gains += [y for _, y in points]
    low = min(*means, *gains)
    high = min(max(means), max(float(np.quantile(means, 0.85)), -2 * low, 1e-3))
    axes.set_ylim(low - 0.1 * (high - low), high + 0.1 * (high - low))
    axes.set_ylabel("difference to the baseline (nats per token)")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.plot([], [], "--", color=COLOURS[0], lw=1, label="paper")
    figure.legend(loc="outside right upper", frameon=False)
    return figure


def over_rates(contents: SweepContents) -> list[Picture]:
    """The loss of the baseline over the learning rate, and of the best setting at each rate; a dot for each seed.

    Of the seeds that every run of the sweep has, for one that was dropped early has the first ones alone, which may be
    easier; none without any.
    """
    losses = {c: {r.seed: r.val_loss for r in contents.by_cell[c]} for c in contents.by_cell}
    losses = {c: of for c, of in losses.items() if not contents.diverged(c)}
    seeds = [s for s in next(iter(losses.values()), {}) if all(s in of for of in losses.values())]
    if not seeds:
        return []
    means = {c: mean(of[s] for s in seeds) for c, of in losses.items()}
    figure = Figure(figsize=(5.4, 3.9), layout="constrained")
    axes = figure.subplots()
    settings = len({replace(c, learning_rate=0) for c in contents.settings})
    one = f"s = {contents.best.bag_size}, r = {contents.best.ratio:g}"
    label = one if settings == 1 else f"best of {settings} settings"
    lows: list[str] = []
    baselines = [c for c in contents.by_cell if c.is_baseline]
    for name, colour, cells in ("baseline", COLOURS[0], baselines), (label, COLOURS[1], contents.settings):
        whole = sorted((c for c in cells if c in means), key=means.__getitem__, reverse=True)
        best = dict(sorted({c.learning_rate: c for c in whole}.items()))
        axes.plot([*best], [means[c] for c in best.values()], "-o", color=colour, lw=2, ms=5, label=name)
        for rate, cell in best.items():
            axes.plot([rate] * len(seeds), [losses[cell][s] for s in seeds], "o", color=colour, ms=3, alpha=0.45, mew=0)
        if best:
            lows.append(f"{name}: lowest at {whole[-1].learning_rate:g}, {means[whole[-1]]:.4f}")
    rates = sorted({c.learning_rate for c in contents.by_cell})
    axes.set_xscale("log")
    axes.set_xticks(rates, [f"{r:g}" for r in rates])
    axes.set_xticks([], minor=True)
    axes.set_xlabel("learning rate")
    axes.set_ylabel("validation loss (nats per token)")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    fewer = len(seeds) < max(map(len, losses.values()))
    title = "Loss over the learning rate" + (f", seed {', '.join(map(str, seeds))}, which all have" if fewer else "")
    return [Picture(title, svg(figure), f"{title}. {'; '.join(lows)}.")]


def colours(n: int) -> list[tuple[float, float, float, float]]:
    """From dark to light, but never so light that a line is lost on white."""
    return [matplotlib.colormaps["viridis"](x) for x in np.linspace(0, 0.85, n)]


def text_colour(background: tuple[float, float, float, float]) -> str:
    """The one of black and white with more contrast, by the relative luminance of WCAG 2.

    >>> text_colour((1.0, 1.0, 1.0, 1.0)), text_colour((0.0, 0.3, 0.5, 1.0))
    ('#000000', '#ffffff')
    """
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in background[:3]]
    luminance = float(np.dot([0.2126, 0.7152, 0.0722], linear))
    return "#000000" if (luminance + 0.05) / 0.05 > 1.05 / (luminance + 0.05) else "#ffffff"


def _value(contents: SweepContents, cell: Cell | None) -> float:
    return math.nan if cell is None else contents.difference(cell)
