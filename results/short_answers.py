"""The first section of the findings page: what all comparisons of at least three seeds say, in two tables."""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import Any

from results.kept import SEEDS, Result, told, verdict
from results.plain import FACTOR, TEXTS, Again, differences, ordinary, pairs, plain, text_of
from token_superposition.experiment.intervals import chance, holm
from token_superposition.report.contents import interval, mean_speedup, short, speedup_in_flops

ASKED = (
    ("Are bags on 99% of the steps ever good?", "ratio-of-99", "ratio-0.99", "baseline"),
    ("Do bags win that are only read?", "sides", "input-only", "baseline"),
    ("Do bags win that are only predicted?", "sides", "output-only", "baseline"),
    ("Do they where a text is read many times?", "few-tokens", "output-only", "baseline"),
    ("Do they there, beside a baseline that stops sooner?", "few-tokens", "output-only", "baseline-x0.4"),
    ("Does it hurt to throw the optimizer's state away at the switch?", "750-steps", "optimizer-reset", "tst"),
    ("Do heads for two further tokens help?", "mtp", "mtp", "baseline"),
    ("Do such heads help together with bags?", "mtp", "tst+mtp", "tst"),
    ("Is a smaller bag better for a smaller model?", "small", "bags-of-2", "tst"),
    ("Does TST win with no more text than the baseline has?", "same-text", "tst", "baseline"),
    ("Does TST win with Muon?", "muon", "tst", "baseline"),
    ("Do weights save a tenth of plain TST's steps on English?", "english-recipe", "tst", "uniform-x1.1"),
    ("Do embeddings that learn 4 x as fast save it on English?", "embeddings-english", "tst", "plain-x1.1"),
    ("Do they save it on Python?", "proof-cpu", "tst", "plain-x1.1"),
    ("Do they save it on C++ headers, which did not choose them?", "embeddings-headers", "tst", "plain-x1.1"),
    ("Do they over ten further seeds, against 1.11 x?", "embeddings-headers-again", "tst", "plain-x1.11"),
    ("Does the baseline gain by them on English?", "embeddings-english", "baseline", "ordinary"),
    ("Does the baseline gain by them on Python?", "proof-cpu", "baseline", "ordinary"),
    ("Does TST win with them on Python at twice the rate?", "higher-rate", "tst", "baseline"),
    ("Does TST at a rate of its own beside that baseline?", "higher-rate", "tst-2e-3", "baseline"),
    ("Does TST where both have that rate of 2e-3?", "higher-rate", "tst-2e-3", "ordinary-2e-3"),
)
"""Questions that one comparison answers: its name, a run, and what it is compared with."""

COUNTED = {"better": "below the baseline", "worse": "above it", "no clear difference": "with no clear difference"}


def short_answers(found: list[Result], again: Again) -> str:
    """Two tables with bullets between them; none where no comparison has enough seeds."""
    enough = [r for r in found if len(r.seeds) >= SEEDS]
    of_plain = [
        r
        for r in enough
        if text_of(r) in TEXTS
        and (name := plain(r))
        and ordinary(r)
        and (r.name, name) not in again
        and "superseded" not in r.about
    ]
    bullets = [*wins(of_plain), *where(enough), *memory(enough), *variants(enough, again)]
    parts = [today(enough, again), bullets, asked(enough)]
    return "".join("\n".join([*lines, "", ""]) for lines in parts if lines)[:-1]


def today(enough: list[Result], again: Again) -> list[str]:
    """A table of what each comparison in today's order of the text says of tst, and of TST as in the paper."""
    lines: list[str] = []
    for r in enough:
        if not r.in_blocks and text_of(r) in TEXTS and (r.name, "tst") not in again:
            c = r.variants["tst"]
            cells = (
                text_of(r),
                short(r.baseline["parameters"]),
                settings(r),
                f"{len(r.seeds)}",
                told(differences(r, "tst", "baseline")),
                speedup(c),
                equal_text(c),
                told(differences(r, p, o)) if (p := plain(r)) and (o := ordinary(r)) else "",
                r.name,
            )
            lines.append(f"| {' | '.join(cells)} |")
    head = [
        "TST less the baseline of the same settings, what FLOPs the baseline needs for TST's loss, and TST less a "
        "baseline that reads as much text. *Plain TST* is the paper's, with one learning rate for all parameters, "
        "which its baseline has as well:",
        "",
        "| text | parameters | TST with | seeds | less the baseline at equal FLOPs, nats (95%) | "
        "FLOPs of a baseline as good, x | at equal text | plain TST less a baseline like it | |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    return [*head, *lines] if lines else []


def speedup(c: dict[str, Any]) -> str:
    """To equal loss, with its interval."""
    if (s := speedup_in_flops(c)) is None:
        return "not measured"
    ends = f" ({interval((s['low'], s['high']), '.2f')})" if s["low"] is not None or s["high"] is not None else ""
    return mean_speedup(s) + ends


def equal_text(c: dict[str, Any]) -> str:
    """TST less a baseline that reads as much text, where one was run or lies between two that were."""
    equal = c["equal_data"]
    if equal["interval"] is None or equal["ratio"] <= c["flops_ratio"]:
        return "not measured"
    return told(equal["delta_val_loss_per_seed"]) + ("" if equal["how"] == "measured" else f", {equal['how']}")


def settings(r: Result) -> str:
    c, train = r.summary["config"]["superposition"], r.summary["config"]["train"]
    kind = "uniform" if c["weighting"] == c.get("input_weighting", "uniform") == "uniform" else "weighted"
    factor = train.get(FACTOR, 1.0)
    faster = f", the embeddings at {factor:g} x that" if factor != 1 else ""
    rate = f" at {train['learning_rate']:g}{faster}" if "learning_rate" in train else ""
    return f"s = {c['bag_size']}, r = {c['ratio']:g}, {kind} bags, {train['steps']:,} steps{rate}"


def wins(of_plain: list[Result]) -> list[str]:
    """How many comparisons of plain TST ended how, text by text."""
    by_text: dict[str, Counter[tuple[str, bool]]] = defaultdict(Counter)
    for r in of_plain:
        by_text[text_of(r)][verdict(differences(r, plain(r) or "", ordinary(r) or "")), r.in_blocks] += 1

    def counted(count: Counter[tuple[str, bool]], kind: str) -> str:
        blocks, all_of = count[kind, True], count[kind, True] + count[kind, False]
        few = "" if blocks == all_of else f"{blocks} of them "
        return f"{all_of} {COUNTED[kind]}" + (f" ({few}†)" if blocks else "")

    told_of = (
        f"{text}: {', '.join(counted(count, kind) for kind in COUNTED if count[kind, True] + count[kind, False])}"
        for text, count in by_text.items()
    )
    head = f"- Plain TST at the end, by 95% intervals of comparisons of at least {SEEDS} seeds"
    alike = "They share seeds, texts and most settings, so they are not independent."
    return [f"{head}: {'; '.join(told_of)}. {alike}"] if by_text else []


def where(enough: list[Result]) -> list[str]:
    """The first comparison's difference on what can be copied from the window, and on the rest."""
    for r in enough:
        if r.copying:
            by = {(x["name"], x["kind"], int(x["seed"])): float(x["loss"]) for x in r.copying}
            new, repeated = (
                told([by["tst", kind, seed] - by["baseline", kind, seed] for seed in r.seeds])
                for kind in ("new", "repeated")
            )
            return [
                f"- Where the difference is ({r.name}): {repeated} on what can be copied from the window, "
                f"{new} on the rest."
            ]
    return []


def memory(enough: list[Result]) -> list[str]:
    """Whether TST knows what its text repeats less well than the baseline does."""
    lines: list[str] = []
    for r in enough:
        by = {(x["name"], int(x["repetitions"]), int(x["seed"])): float(x["loss"]) for x in r.strings}
        by_times = [
            f"{told([by['tst', n, seed] - by['baseline', n, seed] for seed in r.seeds])} with {n}"
            for n in sorted({n for _, n, _ in by})
        ]
        if by_times:
            lines.append(
                f"- Loss on random strings by how often the text has them, `tst` less `baseline` in {r.label}: "
                f"{', '.join(by_times)}."
            )
    return lines


def variants(enough: list[Result], again: Again) -> list[str]:
    """Which changes to plain TST make a clear difference, each by itself and among all of so many seeds."""
    judged = [p for p in pairs(enough, again) if len(p.values) >= SEEDS]
    apart = [p for p in judged if verdict(p.values) in ("better", "worse")]
    if not apart:
        return []
    told_apart = "; ".join(f"`{p.how}` {told(p.values)} in {p.result.label}, {verdict(p.values)}" for p in apart)
    chances = [chance(p.values) for p in judged]
    left = [f"`{p.how}` ({verdict(p.values)})" for p, rejected in zip(judged, holm(chances), strict=True) if rejected]
    return [
        f"- Clearly different from plain TST by their own intervals: {told_apart}. After Holm's correction for the "
        f"{len(judged)} variants of at least {SEEDS} seeds: {', '.join(left) or 'none'}."
    ]


def asked(enough: list[Result]) -> list[str]:
    """A table of the answers to those of ``ASKED`` whose comparison is there."""
    by_name = {r.name: r for r in enough}
    lines: list[str] = []
    for question, name, run, other in ASKED:
        if (r := by_name.get(name)) and {run, other} <= {x["name"] for x in r.summary["runs"]}:
            values = differences(r, run, other)
            lines.append(f"| {question} | {verdict(values)} | {told(values)} | `{run}` less `{other}` in {r.label} |")
    head = ["| question | | difference, nats (95%) | of |", "|---|---|---|---|"]
    return [*head, *lines] if lines else []
