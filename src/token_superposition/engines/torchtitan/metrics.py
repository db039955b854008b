"""torchtitan's metrics, with both token counts, and as lines of ``metrics.jsonl`` like those of the other engines."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torchtitan.components.metrics import (
    MetricsProcessor,
    _get_metrics_rank,  # pyright: ignore[reportPrivateUsage]
)
from torchtitan.distributed import ParallelDims

from token_superposition.experiment.files import METRICS, read_metrics, write_metrics
from token_superposition.schedule import Schedule


class BagMetrics(MetricsProcessor):
    """Adds bag sizes, latent and raw tokens to every log and writes ``metrics.jsonl``.

    One process writes, the one whose metrics torchtitan keeps: with pipeline parallelism it is of the last stage, which
    alone has the loss.

    ``seconds`` is the time in training steps, without validation and checkpoints; ``flops`` is torchtitan's count.
    torchtitan's own tps, tflops and mfu count latent positions, since these are what the labels that it counts are.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(MetricsProcessor.Config):
        pass

    def __init__(
        self,
        config: Config,
        *,
        parallel_dims: ParallelDims,
        dump_folder: str = "./outputs",
        pp_schedule: str = "1F1B",
        **kwargs: Any,
    ):
        super().__init__(
            config, parallel_dims=parallel_dims, dump_folder=dump_folder, pp_schedule=pp_schedule, **kwargs
        )
        writer = _get_metrics_rank(parallel_dims=parallel_dims, pp_schedule=pp_schedule)
        self.path = Path(dump_folder) / METRICS if dist.get_rank() == writer else None
        self.seconds = 0.0
        self.also_logged: Callable[[int], bool] = lambda step: False
        self._mark = time.perf_counter()
        self._logged = 0

    def start(
        self,
        schedule: Schedule,
        counts: tuple[int, int],  # sequences of a step, positions of a sequence
        step: int,
        last_step: int,
        bits_per_byte: float | None,
        also_logged: Callable[[int], bool],
    ) -> None:
        """Lines that a resumed run writes again, after ``step`` and of the last validation, are dropped."""
        self.schedule, self.counts, self.bits_per_byte = schedule, counts, bits_per_byte
        self.also_logged = also_logged
        self._logged = step
        if self.path is not None:
            kept = read_metrics(self.path, step)
            if step == last_step and kept and "val_loss" in kept[-1]:
                kept.pop()
            self.seconds = kept[-1]["seconds"] if kept else 0.0
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_metrics(self.path, kept)

    def should_log(self, step: int) -> bool:
        """Also what precedes a checkpoint, a validation or the end: torchtitan stops at the losses that it logs."""
        return super().should_log(step) or self.also_logged(step)

    def step_begins(self) -> None:
        self._mark = time.perf_counter()

    def step_ends(self) -> None:
        now = time.perf_counter()
        self.seconds, self._mark = self.seconds + now - self._mark, now

    def log(
        self,
        step: int,
        global_avg_loss: float,
        global_max_loss: float,
        grad_norm: float,
        extra_metrics: dict[str, Any] | None = None,
    ) -> None:
        extra = extra_metrics or {}
        # torchtitan's own figure takes every interval to be log_freq long.
        pace = (time.perf_counter() - self.time_last_log) / (step - self._logged)
        ours = {"time_metrics/end_to_end(s)": pace, **self.schedule.counts(*self.counts, step)}
        super().log(step, global_avg_loss, global_max_loss, grad_norm, extra | ours)
        self._logged = step
        self.step_ends()
        *_, rate = (v for k, v in extra.items() if k.startswith("lr/"))  # of the last group, which has the matrices
        self._write(step, {"loss": global_avg_loss, "grad_norm": grad_norm, "learning_rate": rate})

    def log_validation(self, loss: float, step: int, extra_metrics: dict[str, Any] | None = None) -> None:
        super().log_validation(loss, step, extra_metrics)
        bits = {} if self.bits_per_byte is None else {"val_bpb": loss * self.bits_per_byte}
        self._write(step, {"val_loss": loss, **bits})

    def _write(self, step: int, values: dict[str, Any]) -> None:
        if self.path is not None:
            counts = self.schedule.counts(*self.counts, step)
            flops = float(self.num_flops_per_token * counts["latent_tokens"])
            line = {"step": step, "seconds": round(self.seconds, 3), "flops": flops, **values, **counts}
            with self.path.open("a", encoding="utf-8") as f:
                f.write(json.dumps(line) + "\n")
