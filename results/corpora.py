"""The texts of the findings. The same installation and command give the same text.

    python -m results.corpora python   text/python     # the source files of this installation
    python -m results.corpora english  text/english    # their docstrings, and the documentation beside them
    python -m results.corpora invented text/invented   # sentences of a grammar, drawn from a seed
    python -m results.corpora strings  text/strings    # 20 MB of Python source with random strings in it, repeated

Each writes JSON lines of 1,000 documents a file for ``tst prepare``.
"""

from __future__ import annotations

import ast
import json
import random
import sys
import warnings
from collections.abc import Iterable, Iterator
from itertools import accumulate, islice
from pathlib import Path

from token_superposition.data.installation import installed_files

SHORTEST = 200  # characters of a docstring that is prose rather than a label
DOCUMENTS_PER_FILE = 1000


def sources() -> Iterator[tuple[Path, str]]:
    for path in installed_files():
        try:
            yield path, path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue


def python() -> Iterator[str]:
    yield from (text for path, text in sources() if path.suffix == ".py")


def english() -> Iterator[str]:
    """All longer docstrings of a file as one document; files of documentation as they are."""
    for path, text in sources():
        if path.suffix in (".md", ".rst"):
            yield text
        elif path.suffix == ".py":
            try:
                with warnings.catch_warnings(action="ignore"):
                    tree = ast.parse(text)
            except (SyntaxError, ValueError, RecursionError):
                continue
            kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
            found = [ast.get_docstring(node) or "" for node in ast.walk(tree) if isinstance(node, kinds)]
            if prose := [d for d in found if len(d) >= SHORTEST]:
                yield "\n\n".join(prose)


SYLLABLES = [c + v for c in ("b", "d", "f", "g", "k", "l", "m", "n", "p", "r", "s", "t", "v", "z") for v in "aeiou"]


class Language:
    """Words of two to four syllables with Zipf's frequencies; verbs agree with their subject in number; a document has
    a topic (forty words that are drawn ten times as often) and three names, which return throughout."""

    def __init__(self, seed: int, nouns: int = 4000, verbs: int = 1500, adjectives: int = 1500):
        draw = random.Random(seed)
        words: set[str] = set()
        while len(words) < nouns + verbs + adjectives:
            words.add("".join(draw.choice(SYLLABLES) for _ in range(draw.choice((2, 2, 3, 3, 4)))))
        lexicon = sorted(words)
        draw.shuffle(lexicon)
        self.nouns, self.verbs = lexicon[:nouns], lexicon[nouns : nouns + verbs]
        self.adjectives = lexicon[nouns + verbs :]
        self.weights = {n: list(accumulate(1 / (i + 3) for i in range(n))) for n in (nouns, verbs, adjectives)}

    def document(self, draw: random.Random) -> str:
        topic = [draw.choice(self.nouns) for _ in range(40)]
        names = ["".join(draw.choice(SYLLABLES) for _ in range(3)).capitalize() for _ in range(3)]
        sentences = [self.sentence(draw, topic, names) for _ in range(draw.randrange(20, 120))]
        paragraphs = [" ".join(sentences[i : i + 6]) for i in range(0, len(sentences), 6)]
        return "\n\n".join(paragraphs)

    def sentence(self, draw: random.Random, topic: list[str], names: list[str]) -> str:
        subject, plural = self.noun_phrase(draw, topic, names)
        parts = [subject, self.pick(draw, self.verbs) + ("n" if plural else "th")]
        if draw.random() < 0.7:
            parts.append(self.noun_phrase(draw, topic, names)[0])
        if draw.random() < 0.3:
            parts += [draw.choice(("u", "em", "os")), self.noun_phrase(draw, topic, names)[0]]
        if draw.random() < 0.25:
            other, several = self.noun_phrase(draw, topic, names)
            parts += ["ke", other, self.pick(draw, self.verbs) + ("n" if several else "th")]
        text = " ".join(parts)
        return text[0].upper() + text[1:] + draw.choice((".", ".", ".", "?", "!"))

    def noun_phrase(self, draw: random.Random, topic: list[str], names: list[str]) -> tuple[str, bool]:
        if draw.random() < 0.2:
            return draw.choice(names), False
        plural = draw.random() < 0.35
        noun = draw.choice(topic) if draw.random() < 0.5 else self.pick(draw, self.nouns)
        adjective = [self.pick(draw, self.adjectives)] if draw.random() < 0.4 else []
        return " ".join(["la" if plural else "lo", *adjective, noun + ("s" if plural else "")]), plural

    def pick(self, draw: random.Random, words: list[str]) -> str:
        return draw.choices(words, cum_weights=self.weights[len(words)])[0]


def invented(seed: int = 0, documents: int = 24_000) -> Iterator[str]:
    language = Language(seed)
    draw = random.Random(seed + 1)
    yield from (language.document(draw) for _ in range(documents))


REPETITIONS = (1, 4, 16, 64, 256)
STRINGS = 32  # of each number of repetitions, and as many that are in no text
STRINGS_TEXT = 20_000_000  # characters


def random_strings(seed: int = 0) -> dict[str, int]:
    """Strings of 48 hexadecimal digits, and how often each is in the text."""
    draw = random.Random(seed)
    return {f"{draw.getrandbits(192):048x}": times for times in (0, *REPETITIONS) for _ in range(STRINGS)}


def strings() -> Iterator[str]:
    documents: list[str] = []
    size = 0
    for text in python():
        documents.append(text)
        size += len(text)
        if size > STRINGS_TEXT:
            break
    yield from with_strings(documents, random_strings())


def with_strings(documents: list[str], found: dict[str, int], seed: int = 1) -> list[str]:
    """Each string as a line of its own at the end of documents that are drawn for it."""
    draw = random.Random(seed)
    more: list[list[str]] = [[] for _ in documents]
    for string, times in found.items():
        for i in draw.choices(range(len(documents)), k=times):
            more[i].append(f"{string}\n")
    return ["".join((text, *lines)) for text, lines in zip(documents, more, strict=True)]


def write(texts: Iterable[str], out: Path) -> None:
    """JSON lines, a thousand documents a file; the directory appears when it is whole."""
    partial = out.with_name(f".{out.name}.partial")
    partial.mkdir(parents=True)
    documents = iter(texts)
    for i in range(sys.maxsize):
        lines = [json.dumps({"text": t}) + "\n" for t in islice(documents, DOCUMENTS_PER_FILE)]
        if not lines:
            break
        (partial / f"{i:04d}.jsonl").write_text("".join(lines))
    partial.rename(out)


if __name__ == "__main__":
    kinds = {"python": python, "english": english, "invented": invented, "strings": strings}
    if len(sys.argv) != 3 or sys.argv[1] not in kinds:
        sys.exit(__doc__)
    write(kinds[sys.argv[1]](), Path(sys.argv[2]))
