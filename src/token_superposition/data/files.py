"""Which files a source means, and what is wrong with them before any of them is read."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from token_superposition.data.store import is_partial, is_store
from token_superposition.errors import TokenSuperpositionError, first_line

# What a folder is searched for. A file that is named itself, or matched by a glob, is read whatever its ending.
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
ARCHIVE_SUFFIXES = frozenset({".tar", ".tgz", ".tbz2", ".txz", ".zip", ".7z", ".rar", ".xz", ".bz2", ".lz4", ".z"})
STORE = "folders that are prepared data"
HIDDEN = "hidden files and folders in folders"
OTHER_FILE = "files in folders that are not text by their ending, or not regular files"


def find_files(sources: Sequence[str], dropped: Counter[str] | None = None) -> list[Path]:
    """Files of folders (searched recursively), globs and paths, each once, in a fixed order.

    Links to files are followed, links to folders inside a folder are not: there are no loops. What a folder holds
    beside text is counted in ``dropped``; hidden files and folders in it, token stores, and what a killed
    ``tst prepare`` left, are passed over.
    Raises ``TokenSuperpositionError`` for a source that does not exist, matches nothing, or holds no text.
    """
    found: dict[Path, None] = {}
    for source in sources:
        path = Path(os.path.expanduser(source))  # noqa: PTH111 - Path's raises for an unknown user
        try:
            path.stat()
        except PermissionError as e:
            raise unreadable(path, e) from None
        except (OSError, ValueError):
            pass  # told apart below
        if path.is_dir():
            files = _search(path, dropped)
            if not files:
                raise TokenSuperpositionError(
                    f"{source} holds no file with a known text ending; name the files instead"
                )
        elif path.exists():
            files = [path]
        elif any(c in source for c in "*?["):
            root = Path(path.anchor)
            matches = root.glob(str(path.relative_to(root)))
            files = sorted(p for p in matches if p.is_file() and not any(map(is_partial, p.parts)))
            if not files:
                raise TokenSuperpositionError(f"the pattern {source} matches no file; quote it and check the folder")
        elif path.is_symlink():
            raise TokenSuperpositionError(f"{source} is a link that leads nowhere; name the file that is meant")
        else:
            raise TokenSuperpositionError(f"{source} does not exist; give a file, a folder, a glob or hf:DATASET")
        found |= dict.fromkeys(files)
    return list(found)


def check_files(files: Sequence[Path], text_field: str) -> None:
    """Raise ``TokenSuperpositionError`` for the first file that cannot be read at all.

    That is a pipe or device, an archive, a file without permission, or a Parquet file that is none or has no such
    column of text. What is wrong inside a file is found, and counted, when it is read.
    """
    for path in files:
        if not path.is_file():
            raise TokenSuperpositionError(
                f"{path} is a pipe or a device, which cannot be read twice; write it to a file first"
            )
        if (kind := kind_of(path)) in ARCHIVE_SUFFIXES:
            raise TokenSuperpositionError(
                f"{path} is an archive or compressed ({kind}), which is not opened here; unpack it first (only .gz "
                "and .zst of single files are read)"
            )
        try:
            path.open("rb").close()
        except OSError as e:
            raise unreadable(path, e) from None
        if kind == ".parquet":
            open_parquet(path, text_field).close()


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
    return file


def kind_of(path: Path) -> str:
    """The last ending that is not one of a compression."""
    return next((s for s in reversed([s.lower() for s in path.suffixes]) if s not in COMPRESSED_SUFFIXES), "")


def estimated_bytes(files: Sequence[Path]) -> int:
    """Rough bytes of text in the files."""
    return sum(p.stat().st_size * (4 if p.suffix in (*COMPRESSED_SUFFIXES, ".parquet") else 1) for p in files)


def unreadable(path: Path, e: OSError) -> TokenSuperpositionError:
    return TokenSuperpositionError(
        f"{path} cannot be read ({e.strerror or e}); mend it, change its permissions or leave it out"
    )


def _search(folder: Path, dropped: Counter[str] | None) -> list[Path]:
    def failed(e: OSError) -> None:
        raise unreadable(Path(e.filename), e)

    found: list[Path] = []
    for directory, folders, names in os.walk(folder, onerror=failed):
        hidden = [name for name in (*folders, *names) if name.startswith(".")]
        folders[:] = [name for name in folders if name not in hidden]
        if "meta.json" in names and is_store(Path(directory)):
            folders.clear()
            if dropped is not None:
                dropped[STORE] += 1
            continue
        if dropped is not None and (count := sum(not is_partial(name) for name in hidden)):
            dropped[HIDDEN] += count
        for path in (Path(directory, name) for name in names if name not in hidden):
            if _is_text_name(path) and path.is_file():
                found.append(path)
            elif dropped is not None:
                dropped[OTHER_FILE] += 1
    return sorted(found)


def _is_text_name(path: Path) -> bool:
    suffixes = [s.lower() for s in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSED_SUFFIXES:
        suffixes.pop()
    return bool(suffixes) and (suffixes[-1] in TEXT_SUFFIXES or suffixes[-1] in TABLE_SUFFIXES)
