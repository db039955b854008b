"""A run that does not come on ends with a message instead of hanging."""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

STACKS = "stalled.txt"


class Watchdog(TrainerCallback):
    """Inside ``with``, ends the process with status 1 if no step, validation batch or checkpoint comes for ``seconds``.

    It looks every fifth of that time, at least every 10 s. Where the process hung is written to ``stalled.txt``.
    Time in which the process itself was stopped (SIGSTOP, a suspended job) does not count.
    """

    def __init__(self, seconds: float, out: Path):
        self.seconds, self.out = seconds, out
        self.step = 0
        self._mark = 0.0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self._mark = time.monotonic()  # before it, checkpoints were read, which may take longer
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._done.set()

    def _watch(self) -> None:
        pause, looked = min(self.seconds / 5, 10), time.monotonic()
        while not self._done.wait(pause):
            now = time.monotonic()
            stopped, looked = now - looked - pause, now
            if stopped > pause:  # this thread, and so the process, did not come on either
                self._mark = min(self._mark + stopped, now)
            if now - self._mark > self.seconds:
                where = self.out / STACKS
                print(
                    f"tst: error: nothing was done for {self.seconds / 60:g} minutes after step {self.step} "
                    f"(train.timeout_minutes); where it hung is in {where}, and the same command goes on from the "
                    "newest checkpoint",
                    file=sys.stderr,
                    flush=True,
                )
                try:
                    with where.open("a", encoding="utf-8") as f:  # each process of a run
                        faulthandler.dump_traceback(f)
                finally:
                    os._exit(1)  # whatever hangs cannot be asked to end

    def _come_on(self, state: TrainerState) -> None:
        self.step, self._mark = state.global_step, time.monotonic()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._come_on(state)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._come_on(state)

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._come_on(state)

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._come_on(state)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._come_on(state)
