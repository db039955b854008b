"""How the benchmarks measure: rounds in which every contender runs in turn, and the memory that torch allocates."""

from __future__ import annotations

import csv
import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from token_superposition.experiment.result import hardware

RESULTS = Path(__file__).parent / "results.csv"


@dataclass(frozen=True)
class Timing:
    """Seconds of one contender over the rounds."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def row(self) -> dict[str, float]:
        return {
            "median_ms": round(1e3 * self.median, 3),
            "min_ms": round(1e3 * min(self.seconds), 3),
            "max_ms": round(1e3 * max(self.seconds), 3),
        }


def side_by_side(contenders: dict[str, Callable[[], Any]], rounds: int) -> dict[str, Timing]:
    """Time all contenders in every round, after one warm-up each; the order is turned from round to round."""
    names = list(contenders)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for name in names:
        contenders[name]()  # warm-up
    for r in range(rounds):
        for name in names[r % len(names) :] + names[: r % len(names)]:
            synchronize()
            start = time.perf_counter()
            contenders[name]()
            synchronize()
            seconds[name].append(time.perf_counter() - start)
    return {name: Timing(tuple(s)) for name, s in seconds.items()}


def synchronize() -> None:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def peak_bytes(call: Callable[[], Any]) -> int:
    """The most memory that torch held at once for ``call``, beyond what it held before."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as p:
        call()
    results: Any = p.profiler
    events = [e for e in results.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def free_bytes() -> int:
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def read_rows(path: Path = RESULTS) -> list[dict[str, str]]:
    with path.open(newline="") as f:
        return list(csv.DictReader(f))


def append_rows(rows: Sequence[dict[str, Any]], path: Path = RESULTS) -> None:
    """Add rows to the table; columns that are new are added to all rows."""
    old: list[dict[str, Any]] = list(read_rows(path)) if path.exists() else []
    machine = {"hardware": hardware(), "torch": torch.__version__, "python": platform.python_version()}
    content = [*old, *({**row, **machine} for row in rows)]
    columns = list(dict.fromkeys(key for row in content for key in row))
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", newline="") as f:
        writer = csv.DictWriter(f, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(content)
    temporary.replace(path)


def write_table(page: Path, command: str, rows: Sequence[Sequence[str]]) -> None:
    """The rows, the first of which is the header, between the marks of ``page`` that name ``command``."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    lines.insert(1, "|---" * len(rows[0]) + "|")
    marked = rf"(<!-- {re.escape(command)} -->\n).*?(<!-- end -->)"
    content, found = re.subn(marked, lambda m: m[1] + "\n".join(lines) + "\n" + m[2], page.read_text(), flags=re.S)
    assert found == 1, f"{page} has no place for the table of {command}"
    page.write_text(content)
