"""``tst prepare``"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import tyro

from token_superposition.cli.arguments import parse
from token_superposition.data.prepare import PrepareOptions


@dataclass(frozen=True)
class PrepareCommand:
    """Turn text into a token store that tst train and tst compare read.

    SOURCES are files, folders (searched for text, Markdown, code, JSON lines, Parquet, Arrow; .gz and .zst too; not in
    what is hidden, such as .git), quoted globs, or hf:DATASET[:CONFIG[:SPLIT]]. A file is a document, except in JSON
    lines, Parquet and Arrow, where a row is one. What cannot be used is counted by its reason: docs/data.md has the
    list. tst verify reads the result again.

    Example: tst prepare ~/notes 'src/**/*.py' pages.jsonl.zst --out data --vocab-size 16384
    """

    sources: tyro.conf.Positional[tuple[str, ...]]
    out: Path = Path("data")
    """Directory to write; it appears when it is whole."""
    preparation: tyro.conf.OmitArgPrefixes[PrepareOptions] = field(default_factory=PrepareOptions)


def run(args: Sequence[str]) -> None:
    command = parse(PrepareCommand, "prepare", args)
    from rich.console import Console

    from token_superposition.cli.quiet import quiet
    from token_superposition.data.prepare import prepare
    from token_superposition.data.progress import bars
    from token_superposition.data.sources import MAX_TEXT_BYTES

    quiet()
    console = Console()
    start = time.monotonic()
    with bars(console) as progress:
        meta = prepare(command.sources, command.out, command.preparation, progress)
    asked = command.preparation.vocab_size
    few = command.preparation.tokenizer is None and meta.vocab_size < asked
    had = "the sample has no more: give more --tokenizer-bytes" if meta.sampled else "the text has no more"
    note = f" (asked: {asked:,}; {had})" if few else ""
    console.print(f"vocabulary: {meta.vocab_size:,}{note}")
    for split, s in (("train", meta.train), ("validation", meta.validation)):
        console.print(f"{split}: {s.tokens:,} tokens, {s.documents:,} documents, {s.bytes_per_token:.3f} bytes/token")
    share, wanted = meta.validation.bytes / (meta.train.bytes + meta.validation.bytes), meta.validation_share
    if share > 2 * wanted:
        why = f"asked: {wanted:.3g}; documents are held out whole: give more text"
        console.print(f"held out: {share:.3g} of the text ({why})")
    if meta.cut:
        console.print(f"cut: {meta.cut:,} documents of more than {MAX_TEXT_BYTES >> 20} MiB into several")
    for what, share in meta.lost.items():
        console.print(f"lost in the tokens: {share:.2g} of the {what}, which this tokenizer does not give back")
    for reason, count in meta.dropped.items():
        console.print(f"left out: {count:,} ({reason})", markup=False)
    seconds = time.monotonic() - start
    speed = (meta.train.tokens + meta.validation.tokens) / seconds
    console.print(f"written to {command.out} in {seconds:.0f} s, {speed:,.0f} tokens/s", markup=False)
