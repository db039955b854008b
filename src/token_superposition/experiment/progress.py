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
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=console,
            disable=not console.is_terminal,
        )
        self._tasks: dict[str, TaskID] = {}
        self._shown: dict[str, int] = {}
        self._all = self.bars.add_task("all runs", total=runs, note="") if runs > MANY else None

    def __enter__(self) -> RunProgress:
        self.bars.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.bars.stop()

    def update(self, name: str, steps: int, metrics: list[dict[str, Any]]) -> None:
        """``metrics`` are all lines of the run so far."""
        if name not in self._tasks:
            self._tasks[name] = self.bars.add_task(name, total=steps, note="")
        if not metrics:
            return
        last = {k: v for m in metrics[-20:] for k, v in m.items()}
        bag = max(last.get("input_bag", 1), last.get("output_bag", 1))
        loss = f"val {last['val_loss']:.3f}" if "val_loss" in last else f"loss {last['loss']:.3f}"
        note = f"bag {bag}  {loss}  {last['raw_tokens'] / max(last['seconds'], 1e-9):,.0f} tok/s"
        self.bars.update(self._tasks[name], completed=last["step"], note=note)
        if not self.console.is_terminal:
            for m in metrics[self._shown.get(name, 0) :]:
                if "val_loss" in m:
                    self.console.print(f"{name}: step {m['step']}/{steps}, validation loss {m['val_loss']:.4f}")
            self._shown[name] = len(metrics)

    def finish(self, name: str) -> None:
        """The run is done."""
        if self._all is not None:
            self.bars.advance(self._all)
            self.bars.remove_task(self._tasks.pop(name))
