"""``tst verify``"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import tyro

from token_superposition.cli.arguments import parse
from token_superposition.errors import TokenSuperpositionError


@dataclass(frozen=True)
class VerifyCommand:
    """Read data and runs again from end to end and name every damaged file.

    PATHS are directories of tst prepare (every checksum, token ids against the vocabulary, places of documents, the
    tokenizer) and of tst train, tst compare or tst sweep (checkpoints have their manifest and its checksums,
    configurations, metrics and results can be read, models of finished runs have their weights, model files the
    length that they say). Exit status: 0 all whole, 2 something is damaged, missing or unreadable.

    Training never reads damaged tokens either: it compares what it reads, as it reads it. tst verify finds the damage
    before: after a copy, or before a long run.

    Example: tst verify data && tst train config.toml --out run
    """

    paths: tyro.conf.Positional[tuple[Path, ...]]


def run(args: Sequence[str]) -> None:
    options = parse(VerifyCommand, "verify", args)
    if not options.paths:
        raise TokenSuperpositionError("no directory given; name what tst prepare or tst train wrote")
    from rich.console import Console

    from token_superposition.data.progress import bars
    from token_superposition.data.store import Meta
    from token_superposition.data.verify import verify_store

    console = Console()
    damaged = 0
    for path in options.paths:
        if not path.is_dir():
            raise TokenSuperpositionError(f"{path} is not a directory; name what tst prepare or tst train wrote")
        if (path / "meta.json").exists() or any(path.glob("*.crc32.npy")):
            with bars(console) as progress:
                lines = verify_store(path, partial(progress, f"verify {path}"))
            meta = None if lines else Meta.load(path)
            whole = meta and f"{meta.train.tokens + meta.validation.tokens:,} tokens, every checksum is right"
        else:
            from token_superposition.experiment.verify import verify_run  # beside it torch is imported

            files, lines = verify_run(path)
            whole = f"{files:,} files can be read"
        for line in lines:
            print(f"tst: damaged: {line}", file=sys.stderr)
        damaged += len(lines)
        if not lines:
            console.print(f"{path}: {whole}", soft_wrap=True, highlight=False, markup=False)
    if damaged:
        raise TokenSuperpositionError(f"{damaged} of the files are damaged or missing, named above; do not use them")
