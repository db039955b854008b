"""The pictures of a sweep, as SVG: heat maps of bag size and ratio, and the U-curves with the paper's beside them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from token_superposition.experiment.grid import Cell
from token_superposition.report.figures import COLOURS, Picture, svg
from token_superposition.report.sweep import Facet, SweepContents

# Blue is better, vermilion is worse, white is the baseline: told apart by the colour-blind, too.
DIVERGING = LinearSegmentedColormap.from_list("tst", ["#00497a", COLOURS[1], "#ffffff", COLOURS[2], "#8a3c00"])
DIVERGING.set_bad("#dddddd")


def sweep_pictures(contents: SweepContents) -> list[Picture]:
    result: list[Picture] = []
    limit = colour_limit([contents.difference(c) for c in contents.cells])
    for facet in contents.facets:
        where = f" ({contents.label(facet)})" if contents.label(facet) else ""
        cells = [c for c in contents.cells if Facet(c.weighting, c.schedule, c.learning_rate) == facet]
        sizes, ratios = sorted({c.bag_size for c in cells}), sorted({c.ratio for c in cells})
        at = {(c.bag_size, c.ratio): c for c in cells}
        figure = Figure(figsize=(max(7.2, 1.8 + 0.75 * len(sizes)), 1.5 + 0.55 * len(ratios)), layout="constrained")
        heat_map(figure, contents, at, sizes, ratios, limit)
        title = f"Difference to the baseline by bag size and ratio{where}"
        result.append(Picture(title, svg(figure), _alt(contents, title, cells)))
        table = contents.published(facet)
        source = f"{table.model}, {table.steps:,} steps, {table.weighting.replace('_', '-')} weights"
        if len(sizes) > 1:
            figure = Figure(figsize=(7.2, 4.4), layout="constrained")
            axes = figure.subplots()
            published = sorted({1, *(c.bag_size for c in table.cells if c.bag_size <= sizes[-1])})
            u_curves(axes, contents, ratios, sizes, lambda r, s: at.get((s, r)))
            paper(axes, ratios, published, table.gain)
            axes.set_xscale("log", base=2)
            axes.set_xticks([1, *sizes], [str(s) for s in [1, *sizes]])
            axes.set_xticks([], minor=True)
            axes.set_xlabel("bag size s")
            legend(figure, axes, ratios, "r")
            title = f"Over the bag size{where}; dashed: the paper's {source}"
            result.append(Picture(title, svg(figure), _alt(contents, title, cells)))
        if len(ratios) > 1:
            figure = Figure(figsize=(7.2, 4.4), layout="constrained")
            axes = figure.subplots()
            published_ratios = sorted({0.0, *(c.ratio for c in table.cells if c.ratio <= ratios[-1])})
            u_curves(axes, contents, sizes, ratios, lambda s, r: at.get((s, r)))
            paper(axes, sizes, published_ratios, lambda s, r: table.gain(r, round(s)))
            axes.set_xticks([0, *ratios], ["0", *(f"{r:g}" for r in ratios)])
            axes.set_xlabel("ratio r, share of the steps on bags")
            legend(figure, axes, sizes, "s")
            title = f"Over the ratio{where}; dashed: the paper's {source}"
            result.append(Picture(title, svg(figure), _alt(contents, title, cells)))
    return result


def colour_limit(differences: Sequence[float]) -> float:
    """The difference of the strongest colour: a few very bad settings do not wash out all others."""
    finite = np.array([d for d in differences if math.isfinite(d)] or [0.0])
    return max(float(-finite.min()), float(np.quantile(abs(finite), 0.8)), 1e-6)


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
            colour = text_colour(DIVERGING(norm(value))) if math.isfinite(value) else "#1a1a1a"
            number = f"{value:+.3f}" if math.isfinite(value) else "diverged"
            weight = "bold" if best else "normal"
            axes.text(
                x, y + 0.14 * several, number, ha="center", va="center", color=colour, fontsize=10, fontweight=weight
            )
            if several:
                note = f"{seeds} seed{'s' if seeds > 1 else ''}"
                axes.text(x, y - 0.24, note, ha="center", va="center", color=colour, fontsize=8)
            if best:
                axes.add_patch(Rectangle((x - 0.48, y - 0.46), 0.96, 0.92, fill=False, ec="#1a1a1a", lw=2.2))
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
    axes: Axes,
    contents: SweepContents,
    lines: Sequence[float],
    places: Sequence[float],
    cell_at: Callable[..., Cell | None],
) -> None:
    """A line for each of ``lines`` through the baseline (s = 1 or r = 0), a dot for each seed."""
    start = 1 if places[0] > 1 else 0
    axes.axhline(0, color=COLOURS[0], lw=1.2)
    finite: list[float] = []
    for value, colour in zip(lines, colours(len(lines)), strict=True):
        x: list[float] = [start]
        y = [0.0]
        for place in places:
            if (cell := cell_at(value, place)) is not None:
                x.append(place)
                y.append(contents.difference(cell))
                dots = [r.difference for r in contents.by_cell[cell]]
                axes.plot([place] * len(dots), dots, "o", color=colour, ms=3, alpha=0.45, mew=0)
        axes.plot(x, y, "-", color=colour, lw=2)
        axes.plot(x[1:], y[1:], "o", color=colour, ms=5)
        finite += [v for v in y if math.isfinite(v)]
    low, high = min(finite), min(max(finite), max(float(np.quantile(finite, 0.85)), -2 * min(finite), 1e-3))
    margin = 0.1 * (high - low)
    axes.set_ylim(low - margin, high + margin)
    axes.set_ylabel("difference to the baseline (nats per token)")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def paper(
    axes: Axes, lines: Sequence[float], places: Sequence[float], gain: Callable[[float, int], float | None]
) -> None:
    """The paper's curves, thin and dashed, where its table has them."""
    bottom, top = axes.get_ylim()
    for value, colour in zip(lines, colours(len(lines)), strict=True):
        points = [(place, -g) for place in places if (g := gain(value, place)) is not None]  # pyright: ignore
        if len(points) > 1:
            axes.plot(*zip(*points, strict=True), "--", color=colour, lw=1, alpha=0.8)
            bottom = min(bottom, 1.1 * min(y for _, y in points))
    axes.set_ylim(bottom, top)


def legend(figure: Figure, axes: Axes, values: Sequence[float], name: str) -> None:
    for value, colour in zip(values, colours(len(values)), strict=True):
        axes.plot([], [], "-", color=colour, lw=2, label=f"{name} = {value:g}")
    axes.plot([], [], "--", color=COLOURS[0], lw=1, label="paper")
    figure.legend(loc="outside right upper", frameon=False)


def colours(n: int) -> list[tuple[float, float, float, float]]:
    """From dark to light, but never so light that a line is lost on white."""
    return [matplotlib.colormaps["viridis"](x) for x in np.linspace(0, 0.85, n)]


def text_colour(background: tuple[float, float, float, float]) -> str:
    """The one of dark and white with more contrast, by the relative luminance of WCAG 2.

    >>> text_colour((1.0, 1.0, 1.0, 1.0)), text_colour((0.0, 0.3, 0.5, 1.0))
    ('#1a1a1a', '#ffffff')
    """
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in background[:3]]
    luminance = float(np.dot([0.2126, 0.7152, 0.0722], linear))
    return "#1a1a1a" if (luminance + 0.05) / 0.06 > 1.05 / (luminance + 0.05) else "#ffffff"


def _value(contents: SweepContents, cell: Cell | None) -> float:
    return math.nan if cell is None else contents.difference(cell)


def _alt(contents: SweepContents, title: str, cells: list[Cell]) -> str:
    low = min(cells, key=contents.difference)
    return f"{title}. The lowest of {len(cells)} is {contents.difference(low):+.3f} at s = {low.bag_size}, r = {low.ratio:g}."
