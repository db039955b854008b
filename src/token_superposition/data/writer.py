"""The shards of a token store, written as they fill."""

from __future__ import annotations

from array import array
from pathlib import Path

import numpy as np

from token_superposition.data.store import Shard, Split, SplitMeta, block_crc32, file_sha256
from token_superposition.errors import TokenSuperpositionError


class ShardWriter:
    """Collects the documents of one split and writes a shard whenever it is full."""

    def __init__(self, directory: Path, split: Split, dtype: str, vocab_size: int, shard_tokens: int):
        self.directory, self.split, self.vocab_size, self.shard_tokens = directory, split, vocab_size, shard_tokens
        self.shards: list[Shard] = []
        self.buffer = np.empty(shard_tokens, dtype)
        self.filled = self.bytes = 0
        self.starts = array("Q")

    def add(self, tokens: np.ndarray, size: int) -> None:
        if (largest := int(tokens.max())) >= self.vocab_size:
            raise TokenSuperpositionError(
                f"the tokenizer gave token {largest}, its vocabulary has {self.vocab_size}; mend its tokenizer.json"
            )
        self.bytes += size
        self.starts.append(self.filled)
        while len(tokens):
            part = tokens[: self.shard_tokens - self.filled]
            self.buffer[self.filled : self.filled + len(part)] = part
            self.filled, tokens = self.filled + len(part), tokens[len(part) :]
            if self.filled == self.shard_tokens:
                self._flush()

    def finish(self) -> SplitMeta:
        if self.filled:
            self._flush()
        tokens, documents = sum(s.tokens for s in self.shards), sum(s.documents for s in self.shards)
        return SplitMeta(tokens, documents, self.bytes, self.shards)

    def _flush(self) -> None:
        name = f"{self.split}-{len(self.shards):05d}"
        tokens = self.buffer[: self.filled]
        contents = {"": tokens, ".documents": np.array(self.starts, np.uint64), ".crc32": block_crc32(tokens)}
        checksums: list[str] = []
        for kind, content in contents.items():
            path = self.directory / f"{name}{kind}.npy"
            np.save(path, content)
            checksums.append(file_sha256(path))
        self.shards.append(Shard(f"{name}.npy", self.filled, len(self.starts), *checksums))
        self.filled, self.starts = 0, array("Q")
