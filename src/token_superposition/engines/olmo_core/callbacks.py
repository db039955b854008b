"""What a run says of itself, through OLMo-core's callbacks: metrics.jsonl and the next-token loss on held-out text."""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from olmo_core.distributed.utils import get_rank, get_world_size
from olmo_core.train.callbacks import Callback, EvaluatorCallback
from torch import Tensor

from token_superposition.data.plan import PlannedDataset, ValidationSet
from token_superposition.engines.olmo_core.data import PlannedDataLoader, held_out_batches
from token_superposition.engines.olmo_core.module import TSTTrainModule
from token_superposition.errors import TokenSuperpositionError
from token_superposition.experiment.config import TrainConfig
from token_superposition.experiment.files import read_metrics, write_metrics

VALIDATION = "validation/CE loss"


def plan_of(callback: Callback) -> PlannedDataset:
    loader = callback.trainer.data_loader
    assert isinstance(loader, PlannedDataLoader)
    return loader.plan


@dataclass
class MetricsWriter(Callback):
    """One line of metrics.jsonl for every ``train.log_every``-th step and every validation, named as by ``tst train``.

    ``seconds`` is the time in training steps, without validation and checkpoints. On resume, lines after the
    checkpoint are dropped. Raises ``TokenSuperpositionError`` where the gradient of the last step or of one that is
    saved is not finite: OLMo-core tells of the loss when it has written a checkpoint of what is left.
    """

    priority: ClassVar[int] = 100  # before the checkpoint of the step, which holds the seconds

    path: Path = Path("metrics.jsonl")
    train: TrainConfig = field(default_factory=TrainConfig)
    bits_per_byte: float = 1.0
    seconds: float = 0.0
    norm: Tensor | None = None
    """Of the newest step's gradient."""

    def state_dict(self) -> dict[str, Any]:
        return {"seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.seconds = state_dict["seconds"]

    def pre_train(self) -> None:
        if get_rank() == 0:
            kept = read_metrics(self.path, self.step)
            if self.step >= plan_of(self).schedule.total_steps and kept and "val_loss" in kept[-1]:
                kept.pop()  # the last validation comes again
            write_metrics(self.path, kept)

    def pre_load_batch(self) -> None:
        self._mark = time.perf_counter()

    def post_train_batch(self) -> None:
        self.seconds += time.perf_counter() - self._mark
        self.record_seconds()
        self.norm = self.trainer.get_metric("optim/total grad norm")
        if self.step in self.train.save_at or (self.train.save_every and self.step % self.train.save_every == 0):
            self.require_finite()

    def record_seconds(self) -> None:
        self.trainer.record_metric("seconds", self.seconds, namespace="superposition")

    def post_train(self) -> None:
        self.require_finite()

    def require_finite(self) -> None:
        if self.norm is not None and not math.isfinite(norm := float(self.norm)):
            raise TokenSuperpositionError(
                f"the gradient of step {self.step} has the norm {norm}, so that nothing is saved of it; "
                "lower train.learning_rate, or go on from an earlier checkpoint with other settings"
            )

    def log_metrics(self, step: int, metrics: dict[str, float]) -> None:
        if get_rank() != 0:
            return
        plan = plan_of(self)
        line: dict[str, Any] = {
            "step": step,
            "seconds": round(metrics.get("superposition/seconds", self.seconds), 3),
            "flops": self.flops(step),
            **plan.schedule.counts(plan.batch_size, plan.sequence_length, step),
        }
        if "train/CE loss" in metrics and step % self.train.log_every == 0:
            losses = {
                "loss": metrics["train/CE loss"],
                "grad_norm": metrics["optim/total grad norm"],
                "learning_rate": metrics["optim/LR (group 0)"],
            }
            self._append(line | losses)
        if (loss := metrics.get(f"eval/{VALIDATION}")) is not None:  # not that of a merged model, eval/merged/...
            self._append(line | {"val_loss": loss, "val_bpb": loss * self.bits_per_byte})

    def flops(self, step: int) -> float:
        """OLMo-core's count for the first ``step`` steps: compute follows latent positions, a bag counts once."""
        plan, module = plan_of(self), self.trainer.train_module
        assert isinstance(module, TSTTrainModule)
        per_token = module.num_flops_per_token(plan.sequence_length) or 0
        return float(per_token * plan.schedule.latent_tokens(plan.batch_size, plan.sequence_length, step))

    def _append(self, line: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as f:
            f.write(json.dumps(line) + "\n")


@dataclass
class Validation(EvaluatorCallback):
    """Next-token loss on held-out text, always at bag size 1: every ``eval_interval`` steps and at the end."""

    held_out: ValidationSet | None = None
    final: ValidationSet | None = None
    """Read once, after the last step."""
    rows: int = 1
    """Sequences that a process computes at once."""
    final_loss: float = float("nan")

    def perform_eval(self, prefix: str = "eval") -> None:
        assert self.held_out is not None
        self.trainer.record_metric(f"{prefix}/{VALIDATION}", self.loss(self.held_out))
        if self.trainer.get_metric("superposition/seconds") is None:  # a checkpoint of the step took it along
            for writer in self.trainer.callbacks.values():
                if isinstance(writer, MetricsWriter):
                    writer.record_seconds()
        self.trainer._log_metrics()  # pyright: ignore  # at once: what is killed before the next log has it, too

    def post_train(self) -> None:
        assert self.final is not None
        if self.step >= plan_of(self).schedule.total_steps:  # also where it was asked to stop in the last step
            self.final_loss = self.loss(self.final)
            self.trainer.record_metric(f"eval/{VALIDATION}", self.final_loss)

    def loss(self, dataset: ValidationSet) -> float:
        """Mean over all tokens of ``dataset``, without whole logits; to be called on every rank."""
        module, group = self.trainer.train_module, self.trainer.dp_process_group
        assert isinstance(module, TSTTrainModule)
        total = torch.zeros((), dtype=torch.float64, device=self.trainer.device)
        module.model.eval()
        with torch.no_grad():
            for batch in held_out_batches(
                dataset, self.rows, get_world_size(group), get_rank(group), module.label_ignore_index
            ):
                output: Any = module.model_forward(
                    batch["input_ids"], labels=batch["labels"], loss_reduction="sum", return_logits=False
                )
                total += output.loss
        module.model.train()
        if group is not None:
            dist.all_reduce(total, group=group)
        return total.item() / (len(dataset) * dataset.sequence_length)
