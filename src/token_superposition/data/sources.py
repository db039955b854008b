"""Read documents out of files: text, Markdown, code, JSON lines, Parquet, Arrow, and datasets of the hub.

What cannot be read is counted by its reason, and a file that breaks off is named in a warning.
"""

from __future__ import annotations

import json
import warnings
from codecs import BOM_UTF16_BE, BOM_UTF16_LE
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

from token_superposition.data.files import find_files, kind_of, unreadable
from token_superposition.data.tables import (
    check_names,
    check_records,
    damage,
    is_json_lines,
    open_arrow,
    open_file,
    open_parquet,
)
from token_superposition.errors import TokenSuperpositionError, first_line

# A longer document is read as several, cut at line ends: memory stays bounded.
MAX_TEXT_BYTES = 8 * 2**20  # and an eighth more, to the end of a line
MAX_RECORD_BYTES = 2 * 2**30  # of one JSON line
CUT = "long documents cut into several"
"""Counted among what is dropped while reading, though nothing is lost."""


class Continued(str):
    """A further piece of the document that the text before it is of: it goes where that went."""


def read_documents(sources: Sequence[str | Path], text_field: str, dropped: Counter[str]) -> Iterator[str]:
    """Every document of the sources, in order; what cannot be read is counted in ``dropped`` by its reason.

    A path is a file as it stands, a string is what ``tst prepare`` takes.
    """
    for source in sources:
        if isinstance(source, str) and source.startswith("hf:"):
            yield from _documents(_read_hub(source.removeprefix("hf:"), text_field, dropped), dropped)
    for source in sources:
        if isinstance(source, Path):
            yield from _documents(_read_file(source, text_field, dropped), dropped)
        elif not source.startswith("hf:"):
            for path in find_files([source], dropped):
                yield from _documents(_read_file(path, text_field, dropped), dropped)


def _documents(texts: Iterator[str], dropped: Counter[str]) -> Iterator[str]:
    begun = False  # a piece of this document was yielded
    for text in texts:
        begun = begun and isinstance(text, Continued)
        if not text.strip():
            dropped["empty document"] += 1
            continue
        try:
            data = text.encode()
        except UnicodeEncodeError:
            dropped["not Unicode (half of a surrogate pair)"] += 1
            continue
        if len(data) <= MAX_TEXT_BYTES * 9 // 8:
            yield text if begun else str(text)
            begun = True
            continue
        dropped[CUT] += 1
        for piece in cut_bytes(data, MAX_TEXT_BYTES):
            if piece.strip():
                yield Continued(piece) if begun else piece
                begun = True
            else:
                dropped["empty document"] += 1


def cut_bytes(data: bytes, length: int) -> Iterator[str]:
    """Texts of at most ``length`` bytes that end with a line where they can, and never inside a character."""
    start = 0
    while len(data) - start > length:
        end = data.rfind(b"\n", start, start + length) + 1
        end = end or start + _last_whole_character(data[start : start + length])
        yield data[start:end].decode()
        start = end
    yield data[start:].decode()


def cut_at_lines(text: str, length: int) -> Iterator[str]:
    """Pieces of at most ``length`` characters that end with a line where they can."""
    start = 0
    while len(text) - start > length:
        end = text.rfind("\n", start, start + length) + 1 or start + length
        yield text[start:end]
        start = end
    yield text[start:]


def _read_file(path: Path, text_field: str, dropped: Counter[str]) -> Iterator[str]:
    readers = {
        ".parquet": _read_parquet,
        ".arrow": _read_arrow,
        ".jsonl": _read_json_lines,
        ".ndjson": _read_json_lines,
        ".json": _read_json,
    }
    before = dropped.total()
    read = 0
    try:
        for text in readers.get(kind_of(path), _read_text)(path, text_field, dropped):
            read += 1
            yield text
    except damage() as e:
        if isinstance(e, OSError) and e.errno is not None:
            raise unreadable(path, e) from None
        dropped["unreadable rest of a file"] += 1
        warnings.warn(f"{path} breaks off ({first_line(e)}); kept of it: what came before, {read} texts", stacklevel=1)
    if not read and dropped.total() == before:
        dropped["empty file"] += 1


def _read_text(path: Path, text_field: str, dropped: Counter[str]) -> Iterator[str]:
    """The file as one document, or as several if it is too long for one."""
    encoding, rest, pieces = "utf-8-sig", b"", 0
    with open_file(path) as file:
        f = UpToDamage(file)
        while piece := rest + f.read(MAX_TEXT_BYTES):
            rest = b""
            if len(piece) >= MAX_TEXT_BYTES:
                piece += f.readline(MAX_TEXT_BYTES // 8)
            if len(piece) >= MAX_TEXT_BYTES or f.error is not None:
                end = _last_whole_character(piece)
                piece, rest = piece[:end], piece[end:]
            pieces += 1
            if pieces == 2:
                dropped[CUT] += 1
            try:
                text = piece.decode(encoding)
            except UnicodeDecodeError:
                dropped["UTF-16 or UTF-32" if piece.startswith((BOM_UTF16_LE, BOM_UTF16_BE)) else "not UTF-8"] += 1
            else:
                if "\0" in text:
                    dropped["binary"] += 1
                else:
                    yield text if pieces == 1 else Continued(text)
            encoding = "utf-8"  # a byte-order mark is one at the beginning only


class UpToDamage:
    """A file that gives all in front of where it is damaged, and raises when read once more."""

    def __init__(self, file: Any) -> None:
        self.file = file
        self.error: Exception | None = None

    def read(self, size: int) -> bytes:
        if self.error is not None:
            raise self.error
        data = bytearray()
        try:
            while len(data) < size and (piece := self.file.read1(min(size - len(data), 2**16))):
                data += piece
        except damage() as e:
            self.error = e
            if not data:
                raise
        return bytes(data)

    def readline(self, size: int) -> bytes:
        try:
            return b"" if self.error is not None else self.file.readline(size)
        except damage() as e:
            self.error = e
            return b""


def _last_whole_character(data: bytes) -> int:
    """The length of ``data`` without a UTF-8 character at its end of which bytes are missing."""
    for back in range(1, min(3, len(data)) + 1):
        byte = data[-back]
        if byte >= 0xC0:
            length = 2 + (byte >= 0xE0) + (byte >= 0xF0)
            return len(data) - back if length > back else len(data)
        if byte < 0x80:
            break
    return len(data)


def _read_json(path: Path, text_field: str, dropped: Counter[str]) -> Iterator[str]:
    return (_read_json_lines if is_json_lines(path) else _read_text)(path, text_field, dropped)


def _read_json_lines(path: Path, text_field: str, dropped: Counter[str]) -> Iterator[str]:
    with open_file(path) as f:
        while line := f.readline(MAX_RECORD_BYTES):
            if len(line) == MAX_RECORD_BYTES and not line.endswith(b"\n"):
                dropped[f"JSON line of more than {MAX_RECORD_BYTES:,} bytes"] += 1
                while (line := f.readline(2**20)) and not line.endswith(b"\n"):
                    pass
                continue
            if not line.strip():
                continue
            try:
                record: Any = json.loads(line)
            except (ValueError, RecursionError):  # also what is not UTF-8
                dropped["not JSON"] += 1
                continue
            text = cast(dict[str, Any], record).get(text_field) if isinstance(record, dict) else None
            if isinstance(text, str):
                yield text
            else:
                dropped[f"no text in field {text_field!r}"] += 1


def _read_parquet(path: Path, text_field: str, dropped: Counter[str]) -> Iterator[str]:
    with open_parquet(path, text_field) as file:
        batches = file.iter_batches(batch_size=256, columns=[text_field])
        yield from _values((batch.column(0) for batch in batches), text_field, dropped)


def _read_arrow(path: Path, text_field: str, dropped: Counter[str]) -> Iterator[str]:
    with path.open("rb") as file:
        yield from _values(open_arrow(file, path, text_field), text_field, dropped)


def _values(columns: Iterable[Any], text_field: str, dropped: Counter[str]) -> Iterator[str]:
    for value in (value for column in columns for value in column):
        try:
            text = value.as_py()
        except UnicodeDecodeError:
            dropped["not UTF-8"] += 1
            continue
        if isinstance(text, str):
            yield text
        else:
            dropped[f"no text in field {text_field!r}"] += 1


def _read_hub(name: str, text_field: str, dropped: Counter[str]) -> Iterator[str]:
    try:
        import datasets
    except ImportError:
        raise TokenSuperpositionError(
            f"hf:{name} needs the datasets library; install it with: pip install 'token-superposition[datasets]'"
        ) from None
    path, _, rest = name.partition(":")
    config, _, split = rest.partition(":")
    try:
        rows: Any = datasets.load_dataset(path, config or None, split=split or "train", streaming=True)
    except Exception as e:
        raise TokenSuperpositionError(
            f"hf:{name} cannot be opened ({first_line(e)}); the form is hf:DATASET[:CONFIG[:SPLIT]], and the hub must "
            "be within reach"
        ) from None
    if rows.column_names is not None:  # else they are not known before a row, and nothing is decoded
        check_names(f"hf:{name}", rows.column_names, text_field)
        rows = rows.select_columns([text_field])  # the others may be pictures and sound
    read = 0
    try:
        for row in rows:
            read += 1
            if read == 1:
                check_records(f"hf:{name}", [row], text_field)
            text = row.get(text_field)
            if isinstance(text, str):
                yield text
            else:
                dropped[f"no text in field {text_field!r}"] += 1
    except TokenSuperpositionError:
        raise
    except Exception as e:  # of the connection, a file, or the dataset's own
        raise TokenSuperpositionError(
            f"hf:{name} breaks off after {read} rows ({first_line(e)}); see to the connection or the dataset and "
            "run it again"
        ) from None
