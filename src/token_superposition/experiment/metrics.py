"""What a run writes to its metrics file: a line per log and per validation, from the Trainer's own logs."""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from token_superposition.errors import TokenSuperpositionError
from token_superposition.experiment.files import NEWEST, finite, read_metrics, write_metrics
from token_superposition.experiment.health import is_spike

Report = Callable[[list[dict[str, Any]]], None]


class MetricsWriter(TrainerCallback):
    """Writes one line per log and per validation; on resume, lines after the checkpoint are dropped.

    ``seconds`` is the time in training steps, without validation and saving. ``save_at`` asks for checkpoints.
    ``report`` is given the first and the newest lines after each new one. A line has ``spike`` where the loss jumped,
    and the steps that were left out since the last one, which are taken off ``skipped``.

    Raises ``TokenSuperpositionError`` where a line cannot be written.
    """

    def __init__(
        self,
        path: Path,
        bits_per_byte: float,
        step_flops: float,
        save_at: tuple[int, ...] = (),
        report: Report = lambda lines: None,
        skipped: list[int] | None = None,
    ):
        self.skipped = [] if skipped is None else skipped
        self.path, self.bits_per_byte, self.step_flops, self.save_at = path, bits_per_byte, step_flops, save_at
        self.report = report
        self.lines: list[dict[str, Any]] = []
        self.seconds = 0.0
        self._mark = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        state.compute_steps(args, state.max_steps)  # a checkpoint has those of its run; they may have been changed
        self.lines = kept = read_metrics(self.path, state.global_step)
        if state.global_step == state.max_steps:  # the validation after the training comes again
            for line in [m for m in kept if "val_loss" in m and m["step"] == state.global_step][1:]:
                kept.remove(line)
        if state.is_world_process_zero:
            write_metrics(self.path, kept)
        del self.lines[1:-NEWEST]
        self.seconds = kept[-1]["seconds"] if kept else 0.0
        self._mark = time.perf_counter()

    def go_on_from(self, seconds: float) -> None:
        """The time up to a checkpoint, of which the newest line before it knows but a part."""
        self.seconds, self._mark = seconds, time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        control.should_save |= state.global_step in self.save_at
        if torch.cuda.is_available() and (control.should_log or control.should_evaluate or control.should_save):
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.seconds, self._mark = self.seconds + now - self._mark, now

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._mark = time.perf_counter()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._mark = time.perf_counter()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        logs = logs or {}
        del state.log_history[:-1]  # all of it is in the file: a long run must not grow, nor its checkpoints
        if not state.is_world_process_zero or not ({"loss", "eval_loss"} & logs.keys()):
            return
        line: dict[str, Any] = {
            "step": state.global_step,
            "seconds": round(self.seconds, 3),
            "flops": self.step_flops * state.global_step,
        }
        names = ("loss", "grad_norm", "learning_rate", "input_bag", "output_bag", "tokens_per_bag")
        line |= {k: logs[k] for k in (*names, "latent_tokens", "raw_tokens") if k in logs}
        if "eval_loss" in logs:
            line |= {"val_loss": logs["eval_loss"], "val_bpb": logs["eval_loss"] * self.bits_per_byte}
        if "loss" in line and is_spike(self.lines, line):
            line["spike"] = True
            warnings.warn(f"the loss jumped to {line['loss']:.3f} at step {state.global_step}", stacklevel=1)
        if self.skipped:  # also with the last validation, for steps that no loss is logged of
            line["skipped"] = list(self.skipped)
            self.skipped.clear()
        try:
            with self.path.open("a", encoding="utf-8") as f:
                f.write(json.dumps(finite(line)) + "\n")
        except OSError as e:
            raise TokenSuperpositionError(
                f"cannot write {self.path} ({e.strerror}) after step {state.global_step}; make room there and give the "
                "same command again: it goes on from the newest checkpoint"
            ) from e
        self.lines.append(line)
        del self.lines[1:-NEWEST]
        self.report(self.lines)
