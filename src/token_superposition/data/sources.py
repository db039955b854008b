"""Read documents out of files: text, Markdown, code, JSON lines, Parquet, and datasets of the Hugging Face hub."""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

from token_superposition.errors import TokenSuperpositionError

# What a folder is searched for. A file that is named itself, or matched by a glob, is read whatever its ending.
# fmt: off
# fmt: off
TEXT_SUFFIXES = frozenset({
    ".txt", ".text", ".md", ".markdown", ".rst", ".tex", ".org", ".adoc", ".html", ".htm", ".xml", ".py", ".pyi",
    ".pyx", ".ipynb", ".c", ".h", ".cc", ".cpp", ".hpp", ".cu", ".cuh", ".java", ".kt", ".scala", ".go", ".rs",
    ".js", ".mjs", ".ts", ".tsx", ".jsx", ".css", ".rb", ".php", ".pl", ".lua", ".r", ".jl", ".hs", ".ml", ".ex",
    ".erl", ".clj", ".swift", ".m", ".sh", ".bash", ".zsh", ".sql", ".toml", ".yaml", ".yml", ".ini", ".cfg",
    ".json", ".cmake", ".proto", ".f90", ".lisp", ".el", ".vim", ".tcl", ".bat", ".ps1", ".patch", ".diff", ".po",
    ".srt", ".vtt", ".csv", ".tsv",
})
# fmt: on
TABLE_SUFFIXES = (".jsonl", ".ndjson", ".parquet")
COMPRESSED_SUFFIXES = (".gz", ".zst")
# A longer text file is read as several documents, cut at line ends: memory stays bounded.
MAX_TEXT_BYTES = 8 * 2**20


def find_files(sources: Sequence[str]) -> list[Path]:
    """Files of folders (searched recursively), globs and paths, each once, in a fixed order.

    Raises ``TokenSuperpositionError`` for a source that does not exist, matches nothing, or holds no text.
    """
    found: dict[Path, None] = {}
    for source in sources:
        path = Path(source).expanduser()
        if path.is_dir():
            files = sorted(p for p in path.rglob("*") if _is_text_name(p) and p.is_file())
            if not files:
                raise TokenSuperpositionError(
                    f"{source} holds no file with a known text ending; name the files instead"
                )
        elif path.exists():
            files = [path]
        elif any(c in source for c in "*?["):
            root = Path(path.anchor)
            files = sorted(p for p in root.glob(str(path.relative_to(root))) if p.is_file())
            if not files:
                raise TokenSuperpositionError(f"the pattern {source} matches no file; quote it and check the folder")
        else:
            raise TokenSuperpositionError(f"{source} does not exist; give a file, a folder, a glob or hf:DATASET")
        found |= dict.fromkeys(files)
    return list(found)


def read_documents(sources: Sequence[str], text_field: str, dropped: Counter[str]) -> Iterator[str]:
    """Every document of the sources, in order; what cannot be read is counted in ``dropped`` by its reason."""
    for source in sources:
        if source.startswith("hf:"):
            yield from _read_hub(source.removeprefix("hf:"), text_field, dropped)
    for path in find_files([s for s in sources if not s.startswith("hf:")]):
        for text in _read_file(path, text_field, dropped):
            if text.strip():
                yield text
            else:
                dropped["empty document"] += 1


def estimated_bytes(sources: Sequence[str]) -> int | None:
    """Rough bytes of text in the sources; None if a source of the hub makes it unknown."""
    if any(s.startswith("hf:") for s in sources):
        return None
    return sum(
        p.stat().st_size * (4 if p.suffix in (*COMPRESSED_SUFFIXES, ".parquet") else 1) for p in find_files(sources)
    )


def _is_text_name(path: Path) -> bool:
    suffixes = [s.lower() for s in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSED_SUFFIXES:
        suffixes.pop()
    return bool(suffixes) and (suffixes[-1] in TEXT_SUFFIXES or suffixes[-1] in TABLE_SUFFIXES)


def _read_file(path: Path, text_field: str, dropped: Counter[str]) -> Iterator[str]:
    kind = next((s for s in reversed([s.lower() for s in path.suffixes]) if s not in COMPRESSED_SUFFIXES), "")
    try:
        if kind == ".parquet":
            yield from _read_parquet(path, text_field, dropped)
        elif kind in (".jsonl", ".ndjson"):
            yield from _read_json_lines(path, text_field, dropped)
        else:
            yield from _read_text(path, dropped)
    except PermissionError as e:
        raise TokenSuperpositionError(
            f"{path} cannot be read ({e.strerror}); change its permissions or leave it out"
        ) from None
    except OSError as e:  # a compressed file that ends early, a file that vanished
        dropped["unreadable rest of a file"] += 1
        if e.errno is not None:
            raise TokenSuperpositionError(f"{path} cannot be read ({e.strerror}); remove it or try again") from None


def _open(path: Path) -> io.BufferedReader:
    import pyarrow as pa

    stream: Any = pa.input_stream(str(path), compression="detect")
    return io.BufferedReader(stream, 2**20)


def _read_text(path: Path, dropped: Counter[str]) -> Iterator[str]:
    with _open(path) as f:
        while piece := f.read(MAX_TEXT_BYTES):
            if len(piece) == MAX_TEXT_BYTES:
                piece += f.readline(MAX_TEXT_BYTES)
            if b"\0" in piece:
                dropped["binary"] += 1
                continue
            try:
                yield piece.decode("utf-8-sig")
            except UnicodeDecodeError:
                dropped["not UTF-8"] += 1


def _read_json_lines(path: Path, text_field: str, dropped: Counter[str]) -> Iterator[str]:
    with _open(path) as f:
        for line in f:
            if not line.strip():
                continue
            try:
                record: Any = json.loads(line)
            except ValueError:  # also what is not UTF-8
                dropped["not JSON"] += 1
                continue
            text = cast(dict[str, Any], record).get(text_field) if isinstance(record, dict) else None
            if isinstance(text, str):
                yield text
            else:
                dropped[f"no text in field {text_field!r}"] += 1


def _read_parquet(path: Path, text_field: str, dropped: Counter[str]) -> Iterator[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
    except pa.ArrowInvalid as e:
        raise TokenSuperpositionError(f"{path} is not a Parquet file ({e}); remove it") from None
    with file:
        names = file.schema_arrow.names
        if text_field not in names:
            raise TokenSuperpositionError(
                f"{path} has no column {text_field!r}; choose one of {', '.join(names)} with --text-field"
            )
        for batch in file.iter_batches(batch_size=256, columns=[text_field]):
            for text in batch.column(0).to_pylist():
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
            f"hf:{name} cannot be opened ({str(e).splitlines()[0]}); the form is hf:DATASET[:CONFIG[:SPLIT]]"
        ) from None
    for row in rows:
        text = row.get(text_field)
        if isinstance(text, str) and text.strip():
            yield text
        else:
            dropped[f"no text in field {text_field!r}"] += 1
