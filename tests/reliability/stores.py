"""Token stores made by hand: of sizes that nobody prepares for a test."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np

from token_superposition.data.store import (
    BLOCK_TOKENS,
    HEADER_BYTES,
    Meta,
    Shard,
    SplitMeta,
    block_crc32,
    file_sha256,
    header_of,
)


def sparse_store(directory: Path, shards: int, shard_tokens: int, linked: bool) -> Meta:
    """A store of zeros of type uint16 that takes hardly any room: its shards are holes, or links to one hole.

    The checksums of the blocks are right, those of the whole shards are left out.
    """
    (directory / "tokenizer").mkdir(parents=True)
    (directory / "tokenizer/tokenizer.json").write_text("{}")
    block = block_crc32(np.zeros(BLOCK_TOKENS, np.uint16))
    contents = {
        "documents": np.zeros(1, np.uint64),
        "crc32": np.repeat(block, shard_tokens // BLOCK_TOKENS),
    }
    names: list[str] = []
    checksums: dict[str, str] = {}
    for i in range(shards):
        name = f"train-{i:05d}"
        files = {kind: directory / f"{name}.{kind}.npy" for kind in contents}
        tokens = directory / f"{name}.npy"
        if i and linked:
            for kind, path in files.items():
                os.link(directory / f"{names[0]}.{kind}.npy", path)
            os.link(directory / f"{names[0]}.npy", tokens)
        else:
            with tokens.open("wb") as f:
                f.write(header_of("uint16", shard_tokens))
                f.truncate(HEADER_BYTES + 2 * shard_tokens)
            for kind, path in files.items():
                np.save(path, contents[kind])
                checksums[kind] = file_sha256(path)
        names.append(name)
    listed = [Shard(f"{n}.npy", shard_tokens, 1, "", checksums["documents"], checksums["crc32"]) for n in names]
    split = SplitMeta(shards * shard_tokens, shards, 4 * shards * shard_tokens, listed)
    empty = SplitMeta(1, 1, 4, [])
    meta = Meta(320, 0, "uint16", hashlib.sha256(b"{}").hexdigest(), 0, 0.01, split, empty)
    meta.save(directory / "meta.json")
    return meta
