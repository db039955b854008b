"""Write docs/findings.md and its figures from the folders of results: ``python -m results.findings``."""

from __future__ import annotations

import csv
import itertools
import json
import tomllib
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from results.sweeps import section as section_of_sweep
from token_superposition.experiment.intervals import t_interval
from token_superposition.report.contents import interval, short
from token_superposition.report.figures import COLOURS, svg


@dataclass(frozen=True)
class Result:
    name: str
    about: dict[str, str]
    summary: dict[str, Any]
    curves: list[dict[str, str]]
    strings: list[dict[str, str]]
    """What was memorised (results.memorisation), where that was measured."""
    copying: list[dict[str, str]]
    """Losses by what can be copied from the window (results.copying), where that was measured."""

    @property
    def variants(self) -> dict[str, dict[str, Any]]:
        return self.summary["comparison"]["variants"]

    @property
    def baseline(self) -> dict[str, Any]:
        return next(r for r in self.summary["runs"] if r["name"] == "baseline")

    @property
    def setting(self) -> str:
        """Model, batch and length in one line."""
        c = self.summary["config"]
        options = c["model"]["options"]
        t, bags = c["train"], c["superposition"]
        of_input = bags.get("input_weighting", "uniform")  # older ones lack it
        read = "" if of_input == "uniform" else f" of the targets, {of_input} ones of what is read"
        return (
            f"{c['model']['architecture']} {options['num_hidden_layers']} x {options['hidden_size']}, "
            f"{short(self.baseline['parameters'])} parameters, {t['batch_size']} x {c['data']['sequence_length']} "
            f"tokens a step, {t['steps']:,} steps, {t['optimizer']} at {t['learning_rate']:g}; tst: "
            f"s = {bags['bag_size']}, r = {bags['ratio']:g}, {bags['weighting']} weights{read}"
        )

    @property
    def seeds(self) -> list[int]:
        return sorted({r["seed"] for r in self.summary["runs"]})


def load(root: Path) -> list[Result]:
    """Comparisons in the order of their names, the shipped proof first."""
    found: list[Result] = []
    for folder in sorted(root.iterdir(), key=lambda p: (p.name != "proof-cpu", p.name)):
        if (folder / "summary.json").is_file():
            about = tomllib.loads((folder / "about.toml").read_text())
            summary = json.loads((folder / "summary.json").read_text())
            tables = (rows(folder / f"{name}.csv") for name in ("curves", "strings", "copying"))
            found.append(Result(folder.name, about, summary, *tables))
    return found


def unfinished_in(root: Path) -> list[Path]:
    return [p.parent for p in sorted(root.glob("*/curves.csv")) if not (p.parent / "summary.json").is_file()]


def rows(path: Path) -> list[dict[str, str]]:
    """Of a CSV file; none if there is no such file."""
    if not path.is_file():
        return []
    with path.open() as f:
        return list(csv.DictReader(f))


def verdict(c: dict[str, Any]) -> str:
    """
    >>> verdict({"delta_val_loss": -0.1, "delta_val_loss_interval": (-0.2, -0.05)})
    'better'
    """
    ends = c["delta_val_loss_interval"]
    if ends is None:
        return "one seed: a lead"
    return "better" if ends[1] < 0 else "worse" if ends[0] > 0 else "not told from chance"


def table_row(name: str, c: dict[str, Any]) -> str:
    s = c["speedup"]
    marks = {"measured": "", "at least": "≥ ", "at most": "≤ ", "not comparable": "~ "}
    speed = "not measured" if s is None else f"{marks[s['bound']]}{s['geometric_mean']:.2f}"
    if s is not None and (s["low"] is not None or s["high"] is not None):
        speed += f" ({interval((s['low'], s['high']), '.2f')})"
    ends = c["delta_val_loss_interval"]
    difference = f"{c['delta_val_loss']:+.3f}" + (f" ({interval(ends, '+.3f')})" if ends else "")
    per_seed = ", ".join(f"{d:+.3f}" for d in c["delta_val_loss_per_seed"])
    return f"| {name} | {difference} | {speed} | {per_seed} | {verdict(c)} |"


def longer_rows(variants: dict[str, dict[str, Any]]) -> list[str]:
    """A sentence for each baseline of more steps that a variant was compared with."""
    lines = [
        f"- {name} against a baseline of {x['ratio']:.3g} x the steps: {x['delta_val_loss']:+.3f} "
        f"({interval(x['interval'], '+.3f')})"
        for name, c in variants.items()
        for x in c.get("longer_baselines", [])
        if x["interval"] is not None
    ]
    return [*lines, ""] if lines else []


def against_tst(variants: dict[str, dict[str, Any]]) -> list[str]:
    """A table of the further variants' differences to tst, the best first."""
    found = {name: x for name, c in variants.items() if (x := c.get("against_tst"))}
    if not found:
        return []
    lines = ["Less tst of the same seed:", "", "| variant | difference, nats (95%) | |", "|---|---|---|"]
    for name, x in sorted(found.items(), key=lambda item: item[1]["delta_val_loss"]):
        ends = f" ({interval(x['interval'], '+.3f')})" if x["interval"] else ""
        judged = verdict({"delta_val_loss_interval": x["interval"]})
        lines.append(f"| {name} | {x['delta_val_loss']:+.3f}{ends} | {judged} |")
    return [*lines, ""]


def section(r: Result) -> str:
    losses = [x["val_loss"] for x in r.summary["runs"] if x["name"] == "baseline"]
    v = r.baseline["versions"]
    lines = [
        f"### {r.about['question']}",
        "",
        f"Text: {r.about['text']}. {r.setting}. Baseline {mean(losses):.4f}, seeds {', '.join(map(str, r.seeds))}.",
        "",
        "| variant | difference, nats (95%) | steps to equal loss (95%) | by seed | |",
        "|---|---|---|---|---|",
        *(table_row(name, c) for name, c in r.variants.items()),
        "",
        *longer_rows(r.variants),
        *against_tst(r.variants),
        f"`{r.about['command']}`; {r.baseline['hardware']}; torch {v['torch']}, transformers {v['transformers']}; "
        f"[results/{r.name}](../results/{r.name}).",
        "",
        *((r.about["note"], "") if "note" in r.about else ()),
    ]
    return "\n".join(lines)


def cut_short(folder: Path) -> str:
    """A comparison that did not end and has no summary: validation losses where at least two runs have one."""
    about = tomllib.loads((folder / "about.toml").read_text())
    table: dict[int, dict[str, str]] = defaultdict(dict)
    for row in rows(folder / "curves.csv"):
        if row["val_loss"]:
            table[int(row["step"])].setdefault(row["name"], row["val_loss"])  # a run's last step has two: the first
    names = list(dict.fromkeys(row["name"] for row in rows(folder / "curves.csv")))
    lines = [
        f"### {about['question']}",
        "",
        f"Text: {about['text']}.",
        "",
        f"| validation loss after step | {' | '.join(names)} |",
        "|---" * (len(names) + 1) + "|",
    ]
    for step, losses in sorted(table.items()):
        if len(losses) > 1:
            values = (f"{float(losses[n]):.4f}" if n in losses else "" for n in names)
            lines.append(f"| {step:,} | {' | '.join(values)} |")
    lines += ["", f"`{about['command']}`; [results/{folder.name}](../results/{folder.name}).", "", about["note"], ""]
    return "\n".join(lines)


def forest(found: list[Result]) -> str:
    """Every difference with its interval, one line each."""
    entries = [(f"{r.name}: {name}", c) for r in found for name, c in r.variants.items()][::-1]
    figure = Figure(figsize=(7.6, 1.2 + 0.3 * len(entries)), layout="constrained")
    axes = figure.subplots()
    colours = {"better": COLOURS[1], "worse": COLOURS[2]}
    for y, (_, c) in enumerate(entries):
        colour = colours.get(verdict(c), COLOURS[0])
        if ends := c["delta_val_loss_interval"]:
            axes.plot(ends, (y, y), color=colour, lw=2)
        axes.plot(c["delta_val_loss_per_seed"], [y] * len(c["delta_val_loss_per_seed"]), ".", color=colour, alpha=0.5)
        axes.plot(c["delta_val_loss"], y, "o", color=colour, ms=6)
    axes.axvline(0, color="#000000", lw=1)
    axes.set_yticks(range(len(entries)), [name for name, _ in entries], fontsize=9)
    axes.set_xlabel("validation loss minus the baseline's, nats per token (left is better)")
    plain(axes)
    return svg(figure)


def after_switch(r: Result, steps: int = 150) -> tuple[str, str]:
    """Training loss after the switch of the run tst and the baseline's at the same steps, means over seeds."""
    c = r.summary["config"]
    at = round(c["superposition"]["ratio"] * c["train"]["steps"])
    longest = max((x for x in r.summary["runs"] if x["name"].startswith("baseline")), key=lambda x: x["steps"])["name"]
    figure = Figure(figsize=(7.2, 3.6), layout="constrained")
    axes = figure.subplots()
    losses: dict[str, dict[int, float]] = {}
    for name, colour in ((longest, COLOURS[0]), ("tst", COLOURS[1])):
        shown: dict[int, list[float]] = defaultdict(list)
        for x in r.curves:
            if x["name"] == name and x["loss"] and at < int(x["step"]) <= at + steps:
                shown[int(x["step"]) - at].append(float(x["loss"]))
        losses[name] = {step: mean(values) for step, values in sorted(shown.items())}
        axes.plot(list(losses[name]), list(losses[name].values()), ".-", color=colour, label=name)
    axes.set_xlabel("steps after the switch")
    axes.set_ylabel("training loss (nats per token)")
    axes.legend(frameon=False)
    plain(axes)
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
    """Where TST passes the baseline on the way: a figure of all comparisons, and a table."""
    figure = Figure(figsize=(7.2, 4.0), layout="constrained")
    axes = figure.subplots()
    lines = [
        "| comparison | the switch, after | behind at last after | ahead beyond chance from |",
        "|---|---|---|---|",
    ]
    for r, colour, marker in zip(found, itertools.cycle(COLOURS), "osD^vPX*<>", strict=False):
        by_step = differences_by_step(r)
        switch = round(r.summary["config"]["superposition"]["ratio"] * r.summary["config"]["train"]["steps"])
        after = [step for step in by_step if step > switch]
        axes.plot(after, [mean(by_step[step]) for step in after], f"{marker}-", color=colour, ms=4, label=r.name)
        behind = [step for step in by_step if mean(by_step[step]) >= 0]
        unsure = [step for step in after if (ends := t_interval(by_step[step])) is None or ends[1] >= 0]
        first = next((step for step in after if step > max(unsure, default=0)), None)
        found_at = f"{first:,}" if first else "never" if len(by_step[after[0]]) > 1 else "one seed"
        lines.append(f"| {r.name} | {switch:,} | {max(behind, default=0):,} | {found_at} |")
    axes.axhline(0, color="#000000", lw=1)
    axes.set_xlabel("step, up to where the learning rate decays")
    axes.set_ylabel("validation loss minus the baseline's\n(nats per token, mean over seeds)")
    axes.legend(frameon=False, fontsize=8)
    plain(axes)
    return svg(figure), "\n".join([*lines, ""])


def memorised(r: Result) -> str:
    """A table of what the loss on repeated strings is below that on strings that were in no text."""
    by: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for x in r.strings:
        by[x["name"]][int(x["repetitions"])].append(float(x["loss"]))
    times = sorted({int(x["repetitions"]) for x in r.strings} - {0})
    lines = [
        f"From {r.name}: loss on random strings, by how often each is in the text, less the loss on such strings "
        "that are in no text. More below 0 is more memorised; means over seeds.",
        "",
        f"| run | {' | '.join(f'{n} x' for n in times)} |",
        f"|---|{'---|' * len(times)}",
        *(
            f"| {name} | {' | '.join(f'{mean(found[n]) - mean(found[0]):+.2f}' for n in times)} |"
            for name, found in by.items()
        ),
        "",
    ]
    return "\n".join(lines)


def copied(r: Result) -> str:
    """A table of the differences to the baseline on what can be copied from the window and on the rest."""
    by = {(x["name"], x["kind"], int(x["seed"])): float(x["loss"]) for x in r.copying}
    tokens = {x["kind"]: int(x["tokens"]) for x in r.copying}
    share = tokens["repeated"] / sum(tokens.values())
    lines = [
        f"From {r.name}: of {sum(tokens.values()):,} held-out tokens {share:.0%} form, with the token before, a pair "
        "that has occurred earlier in the window (repeated), so that it can be copied from there; the others are new. "
        "Loss less the baseline's of the same seed, nats per token (95% interval over seeds).",
        "",
        "| run | new | repeated |",
        "|---|---|---|",
    ]
    for name in dict.fromkeys(x["name"] for x in r.copying if x["name"] != "baseline"):
        cells: list[str] = []
        for kind in ("new", "repeated"):
            differences = [by[name, kind, seed] - by["baseline", kind, seed] for seed in r.seeds]
            ends = t_interval(differences)
            cells.append(f"{mean(differences):+.3f}" + (f" ({interval(ends, '+.3f')})" if ends else ""))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def plain(axes: Axes) -> None:
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


HEAD = """\
# Findings

Made by `python -m results.findings` from the folders in [results](../results), each of which holds the configuration,
the seeds, the hardware and the versions; no number is typed in by hand. Small models on two CPU cores: they say what
TST does there, not what it does at 3B. Loss is next-token cross-entropy on held-out text in nats per token; an interval
is Student's t over paired seeds ([how to read a comparison](compare.md)). The texts come from
`python -m results.corpora`. What is a lead of one seed, or was tried and left, is in the [log](../LOG.md).

![Differences of all comparisons with their intervals](findings_forest.svg)

"""


def write(root: Path, docs: Path) -> None:
    found = load(root)
    docs.mkdir(exist_ok=True)
    (docs / "findings_forest.svg").write_text(forest(found))
    picture, sentence = after_switch(found[0])
    (docs / "findings_switch.svg").write_text(picture)
    parts = [
        HEAD,
        "## Comparisons\n",
        *map(section, found),
        *(section_of_sweep(folder, docs) for folder in sorted(p.parent for p in root.glob("*/sweep.json"))),
        *(["## Cut short\n", *map(cut_short, unfinished)] if (unfinished := unfinished_in(root)) else []),
        "## What the switch does to the loss\n",
        f"{sentence}\n\n![Training loss after the switch](findings_switch.svg)\n",
    ]
    picture, table = ahead(found)
    (docs / "findings_ahead.svg").write_text(picture)
    parts += [
        "## From which step on TST is ahead\n",
        "Before the learning rate decays: the validation loss on the way less that of the baseline of the same seed "
        "after the same step.\n",
        table,
        "![Validation loss of TST minus the baseline's by step](findings_ahead.svg)\n",
    ]
    if copies := [r for r in found if r.copying]:
        parts += ["## Where the difference is\n", *map(copied, copies)]
    if memories := [r for r in found if r.strings]:
        parts += ["## Does the bag memorise less?\n", *map(memorised, memories)]
    (docs / "findings.md").write_text("\n".join(parts))


if __name__ == "__main__":
    write(Path(__file__).parent, Path(__file__).parent.parent / "docs")
