"""The paper's results (arXiv 2605.06546), and what they say about a run of another size and length."""

from __future__ import annotations

import csv
import math
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files

NEAR_BEST = 0.005  # nats below the best gain; ours: neighbouring cells, of one run each, differ by nearly as much
WEIGHTING = {"power": "power_law"}  # our name of a weighting -> the tables'; uniform for all others


@dataclass(frozen=True)
class Cell:
    """One trained model of a table."""

    ratio: float
    bag_size: int
    loss: float
    gain: float
    """Loss of the table's baseline less this loss, nats."""

    @property
    def raw_per_latent(self) -> float:
        """Raw tokens read for one latent token, over the whole run."""
        return 1 + self.ratio * (self.bag_size - 1)


@dataclass(frozen=True)
class Table:
    """Final losses of one model and length by r and s."""

    model: str
    body_parameters: int
    """Parameters without embedding and head."""
    steps: int
    latent_tokens: int
    """Per step."""
    weighting: str
    baseline: float
    cells: tuple[Cell, ...]

    def best(self, raw_per_latent: float = math.inf) -> Cell | None:
        """The largest gain among the runs that read at most that many raw tokens for a latent one."""
        fitting = [c for c in self.cells if c.raw_per_latent <= raw_per_latent and c.gain > 0]
        return max(fitting, key=lambda c: c.gain, default=None)

    def frugal(self) -> Cell:
        """The run that reads least among those about as good as the best."""
        best = max(c.gain for c in self.cells)
        return min((c for c in self.cells if c.gain >= best - NEAR_BEST), key=lambda c: (c.raw_per_latent, -c.gain))

    def gain(self, ratio: float, bag_size: int) -> float | None:
        """The gain at r and s, linear in r between the table's columns; None outside of the table.

        Ratio 0 and bag size 1 are the baseline, whose gain is 0.
        """
        if ratio == 0 or bag_size == 1:
            return 0.0
        column = {0.0: 0.0} | {c.ratio: c.gain for c in self.cells if c.bag_size == bag_size}
        ratios = sorted(column)
        if len(ratios) < 2 or ratio > ratios[-1]:
            return None
        if ratio in column:
            return column[ratio]
        i = bisect_left(ratios, ratio)
        low, high = ratios[i - 1], ratios[i]
        return column[low] + (ratio - low) / (high - low) * (column[high] - column[low])


@dataclass(frozen=True)
class PublishedRun:
    """One of the paper's main runs."""

    model: str
    kind: str
    """dense or mixture (of experts)."""
    body_parameters: int
    """Active parameters without embedding and head."""
    steps: int
    superposed_steps: int
    bag_size: int
    latent_tokens: int
    """Per step."""
    b200_hours: float
    final_loss: float

    @property
    def raw_tokens(self) -> int:
        return self.latent_tokens * (self.steps + self.superposed_steps * (self.bag_size - 1))


def published_runs() -> list[PublishedRun]:
    return [
        PublishedRun(
            row["model"],
            row["kind"],
            *(int(row[k]) for k in ("body_parameters", "steps", "superposed_steps", "bag_size", "latent_tokens")),
            b200_hours=float(row["b200_hours"]),
            final_loss=float(row["final_loss"]),
        )
        for row in _rows("runs.csv")
    ]


def tables() -> list[Table]:
    size = {run.model: run for run in published_runs()}
    rows: dict[tuple[str, int, str], list[tuple[float, int, float]]] = {}
    for row in _rows("final_loss.csv"):
        key = row["model"], int(row["total_steps"]), row["output_weighting"]
        rows.setdefault(key, []).append((float(row["ratio"]), int(row["bag_size"]), float(row["final_loss"])))
    result: list[Table] = []
    for (model, steps, weighting), losses in rows.items():
        baseline = next(loss for r, _, loss in losses if r == 0)
        cells = tuple(Cell(r, s, loss, round(baseline - loss, 4)) for r, s, loss in losses if 0 < r < 1)
        run = size[model]
        result.append(Table(model, run.body_parameters, steps, run.latent_tokens, weighting, baseline, cells))
    return result


def nearest_table(body_parameters: int, steps: int, weighting: str = "uniform") -> Table:
    """The table of the nearest size (in log parameters), of those the nearest length; with the weighting if it has one.

    >>> nearest_table(body_parameters=150_000_000, steps=60_000).model
    '270M'
    """
    every = tables()
    size = min({t.body_parameters for t in every}, key=lambda n: _distance(n, body_parameters))
    same = [t for t in every if t.body_parameters == size]
    wanted = WEIGHTING.get(weighting, "uniform")
    same = [t for t in same if t.weighting == wanted] or [t for t in same if t.weighting == "uniform"]
    return min(same, key=lambda t: _distance(t.steps, steps))


def nearest_runs(body_parameters: int, mixture: bool) -> list[PublishedRun]:
    """The paper's main runs of the model of the same kind and nearest size."""
    runs = [r for r in published_runs() if r.kind == ("mixture" if mixture else "dense")]
    size = min((r.body_parameters for r in runs), key=lambda n: _distance(n, body_parameters))
    return [r for r in runs if r.body_parameters == size]


def baseline_hours(run: PublishedRun, runs: Sequence[PublishedRun]) -> tuple[float, float | None] | None:
    """B200-hours between which the published baselines come down to the loss of ``run``: of the longest that ends above
    it, and of the shortest that does not, if one does.

    No loss between two lengths is guessed. None for a baseline itself, and where every baseline of ``runs`` is below.
    """
    baselines = [r for r in runs if r.superposed_steps == 0]
    above = [r.b200_hours for r in baselines if r.final_loss > run.final_loss]
    if run.superposed_steps == 0 or not above:
        return None
    return max(above), min((r.b200_hours for r in baselines if r.final_loss <= run.final_loss), default=None)


def outside(table: Table, body_parameters: int, steps: int, latent_tokens: int) -> dict[str, float]:
    """How far a run lies outside of the published tables, as factors: 2.0 is twice the largest, 0.5 half the least.

    Sizes are those of all tables, lengths those of this size. What lies inside is left out.
    """
    every = tables()
    lengths = [t.steps for t in every if t.body_parameters == table.body_parameters]
    ranges = {
        "parameters without embedding and head": (body_parameters, [t.body_parameters for t in every]),
        "steps": (steps, lengths),
        "latent tokens a step": (latent_tokens, [t.latent_tokens for t in every]),
    }
    factors = {name: value / min(max(value, min(known)), max(known)) for name, (value, known) in ranges.items()}
    return {name: factor for name, factor in factors.items() if factor != 1}


def _distance(a: float, b: float) -> float:
    return abs(math.log(a / b))


def _rows(name: str) -> Iterator[dict[str, str]]:
    lines = (files("token_superposition") / "published" / name).read_text(encoding="utf-8").splitlines()
    return csv.DictReader(line for line in lines if not line.startswith("#"))
