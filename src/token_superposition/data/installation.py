"""The text of this Python installation, for the demo: source code, documentation and other text of its packages."""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

SUFFIXES = frozenset({".py", ".pyi", ".md", ".rst", ".txt"})
MAX_FILE_BYTES = 256 * 2**10  # longer ones are mostly tables and generated code


@cache
def installed_files() -> tuple[Path, ...]:
    """Text files of the standard library and the installed packages, in an order that mixes them; sought once."""
    paths = sysconfig.get_paths()
    roots = {Path(paths[name]).resolve() for name in ("stdlib", "purelib", "platlib")}
    found: dict[str, Path] = {}
    for root in roots:
        for directory, _, names in os.walk(root):
            for path in (Path(directory, name) for name in names if Path(name).suffix in SUFFIXES):
                if path.is_file() and 0 < path.stat().st_size <= MAX_FILE_BYTES:
                    found[str(path.relative_to(root))] = path
    return tuple(found[name] for name in sorted(found, key=lambda n: hashlib.blake2b(n.encode()).digest()))


def installed_documents(dropped: Counter[str]) -> Iterator[str]:
    for path in installed_files():
        try:
            text = path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            dropped["not UTF-8"] += 1
            continue
        if text.strip() and "\0" not in text:
            yield text
