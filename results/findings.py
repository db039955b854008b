"""Write docs/findings.md and its figures from the folders of results: ``python -m results.findings``."""

from __future__ import annotations

import tomllib
from collections import defaultdict
from pathlib import Path
from statistics import mean
from typing import Any

from results.figures import after_switch, ahead, forest
from results.kept import Result, at_equal_flops, first_shown, kept_at, load, rows, told, unfinished_in, verdict
from results.plain import against_plain, differences, over_batches, recipes, text_of
from results.short_answers import short_answers, speedup
from results.sweeps import section as section_of_sweep
from token_superposition.report.contents import interval


def table_row(name: str, c: dict[str, Any], again: str | None, chose: list[int]) -> str:
    name, values = at_equal_flops(name, c)
    per_seed = ", ".join(f"{d:+.3f}" for d in values)
    judged = f"{verdict(values)}; the runs of {again}" if again else verdict(values)
    if chose and name == "tst":
        judged += f"; seed {' and '.join(map(str, chose))} had a part in choosing it"
    return f"| {name} | {told(values)} | {speedup(c)} | {per_seed} | {judged} |"


def longer_rows(variants: dict[str, dict[str, Any]]) -> list[str]:
    """A sentence for each baseline of more steps that a variant was compared with, and for that of as much text."""
    lines = [
        f"- {name} against a baseline of {x['ratio']:.3g} x the steps: {x['delta_val_loss']:+.3f} "
        f"({interval(x['interval'], '+.3f')})"
        for name, c in variants.items()
        for x in c["longer_baselines"]
        if x["interval"] is not None
    ]
    lines += [
        f"- {name} at equal data, against a baseline of {x['ratio']:.3g} x the steps ({x['how']}): "
        f"{x['delta_val_loss']:+.3f} ({interval(x['interval'], '+.3f')})"
        for name, c in variants.items()
        if (x := c["equal_data"])["interval"] is not None and x["ratio"] > c["flops_ratio"]
    ]
    return [*lines, ""] if lines else []


def against_tst(r: Result) -> list[str]:
    """A table of the further variants' differences to tst, the best first."""
    found = {name: x for name, c in r.variants.items() if (x := c["against_tst"])}
    if not found:
        return []
    lines = ["Less tst of the same seed:", "", "| variant | difference, nats (95%) | |", "|---|---|---|"]
    for name, x in sorted(found.items(), key=lambda item: item[1]["delta_val_loss"]):
        ends = f" ({interval(x['interval'], '+.3f')})" if x["interval"] else ""
        lines.append(f"| {name} | {x['delta_val_loss']:+.3f}{ends} | {verdict(differences(r, name, 'tst'))} |")
    return [*lines, ""]


def baselines(r: Result) -> str:
    """Their mean losses, that of equal steps first."""
    losses: dict[str, list[float]] = defaultdict(list)
    for x in r.summary["runs"]:
        if x["name"].startswith("baseline"):
            losses[x["name"]].append(x["val_loss"])
    others = "; ".join(
        f"{name.removeprefix('baseline-x')} x the steps {mean(values):.4f}"
        for name, values in losses.items()
        if name != "baseline"
    )
    return f"Baseline {mean(losses['baseline']):.4f}" + (f" ({others})" if others else "")


def section(r: Result, again: dict[tuple[str, str], str]) -> str:
    v = r.baseline["versions"]
    lines = [
        f"### {r.label}: {r.about['question']}",
        "",
        f"Text: {r.about['text']}{', read in blocks' if r.in_blocks else ''}. {r.setting}. {baselines(r)}, seeds "
        f"{', '.join(map(str, r.seeds))}.",
        "",
        "| variant | difference, nats (95%) | speed-up to equal loss (95%) | by seed | |",
        "|---|---|---|---|---|",
        *(table_row(name, c, again.get((r.name, name)), r.about.get("chose", [])) for name, c in r.variants.items()),
        "",
        *longer_rows(r.variants),
        *against_tst(r),
        f"`{r.about['command']}`{kept_at(r.about)}; {'; '.join(r.hardware)}; torch {v['torch']}, "
        f"transformers {v['transformers']}; "
        f"[results/{r.name}](../results/{r.name}).",
        "",
        *((r.about["note"], "") if "note" in r.about else ()),
    ]
    return "\n".join(lines)


def cut_short(folder: Path) -> str:
    """A comparison that did not end and has no summary: validation losses where at least two runs have one."""
    about = tomllib.loads((folder / "about.toml").read_text())
    train = tomllib.loads((folder / "config.toml").read_text())["train"]
    constant = train["steps"] - round(train["decay_ratio"] * train["steps"])
    table: dict[int, dict[str, str]] = defaultdict(dict)
    for row in rows(folder / "curves.csv"):
        alike = int(row["step"]) <= constant or not row["name"].startswith("baseline-x")  # which decays elsewhere
        if row["val_loss"] and alike:
            table[int(row["step"])].setdefault(row["name"], row["val_loss"])  # a run's last step has two: the first
    names = list(dict.fromkeys(row["name"] for row in rows(folder / "curves.csv")))
    lines = [
        f"### {folder.name}: {about['question']}",
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
    made = f"`{about['command']}`{kept_at(about)}; [results/{folder.name}](../results/{folder.name})."
    lines += ["", made, "", about["note"], ""]
    return "\n".join(lines)


def memorised(r: Result) -> str:
    """Tables of the loss on repeated strings, less that on strings of no text and less the baseline's."""
    losses = {(x["name"], int(x["repetitions"]), int(x["seed"])): float(x["loss"]) for x in r.strings}
    times = sorted({n for _, n, _ in losses})
    names = list(dict.fromkeys(name for name, *_ in losses))

    def less(name: str, n: int, other: str, m: int) -> list[float]:
        return [losses[name, n, seed] - losses[other, m, seed] for seed in r.seeds]

    lines = [
        f"From {r.label}: loss on random strings, by how often each is in the text, less the loss on such strings "
        "that are in no text. More below 0 is more memorised; means over seeds.",
        "",
        f"| run | {' | '.join(f'{n} x' for n in times[1:])} |",
        f"|---|{'---|' * len(times[1:])}",
        *(f"| {name} | {' | '.join(f'{mean(less(name, n, name, 0)):+.2f}' for n in times[1:])} |" for name in names),
        "",
        "Loss less the baseline's on the same strings, nats per token (95% interval over seeds); 0 x are the "
        "strings that are in no text.",
        "",
        f"| run | {' | '.join(f'{n} x' for n in times)} |",
        f"|---|{'---|' * len(times)}",
        *(f"| {x} | {' | '.join(told(less(x, n, 'baseline', n)) for n in times)} |" for x in names if x != "baseline"),
        "",
    ]
    return "\n".join(lines)


def copied(found: list[Result]) -> str:
    """A table of the differences to the baseline on what can be copied from the window and on the rest."""
    lines = [
        "A held-out token is *repeated* if the pair that it forms with the token before has occurred earlier in the "
        "window, so that it can be copied from there; the others are *new*. Loss less the baseline's of the same seed, "
        "nats per token (95% interval over seeds).",
        "",
        "| comparison | text | tokens, of which repeated | run | seeds | new | repeated |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in found:
        by = {(x["name"], x["kind"], int(x["seed"])): float(x["loss"]) for x in r.copying}
        tokens = {x["kind"]: int(x["tokens"]) for x in r.copying}
        of = f"{sum(tokens.values()):,}, {tokens['repeated'] / sum(tokens.values()):.0%}"
        for name in dict.fromkeys(x["name"] for x in r.copying if x["name"] != "baseline"):
            cells = (
                told([by[name, kind, seed] - by["baseline", kind, seed] for seed in r.seeds])
                for kind in ("new", "repeated")
            )
            lines.append(f"| {r.label} | {text_of(r)} | {of} | {name} | {len(r.seeds)} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


HEAD = """\
# Findings

Made by `python -m results.findings` from the folders in [results](../results), each of which holds the configuration,
the seeds, the hardware and the versions; no number of a table is typed in by hand. Small models on two CPU cores, and
one of 110M parameters on a GPU: they say what TST does there, not what it does at 3B. Loss is next-token cross-entropy
on held-out text in nats per token; an interval is Student's t over paired seeds ([how to read a
comparison](compare.md)); a speed-up after `~` is a rough mean of seeds of which some are only bounds. The texts come
from `python -m results.corpora`. Sections of one seed or two say so, whatever their intervals are; further leads, and
what was tried and left, are in the [log](../LOG.md). Parameters are counted with embedding and head, 0.26M of the 0.59M
here and 0.13M of the 0.21M. *English* is the docstrings and the documentation of the packages whose code is *python*;
the *C++ headers* lie beside it and are read as they are; the *sentences of a grammar* are an invented language (what
each is made of: [results/corpora.py](../results/corpora.py)). Where no precision is said, it is float32.

*Read in blocks* (†) is the order of the text before 2026-11-27: an ordinary step read pieces of blocks that bags fit
into, which lay closer together than by chance. That makes the baseline worse and so probably flatters TST: in
`weighted-bags`, where alone it was measured, by 0.014 (-0.013 to +0.041; [log](../LOG.md)). Such a comparison's command
reads in that order at the commit that is named, and in that of today now.

![Differences of all comparisons with their intervals](findings_forest.svg)

"""


def write(root: Path, docs: Path) -> None:
    found = load(root)
    again = first_shown(found)
    docs.mkdir(exist_ok=True)
    (docs / "findings_forest.svg").write_text(forest(found, again))
    picture, sentence = after_switch(found[0])
    (docs / "findings_switch.svg").write_text(picture)
    parts = [
        HEAD,
        *(["## In short\n", answers] if (answers := short_answers(found, again)) else []),
        "## Comparisons\n",
        *(section(r, again) for r in found if not r.in_blocks),
        "## Comparisons read in blocks\n",
        *(section(r, again) for r in found if r.in_blocks),
        "## Sweeps\n",
        *(section_of_sweep(folder, docs) for folder in sorted(p.parent for p in root.glob("*/sweep.json"))),
        *(["## Cut short\n", *map(cut_short, unfinished)] if (unfinished := unfinished_in(root)) else []),
        "## What the switch does to the loss\n",
        f"{sentence}\n\n![Training loss after the switch](findings_switch.svg)\n",
    ]
    picture, table = ahead([r for r in found if (r.name, "tst") not in again])
    (docs / "findings_ahead.svg").write_text(picture)
    parts += [
        "## When TST overtakes the baseline\n",
        "Before the learning rate decays: the validation loss on the way less that of the baseline of the same seed "
        "after the same step.\n",
        table,
        "![Validation loss of TST minus the baseline's over the run](findings_ahead.svg)\n",
    ]
    picture, table = over_batches(found, again)
    (docs / "findings_batches.svg").write_text(picture)
    parts += [
        "## Batch, steps and tokens per parameter\n",
        "Plain TST (s = 4, r = 0.3, uniform weights), all comparisons on whole texts. Tokens are latent ones.\n",
        table,
        "![Difference by tokens a parameter](findings_batches.svg)\n",
        "## Which variant ends below plain TST?\n",
        "Every variant less plain TST of the same bag size, seeds, model and steps, those of several seeds first; "
        "without the seeds that chose the variant.\n",
        against_plain(found, again),
        "## Does a recipe save a tenth of the steps of plain TST?\n",
        "The recipe less plain TST with 1.1 x the steps, or with 1.11 x, of which its own are a tenth less: shown "
        "where the whole interval is below 0. The default of `tst train` is `embedding_lr_factor = 4.0`; "
        "`--train.embedding-lr-factor 1` is plain TST.\n",
        recipes(found),
    ]
    if copies := [r for r in found if r.copying]:
        parts += ["## Where the difference is\n", copied(copies)]
    if memories := [r for r in found if r.strings]:
        parts += ["## Does the bag memorise less?\n", *map(memorised, memories)]
    (docs / "findings.md").write_text("\n".join(parts))


if __name__ == "__main__":
    write(Path(__file__).parent, Path(__file__).parent.parent / "docs")
