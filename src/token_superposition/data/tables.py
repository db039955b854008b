"""Files with a document a row, JSON lines, Parquet and Arrow: opened, and refused if they have no text in its field."""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, cast

from token_superposition.errors import TokenSuperpositionError, first_line

COMPRESSIONS = (".gz", ".zst")
FIRST_RECORDS, FIRST_BYTES = 100, 2**20  # of JSON lines: among these one has text in its field
LONGEST_FIRST = 2**26  # bytes of such a line


def open_file(path: Path) -> Any:
    """Its bytes, decompressed. Opened by Python, since names that are not UTF-8 are none to pyarrow."""
    return _decompressed(path, path.suffix.lower())


def _decompressed(source: Path | io.BytesIO, ending: str) -> Any:
    if ending == ".gz":  # by Python, which takes zeros behind the end, as gzip does
        return gzip.open(source, "rb")
    file = source.open("rb") if isinstance(source, Path) else source
    if ending == ".zst":
        import pyarrow as pa

        return io.BufferedReader(cast(Any, pa.CompressedInputStream(file, "zstd")), 2**20)
    return file


def damage() -> tuple[type[Exception], ...]:
    """What reading a damaged file raises; an OSError that has a number is of the system, and no damage."""
    import pyarrow as pa

    return OSError, EOFError, zlib.error, pa.ArrowException


def expansion(path: Path) -> float:
    """How many bytes of a file come from one of it, in what its first bytes are decompressed to; 1 if they are not."""
    ending = path.suffix.lower()
    if ending not in COMPRESSIONS:
        return 1
    with path.open("rb") as file:
        head = file.read(2**18)
    text, size = _decompressed(io.BytesIO(head), ending), 0
    try:
        while piece := text.read1(2**14):
            size += len(piece)
    except damage():  # where the first bytes end
        pass
    return max(1, size / max(len(head), 1))


def open_parquet(path: Path, text_field: str) -> Any:
    """Raises ``TokenSuperpositionError`` if it is no Parquet file or has no such column of text."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path.open("rb"))
        schema = file.schema_arrow
    except (OSError, ValueError, pa.ArrowException) as e:  # ValueError: a name of a column that is not UTF-8
        raise TokenSuperpositionError(
            f"{path} is not a Parquet file, or not a whole one ({first_line(e)}); remove it"
        ) from None
    _check_column(path, schema, text_field)
    return file


def parquet_bytes(path: Path, text_field: str) -> int:
    """Rough bytes of its column of text, from what the file says of itself."""
    with open_parquet(path, text_field) as file:
        groups = (file.metadata.row_group(i) for i in range(file.metadata.num_row_groups))
        columns = (group.column(i) for group in groups for i in range(group.num_columns))
        return sum(c.total_uncompressed_size for c in columns if c.path_in_schema == text_field)


def open_arrow(file: BinaryIO, path: Path, text_field: str) -> Iterator[Any]:
    """The batches of its column of text; as datasets' ``save_to_disk`` writes one (a stream), or as a file.

    Raises ``TokenSuperpositionError``, before the first of them, as ``open_parquet`` does.
    """
    import pyarrow as pa

    try:
        indexed = file.read(6) == b"ARROW1"
        file.seek(0)
        reader: Any = pa.ipc.open_file(file) if indexed else pa.ipc.open_stream(file)
        names = reader.schema.names
    except (OSError, ValueError, pa.ArrowException) as e:
        raise TokenSuperpositionError(
            f"{path} is not an Arrow file, or not a whole one ({first_line(e)}); remove it"
        ) from None
    _check_column(path, reader.schema, text_field)
    batches = (reader.get_batch(i) for i in range(reader.num_record_batches)) if indexed else reader
    return (batch.column(names.index(text_field)) for batch in batches)


def _check_column(path: Path, schema: Any, text_field: str) -> None:
    import pyarrow as pa

    if text_field not in schema.names:
        raise TokenSuperpositionError(
            f"{path} has no column {text_field!r}; choose one of {', '.join(schema.names)} with --text-field"
        )
    kind = schema.field(schema.names.index(text_field)).type
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
        raise TokenSuperpositionError(
            f"{path} has {kind} in its column {text_field!r}, not text; choose another with --text-field"
        )


def is_json_lines(path: Path) -> bool:
    """Whether each of its first two lines is an object, as in C4's .json files."""
    with open_file(path) as f:
        return all(isinstance(_json(f.readline(LONGEST_FIRST)), dict) for _ in range(2))


def check_json_lines(path: Path, text_field: str) -> None:
    """Raises ``TokenSuperpositionError`` if none of the first records has text in this field."""
    records: list[Mapping[str, Any]] = []
    read = 0
    with open_file(path) as f:
        while read < FIRST_BYTES and len(records) < FIRST_RECORDS and (line := f.readline(LONGEST_FIRST)):
            read += len(line)
            if isinstance(record := _json(line), dict):
                records.append(cast(dict[str, Any], record))
    check_records(str(path), records, text_field)


def check_records(name: str, records: Sequence[Mapping[str, Any]], text_field: str) -> None:
    """Raises ``TokenSuperpositionError`` if none of them has text in this field, and one has another or something else.

    A record may lack it, or have null there.
    """
    values = [record[text_field] for record in records if text_field in record]
    if any(isinstance(value, str) for value in values):
        return
    kinds = sorted({type(value).__name__ for value in values if value is not None})
    if kinds:
        raise TokenSuperpositionError(
            f"{name} has {', '.join(kinds)} in its field {text_field!r}, not text; choose another with --text-field"
        )
    if not values:
        check_names(name, (key for record in records for key in record), text_field)


def check_names(name: str, fields: Iterable[str], text_field: str) -> None:
    """Raises ``TokenSuperpositionError`` if there are fields and this is none of them."""
    found = list(dict.fromkeys(fields))
    if found and text_field not in found:
        shown = [field[:80] if field.isprintable() else repr(field[:80]) for field in found[:20]]
        more = ", ..." if len(found) > len(shown) else ""
        raise TokenSuperpositionError(
            f"{name} has no field {text_field!r}; choose one of {', '.join(shown)}{more} with --text-field, or leave "
            "it out"
        )


def _json(line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):  # also what is not UTF-8
        return None
