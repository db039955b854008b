"""Sections of the findings page about plain TST: s = 4, r = 0.3, uniform weights, as in the paper.

How its gain depends on the batch and the number of steps, which variants end below it, and whether a recipe saves a
tenth of its steps.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import product
from statistics import mean
from typing import Any

from matplotlib.figure import Figure

from results.figures import bare
from results.kept import SEEDS, Result, told, verdict
from token_superposition.experiment.superposition import SuperpositionConfig
from token_superposition.report.contents import short
from token_superposition.report.figures import COLOURS, svg

TEXTS = ("python", "English", "C++ headers", "sentences of a grammar")
MARKERS = "os^D"
PLAIN = json.loads(json.dumps(asdict(SuperpositionConfig(bag_size=4, ratio=0.3))))  # as a summary has it

FACTOR, RATE = "embedding_lr_factor", "learning_rate"


def ways(r: Result) -> Iterator[tuple[str, dict[str, Any], float]]:
    """Of each run but the baselines: its name, what of it differs from plain TST at one learning rate for all weights,
    that of the baseline, and its length."""
    config = r.summary["config"]
    train = config["train"]
    tst: dict[str, Any] = {"name": "tst", "superposition": config["superposition"]}
    for v in (tst, *config["compare"].get("variants", [])):
        # An option that came later is not in the older files, which then have its default.
        changed = {k: value for k, value in v["superposition"].items() if PLAIN.get(k) != value}
        if v["superposition"]["ratio"] == 0 or v["superposition"]["bag_size"] == 1:  # either will do
            changed |= {"bag_size": 1, "ratio": 0.0}
        if (factor := v.get(FACTOR) or train.get(FACTOR, 1.0)) != 1:
            changed[FACTOR] = factor
        if v.get(RATE) not in (None, train.get(RATE)):
            changed[RATE] = v[RATE]
        yield v["name"], changed, v.get("length", 1.0)


def ordinary(r: Result) -> str | None:
    """The name of the run of that length without bags and at one learning rate, which plain TST is compared with."""
    if r.summary["config"]["train"].get(FACTOR, 1.0) == 1:
        return "baseline"
    without = {"bag_size": 1, "ratio": 0.0}
    return next((name for name, changed, steps in ways(r) if changed == without and steps == 1), None)


def plain(r: Result, length: float = 1.0, bag_size: int = PLAIN["bag_size"]) -> str | None:
    """The name of the run that is plain TST of that length, or is so but for its bag size."""
    expected = {} if bag_size == PLAIN["bag_size"] else {"bag_size": bag_size}
    return next((name for name, changed, steps in ways(r) if changed == expected and steps == length), None)


def differences(r: Result, name: str, reference: str) -> list[float]:
    """Of the validation losses, seed by seed."""
    return [ours - other for ours, other in zip(r.losses(name), r.losses(reference), strict=True)]


def text_of(r: Result) -> str:
    """Its name, without the commands that make it."""
    return r.about["text"].partition(" (")[0]


def read(r: Result, name: str) -> str:
    """How often that run read the text."""
    times = next(x["epochs"] for x in r.summary["runs"] if x["name"] == name)
    return "once at most" if times <= 1 else f"{times:.2g} times"


Again = dict[tuple[str, str], str]
"""As kept.first_shown tells: runs that stand in an earlier comparison."""


@dataclass(frozen=True)
class Pair:
    """A variant beside plain TST of the same bag size, seeds, model and steps."""

    result: Result
    name: str
    how: str
    """What differs from plain TST of bags of 4."""
    values: list[float]
    """The variant's losses less those of plain TST, seed by seed, without the seeds that chose the variant."""


def pairs(found: list[Result], again: Again) -> list[Pair]:
    """Of every variant, but where an earlier comparison has both runs; a bag size of its own is one of s = 4."""
    result: list[Pair] = []
    for r in found:
        for name, changed, length in ways(r):
            own = changed.get("bag_size", PLAIN["bag_size"])
            reference = plain(r) if changed.keys() == {"bag_size"} else plain(r, bag_size=own)
            earlier = {again.get((r.name, name)), again.get((r.name, reference or ""))}
            if reference and changed and length == 1 and (len(earlier) > 1 or None in earlier):
                values = differences(r, name, reference)
                chose = r.about.get("chose", [])
                kept = [x for seed, x in zip(r.seeds, values, strict=True) if seed not in chose]
                if kept:
                    result.append(Pair(r, name, ", ".join(f"{k} = {v}" for k, v in changed.items()), kept))
    return result


def over_batches(found: list[Result], again: Again) -> tuple[str, str]:
    """Plain TST less the baseline by batch and steps: a figure and a table, the comparisons on TEXTS alone."""
    entries: list[tuple[int, float, int, int, list[float], str, Result]] = []
    for r in found:
        if (name := plain(r)) and (other := ordinary(r)) and text_of(r) in TEXTS and (r.name, name) not in again:
            c = r.summary["config"]
            tokens = c["train"]["batch_size"] * c["data"]["sequence_length"]
            per_parameter = r.baseline["latent_tokens"] / r.baseline["parameters"]
            values = differences(r, name, other)
            place = TEXTS.index(text_of(r))
            entries.append((place, per_parameter, tokens, c["train"]["steps"], values, read(r, name), r))
    entries.sort(key=lambda e: e[:4])
    lines = [
        "| text | tokens a parameter | tokens a step | steps | parameters | TST less baseline, nats (95%) | seeds | "
        "text read by TST | |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    figure = Figure(figsize=(7.2, 3.8), layout="constrained")
    axes = figure.subplots()
    sizes = list(dict.fromkeys(short(e[-1].baseline["parameters"]) for e in entries))
    labelled: set[str] = set()
    for text, per_parameter, tokens, steps, values, times, r in entries:
        size = short(r.baseline["parameters"])
        flattered = f", whose baseline is {r.about['mistuned']} mistuned" if "mistuned" in r.about else ""
        lines.append(
            f"| {TEXTS[text]} | {per_parameter:.1f} | {tokens:,} | {steps:,} | {size} | {told(values)} | "
            f"{len(values)} | {times} | [{r.label}](../results/{r.name}){flattered} |"
        )
        colour, label = COLOURS[sizes.index(size) % len(COLOURS)], f"{TEXTS[text]}, {size} parameters"
        axes.plot([per_parameter] * len(values), values, ".", color=colour, alpha=0.4)
        shown = None if label in labelled else label
        fill, pale = colour if len(values) >= SEEDS else "none", 0.45 if r.in_blocks else 1
        axes.plot(per_parameter, mean(values), MARKERS[text], color=colour, ms=7, label=shown, mfc=fill, alpha=pale)
        labelled.add(label)
    axes.axhline(0, color="#000000", lw=1)
    axes.set_xscale("log")
    axes.set_xticks((3, 10, 30, 100), ("3", "10", "30", "100"))
    axes.set_xlabel("latent tokens a parameter (log; hollow: fewer than three seeds; pale: read in blocks)")
    axes.set_ylabel("validation loss minus the baseline's\n(nats per token)")
    if entries:
        axes.legend(frameon=False, fontsize=8)
    bare(axes)
    return svg(figure), "\n".join([*lines, ""])


def against_plain(found: list[Result], again: Again) -> str:
    """A table of every variant less plain TST of the same bag size, seeds and steps, the best first."""
    table: list[tuple[bool, float, str]] = []
    for p in pairs(found, again):
        row = (
            f"| `{p.how}` | {told(p.values)} | {len(p.values)} | {verdict(p.values)} | {read(p.result, p.name)} | "
            f"{p.result.label} |"
        )
        table.append((len(p.values) == 1, mean(p.values), row))
    head = ["| changed | less plain TST, nats (95%) | seeds | | text read | comparison |", "|---|---|---|---|---|---|"]
    return "\n".join([*head, *(row for *_, row in sorted(table)), ""])


def recipes(found: list[Result], lengths: Iterable[float] = (1.1, 1.1112)) -> str:
    """A table of what was tried to save a tenth of the steps: tst less plain TST of 1.1 x the steps, or of 1 / 0.9."""
    lines = [
        "| comparison | text | recipe | steps of plain TST | less plain TST, nats (95%) | seeds | |",
        "|---|---|---|---|---|---|---|",
    ]
    by_recipe: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for r, length in product(found, lengths):
        if reference := plain(r, length):
            for name, changed, steps in ways(r):
                if changed and steps == 1 and changed.get("bag_size") != 1:
                    values = differences(r, name, reference)
                    how = ", ".join(f"{k} = {v}" for k, v in changed.items())
                    by_recipe[how].append((verdict(values), text_of(r)))
                    lines.append(
                        f"| {r.label} | {text_of(r)} | `{how}` | {length:.3g} x | {told(values)} | {len(values)} | "
                        f"{verdict(values)} |"
                    )
    shown: list[str] = []
    for how, tried in by_recipe.items():
        texts = list(dict.fromkeys(text for judged, text in tried if judged == "better"))
        where = f" ({', '.join(texts)})" if texts else ""
        shown.append(f"`{how}` in {sum(judged == 'better' for judged, _ in tried)} of {len(tried)}{where}")
    if shown:
        lines += ["", f"Comparisons that show it: {'; '.join(shown)}."]
    return "\n".join([*lines, ""])
