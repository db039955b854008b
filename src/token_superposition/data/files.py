"""Which files a source means, and what is wrong with them before any of them is read."""

from __future__ import annotations

import errno
import os
import reprlib
import shlex
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from token_superposition.data.store import is_partial, is_store
from token_superposition.data.tables import (
    COMPRESSIONS,
    check_json_lines,
    damage,
    expansion,
    is_json_lines,
    open_arrow,
    open_file,
    open_parquet,
    parquet_bytes,
)
from token_superposition.errors import TokenSuperpositionError

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
TABLE_SUFFIXES = (".jsonl", ".ndjson", ".parquet", ".arrow")
ARCHIVE_SUFFIXES = frozenset({".tar", ".tgz", ".tbz2", ".txz", ".zip", ".7z", ".rar", ".xz", ".bz2", ".lz4", ".z"})
STORE = "folders that are prepared data"
FOUND = "lost+found"  # the system's, at the top of a disk, for nobody else to read
HIDDEN = "hidden files and folders in folders"
OTHER_FILE = "files in folders that are not text by their ending, or not regular files"
LINK = "links in folders to other folders"
DESCRIPTION = "descriptions and caches of saved datasets in folders"
MATCHED_FOLDER = "folders that a glob matches, but nothing in them"


def find_files(sources: Sequence[str], dropped: Counter[str] | None = None) -> list[Path]:
    """Files of folders (searched recursively), globs and paths, each once, in a fixed order.

    Links to files are followed, links to folders inside a folder are not: there are no loops. What a folder holds
    beside text is counted in ``dropped``, and so is a folder that a glob matches; hidden files and folders in a folder,
    token stores, and what a killed ``tst prepare`` left, are passed over.
    Raises ``TokenSuperpositionError`` for a source that does not exist, matches nothing, or holds no text.
    """
    found: dict[str, Path] = {}
    for source in sources:
        if not source:
            raise TokenSuperpositionError('a source is empty (""); name a file, a folder (this one is .) or a glob')
        path = Path(os.path.expanduser(source))  # noqa: PTH111 - Path's raises for an unknown user
        try:
            path.stat()
        except PermissionError as e:
            raise unreadable(path, e) from None
        except (OSError, ValueError):
            pass  # told apart below
        if os.path.isdir(path):  # noqa: PTH112 - Path's raises for too long a name
            files = _search(path, dropped)
            if not files:
                raise TokenSuperpositionError(
                    f"{source} holds no file with a known text ending; name the files instead"
                )
        elif os.path.exists(path):  # noqa: PTH110
            files = [path]
        elif any(c in source for c in "*?["):
            files = _match(path, dropped)
            if not files:
                raise TokenSuperpositionError(f"the pattern {source} matches no file; quote it and check the folder")
        elif os.path.islink(path):  # noqa: PTH114
            raise TokenSuperpositionError(f"{source} is a link that leads nowhere; name the file that is meant")
        else:
            shown = source if len(source) < 200 and "\n" not in source else reprlib.repr(source)
            raise TokenSuperpositionError(f"{shown} does not exist; give a file, a folder, a glob or hf:DATASET")
        for file in files:
            found.setdefault(os.path.realpath(file), file)
    return list(found.values())


def check_files(files: Sequence[Path], text_field: str) -> None:
    """Raise ``TokenSuperpositionError`` for the first file that cannot be read at all.

    That is a pipe or device, an archive, a file without permission, a Parquet or Arrow file that is none, or one that,
    like JSON lines, has no text in its field. What else is wrong inside a file is found, and counted, when it is read.
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
            with path.open("rb") as f:
                if kind == ".arrow":
                    open_arrow(f, path, text_field)
            if kind == ".parquet":
                open_parquet(path, text_field).close()
            elif kind in (".jsonl", ".ndjson") or (kind == ".json" and is_json_lines(path)):
                check_json_lines(path, text_field)
            elif path.suffix.lower() in COMPRESSIONS:
                with open_file(path) as f:
                    f.read(1)
        except damage() as e:
            if isinstance(e, OSError) and e.errno is not None:
                raise unreadable(path, e) from None
            if "too much memory for decoding" in str(e):
                raise TokenSuperpositionError(
                    f"{path} was compressed with a window of more than 128 MiB, which is not opened here; decompress "
                    f"it first: zstd -d --long=31 {shlex.quote(str(path))}"
                ) from None


def kind_of(path: Path) -> str:
    """The last ending that is not one of a compression."""
    return next((s for s in reversed([s.lower() for s in path.suffixes]) if s not in COMPRESSIONS), "")


def estimated_bytes(files: Sequence[Path], text_field: str) -> int:
    """Rough bytes of text in the files."""
    return sum(
        parquet_bytes(p, text_field) if kind_of(p) == ".parquet" else round(p.stat().st_size * expansion(p))
        for p in files
    )


def unreadable(path: Path, e: OSError) -> TokenSuperpositionError:
    return TokenSuperpositionError(
        f"{path} cannot be read ({e.strerror or e}); mend it, change its permissions or leave it out"
    )


def _match(pattern: Path, dropped: Counter[str] | None) -> list[Path]:
    """The files that a glob matches; folders of which it matches nothing else are counted."""
    root = Path(pattern.anchor)
    pattern = pattern / "*" if pattern.name == "**" else pattern  # which matches folders alone before Python 3.13
    parts = pattern.relative_to(root).parts
    first = next(i for i, part in enumerate(parts) if any(c in part for c in "*?["))
    effective = os.access in os.supports_effective_ids
    try:
        matches = sorted(p for p in root.glob(str(Path(*parts))) if not any(map(is_partial, p.parts)))
    except ValueError as e:
        raise TokenSuperpositionError(f"{pattern} is no pattern ({e}); write **/ for all folders") from None
    for i in range(first, len(parts)):  # glob itself passes over a folder that it may not read
        needed = os.X_OK | (os.R_OK if any(c in parts[i] for c in "*?[") else 0)
        for folder in root.glob(str(Path(*parts[:i]))) if i else [root]:
            if folder.is_dir() and folder.name != FOUND and not os.access(folder, needed, effective_ids=effective):
                raise unreadable(folder, PermissionError(errno.EACCES, os.strerror(errno.EACCES)))
    files = [p for p in matches if p.is_file()]
    above = {folder for p in files for folder in p.parents}
    if dropped is not None and (count := sum(p.is_dir() and p not in above for p in matches)):
        dropped[MATCHED_FOLDER] += count
    return files


def _search(folder: Path, dropped: Counter[str] | None) -> list[Path]:
    def failed(e: OSError) -> None:
        raise unreadable(Path(e.filename), e)

    root = os.path.realpath(folder)
    found: list[Path] = []
    for directory, folders, names in os.walk(folder, onerror=failed):
        hidden = [name for name in (*folders, *names) if name.startswith(".") or name == FOUND]
        folders[:] = [name for name in folders if name not in hidden]
        if "meta.json" in names and is_store(Path(directory)):
            folders.clear()
            if dropped is not None:
                dropped[STORE] += 1
            continue
        if dropped is not None and (count := sum(not is_partial(name) for name in hidden)):
            dropped[HIDDEN] += count
        if dropped is not None and (count := sum(_leads_out(Path(directory, name), root) for name in folders)):
            dropped[LINK] += count
        described = _descriptions(Path(directory), names, folders)
        for path in (Path(directory, name) for name in names if name not in hidden):
            if path.name in described:
                if dropped is not None:
                    dropped[DESCRIPTION] += 1
            elif _is_text_name(path) and path.is_file():
                found.append(path)
            elif dropped is not None:
                dropped[OTHER_FILE] += 1
    return sorted(found)


def _leads_out(folder: Path, root: str) -> bool:
    """Whether this is a link, which is not followed, to what is not searched anyway."""
    return folder.is_symlink() and not Path(os.path.realpath(folder)).is_relative_to(root)


def _descriptions(directory: Path, names: Sequence[str], folders: Sequence[str]) -> set[str]:
    """The names beside the text of a dataset that the datasets library saved: its metadata, and what ``map`` keeps."""
    arrow = {name for name in names if name.endswith(".arrow")}
    if arrow and not {"state.json", "dataset_info.json"}.isdisjoint(names):
        return {"state.json", "dataset_info.json"} | {name for name in arrow if name.startswith("cache-")}
    saved = "dataset_dict.json" in names and any((directory / name / "state.json").is_file() for name in folders)
    return {"dataset_dict.json"} if saved else set()


def _is_text_name(path: Path) -> bool:
    suffixes = [s.lower() for s in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        suffixes.pop()
    return bool(suffixes) and (suffixes[-1] in TEXT_SUFFIXES or suffixes[-1] in TABLE_SUFFIXES)
