"""A signal to end while training: the step is finished, a checkpoint saved, and the run ends with 143 or 130."""

from __future__ import annotations

import signal
import sys
import threading
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from token_superposition.experiment.terminal import leave_terminal

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)  # SLURM: --signal=USR1@120; a terminal that is closed
TERMINATED, INTERRUPTED = 143, 130


class Preemption(TrainerCallback):
    """Catches SIGTERM, SIGUSR1, SIGHUP and SIGINT inside ``with``, and stops the training after the step.

    A second SIGINT is ``KeyboardInterrupt`` at once. Among several processes it is not: a launcher passes on to them
    the Ctrl-C that they got from the terminal, too. Where SIGINT is ignored, as in a shell's background, it stays so;
    so does SIGHUP, under nohup.

    Several processes agree: each step sums up who got a signal over gloo, beside the step's computation, and the next
    step's end takes note, so they all stop after the same one. A signal after the last step changes nothing.
    """

    def __init__(self, processes: int = 1):
        self.processes = processes
        self.signalled = False
        self.status = TERMINATED
        """What the process should end with if it was stopped."""
        self.stopped = False
        """Training was stopped before its last step."""
        self._group: Any = None
        self._told: tuple[Any, Tensor] | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Preemption:
        if threading.current_thread() is threading.main_thread():
            nohup = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
            caught = [s for s in SIGNALS if not (nohup and s == signal.SIGHUP)]
            self._before = {s: signal.signal(s, self._take) for s in caught}
            if signal.getsignal(signal.SIGINT) == signal.default_int_handler:
                self._before[signal.SIGINT] = signal.signal(signal.SIGINT, self._interrupt)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        for s, handler in self._before.items():
            signal.signal(s, handler)

    def _take(self, number: int, *_: object) -> None:
        self.signalled = True
        if number == signal.SIGHUP:
            leave_terminal()  # to print there would fail, before the checkpoint is saved

    def _interrupt(self, *_: object) -> None:
        if self.processes == 1:
            if self.signalled:
                raise KeyboardInterrupt
            print("tst: finishing the step and saving a checkpoint; Ctrl-C again stops at once", file=sys.stderr)
        self.signalled, self.status = True, INTERRUPTED

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.processes > 1:
            self._group = dist.new_group(backend="gloo")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._agreed() and state.global_step < state.max_steps:
            self.stopped = control.should_save = control.should_training_stop = True

    def _agreed(self) -> bool:
        if self._group is None:
            return self.signalled
        if self._told is not None:
            work, count = self._told
            work.wait()
            if count.item():
                return True
        count = torch.tensor(int(self.signalled))
        self._told = dist.all_reduce(count, group=self._group, async_op=True), count
        return False
