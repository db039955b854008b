"""The token store: tokenised text on disk, read through memory maps.

A store is a directory:

    meta.json                        counts, checksums, tokenizer hash (``Meta``), and a checksum of all that
    tokenizer/                       the tokenizer, as transformers loads it
    train-00000.npy                  tokens of consecutive documents, uint16 or uint32, each document ending in EOS,
                                     and beginning with BOS if the tokenizer begins a text with it
    train-00000.documents.npy        uint64 index in the shard of the first token of each document
    train-00000.crc32.npy            uint32 CRC-32 of every ``BLOCK_TOKENS`` tokens, the last block may be shorter
    validation-00000.npy ...         the same for the held-out documents

Nothing damaged is read: size and header of every file are looked at when the store is opened, and a block's checksum
and the range of its ids when a process first reads from it, which costs what that block costs and not what the shard
does. ``data.verify`` reads everything.
"""

from __future__ import annotations

import bisect
import hashlib
import io
import json
import math
import os
import zlib
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal, SupportsIndex, cast, overload

import numpy as np

from token_superposition.data.tokenizer import tokenizer_sha256
from token_superposition.errors import TokenSuperpositionError

FORMAT = 2
HEADER_BYTES = 128  # of a 1-D .npy file
BLOCK_TOKENS = 2**14
Split = Literal["train", "validation"]
SPLITS: tuple[Split, ...] = ("train", "validation")


@dataclass(frozen=True)
class Shard:
    file: str
    tokens: int
    documents: int
    sha256: str
    documents_sha256: str
    crc32_sha256: str

    @property
    def documents_file(self) -> str:
        return self.file.replace(".npy", ".documents.npy")

    @property
    def crc32_file(self) -> str:
        return self.file.replace(".npy", ".crc32.npy")

    @property
    def blocks(self) -> int:
        return -(-self.tokens // BLOCK_TOKENS)


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

    @property
    def bits_per_nat(self) -> float:
        """Bits per byte of a loss of one nat per token."""
        return 1 / math.log(2) / self.bytes_per_token


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
    cut: int = 0
    """Documents that were too long for one and became several."""
    lost: dict[str, float] = field(default_factory=dict[str, float])
    """Shares of the text's letters and line ends that the tokens do not give back, in a sample of it."""
    bos_id: int | None = None
    """The token before each document, where the tokenizer begins a text with one."""
    tokenizer_files: dict[str, str] = field(default_factory=dict[str, str])
    """SHA-256 of every file of ``tokenizer/``; none in stores of earlier versions."""
    format: int = FORMAT
    sampled: bool = field(default=False, compare=False)
    """The tokenizer was trained on a part of the text. Known of what was just prepared: the file does not have it."""

    def save(self, path: Path) -> None:
        fields = {k: v for k, v in asdict(self).items() if k != "sampled"}
        derived = {s: {"bytes_per_token": getattr(self, s).bytes_per_token} for s in SPLITS}
        content = {k: v | derived.get(k, {}) if isinstance(v, dict) else v for k, v in fields.items()}
        path.write_text(json.dumps(content | {"sha256": json_sha256(content)}, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, directory: Path) -> Meta:
        """That of prepared data.

        Raises ``TokenSuperpositionError`` if ``directory`` has no meta.json, or one that cannot be read, has another
        format, differs from its own checksum or is not what ``tst prepare`` writes.
        """
        path = directory / "meta.json"
        try:
            d: Any = json.loads(path.read_bytes())
        except (FileNotFoundError, NotADirectoryError):
            raise TokenSuperpositionError(
                f"{directory} holds no prepared data (no meta.json); make it with: tst prepare SOURCE --out {directory}"
            ) from None
        except (OSError, ValueError, RecursionError) as e:
            raise TokenSuperpositionError(f"{path} cannot be read ({e}); run tst prepare again") from None
        found = cast(dict[str, Any], d).get("format") if isinstance(d, dict) else None
        if found != FORMAT:
            raise TokenSuperpositionError(
                f"{path} has format {found!r}, this version reads {FORMAT}; run tst prepare again"
            )
        if d.pop("sha256", None) != json_sha256(d):
            raise TokenSuperpositionError(
                f"{path} differs from its own checksum: it is damaged or was edited; run tst prepare again"
            )
        try:
            for split in SPLITS:
                s = d[split]
                d[split] = SplitMeta(s["tokens"], s["documents"], s["bytes"], [Shard(**x) for x in s["shards"]])
            return cls(**d)
        except (TypeError, KeyError) as e:
            raise TokenSuperpositionError(f"{path} is not what tst prepare writes ({e}); run it again") from None


def is_store(directory: Path) -> bool:
    """Whether this is prepared data, of whatever version and however damaged its tokens are."""
    try:
        meta: Any = json.loads((directory / "meta.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(meta, dict) and {"format", "tokenizer_sha256"} <= cast(dict[str, Any], meta).keys()


def partial_of(out: Path) -> Path:
    """Where ``tst prepare`` writes the store ``out`` until it is whole; the lock beside it has the ending .lock."""
    return out.parent / f".{out.name}.partial"


def is_partial(name: str) -> bool:
    """Whether this is the name of something that only an unfinished ``tst prepare`` has."""
    return name.startswith(".") and name.endswith((".partial", ".partial.lock"))


@dataclass
class _OpenShard:
    tokens: np.ndarray
    crc32: np.ndarray
    unread: np.ndarray
    """(blocks,) bool: this process has not checked the block yet."""


class TokenStore:
    """One split of a prepared directory as one long 1-D array of tokens.

    ``len(store)`` is the number of tokens, ``store[start:stop]`` a numpy array of them, ``store[i]`` one of them.
    Shards are mapped when they are first touched, so that opening is instant; the object can be sent to worker
    processes.

    Raises ``TokenSuperpositionError``, which names the file: here, if the directory is not a finished store, its
    tokenizer is another one, or a shard has the wrong size or header; when tokens are read, if they are not those that
    were written. Also for a split that is none.
    """

    def __init__(self, directory: str | Path, split: Split = "train"):
        if split not in SPLITS:
            raise TokenSuperpositionError(f"split is {split!r}; choose one of {', '.join(SPLITS)}")
        self.directory = Path(directory)
        self.meta = Meta.load(self.directory)
        self.split: SplitMeta = getattr(self.meta, split)
        self._ends = list(accumulate(s.tokens for s in self.split.shards))
        self._open: list[_OpenShard | None] = [None] * len(self._ends)
        check_tokenizer(self.directory, self.meta)
        for shard in self.split.shards:
            check_header(self.directory / shard.file, self.meta.dtype, shard.tokens)

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    @overload
    def __getitem__(self, key: slice) -> np.ndarray: ...
    @overload
    def __getitem__(self, key: SupportsIndex) -> np.integer: ...
    def __getitem__(self, key: slice | SupportsIndex) -> np.ndarray | np.integer:
        if not isinstance(key, slice):
            i = range(len(self))[key]  # also from the end; an IndexError past it
            return self[i : i + 1][0]
        start, stop, step = key.indices(len(self))
        if step != 1:
            raise TokenSuperpositionError(f"a token store is read in slices of step 1, not {step}")
        parts: list[np.ndarray] = []
        i = bisect.bisect_right(self._ends, start)
        while start < stop:
            first = self._ends[i - 1] if i else 0
            end = min(stop, self._ends[i])
            parts.append(self._read(i, start - first, end - first))
            start, i = end, i + 1
        return np.concatenate(parts) if parts else np.empty(0, self.meta.dtype)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if copy is False:
            raise ValueError("a token store becomes an array only by a copy")
        return self[:].astype(dtype or self.meta.dtype, copy=False)

    def document_starts(self) -> np.ndarray:
        """Index of the first token of every document, uint64."""
        firsts = [0, *self._ends]
        starts = [
            read_checked(self.directory / s.documents_file, "uint64", s.documents, s.documents_sha256) + np.uint64(f)
            for s, f in zip(self.split.shards, firsts, strict=False)
        ]
        return np.concatenate(starts) if starts else np.empty(0, np.uint64)

    def _read(self, i: int, start: int, stop: int) -> np.ndarray:
        """Tokens ``start`` to ``stop`` of a shard, whose blocks this process has checked."""
        shard, path = self.split.shards[i], self.directory / self.split.shards[i].file
        opened = self._open[i]
        if opened is None:
            crc32 = read_checked(self.directory / shard.crc32_file, "uint32", shard.blocks, shard.crc32_sha256)
            tokens = np.memmap(path, self.meta.dtype, "r", HEADER_BYTES, (shard.tokens,))
            opened = self._open[i] = _OpenShard(tokens, crc32, np.ones(shard.blocks, bool))
        first, end = start // BLOCK_TOKENS, -(-stop // BLOCK_TOKENS)
        for block in first + np.flatnonzero(opened.unread[first:end]):
            content = opened.tokens[block * BLOCK_TOKENS : (block + 1) * BLOCK_TOKENS]
            if zlib.crc32(content.data) != opened.crc32[block]:
                raise damaged(
                    path, f"differs from its checksum in the {BLOCK_TOKENS} tokens from {block * BLOCK_TOKENS} on"
                )
            if (largest := int(content.max())) >= self.meta.vocab_size:
                raise damaged(path, f"holds token {largest}, the vocabulary has {self.meta.vocab_size}")
            opened.unread[block] = False
        return opened.tokens[start:stop]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": [None] * len(self._open)}  # a pickled memory map would be a whole copy


@lru_cache
def header_of(dtype: str, length: int) -> bytes:
    """The first ``HEADER_BYTES`` of a 1-D .npy file."""
    header = io.BytesIO()
    kind = np.dtype(dtype).newbyteorder("<").str
    np.lib.format.write_array_header_1_0(header, {"descr": kind, "fortran_order": False, "shape": (length,)})
    return header.getvalue()


def check_header(path: Path, dtype: str, length: int) -> None:
    """Raises ``TokenSuperpositionError`` if a file is not a 1-D .npy file of this type and length, by size and header.

    The file is not loaded by numpy, which would ask what the header says, but compared with what was written.
    """
    try:
        with path.open("rb", buffering=0) as f:
            size, header = os.fstat(f.fileno()).st_size, f.read(HEADER_BYTES)
    except OSError as e:
        raise damaged(path, f"cannot be read ({e.strerror})") from None
    if size != HEADER_BYTES + length * np.dtype(dtype).itemsize:
        raise damaged(path, f"has {size} bytes where meta.json says {length} values of {dtype}")
    if header != header_of(dtype, length):
        raise damaged(path, f"does not begin with the header of {length} values of {dtype}")


def read_checked(path: Path, dtype: str, length: int, sha256: str) -> np.ndarray:
    """A small file as a whole, compared with its checksum."""
    check_header(path, dtype, length)
    try:
        content = path.read_bytes()
    except OSError as e:
        raise damaged(path, f"cannot be read ({e.strerror})") from None
    if hashlib.sha256(content).hexdigest() != sha256:
        raise damaged(path, "differs from its checksum in meta.json")
    return np.frombuffer(content, np.dtype(dtype).newbyteorder("<"), offset=HEADER_BYTES)


def check_tokenizer(directory: Path, meta: Meta) -> None:
    path = directory / "tokenizer" / "tokenizer.json"
    try:
        found = tokenizer_sha256(path.parent)
    except OSError as e:
        raise damaged(path, f"cannot be read ({e.strerror})") from None
    if found != meta.tokenizer_sha256:
        raise damaged(path, "differs from its checksum in meta.json")


def damaged(path: Path, what: str) -> TokenSuperpositionError:
    return TokenSuperpositionError(f"{path} {what}; run tst prepare again or copy the file again")


def block_crc32(tokens: np.ndarray) -> np.ndarray:  # (n,) -> (blocks,) uint32
    return np.array(
        [zlib.crc32(tokens[i : i + BLOCK_TOKENS].data) for i in range(0, len(tokens), BLOCK_TOKENS)], np.uint32
    )


def file_sha256(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def json_sha256(content: dict[str, Any]) -> str:
    """Of what a JSON file holds, in whatever order."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
