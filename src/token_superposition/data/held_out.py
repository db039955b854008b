"""Which text is held out for validation: whole documents, chosen by their hash, or the end of one."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from token_superposition.data.store import Split
from token_superposition.errors import TokenSuperpositionError

SHORT = 2**16  # bytes: a longer document, where few are given, is not held out as a whole
LEAST = 2**12  # bytes: of a single document at least so many are held out

Piece = tuple[bytes, int, str]  # of a text: the hash of its document, its bytes, and itself


@dataclass(frozen=True)
class HeldOut:
    """The documents whose hash is ``below``, and of one other what comes after its byte ``start``."""

    below: float
    document: bytes | None = None
    start: int = 0

    def split(self, pieces: Iterable[Piece]) -> Iterator[tuple[Split, int, str]]:
        """The split of every piece, and its bytes; that in which ``start`` lies is cut, at a line end if it can be."""
        read = 0
        for document, size, text in pieces:
            if document != self.document:
                kind: Split = "validation" if _place(document) < self.below else "train"
                yield kind, size, text
                continue
            start = self.start - read
            read += size
            begin = _cut(text, start) if 0 < start < size else 0 if start <= 0 else len(text)
            parts: tuple[tuple[Split, str], ...] = (("train", text[:begin]), ("validation", text[begin:]))
            for kind, part in parts:
                if part:
                    yield kind, len(part.encode()), part


def choose_held_out(pieces: Iterable[Piece], share: float) -> HeldOut | None:
    """A ``share`` of the documents by their hash, if that leaves some on either side; reads until it does.

    Else, of the few that there are, those with the smallest hashes up to that share of the text, of which the last may
    be too long: then only its end. None where there is no document.

    Raises ``TokenSuperpositionError`` for a single document that is too short to be cut.
    """
    below = share * 2**64
    sizes: dict[bytes, int] = {}
    for document, size, _ in pieces:
        sizes[document] = sizes.get(document, 0) + size
        first = next(iter(sizes))
        if (_place(document) < below) != (_place(first) < below):
            return HeldOut(below)
    if not sizes:
        return None
    missing = share * sum(sizes.values())
    *others, last = sorted(sizes)
    if not others:
        missing = max(missing, LEAST)
        if sizes[last] < 2 * LEAST:
            raise TokenSuperpositionError(
                f"a single document of {sizes[last]:,} bytes cannot be split into text to train on and text for "
                f"validation; give at least {2 * LEAST:,} bytes, or a second document"
            )
    for document in others:
        if sizes[document] > max(missing, SHORT):
            last = document
            break
        missing -= sizes[document]
        if missing <= 0:
            return HeldOut(_place(document) + 1)
    return HeldOut(_place(last), last, int(sizes[last] - missing))


def digest(data: bytes, seed: int) -> bytes:
    """Of a text; its first half decides whether that is held out, its second whether a tokenizer is trained on it."""
    return hashlib.blake2b(data, digest_size=16, key=seed.to_bytes(8, "little")).digest()


def _place(document: bytes) -> int:
    return int.from_bytes(document[:8])


def _cut(text: str, start: int) -> int:
    """The last line end in the ``LEAST`` characters before byte ``start``, or in more of a long rest; else there."""
    at = len(text.encode()[:start].decode(errors="ignore"))
    return text.rfind("\n", max(at - max(len(text) - at, LEAST), 0), at) + 1 or at
