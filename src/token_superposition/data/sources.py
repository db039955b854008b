"""Read documents out of files: text, Markdown, code, JSON lines, Parquet, and datasets of the Hugging Face hub.

What cannot be read is counted by its reason, and a file that breaks off is named in a warning.
"""

from __future__ import annotations

import io
import json
import warnings
from codecs import BOM_UTF16_BE, BOM_UTF16_LE
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

from token_superposition.data.files import find_files, kind_of, open_parquet, unreadable
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
        elif not _is_unicode(text):
            dropped["not Unicode (half of a surrogate pair)"] += 1
        elif len(text) <= MAX_TEXT_BYTES * 9 // 8:
            yield text if begun else str(text)
            begun = True
        else:
            dropped[CUT] += 1
            for piece in cut_at_lines(text, MAX_TEXT_BYTES):
                if piece.strip():
                    yield Continued(piece) if begun else piece
                    begun = True


def cut_at_lines(text: str, length: int) -> Iterator[str]:
    """Pieces of at most ``length`` characters that end with a line where they can."""
    start = 0
    while len(text) - start > length:
        end = text.rfind("\n", start, start + length) + 1 or start + length
        yield text[start:end]
        start = end
    yield text[start:]


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _read_file(path: Path, text_field: str, dropped: Counter[str]) -> Iterator[str]:
    import pyarrow as pa

    readers = {
        ".parquet": _read_parquet,
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
    except (OSError, pa.ArrowException) as e:  # pyarrow's own errors have no number
        if isinstance(e, OSError) and e.errno is not None:
            raise unreadable(path, e) from None
        dropped["unreadable rest of a file"] += 1
        warnings.warn(f"{path} breaks off ({first_line(e)}); kept of it: what came before, {read} texts", stacklevel=1)
    if not read and dropped.total() == before:
        dropped["empty file"] += 1


def _open(path: Path) -> Any:
    """Opened by Python, since names that are not UTF-8 are none to pyarrow."""
    import pyarrow as pa

    file = path.open("rb")
    compression = {".gz": "gzip", ".zst": "zstd"}.get(path.suffix.lower())
    return io.BufferedReader(cast(Any, pa.CompressedInputStream(file, compression)), 2**20) if compression else file


def _read_text(path: Path, text_field: str, dropped: Counter[str]) -> Iterator[str]:
    """The file as one document, or as several if it is too long for one."""
    encoding, rest, pieces = "utf-8-sig", b"", 0
    with _open(path) as f:
        while piece := rest + f.read(MAX_TEXT_BYTES):
            rest = b""
            if len(piece) >= MAX_TEXT_BYTES:
                piece += f.readline(MAX_TEXT_BYTES // 8)
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
    """JSON lines under the name of JSON, as C4 has them, if the first two lines are objects; else text."""
    with _open(path) as f:
        lines = all(_is_object(f.readline(MAX_TEXT_BYTES)) for _ in range(2))
    return (_read_json_lines if lines else _read_text)(path, text_field, dropped)


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _read_json_lines(path: Path, text_field: str, dropped: Counter[str]) -> Iterator[str]:
    with _open(path) as f:
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
        for batch in file.iter_batches(batch_size=256, columns=[text_field]):
            for value in batch.column(0):
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
    read = 0
    try:
        for row in rows:
            read += 1
            text = row.get(text_field)
            if isinstance(text, str):
                yield text
            else:
                dropped[f"no text in field {text_field!r}"] += 1
    except Exception as e:  # of the connection, a file, or the dataset's own
        raise TokenSuperpositionError(
            f"hf:{name} breaks off after {read} rows ({first_line(e)}); see to the connection or the dataset and "
            "run it again"
        ) from None
