"""The first section of the findings page: what all comparisons of at least three seeds say, in a few sentences."""

from __future__ import annotations

from collections import Counter, defaultdict
from statistics import mean

from results.kept import SEEDS, Result, told, verdict
from results.plain import FACTOR, TEXTS, Again, differences, ordinary, pairs, plain, text_of
from token_superposition.experiment.intervals import chance, holm
from token_superposition.report.contents import short
from token_superposition.report.verdicts import in_short

ASKED = (
    ("Are bags on 99% of the steps ever good?", "ratio-of-99", "ratio-0.99", "baseline"),
    ("Is it what is read?", "sides", "input-only", "baseline"),
    ("Is it what is predicted?", "sides", "output-only", "baseline"),
    ("Do bags of what is predicted win where a text is read many times?", "few-tokens", "output-only", "baseline"),
    ("And beside a baseline that stops sooner?", "few-tokens", "output-only", "baseline-x0.4"),
    ("Does it hurt to throw the optimizer's state away at the switch?", "750-steps", "optimizer-reset", "tst"),
    ("Do heads for two further tokens help?", "mtp", "mtp", "baseline"),
    ("Do they help together with bags?", "mtp", "tst+mtp", "tst"),
    ("Is a smaller bag better for a smaller model?", "small", "bags-of-2", "tst"),
    ("Does it win with no more text than the baseline has?", "same-text", "tst", "baseline"),
    ("Does it win with Muon?", "muon", "tst", "baseline"),
    (
        "Do weights save a tenth of the steps on a text that did not choose them?",
        "english-recipe",
        "tst",
        "uniform-x1.1",
    ),
    ("Do embeddings that learn four times as fast save it on English?", "embeddings-english", "tst", "plain-x1.1"),
    ("And on Python?", "proof-cpu", "tst", "plain-x1.1"),
    ("And on C++ headers, which did not choose them?", "embeddings-headers", "tst", "plain-x1.1"),
    ("On Python at twice the rate, which suits a baseline with them: does TST win?", "higher-rate", "tst", "baseline"),
    ("And at a rate of its own?", "higher-rate", "tst-2e-3", "baseline"),
    ("And both at that rate?", "higher-rate", "tst-2e-3", "ordinary-2e-3"),
    ("Does the ordinary run gain by them on English?", "embeddings-english", "baseline", "ordinary"),
    ("And on Python?", "proof-cpu", "baseline", "ordinary"),
)
"""Questions that one comparison answers: its name, a run, and what it is compared with."""

COUNTED = {"better": "below the baseline", "worse": "above it", "no clear difference": "with no clear difference"}


def short_answers(found: list[Result], again: Again) -> str:
    """Bullets; none where no comparison has enough seeds."""
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
    lines = [
        *today(enough, again),
        *wins(of_plain),
        *from_where(of_plain),
        *at_equal_data(enough, again),
        *where(enough),
        *memory(enough),
        *variants(enough, again),
        *asked(enough),
    ]
    return "\n".join([*lines, ""]) if lines else ""


def today(enough: list[Result], again: Again) -> list[str]:
    """What each comparison in today's order of the text says of tst, as its report does."""
    return [
        f"- **{text_of(r)}, {short(r.baseline['parameters'])} parameters** ({r.name}; {r.baseline['steps']:,} steps, "
        f"{superposition(r)}): {in_short(r.variants['tst'])}."
        for r in enough
        if not r.in_blocks and text_of(r) in TEXTS and (r.name, "tst") not in again
    ]


def superposition(r: Result) -> str:
    c = r.summary["config"]["superposition"]
    factor = r.summary["config"]["train"].get(FACTOR, 1.0)
    kind = "uniform" if c["weighting"] == c.get("input_weighting", "uniform") == "uniform" else "weighted"
    rate = f", the embeddings at {factor:g} x the learning rate" if factor != 1 else ""
    return f"s = {c['bag_size']}, r = {c['ratio']:g}, {kind} bags{rate}"


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


def from_where(of_plain: list[Result]) -> list[str]:
    """Of each text and size of the model: the difference by tokens a parameter."""
    groups: dict[tuple[str, str], list[tuple[float, str]]] = defaultdict(list)
    for r in of_plain:
        b = r.baseline
        tokens, values = b["latent_tokens"] / b["parameters"], differences(r, plain(r) or "", ordinary(r) or "")
        judged = verdict(values)
        unsure = f", {judged}" if judged == "no clear difference" else ""
        flattered = f"; its baseline is {r.about['mistuned']} mistuned" if "mistuned" in r.about else ""
        said = f"{mean(values):+.3f} with {tokens:.1f} ({r.label}{unsure}{flattered})"
        groups[text_of(r), short(b["parameters"])].append((tokens, said))
    return [
        f"- Plain TST less the baseline by latent tokens a parameter, {text}, {size} parameters: "
        f"{', '.join(said for _, said in sorted(entries))}."
        for (text, size), entries in groups.items()
    ]


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
    """The answer to each of ``ASKED`` whose comparison is there."""
    by_name = {r.name: r for r in enough}
    lines: list[str] = []
    for question, name, run, other in ASKED:
        if (r := by_name.get(name)) and {run, other} <= {x["name"] for x in r.summary["runs"]}:
            values = differences(r, run, other)
            lines.append(f"- {question} `{run}` less `{other}` in {r.label}: {told(values)}, {verdict(values)}.")
    return lines


def at_equal_data(enough: list[Result], again: Again) -> list[str]:
    """TST less a baseline that reads as much text, wherever one was run or lies between two that were."""
    said: list[str] = []
    for r in enough:
        for name, c in r.variants.items():
            equal = c["equal_data"]
            more = equal["interval"] is not None and equal["ratio"] > c["flops_ratio"]
            if text_of(r) in TEXTS and more and (r.name, name) not in again:
                how = "" if equal["how"] == "measured" else f", {equal['how']}"
                difference = told(equal["delta_val_loss_per_seed"])
                said.append(f"{difference} with {name} in {r.label} ({equal['ratio']:.3g} x the steps{how})")
    return [f"- At equal data, less a baseline that reads as much text: {'; '.join(said)}."] if said else []
