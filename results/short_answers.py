"""The first section of the findings page: what all comparisons of at least three seeds say, in a few sentences."""

from __future__ import annotations

from collections import Counter, defaultdict

from results.kept import Result, told, verdict
from results.plain import TEXTS, differences, plain, text_of, ways
from token_superposition.experiment.intervals import t_interval
from token_superposition.report.contents import short

SEEDS = 3
"""Fewer have no interval that is of use."""
COUNTED = {"better": "below the baseline", "worse": "above it", "not told from chance": "not told from it"}


def short_answers(found: list[Result]) -> str:
    """Bullets; none where no comparison has enough seeds."""
    enough = [r for r in found if len(r.seeds) >= SEEDS]
    lines = [*wins(enough), *from_where(enough), *where(enough), *variants(enough)]
    return "\n".join([*lines, ""]) if lines else ""


def wins(enough: list[Result]) -> list[str]:
    """How many comparisons of plain TST ended how, text by text."""
    by_text: dict[str, Counter[str]] = defaultdict(Counter)
    for r in enough:
        if text_of(r) in TEXTS and (name := plain(r)):
            by_text[text_of(r)][verdict(t_interval(differences(r, name, "baseline")))] += 1
    told_of = (
        f"{text}: {', '.join(f'{count[kind]} {words}' for kind, words in COUNTED.items() if count[kind])}"
        for text, count in by_text.items()
    )
    head = f"- Plain TST at the end, by 95% intervals of comparisons of at least {SEEDS} seeds"
    return [f"{head}: {'; '.join(told_of)}."] if by_text else []


def from_where(enough: list[Result]) -> list[str]:
    """Of each text and size of the model: with how many tokens a parameter TST does not win, and does."""
    groups: dict[tuple[str, str], list[tuple[float, str]]] = defaultdict(list)
    for r in enough:
        if text_of(r) in TEXTS and (name := plain(r)):
            b = r.baseline
            judged = verdict(t_interval(differences(r, name, "baseline")))
            groups[text_of(r), short(b["parameters"])].append((b["latent_tokens"] / b["parameters"], judged))
    lines: list[str] = []
    for (text, size), entries in groups.items():
        won = [x for x, judged in entries if judged == "better"]
        not_won = [x for x, judged in entries if judged != "better"]
        said = [f"not ahead with up to {max(not_won):.1f}"] if not_won else []
        said += [f"ahead from {min(won):.1f} on"] if won else []
        lines.append(f"- Latent tokens a parameter, {text}, {size} parameters: {', '.join(said)}.")
    return lines


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


def variants(enough: list[Result]) -> list[str]:
    """What of the changes to plain TST is told from chance."""
    better: list[str] = []
    worse: list[str] = []
    for r in enough:
        if text_of(r) in TEXTS and (reference := plain(r)):
            for name, changed, length in ways(r):
                if changed and length == 1:
                    values = differences(r, name, reference)
                    judged = verdict(t_interval(values))
                    how = f"`{', '.join(f'{k} = {v}' for k, v in changed.items())}` {told(values)} in {r.name}"
                    {"better": better, "worse": worse}.get(judged, []).append(how)
    lines = [f"- Below plain TST beyond chance: {'; '.join(better)}."] if better else []
    return lines + ([f"- Above plain TST beyond chance: {'; '.join(worse)}."] if worse else [])
