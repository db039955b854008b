"""What a sweep's directory holds, and the sentences and rows that table and page share."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import mean
from typing import Any, Literal

import tomli_w

from token_superposition.errors import TokenSuperpositionError
from token_superposition.experiment.config import SweepSchedule
from token_superposition.experiment.files import SWEEP
from token_superposition.experiment.form import misfit, restored
from token_superposition.experiment.grid import Cell, directory
from token_superposition.experiment.halving import Best
from token_superposition.experiment.intervals import t_interval
from token_superposition.experiment.published import NEAR_BEST, Table, nearest_table
from token_superposition.experiment.sweep import TABLE, Row, read_rows
from token_superposition.experiment.tree import without_none
from token_superposition.report.cautions import not_shown
from token_superposition.report.contents import interval, short
from token_superposition.report.verdicts import clear
from token_superposition.weights import Weighting

FORM = {
    "format": Literal[1],
    "command": str,
    "best": Best,
    "rounds": [{"cells": int, "seeds": list[int]}],
    "body_parameters": int,
    "hardware": list[str],
    "versions": list[str],
    "config": dict[str, Any],
}
"""Of sweep.json."""


@dataclass(frozen=True)
class Facet:
    """The cells that differ in bag size and ratio only."""

    weighting: Weighting
    schedule: SweepSchedule
    learning_rate: float


@dataclass(frozen=True)
class SweepContents:
    summary: dict[str, Any]
    rows: list[Row]
    config_text: str
    directory: Path

    @cached_property
    def by_cell(self) -> dict[Cell, list[Row]]:
        cells: dict[Cell, list[Row]] = {}
        for row in self.rows:
            cells.setdefault(row.cell, []).append(row)
        return cells

    @property
    def cells(self) -> list[Cell]:
        """Beside the baselines; those that train the same are several."""
        return [c for c in self.by_cell if not c.is_baseline]

    @property
    def settings(self) -> list[Cell]:
        """Of the cells that share their runs the one that names them: as many as were trained and chosen among."""
        return [c for c in self.cells if (row := self.by_cell[c][0]).run == directory(c, row.seed)]

    @property
    def facets(self) -> list[Facet]:
        return list(dict.fromkeys(Facet(c.weighting, c.schedule, c.learning_rate) for c in self.cells))

    @property
    def best(self) -> Cell:
        return Cell(**self.summary["best"]["cell"])

    @property
    def baseline(self) -> Cell:
        return Cell(**self.summary["best"]["baseline"])

    @property
    def frugal(self) -> tuple[Cell, float] | None:
        """Of the cells about as good as the best on the seeds that chose it the one that reads the least text, and how
        far it is behind; None where none reads less.
        """
        seeds = self.summary["best"]["chosen"]["seeds"]
        losses = {c: {r.seed: r.val_loss for r in self.by_cell[c]} for c in self.cells}
        best = losses[self.best]
        behind = {
            c: mean(of[s] - best[s] for s in seeds) for c, of in losses.items() if seeds and set(seeds) <= of.keys()
        }
        reads = {c: self.by_cell[c][0].raw_tokens for c in behind}
        near = [c for c in behind if behind[c] <= NEAR_BEST and reads[c] < reads[self.best]]
        return (least, behind[least]) if (least := min(near, key=lambda c: reads[c], default=None)) else None

    def difference(self, cell: Cell) -> float:
        """Mean over the cell's seeds, to the baseline of the same learning rate."""
        return mean(r.difference for r in self.by_cell[cell])

    def diverged(self, cell: Cell) -> bool:
        return not all(math.isfinite(r.val_loss) for r in self.by_cell[cell])

    def published(self, facet: Facet) -> Table:
        """The paper's table nearest in size, length and weighting."""
        return nearest_table(self.summary["body_parameters"], self.rows[0].steps, facet.weighting)

    def several(self, name: str) -> bool:
        return len({getattr(c, name) for c in self.cells}) > 1

    def label(self, of: Cell | Facet) -> str:
        """What tells it from the others: weighting, schedule and learning rate, where several are swept."""
        parts = {
            "weighting": f"{of.weighting} weights",
            "schedule": of.schedule,
            "learning_rate": f"learning rate {of.learning_rate:g}",
        }
        return ", ".join(text for name, text in parts.items() if self.several(name))


def read_sweep(directory: Path) -> SweepContents:
    """Raises ``TokenSuperpositionError`` if ``directory`` holds no finished sweep."""
    try:
        summary: Any = restored(json.loads((directory / SWEEP).read_text(encoding="utf-8")), FORM)
        wrong = misfit(summary, FORM, SWEEP)
        rows = read_rows(directory / TABLE)
    except (OSError, ValueError, TypeError, RecursionError) as e:
        why = e if isinstance(e, OSError) else f"{SWEEP} or {TABLE}: {e}"
        raise TokenSuperpositionError(f"{directory} holds no finished sweep ({why}); make one with tst sweep") from None
    # config.toml may already ask for more
    config_text = "" if wrong else tomli_w.dumps(without_none(summary["config"]))
    contents = SweepContents(summary, rows, config_text, directory)
    if not wrong and not {contents.best, contents.baseline} <= contents.by_cell.keys():
        wrong = f"{TABLE} lacks the best setting, or its baseline, that {SWEEP} names"
    if wrong:
        raise TokenSuperpositionError(
            f"{directory / SWEEP} has not the form that tst sweep writes ({wrong}); give tst sweep again, which "
            "keeps the finished runs"
        )
    return contents


def headers(contents: SweepContents) -> list[str]:
    names = {"weighting": "weights", "schedule": "schedule", "learning_rate": "lr"}
    swept = [text for name, text in names.items() if contents.several(name)]
    return ["", "s", "r", *swept, "raw tokens", "seeds", "loss", "difference", "95% interval"]


def sweep_rows(contents: SweepContents) -> list[tuple[str, ...]]:
    """A row for each cell and baseline: those of the most seeds first, then by mean loss."""
    names = [n for n in ("weighting", "schedule", "learning_rate") if contents.several(n)]
    losses = {cell: mean(r.val_loss for r in rows) for cell, rows in contents.by_cell.items()}
    order = sorted(losses, key=lambda c: (-len(contents.by_cell[c]), _finite(losses[c])))
    result: list[tuple[str, ...]] = []
    for cell in order:
        rows = contents.by_cell[cell]
        swept = [getattr(cell, n) for n in names]
        differences = [r.difference for r in rows]
        known = all(map(math.isfinite, differences)) and not cell.is_baseline
        ends = interval(t_interval(differences) if known else None, "+.4f")
        if cell == contents.best and len(rows) > 1 and contents.summary["best"]["chosen"]["seeds"]:
            ends = "see its difference"  # a sentence, without the seeds that chose it
        result.append(
            (
                "best" if cell == contents.best else "baseline" if cell.is_baseline else "",
                str(cell.bag_size),
                f"{cell.ratio:g}",
                *("" if cell.is_baseline and isinstance(x, str) else str(x) for x in swept),
                short(rows[0].raw_tokens),
                str(len(rows)),
                f"{losses[cell]:.4f}" if math.isfinite(losses[cell]) else "diverged",
                "" if cell.is_baseline or not known else f"{mean(differences):+.4f}",
                "" if cell.is_baseline else ends,
            )
        )
    return result


def sentences(contents: SweepContents) -> list[tuple[str, str]]:
    """(label, sentence): the best setting, how much it gains, against which baseline, and what to mistrust."""
    summary, cell, baseline = contents.summary["best"], contents.best, contents.baseline
    chosen, judged, same = summary["chosen"], summary["judged"], summary["same_rate"]
    result = [("best setting", f"{_settings(contents, cell)} (runs/{contents.by_cell[cell][0].run})")]
    others = not_shown(contents.directory, {r.run for r in contents.rows})
    if judged["seeds"]:
        alone = "one setting" + ("" if others else ": nothing was chosen")
        part = "which took no part in choosing it" if chosen["seeds"] else alone
        text = f"{_by(judged['mean'])} ({_seeds(judged['seeds'])}, {part}; {_known(judged)})"
    else:
        text = (
            f"{_by(chosen['mean'])} on {_seeds(chosen['seeds'])}, by which it was chosen: the best of "
            f"{len(contents.settings)} settings is partly the luckiest, and there is no interval; more seeds judge it "
            "(--compare.seeds 0 1 2 3)"
        )
    result.append(("its difference", text))
    if judged["seeds"] and chosen["seeds"]:
        text = f"{_by(chosen['mean'])} on {_seeds(chosen['seeds'])}, by which it was chosen"
        result.append(("when chosen", f"{text} out of {len(contents.settings)}: flattering, not to be quoted"))
    result.append(("the baseline", _baseline(contents, baseline, cell, same)))
    if not contents.diverged(cell) and (warnings := _edges(contents, cell, baseline)):
        result.append(("at the edge", f"{'; '.join(warnings)}: the best may lie beyond"))
    losses = {
        c: mean(r.val_loss for r in rows)
        for c, rows in contents.by_cell.items()
        if not c.is_baseline and len(rows) == len(contents.by_cell[cell])
    }
    lowest = min(losses, key=lambda c: _finite(losses[c]))
    if losses[lowest] < losses[cell]:
        by = losses[cell] - losses[lowest]
        text = f"{_settings(contents, lowest)} has the lowest mean loss, by {by:.4f}; to go by that would flatter it"
        result.append(("over all seeds", text))
    if frugal := contents.frugal:
        other, by = frugal
        share = contents.by_cell[other][0].raw_tokens / contents.by_cell[cell][0].raw_tokens
        text = f"{_settings(contents, other)} ended {abs(by):.4f} nats {'behind' if by >= 0 else 'before'} it on "
        result.append(("about as good", f"{text}{_seeds(chosen['seeds'])} and reads {share:.2f} x its text"))
    if repeated := [r for r in contents.rows if r.epochs > 1]:
        most = max(r.epochs for r in repeated)
        text = f"{len(repeated)} of {len(contents.rows)} rows read their text more than once, up to {most:.2g} times"
        result.append(("repeated text", f"{text}, which costs large bags more"))
    if len(contents.settings) > 1 and any(len(rows) > 1 for rows in contents.by_cell.values()):
        text = "not corrected for the number of settings tried, so among many some exclude 0 by chance"
        result.append(("other intervals", text))
        if judged["seeds"] and chosen["seeds"]:
            text = "there the best setting's difference includes the seeds that chose it"
            result.append(("table and pictures", text))
    if others:
        result.append(("not shown", others))
    return result


def _settings(contents: SweepContents, cell: Cell) -> str:
    return ", ".join(filter(None, [f"s = {cell.bag_size}, r = {cell.ratio:g}", contents.label(cell)]))


def _baseline(contents: SweepContents, baseline: Cell, cell: Cell, same: dict[str, Any]) -> str:
    rates = sorted(c.learning_rate for c in contents.by_cell if c.is_baseline)
    if len(rates) == 1:
        return (
            f"learning rate {rates[0]:g}, the only one swept: if another suits the baseline better, part of the "
            "difference is that; --sweep.learning-rates tries several"
        )
    text = (
        f"the one with its own best learning rate, {baseline.learning_rate:g} of {', '.join(f'{x:g}' for x in rates)}"
    )
    if baseline.learning_rate == cell.learning_rate:
        return text + ", which is also the best setting's"
    if not math.isfinite(same["mean"]):
        its = next(c for c in contents.by_cell if c.is_baseline and c.learning_rate == cell.learning_rate)
        own = f"; the baseline at the setting's own {cell.learning_rate:g} diverged"
        return text + (own if contents.diverged(its) else "")
    return (
        f"{text}; beside the baseline at the setting's own {cell.learning_rate:g} the difference would be "
        f"{same['mean']:+.4f} ({_seeds(same['seeds'])}), which counts a mistuned baseline as a gain"
    )


def _edges(contents: SweepContents, cell: Cell, baseline: Cell) -> list[str]:
    found: list[str] = []
    rates = [c.learning_rate for c in contents.by_cell if c.is_baseline]
    for what, value, values in (
        ("s", cell.bag_size, [c.bag_size for c in contents.settings]),
        ("r", cell.ratio, [c.ratio for c in contents.settings]),
        ("its learning rate", cell.learning_rate, rates),
        ("the baseline's learning rate", baseline.learning_rate, rates),
    ):
        beyond = value != 2 or what != "s"  # below bags of 2 is the baseline
        if beyond and min(values) < max(values) and value in (min(values), max(values)):
            least = "smallest" if value == min(values) else "largest"
            found.append(f"{what} = {value:g} is the {least} that was tried")
    return found


def _by(difference: float) -> str:
    if not math.isfinite(difference):
        return "a run diverged"
    return f"{abs(difference):.4f} nats {'below' if difference < 0 else 'above'} the baseline"


def _known(difference: dict[str, Any]) -> str:
    ends = difference["interval"]
    if ends is None:
        return "no interval"
    seeds = len(difference["seeds"])
    return f"95% interval of the difference {interval(ends, '+.4f')}, {clear(ends, seeds)}"


def _seeds(seeds: list[int]) -> str:
    return f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"


def _finite(loss: float) -> float:
    return loss if math.isfinite(loss) else math.inf


def about(contents: SweepContents) -> list[tuple[str, str]]:
    """(what, how it was made)."""
    rounds = contents.summary["rounds"]
    first = contents.rows[0]
    seconds = {r.run: r.train_seconds for r in contents.rows}
    return [
        ("Command", contents.summary["command"]),
        ("Runs", f"{len(seconds)}, {sum(seconds.values()) / 3600:.3g} hours of training steps in all"),
        (
            "Rounds",
            "; ".join(f"{r['cells']} setting{'s' if r['cells'] > 1 else ''} with {_seeds(r['seeds'])}" for r in rounds),
        ),
        ("Each run", f"{first.steps:,} steps, {short(first.latent_tokens)} latent tokens, {first.flops:.3g} FLOPs"),
        ("Model", f"{first.parameters:,} parameters"),
        ("Hardware", "; ".join(contents.summary["hardware"])),
        ("Versions", "; ".join(contents.summary["versions"])),
    ]
