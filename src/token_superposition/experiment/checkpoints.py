"""Checkpoints on disk: written aside and renamed, with a manifest of checksums. Only a whole one is ever loaded.

A checkpoint is whole if its ``manifest.json`` is there, is what was written, and every file that it names has the size
and the SHA-256 that it says. Other files in the directory are of no account.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from token_superposition.data.store import json_sha256
from token_superposition.errors import TokenSuperpositionError

MANIFEST = "manifest.json"
ASIDE = ".writing"
"""Directory beside the checkpoints in which one is written."""
FORMAT = 1
THREADS = 8

Checksums = dict[str, list[Any]]  # file -> [bytes, SHA-256]


def step_of(checkpoint: Path) -> int:
    """Number of steps that were done when it was written."""
    found = re.fullmatch(r"checkpoint-(\d+)", checkpoint.name)
    if found is None:
        raise TokenSuperpositionError(f"{checkpoint} is no checkpoint; give a directory such as checkpoint-500")
    return int(found[1])


def checkpoints_in(directory: Path) -> list[Path]:
    """Those that are there, whole or not, the oldest first."""
    found = [p for p in directory.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name)]
    return sorted(found, key=step_of)


def checksums(written: Path, part: int = 0, parts: int = 1) -> Checksums:
    """Size and SHA-256 of every file, which is on the disk when this returns; of several processes, each a share."""
    names = sorted(str(p.relative_to(written)) for p in written.rglob("*") if p.is_file() and p.name != MANIFEST)

    def one(name: str) -> list[Any]:
        with (written / name).open("rb") as f:
            digest = hashlib.file_digest(f, "sha256").hexdigest()
            os.fsync(f.fileno())
            return [os.fstat(f.fileno()).st_size, digest]

    mine = names[part::parts]
    with ThreadPoolExecutor(THREADS) as pool:
        return dict(zip(mine, pool.map(one, mine), strict=True))


def commit(written: Path, target: Path, files: Checksums, facts: dict[str, Any]) -> None:
    """Write the manifest of a checkpoint that was ``written`` aside, and rename it to ``target``."""
    content: dict[str, Any] = {"format": FORMAT, "step": step_of(target), **facts, "files": files}
    with (written / MANIFEST).open("w", encoding="utf-8") as f:
        json.dump(content | {"sha256": json_sha256(content)}, f, indent=1)
        f.flush()
        os.fsync(f.fileno())
    for directory in (*(p for p in written.rglob("*") if p.is_dir()), written):
        _sync(directory)
    if target.exists():  # damaged, or a run that goes on from an older one comes by again
        target.rename(written.with_name(f"{target.name}.replaced"))
    written.rename(target)
    _sync(target.parent)
    shutil.rmtree(written.parent, ignore_errors=True)


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """Raises ``TokenSuperpositionError`` where it is missing or not what was written."""
    path = checkpoint / MANIFEST
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
        digest = content.pop("sha256")
        if content["format"] != FORMAT:
            raise TokenSuperpositionError(f"{path} has format {content['format']!r}, this version reads {FORMAT}")
        altered = digest != json_sha256(content) or content["step"] != step_of(checkpoint)
    except FileNotFoundError:
        raise TokenSuperpositionError(
            f"{checkpoint} has no {MANIFEST}: it was not finished, or an older version wrote it"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        if isinstance(e, TokenSuperpositionError):
            raise
        raise TokenSuperpositionError(f"{path} cannot be read ({e})") from None
    if altered:
        raise TokenSuperpositionError(f"{path} was altered")
    return content


def damage(checkpoint: Path, *, content: bool = True, part: int = 0, parts: int = 1) -> str | None:
    """What is wrong with a checkpoint: the file, and how it differs from the manifest; None if it is whole.

    Without ``content``, sizes only. Of several processes, each reads a share of the files.
    """
    try:
        expected: Checksums = read_manifest(checkpoint)["files"]
    except TokenSuperpositionError as e:
        return str(e)
    for name, (size, _) in expected.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{path} is missing"
        if path.stat().st_size != size:
            return f"{path} has {path.stat().st_size:,} of {size:,} bytes"

    def altered(name: str) -> bool:
        with (checkpoint / name).open("rb") as f:
            return hashlib.file_digest(f, "sha256").hexdigest() != expected[name][1]

    if content:
        mine = sorted(expected)[part::parts]
        try:
            with ThreadPoolExecutor(THREADS) as pool:
                wrong = [name for name, bad in zip(mine, pool.map(altered, mine), strict=True) if bad]
        except OSError as e:
            return f"{e.filename} cannot be read ({e.strerror})"
        if wrong:
            return f"{checkpoint / wrong[0]} was altered: its SHA-256 is not the manifest's"
    return None


def newest_whole(
    directory: Path,
    report: Callable[[str], None] = lambda line: None,
    check: Callable[[Path], str | None] = damage,
) -> Path | None:
    """The newest checkpoint that is whole; each damaged one before it is reported in one line and left where it is.

    None where there are none. Raises ``TokenSuperpositionError`` if there are some and none is whole.
    """
    found = checkpoints_in(directory)
    lines: list[str] = []
    for checkpoint in reversed(found):
        problem = check(checkpoint)
        if problem is None:
            return checkpoint
        lines.append(problem)
        report(f"{checkpoint.name} is damaged and is passed over: {problem}")
    if found:
        raise TokenSuperpositionError(
            f"no checkpoint in {directory} is whole ({lines[0]}); remove them to train from the start"
        )
    return None


def rotate(written: Path, keep: int, kept_steps: Collection[int] = ()) -> None:
    """Remove all but the newest ``keep`` (0 keeps all) up to the one that was just ``written``, and ``kept_steps``.

    Later ones, which the run passed over as damaged, stay. Where none of those that would stay is whole, nothing is
    removed.
    """
    directory, last = written.parent, step_of(written)
    ordinary = [c for c in checkpoints_in(directory) if step_of(c) <= last and step_of(c) not in kept_steps]
    if not keep or len(ordinary) <= keep:
        return
    if all(damage(c, content=False) for c in ordinary[-keep:]):
        return
    for checkpoint in ordinary[:-keep]:
        doomed = directory / ASIDE / checkpoint.name  # renamed first: what is half removed has no checkpoint's name
        doomed.parent.mkdir(exist_ok=True)
        checkpoint.rename(doomed)
        shutil.rmtree(doomed.parent, ignore_errors=True)


def _sync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
