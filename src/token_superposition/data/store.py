"""The token store: tokenised text on disk, read through memory maps.

A store is a directory:

    meta.json                        counts, checksums, tokenizer hash (``Meta``)
    tokenizer/                       the tokenizer, as transformers loads it
    train-00000.npy                  tokens of consecutive documents, uint16 or uint32, each document ending in EOS
    train-00000.documents.npy        uint64 index in the shard of the first token of each document
    validation-00000.npy ...         the same for the held-out documents
"""

from __future__ import annotations

import bisect
import hashlib
import json
from dataclasses import asdict, dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

import numpy as np

from token_superposition.errors import TokenSuperpositionError

FORMAT = 1
HEADER_BYTES = 128  # of a 1-D .npy file
Split = Literal["train", "validation"]


@dataclass(frozen=True)
class Shard:
    file: str
    tokens: int
    documents: int
    sha256: str
    documents_sha256: str


@dataclass(frozen=True)
class SplitMeta:
    tokens: int
    documents: int
    bytes: int
    """UTF-8 bytes of the text."""
    shards: list[Shard]

    @property
    def bytes_per_token(self) -> float:
        return self.bytes / self.tokens


@dataclass(frozen=True)
class Meta:
    """What ``meta.json`` holds. It has no time and no path: the same text and seed give the same file."""

    vocab_size: int
    eos_id: int
    dtype: str
    tokenizer_sha256: str
    seed: int
    validation_share: float
    train: SplitMeta
    validation: SplitMeta
    dropped: dict[str, int] = field(default_factory=dict[str, int])
    """Documents and files that were left out, by reason."""
    format: int = FORMAT

    def save(self, path: Path) -> None:
        derived = {s: {"bytes_per_token": getattr(self, s).bytes_per_token} for s in ("train", "validation")}
        content = {k: v | derived.get(k, {}) if isinstance(v, dict) else v for k, v in asdict(self).items()}
        path.write_text(json.dumps(content, indent=2) + "\n")

    @classmethod
    def load(cls, directory: Path) -> Meta:
        path = directory / "meta.json"
        try:
            d: dict[str, Any] = json.loads(path.read_text())
        except (FileNotFoundError, NotADirectoryError):
            raise TokenSuperpositionError(
                f"{directory} holds no prepared data (no meta.json); make it with: tst prepare SOURCE --out {directory}"
            ) from None
        except (OSError, ValueError) as e:
            raise TokenSuperpositionError(f"{path} cannot be read ({e}); run tst prepare again") from None
        if d.get("format") != FORMAT:
            raise TokenSuperpositionError(
                f"{path} has format {d.get('format')!r}, this version reads {FORMAT}; run tst prepare again"
            )
        for split in ("train", "validation"):
            s = d[split]
            d[split] = SplitMeta(s["tokens"], s["documents"], s["bytes"], [Shard(**shard) for shard in s["shards"]])
        return cls(**d)


class TokenStore:
    """One split of a prepared directory as one long 1-D array of tokens.

    ``len(store)`` is the number of tokens, ``store[start:stop]`` a numpy array of them. Shards are mapped when they
    are first touched, so that opening is instant; the object can be sent to worker processes.

    Raises ``TokenSuperpositionError`` if the directory is not a finished store or a shard has the wrong size or type.
    """

    def __init__(self, directory: str | Path, split: Split = "train"):
        self.directory = Path(directory)
        self.meta = Meta.load(self.directory)
        self.split: SplitMeta = getattr(self.meta, split)
        self._ends = list(accumulate(s.tokens for s in self.split.shards))
        self._maps: list[np.ndarray | None] = [None] * len(self._ends)
        for shard in self.split.shards:
            path = self.directory / shard.file
            expected = shard.tokens * np.dtype(self.meta.dtype).itemsize
            size = path.stat().st_size if path.exists() else 0
            if size != expected + HEADER_BYTES:
                raise TokenSuperpositionError(
                    f"{path} has {size} bytes where meta.json says {shard.tokens} tokens; run tst prepare again"
                )

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, key: slice) -> np.ndarray:
        start, stop, step = key.indices(len(self))
        if step != 1:
            raise TokenSuperpositionError(f"a token store is read in slices of step 1, not {step}")
        parts: list[np.ndarray] = []
        i = bisect.bisect_right(self._ends, start)
        while start < stop:
            first = self._ends[i - 1] if i else 0
            end = min(stop, self._ends[i])
            parts.append(self._map(i)[start - first : end - first])
            start, i = end, i + 1
        return np.concatenate(parts) if parts else np.empty(0, self.meta.dtype)

    def document_starts(self) -> np.ndarray:
        """Index of the first token of every document, uint64."""
        firsts = [0, *self._ends]
        names = [s.file.replace(".npy", ".documents.npy") for s in self.split.shards]
        starts = [np.load(self.directory / n) + np.uint64(f) for n, f in zip(names, firsts, strict=False)]
        return np.concatenate(starts) if starts else np.empty(0, np.uint64)

    def verify(self) -> None:
        """Compare the checksum of every file with ``meta.json``; raises ``TokenSuperpositionError`` on a difference."""
        for shard in self.split.shards:
            for name, expected in (
                (shard.file, shard.sha256),
                (shard.file.replace(".npy", ".documents.npy"), shard.documents_sha256),
            ):
                if file_sha256(self.directory / name) != expected:
                    raise TokenSuperpositionError(
                        f"{self.directory / name} differs from its checksum in meta.json; run tst prepare again"
                    )

    def _map(self, i: int) -> np.ndarray:
        mapped = self._maps[i]
        if mapped is None:
            shard = self.split.shards[i]
            try:
                mapped = np.load(self.directory / shard.file, mmap_mode="r", allow_pickle=False)
            except ValueError as e:
                raise TokenSuperpositionError(f"{self.directory / shard.file} is damaged ({e})") from None
            if mapped.shape != (shard.tokens,) or mapped.dtype != self.meta.dtype:
                raise TokenSuperpositionError(
                    f"{self.directory / shard.file} holds {mapped.dtype} {mapped.shape}, "
                    f"meta.json says {self.meta.dtype} ({shard.tokens},); run tst prepare again"
                )
            self._maps[i] = mapped
        return mapped

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": [None] * len(self._maps)}  # a pickled memory map would be a whole copy


def file_sha256(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
