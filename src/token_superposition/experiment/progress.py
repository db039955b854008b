"""Progress of one or several runs: bars on a terminal, a line per validation elsewhere."""

from __future__ import annotations

from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

MANY = 8  # runs; of more, the finished ones are counted in one bar


class RunProgress:
    """Shows how far each of so many runs is; ``update`` takes lines of its metrics."""

    def __init__(self, console: Console, runs: int = 1):
        self.console = console
        self.bars = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=10),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=console,
            disable=not console.is_terminal,
        )
        self._tasks: dict[str, TaskID] = {}
        self._shown: dict[str, dict[str, Any]] = {}
        self._all = self.bars.add_task("all runs", total=runs, note="") if runs > MANY else None

    def __enter__(self) -> RunProgress:
        if self.console.is_terminal:  # rich would print an empty line at the end of a pipe
            self.bars.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self.console.is_terminal:
            self.bars.stop()

    def update(self, name: str, steps: int, metrics: list[dict[str, Any]]) -> None:
        """``metrics`` are lines of the run so far: the first, and the newest ones."""
        if name not in self._tasks:
            self._tasks[name] = self.bars.add_task(name, total=steps, note="")
        if not metrics:
            return
        last = {k: v for m in metrics[-20:] for k, v in m.items()}
        loss = f"val {last['val_loss']:.3f}" if "val_loss" in last else f"loss {last['loss']:.3f}"
        note = f"{phase(metrics)}  {loss}  {speed(metrics[-20:]):,.0f} raw tok/s"
        self.bars.update(self._tasks[name], completed=last["step"], note=note)
        if not self.console.is_terminal:
            shown = self._shown.get(name)
            new = next((i for i in range(len(metrics), 0, -1) if metrics[i - 1] == shown), 0)
            for m in metrics[new:]:
                if "val_loss" in m:
                    line = f"{name}: step {m['step']}/{steps}, validation loss {m['val_loss']:.4f}"
                    self.console.print(line, markup=False)
            self._shown[name] = metrics[-1]

    def finish(self, name: str) -> None:
        """The run is done."""
        if self._all is not None:
            self.bars.advance(self._all)
            self.bars.remove_task(self._tasks.pop(name))


def phase(metrics: list[dict[str, Any]]) -> str:
    """
    >>> phase([{"input_bag": 4}]), phase([{"input_bag": 4}, {"input_bag": 1}]), phase([{"input_bag": 1}])
    ('bags of 4', 'recovery', 'ordinary')
    """

    def bag(line: dict[str, Any]) -> int:
        return int(max(line.get("input_bag", 1), line.get("output_bag", 1)))

    known = [m for m in metrics if "input_bag" in m]
    if known and bag(known[-1]) > 1:
        return f"bags of {bag(known[-1])}"
    return "recovery" if any(bag(m) > 1 for m in known) else "ordinary"


def speed(metrics: list[dict[str, Any]]) -> float:
    """Raw tokens a second over the newest lines, of one phase: the two phases read at different speeds.

    >>> speed([{"raw_tokens": 400, "seconds": 1.0}, {"raw_tokens": 800, "seconds": 2.0}])
    400.0
    """
    timed = [m for m in metrics if "raw_tokens" in m and "seconds" in m]
    newest = [m for m in timed if m.get("input_bag") == timed[-1].get("input_bag")]
    first = newest[0] if len(newest) > 1 else {"raw_tokens": 0, "seconds": 0.0}
    return (newest[-1]["raw_tokens"] - first["raw_tokens"]) / max(newest[-1]["seconds"] - first["seconds"], 1e-9)
