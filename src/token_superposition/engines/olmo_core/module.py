"""OLMo-core's train module, learning-rate schedule and speed monitor, taught about bags."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from olmo_core.data.utils import get_labels
from olmo_core.nn.lm_head import LMOutputWithLoss
from olmo_core.nn.transformer import NormalizedTransformer, Transformer
from olmo_core.optim import SkipStepOptimizer
from olmo_core.optim.scheduler import Scheduler, SchedulerUnits
from olmo_core.train.callbacks import SpeedMonitorCallback
from olmo_core.train.train_module import TransformerTrainModule
from torch import Tensor

from token_superposition.embedding import superpose
from token_superposition.engines.olmo_core.data import PlannedDataLoader
from token_superposition.engines.olmo_core.export import is_loaded
from token_superposition.engines.olmo_core.model import NO_NGPT, TSTLMHead
from token_superposition.errors import TokenSuperpositionError
from token_superposition.schedule import WSD


class TSTTrainModule(TransformerTrainModule):
    """``TransformerTrainModule`` whose batches may be bags; everything else is the stock one.

    A batch is what ``PlannedDataLoader`` gives; the model's head must be built by ``TSTLMHeadConfig``. The loss is the
    mean over the latent positions of a rank that have a target, averaged over the ranks: as in stock OLMo-core, a
    target counts less on a rank that has more of them. A ``SkipStepOptimizer`` compares a step with earlier ones of the
    same bag sizes, since the loss jumps at a switch.

    Raises ``TokenSuperpositionError`` for a model without such a head or with loaded weights, which the stock module
    initialises anew; for a z-loss; for bags without labels; and for a trainer of other steps than the plan's.
    """

    def __init__(self, model: Transformer, *args: Any, **kwargs: Any):
        if isinstance(model, NormalizedTransformer):
            raise TokenSuperpositionError(f"the model is a NormalizedTransformer; {NO_NGPT}")
        if not isinstance(model.lm_head, TSTLMHead):
            raise TokenSuperpositionError(
                f"the model's head is {type(model.lm_head).__name__}, which takes no bags of targets; build the model "
                "with lm_head=TSTLMHeadConfig(...), with the layer_norm, bias and dtype of its LMHeadConfig"
            )
        if is_loaded(model):
            raise TokenSuperpositionError(
                "the model has loaded weights, and a train module initialises its model anew; build the module first "
                "and call load_weights(module.model, ...) after it"
            )
        super().__init__(model, *args, **kwargs)
        if self.z_loss_multiplier is not None:
            raise TokenSuperpositionError(
                f"z_loss_multiplier is {self.z_loss_multiplier:g}; the loss on bags has no separate z-loss, so leave "
                "it None"
            )
        model.lm_head.positions_are_counted = True
        self._history: dict[tuple[torch.Size, torch.Size], tuple[list[Tensor], list[Tensor]]] = {}
        superpose(self.model)  # after FSDP, which puts a class of its own in front of the embedding's

    def pre_train(self) -> None:
        super().pre_train()
        if isinstance(loader := self.trainer.data_loader, PlannedDataLoader):
            loader.check_duration(self.trainer.max_duration, self.trainer.max_steps)

    def train_batch(self, batch: dict[str, Any], dry_run: bool = False) -> None:
        if "labels" not in batch:
            if batch["input_ids"].dim() == 3:
                raise TokenSuperpositionError(
                    "the batch of bags has no labels, which do not follow from its input_ids; add labels as "
                    "PlannedDataLoader does: the bag after each position"
                )
            batch["labels"] = get_labels(batch, label_ignore_index=self.label_ignore_index)
        has_target = batch["labels"] != self.label_ignore_index
        self._positions = (has_target.any(-1) if has_target.dim() == 3 else has_target).sum()
        if (kept := batch.get("instance_mask")) is not None:  # as in the stock module: left out, but counted
            self._positions = self._positions + (~kept).sum() * batch["labels"].shape[1]
        if isinstance(self.optim, SkipStepOptimizer) and not dry_run:
            bags, optim = (batch["input_ids"].shape[2:], batch["labels"].shape[2:]), cast(Any, self.optim)
            optim._losses, optim._grad_norms = self._history.setdefault(bags, ([], []))
        super().train_batch(batch, dry_run)

    def model_forward(
        self, input_ids: Tensor, labels: Tensor | None = None, **kwargs: Any
    ) -> Tensor | LMOutputWithLoss:
        if kwargs.get("loss_div_factor") is not None:  # the stock one counts every token of a bag
            kwargs["loss_div_factor"] = self._positions
        return super().model_forward(input_ids, labels, **kwargs)


@dataclass
class PlannedWSD(Scheduler):
    """The learning rate of ``token_superposition.WSD``: one curve through every switch.

    Over ``total_steps``, or over those of the trainer's ``max_duration``.
    Raises ``TokenSuperpositionError`` for units other than steps, which are what a plan is made of.
    """

    total_steps: int | None = None
    warmup_steps: int = 0
    decay_ratio: float = 0.1

    def __post_init__(self, *_: Any) -> None:
        if self.units != SchedulerUnits.steps:
            raise TokenSuperpositionError(
                f"PlannedWSD: units is {str(self.units)!r}, but a plan is made of steps; leave units out"
            )

    def get_lr(self, initial_lr: float | Tensor, current: int, t_max: int) -> float | Tensor:
        factor = WSD(self.total_steps or t_max, self.warmup_steps, self.decay_ratio)
        return initial_lr * factor(current - 1)  # OLMo-core counts steps from 1


@dataclass
class TSTSpeedMonitor(SpeedMonitorCallback):
    """``SpeedMonitorCallback`` that counts a bag as the one position it is computed as.

    Bag sizes and token counts of every step of a ``PlannedDataLoader`` are metrics of the trainer, ``superposition/*``.
    """

    def pre_step(self, batch: dict[str, Any]) -> None:
        ids: torch.Tensor = batch["input_ids"]
        super().pre_step({**batch, "input_ids": ids[..., 0] if ids.dim() == 3 else ids})

    def post_step(self) -> None:
        super().post_step()
        if isinstance(loader := self.trainer.data_loader, PlannedDataLoader):
            plan = loader.plan
            for name, value in plan.schedule.counts(plan.batch_size, plan.sequence_length, self.step).items():
                self.trainer.record_metric(name, value, namespace="superposition")
