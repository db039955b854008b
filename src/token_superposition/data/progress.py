"""Progress bars of ``prepare``."""

from __future__ import annotations

import time
from collections.abc import Generator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from token_superposition.data.prepare import Progress as Report


@contextmanager
def bars(console: Console) -> Generator[Report]:
    """A bar for each stage, in bytes of text; nothing if the console is no terminal."""
    if not console.is_terminal:
        yield lambda stage, done, total: None
        return
    tasks: dict[str, TaskID] = {}
    newest: dict[TaskID, float] = {}
    shown = 0.0
    with Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
        console=console,
    ) as progress:

        def report(stage: str, done: float, total: float | None) -> None:
            nonlocal shown
            if stage not in tasks:
                show()
                tasks[stage] = progress.add_task(stage, total=total)
            newest[tasks[stage]] = done
            if time.monotonic() - shown > 0.1:  # it is called for every document
                show()
                shown = time.monotonic()

        def show() -> None:
            """All stages, so that each ends with what it came to."""
            for task, done in newest.items():
                progress.update(task, completed=done)

        yield report
        show()
