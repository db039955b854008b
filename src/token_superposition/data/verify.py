"""Read every byte of a token store and name what is damaged."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np

from token_superposition.data.store import (
    HEADER_BYTES,
    SPLITS,
    Meta,
    Shard,
    check_header,
    check_tokenizer,
    damaged,
    file_sha256,
    read_checked,
)
from token_superposition.errors import TokenSuperpositionError

CHUNK_BYTES = 2**22  # whole tokens of any type


def verify_store(directory: Path, progress: Callable[[int, int], None] = lambda done, total: None) -> list[str]:
    """A line for each damaged file of a prepared directory; no line if it is whole.

    Compares the checksum of every file, looks whether every token is in the vocabulary, and whether the documents of
    a shard begin inside it, one after the other. ``progress`` is told the bytes read and the bytes in all.
    """
    try:
        meta = Meta.load(directory)
    except TokenSuperpositionError as e:
        return [str(e)]
    found: list[str] = []
    try:
        check_tokenizer(directory, meta)
    except TokenSuperpositionError as e:
        found.append(str(e))
    found += _tokenizer_files(directory / "tokenizer", meta)
    shards = [s for split in SPLITS for s in getattr(meta, split).shards]
    size = np.dtype(meta.dtype).itemsize
    done, total = 0, sum(s.tokens for s in shards) * size
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # hashing frees the GIL
        for shard, lines in zip(shards, pool.map(partial(_verify_shard, directory, meta), shards), strict=True):
            found += lines
            done += shard.tokens * size
            progress(done, total)
    return found


def _tokenizer_files(folder: Path, meta: Meta) -> list[str]:
    """But for tokenizer.json, which every store has a checksum of."""
    found: list[str] = []
    for path, sha256 in ((folder / name, sha256) for name, sha256 in meta.tokenizer_files.items()):
        if path.name == "tokenizer.json":
            continue
        try:
            if file_sha256(path) != sha256:
                found.append(str(damaged(path, "differs from its checksum in meta.json")))
        except OSError as e:
            found.append(str(damaged(path, f"cannot be read ({e.strerror})")))
    return found


def _verify_shard(directory: Path, meta: Meta, shard: Shard) -> list[str]:
    found: list[str] = []
    for check in (_tokens, _documents, _crc32):
        try:
            check(directory, meta, shard)
        except TokenSuperpositionError as e:
            found.append(str(e))
    return found


def _tokens(directory: Path, meta: Meta, shard: Shard) -> None:
    path = directory / shard.file
    check_header(path, meta.dtype, shard.tokens)
    digest, largest = hashlib.sha256(), 0
    try:
        with path.open("rb") as f:
            digest.update(f.read(HEADER_BYTES))
            while chunk := f.read(CHUNK_BYTES):
                digest.update(chunk)
                largest = max(largest, int(np.frombuffer(chunk, meta.dtype).max()))
    except OSError as e:
        raise damaged(path, f"cannot be read ({e.strerror})") from None
    if digest.hexdigest() != shard.sha256:
        raise damaged(path, "differs from its checksum in meta.json")
    if largest >= meta.vocab_size:
        raise damaged(path, f"holds token {largest}, the vocabulary has {meta.vocab_size}")


def _documents(directory: Path, meta: Meta, shard: Shard) -> None:
    path = directory / shard.documents_file
    starts = read_checked(path, "uint64", shard.documents, shard.documents_sha256)
    if (starts[1:] <= starts[:-1]).any() or (starts >= shard.tokens).any():
        raise damaged(path, f"does not hold rising places in the {shard.tokens} tokens of {shard.file}")


def _crc32(directory: Path, meta: Meta, shard: Shard) -> None:
    read_checked(directory / shard.crc32_file, "uint32", shard.blocks, shard.crc32_sha256)
