"""Sections of the findings page about plain TST: s = 4, r = 0.3, uniform weights, as in the paper.

How its gain depends on the batch and the number of steps, which variants end below it, and whether a recipe saves a
tenth of its steps.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from statistics import mean
from typing import Any

from matplotlib.figure import Figure

from results.figures import bare
from results.kept import Result, told, verdict
from token_superposition.experiment.intervals import t_interval
from token_superposition.experiment.superposition import SuperpositionConfig
from token_superposition.report.contents import short
from token_superposition.report.figures import COLOURS, svg

PLAIN = json.loads(json.dumps(asdict(SuperpositionConfig(bag_size=4, ratio=0.3))))  # as a summary has it


def ways(r: Result) -> Iterator[tuple[str, dict[str, Any], float]]:
    """Of each run but the baselines: its name, what of its superposition differs from plain TST, its length."""
    config = r.summary["config"]
    further = ((v["name"], v["superposition"], v.get("length", 1.0)) for v in config["compare"].get("variants", []))
    for name, superposition, length in (("tst", config["superposition"], 1.0), *further):
        # An option that came later is not in the older files, which then have its default.
        yield name, {k: v for k, v in superposition.items() if PLAIN.get(k) != v}, length


def plain(r: Result, length: float = 1.0) -> str | None:
    """The name of the run that is plain TST of that length."""
    return next((name for name, changed, steps in ways(r) if not changed and steps == length), None)


def differences(r: Result, name: str, reference: str) -> list[float]:
    """Of the validation losses, seed by seed."""
    losses = {(x["name"], x["seed"]): x["val_loss"] for x in r.summary["runs"]}
    return [losses[name, seed] - losses[reference, seed] for seed in r.seeds]


def over_batches(found: list[Result]) -> tuple[str, str]:
    """Plain TST less the baseline by batch and steps: a figure and a table of the comparisons on Python source."""
    entries: list[tuple[int, int, float, list[float], Result]] = []
    for r in found:
        if (name := plain(r)) and r.about["text"].startswith("python"):
            c = r.summary["config"]
            tokens = c["train"]["batch_size"] * c["data"]["sequence_length"]
            per_parameter = r.baseline["latent_tokens"] / r.baseline["parameters"]
            entries.append((tokens, c["train"]["steps"], per_parameter, differences(r, name, "baseline"), r))
    entries.sort(key=lambda e: (e[2], e[:2]))
    lines = [
        "| tokens a parameter | tokens a step | steps | parameters | TST less the baseline, nats (95%) | seeds | |",
        "|---|---|---|---|---|---|---|",
    ]
    figure = Figure(figsize=(7.2, 3.8), layout="constrained")
    axes = figure.subplots()
    labelled: set[str] = set()
    for tokens, steps, per_parameter, values, r in entries:
        lines.append(
            f"| {per_parameter:.1f} | {tokens:,} | {steps:,} | {short(r.baseline['parameters'])} | {told(values)} | "
            f"{len(values)} | [{r.name}](../results/{r.name}) |"
        )
        axes.plot([per_parameter] * len(values), values, ".", color=COLOURS[0], alpha=0.4)
        axes.plot(per_parameter, mean(values), "o", color=COLOURS[1], ms=7)
        if (label := f"{tokens:,} x {steps:,}") not in labelled:
            offset = (0, -12 if len(labelled) % 2 else 12)  # neighbours on either side
            at = (per_parameter, mean(values))
            axes.annotate(label, at, offset, textcoords="offset points", fontsize=8, ha="center", va="center")
        labelled.add(label)
    axes.axhline(0, color="#000000", lw=1)
    axes.set_xlim(left=0, right=1.1 * max((e[2] for e in entries), default=1.0))
    axes.set_xlabel("tokens a parameter (beside the points: tokens a step x steps)")
    axes.set_ylabel("validation loss minus the baseline's\n(nats per token)")
    bare(axes)
    return svg(figure), "\n".join([*lines, ""])


def against_plain(found: list[Result]) -> str:
    """A table of every variant less plain TST of the same seeds and steps, the best first."""
    table: list[tuple[bool, float, str]] = []
    for r in found:
        if reference := plain(r):
            for name, changed, length in ways(r):
                if changed and length == 1:
                    values = differences(r, name, reference)
                    how = ", ".join(f"{k} = {v}" for k, v in changed.items())
                    row = f"| `{how}` | {told(values)} | {len(values)} | {verdict(t_interval(values))} | {r.name} |"
                    table.append((len(values) == 1, mean(values), row))
    head = ["| changed | less plain TST, nats (95%) | seeds | | comparison |", "|---|---|---|---|---|"]
    return "\n".join([*head, *(row for *_, row in sorted(table)), ""])


def recipes(found: list[Result], length: float = 1.1) -> str:
    """A table of what was tried to save a tenth of the steps: tst less plain TST of 1.1 x the steps."""
    lines = [
        "| comparison | text | recipe | less plain TST of 1.1 x the steps, nats (95%) | |",
        "|---|---|---|---|---|",
    ]
    saves: set[bool] = set()
    for r in found:
        if reference := plain(r, length):
            for name, changed, steps in ways(r):
                if changed and steps == 1:
                    values = differences(r, name, reference)
                    how = ", ".join(f"{k} = {v}" for k, v in changed.items())
                    text = r.about["text"].partition(" (")[0]
                    judged = verdict(t_interval(values))
                    saves.add(judged == "better")
                    lines.append(f"| {r.name} | {text} | `{how}` | {told(values)} | {judged} |")
    if saves == {False}:
        lines += ["", "Nothing that was tried does, so the default of `tst train` is plain TST."]
    return "\n".join([*lines, ""])
