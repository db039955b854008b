"""The directory of a run, a comparison or a sweep: names of its files; JSON and metrics, written whole or not."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any, cast

RESULT = "run.json"
DIVERGED = "diverged.json"
"""What run.json would say of a run that ended with a gradient that is not finite; its loss is nan."""
CONFIG = "config.toml"
METRICS = "metrics.jsonl"
MODEL = "model"
SUMMARY = "summary.json"
"""Of a comparison."""
SWEEP = "sweep.json"
NEWEST = 200  # lines of metrics in memory, among which a spike is looked for


def write_whole(path: Path, text: str) -> None:
    """Aside, then renamed: nobody finds half of it, also where several processes write it or the disk is full."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("w", encoding="utf-8", newline="") as file:
            file.write(text)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    write_whole(path, json.dumps(finite(content), indent=2, allow_nan=False) + "\n")


def finite(content: Any) -> Any:
    """With null in place of nan and infinity, which are no JSON (``form.restored`` undoes it).

    >>> finite({"loss": float("nan"), "ends": (1.0, None)})
    {'loss': None, 'ends': [1.0, None]}
    """
    if isinstance(content, dict):
        return {key: finite(value) for key, value in cast(dict[str, Any], content).items()}
    if isinstance(content, (list, tuple)):
        return [finite(value) for value in cast(list[Any], content)]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def line_of(text: str | bytes) -> Any:
    """A line of a metrics file, with nan where it has null: no figure of it is missing otherwise.

    >>> line_of('{"step": 2, "loss": null}')
    {'step': 2, 'loss': nan}
    """
    content: Any = json.loads(text)
    if isinstance(content, dict):
        items = cast(dict[str, Any], content).items()
        return {name: math.nan if value is None else value for name, value in items}
    return content


def read_metrics(path: Path, up_to: int | None = None) -> list[dict[str, Any]]:
    """The lines of a metrics file, or those up to a step; a last line that was cut off is left out."""
    lines: list[dict[str, Any]] = []
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                lines.append(line_of(line))
            except ValueError:
                break
    return [m for m in lines if up_to is None or m["step"] <= up_to]


def write_metrics(path: Path, lines: list[dict[str, Any]]) -> None:
    """A run that goes on drops the lines after its checkpoint, which it writes again."""
    write_whole(path, "".join(json.dumps(finite(m)) + "\n" for m in lines))


class GrowingMetrics:
    """The metrics of a run that another process trains: ``read`` gives the first line and the newest ones."""

    def __init__(self, path: Path):
        self.path = path
        self.lines: list[dict[str, Any]] = []
        self._file, self._read = 0, 0

    def read(self) -> list[dict[str, Any]]:
        """Reads on where it stopped, or anew where the run has written the file again."""
        try:
            with self.path.open("rb") as file:
                status = os.fstat(file.fileno())
                if status.st_ino != self._file or status.st_size < self._read:
                    self.lines, self._file, self._read = [], status.st_ino, 0
                file.seek(self._read)
                whole, end, _ = file.read().rpartition(b"\n")
        except FileNotFoundError:
            return self.lines
        self._read += len(whole + end)
        self.lines += [line_of(line) for line in whole.splitlines()]
        del self.lines[1:-NEWEST]
        return self.lines
