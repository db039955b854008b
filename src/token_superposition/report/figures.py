"""The pictures of a comparison, as SVG."""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from statistics import mean, median
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from token_superposition.report.contents import Contents, short

# Colour-blind safe (Okabe and Ito, P. Tol), each 3:1 or more against white; markers tell them apart in grey, too.
COLOURS = ("#555555", "#0072B2", "#D55E00", "#009E73", "#AA4499", "#997700", "#332288")
MARKERS = "osD^vPX"


@dataclass(frozen=True)
class Picture:
    title: str
    svg: str
    alt: str
    """What it shows, for those who do not see it."""

    @property
    def accessible(self) -> str:
        """The element with its title and description, as one image to a screen reader."""
        start, end = self.svg.index("<svg"), self.svg.index(">", self.svg.index("<svg"))
        words = f"<title>{escape(self.title)}</title><desc>{escape(self.alt)}</desc>"
        return f'{self.svg[start:end]} role="img" aria-label="{escape(self.alt)}">{words}{self.svg[end + 1 :]}'


AXES = (
    ("flops", "FLOPs", "Equal FLOPs: loss against compute"),
    ("seconds", "training time", "Loss against time"),
    ("raw_tokens", "raw tokens read", "Equal data: loss against text read"),
)


def pictures(contents: Contents) -> list[Picture]:
    """Next-token validation loss against FLOPs, time and raw tokens, the switch marked."""
    result: list[Picture] = []
    for key, label, title in AXES:
        figure = Figure(figsize=(5.4, 3.6), layout="constrained")
        ends = draw(figure.subplots(), contents, key, label)
        result.append(Picture(title, svg(figure), f"{title}. {ends}"))
    return result


def draw(axes: Axes, contents: Contents, key: str, label: str) -> str:
    """Draw every run's curve; returns a sentence with where each ends."""
    names = list(dict.fromkeys(r.name for r in contents.runs))
    shown: set[str] = set()
    switches: dict[str, list[float]] = {}
    tail: list[float] = []
    for run in contents.runs:
        name = run.name
        lines = contents.metrics[run.directory]
        validated = [m for m in lines if "val_loss" in m]
        seen = list({m["step"]: m for m in reversed(validated)}.values())[::-1]  # of a last step not the longer one
        if not seen:
            continue
        baseline = name.startswith("baseline")
        colour = COLOURS[0] if baseline else COLOURS[1 + (names.index(name) - 1) % (len(COLOURS) - 1)]
        dash = "--" if baseline and name != "baseline" else "-"
        x = [m[key] for m in seen]
        y = [m["val_loss"] for m in seen]
        legend, marker = name if name not in shown else None, MARKERS[names.index(name) % len(MARKERS)]
        axes.plot(x, y, dash, color=colour, lw=1.8, alpha=0.9, label=legend, marker=marker, markevery=[-1], ms=5)
        for at in [a for a, b in pairwise(lines) if bag(a) != bag(b)][-1:]:  # of several, to ordinary training
            switches.setdefault(colour, []).append(at[key])
        shown.add(name)
        tail += y[len(y) // 4 :]
    for i, (colour, at) in enumerate(switches.items()):
        axes.axvline(median(at), color=colour, lw=1, ls=":", label=None if i else "switch")
    if tail := list(filter(math.isfinite, tail)):  # a run that diverged at once has nothing to show
        low, high = min(tail), max(tail)
        axes.set_ylim(low - 0.06 * (high - low), high + 0.06 * (high - low))
    axes.set_xlim(left=0)
    unit, seconds = time_unit(axes.get_xlim()[1]) if key == "seconds" else ("", 1)
    axes.set_xlabel(f"{label} ({unit})" if unit else label)
    axes.set_ylabel("validation loss (nats per token)")
    axes.xaxis.set_major_locator(Multiples(seconds))
    axes.xaxis.set_major_formatter(lambda v, _: short(v / seconds))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if shown:
        axes.legend(frameon=False)
    return "; ".join(f"{name} {_end(contents, name)}" for name in names if name in shown)


def _end(contents: Contents, name: str) -> str:
    losses = [r.val_loss for r in contents.runs if r.name == name]
    diverged = sum(not math.isfinite(x) for x in losses)
    if diverged:
        return "diverges" if len(losses) == 1 else f"diverges with {diverged} of {len(losses)} seeds"
    return f"ends at {mean(losses):.3f}" + (f" (mean of {len(losses)} seeds)" if len(losses) > 1 else "")


def time_unit(longest: float) -> tuple[str, int]:
    """
    >>> time_unit(80), time_unit(1000), time_unit(90_000)
    (('s', 1), ('min', 60), ('h', 3600))
    """
    return ("s", 1) if longest < 180 else ("min", 60) if longest < 3 * 3600 else ("h", 3600)


class Multiples(MaxNLocator):
    """Ticks at round multiples of ``unit``."""

    def __init__(self, unit: float) -> None:
        super().__init__(nbins=5)
        self._unit = unit

    def tick_values(self, vmin: float, vmax: float) -> Any:
        return [self._unit * tick for tick in super().tick_values(vmin / self._unit, vmax / self._unit)]


def bag(line: dict[str, float]) -> tuple[float, float]:
    return line.get("input_bag", 1), line.get("output_bag", 1)


def svg(figure: Figure) -> str:
    """The figure as an inline SVG element, the same bytes for the same figure."""
    with matplotlib.rc_context({"svg.hashsalt": "token-superposition", "svg.fonttype": "none"}):
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]
