"""The transformers ``Trainer``, taught to train on bags."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, SequentialSampler, Subset
from transformers import Trainer, TrainingArguments, default_data_collator

from token_superposition.data.plan import PlannedDataset
from token_superposition.embedding import superpose
from token_superposition.engines.transformers.checks import (
    Plan,
    check_held_out,
    check_objective,
    check_plan,
    refuse_bags,
    warn_early_stop,
)
from token_superposition.engines.transformers.embedding_lr import scale_embedding_lr
from token_superposition.engines.transformers.fit import check_fit
from token_superposition.engines.transformers.head import (
    Head,
    HiddenStates,
    auxiliary_weight,
    check_causal,
    ids_used_elsewhere,
    logits_of,
    read_head,
    whole_head,
    without_cache,
)
from token_superposition.engines.transformers.mtp import MTPHeads
from token_superposition.errors import TokenSuperpositionError, require_number
from token_superposition.loss import linear_multi_hot_cross_entropy, multi_hot_cross_entropy
from token_superposition.loss.targets import BagLoss, target_weights
from token_superposition.schedule import Schedule
from token_superposition.weights import Weighting, weights_for

logger = logging.getLogger(__name__)
PLAN = "plan.json"
"""Of a checkpoint: the fingerprint of the plan."""


class TSTTrainer(Trainer):
    """``Trainer`` whose batches may be bags; everything else is the ``Trainer`` that users know.

    A batch with ``shift_labels`` is ours (``PlannedDataset``, ``ValidationSet``): input_ids (B, L) or (B, L, a),
    shift_labels (B, L) or (B, L, b), and the loss is the mean multi-hot cross-entropy over the latent positions that
    have a target. A batch with ``labels`` alone goes the stock way. A ``PlannedDataset`` or ``StreamedPlan`` is read in
    its own order and decides the number of steps, unless ``max_steps`` is smaller; it must agree with the arguments
    about the batch size, and with a checkpoint about the samples. Validate on a ``ValidationSet``; where its loss stops
    the run early, give ``eval_delay``: before the switch it is that of a model that trains on something else.

    ``compute_metrics`` gets whole logits, and as labels ``shift_labels``: that of a position is its own target.

    ``weighting`` weighs the places in a target bag, ``input_weighting`` those of a bag that is read and
    ``place_signal`` marks them (``superpose``); ``bag_loss`` "sum-to-one" takes the bag as one label; ``mtp``, heads
    that were added to the model, are trained with it and their loss joins the training loss. ``lr_factor`` maps a
    0-based step to a learning-rate factor (``WSD``) and goes before the arguments' own scheduler; the token embeddings
    take ``embedding_lr_factor`` times the learning rate, with which TST gains more (docs/choose.md). ``figures`` maps
    the step, and the latent and raw tokens so far, to further figures of every logged line. Checkpoints, resume and the
    saved model are the stock ones; a checkpoint also has ``plan.json``. The auxiliary loss of a mixture of experts is
    divided by the accumulated batches and counts in training only; ``Trainer`` adds it whole to each batch, and in
    validation.

    Raises ``TokenSuperpositionError`` where plan and arguments or checkpoint disagree, for a plan with a model that
    sees later tokens or in place of held-out text, for ``mtp`` where the head is not known, for an ``lr_factor`` beside
    a scheduler or of fewer steps than the run, and where ``Trainer`` lacks a method that is overridden here: that
    nothing calls ours would go unseen.
    """

    OVERRIDDEN: ClassVar[tuple[str, ...]] = (
        "_get_num_items_in_batch",
        "_get_train_sampler",
        "_load_from_checkpoint",
        "_set_signature_columns_if_needed",
    )
    """Private methods of ``Trainer``, which another version may have renamed."""

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        *,
        weighting: Weighting = "uniform",
        input_weighting: Weighting = "uniform",
        bag_loss: BagLoss = "multi-hot",
        place_signal: float = 0.0,
        mtp: MTPHeads | None = None,
        lr_factor: Callable[[int], float] | None = None,
        embedding_lr_factor: float = 1.0,
        figures: Callable[[int, int, int], Mapping[str, float]] | None = None,
        **kwargs: Any,
    ):
        if missing := [name for name in self.OVERRIDDEN if not hasattr(Trainer, name)]:
            raise TokenSuperpositionError(
                f"transformers {version('transformers')} has no Trainer.{missing[0]}, in whose place we train "
                "bags; install the version of constraints.txt"
            )
        if kwargs.get("model_init") is not None:
            raise TokenSuperpositionError(
                "model_init makes a model of its own for every training, which is not taught to read bags; give the "
                "model, and a TSTTrainer for each trial"
            )
        args = copy(args)  # what is set here is not for the next trainer that gets them
        with torch.compiler.set_stance("force_eager"):  # nothing is compiled for 4 ids
            head = read_head(model)
        if mtp is not None:
            if isinstance(head, str):
                raise TokenSuperpositionError(
                    f"superposition.mtp_heads is {mtp.heads}, but {type(model).__name__} shows no hidden states for "
                    f"them ({head}); set it to 0"
                )
            if args.ddp_find_unused_parameters is None:  # DDP would take them for unused: they come after the forward
                args.ddp_find_unused_parameters = False
        if isinstance(head, str):
            logger.warning("%s computes whole logits in training: %s", type(model).__name__, head)
        check_objective(weighting, bag_loss)
        dataset = kwargs.get("train_dataset")
        if isinstance(dataset, Subset) and isinstance(cast(Any, dataset).dataset, Plan):
            raise TokenSuperpositionError(
                "train_dataset is a Subset of a plan, which has samples for each step; give the plan, and for fewer "
                "steps max_steps"
            )
        if isinstance(dataset, Plan) and kwargs.get("data_collator") is None:
            kwargs["data_collator"] = default_data_collator  # nothing to pad
        super().__init__(model, args, **kwargs)
        if args.ddp_static_graph and isinstance(head, Head):
            raise TokenSuperpositionError(
                "ddp_static_graph is True, with which DDP averages only gradients of a loss that is made from the "
                "model's outputs, and ours is made from the hidden states in front of the head; set it to False"
            )
        if args.label_smoothing_factor or self.compute_loss_func is not None:
            raise TokenSuperpositionError(
                "label_smoothing_factor and compute_loss_func cannot be combined with TSTTrainer; use weighting"
            )
        if lr_factor is not None and self.lr_scheduler is not None:
            raise TokenSuperpositionError("lr_factor is given beside a scheduler in optimizers; give one of them")
        require_number("embedding_lr_factor", embedding_lr_factor, 0, strictly=True, hint=", such as 4")
        if embedding_lr_factor != 1 and self.optimizer is not None:
            raise TokenSuperpositionError(
                f"embedding_lr_factor is {embedding_lr_factor:g} beside an optimizer in optimizers; give it the groups"
            )
        for held_out in self.eval_dataset.values() if isinstance(self.eval_dataset, dict) else [self.eval_dataset]:
            check_held_out(held_out)
        self.weighting: Weighting = weighting
        self.bag_loss: BagLoss = bag_loss
        self.lr_factor = lr_factor
        self.embedding_lr_factor = embedding_lr_factor
        self.figures = figures
        self.mtp = mtp
        self.head = None if isinstance(head, str) else head
        self.whole_logits = head if isinstance(head, str) else ""
        """Why whole logits are made; empty if they are not."""
        self._told_ordinary = False
        self._without_cache = without_cache(model)
        self._hidden = HiddenStates.of(cast(Any, model).get_decoder()) if self.head else None
        if isinstance(self.train_dataset, Plan):
            check_plan(self, self.train_dataset, lr_factor)
            with torch.compiler.set_stance("force_eager"):
                if isinstance(self.train_dataset, PlannedDataset):
                    check_fit(model, self.train_dataset)
                self._check_model(model, self.train_dataset.schedule)
        # The last, so that a model is what it was where anything above is refused.
        superpose(model, place_signal=place_signal, input_weighting=input_weighting)

    def _check_model(self, model: nn.Module, schedule: Schedule) -> None:
        check_causal(model)
        self._check_bags(model, schedule)

    def _check_bags(self, model: nn.Module, schedule: Schedule) -> None:
        bags = any(phase.input_bag > 1 for phase in schedule.phases)
        if bags and (why := ids_used_elsewhere(model)) is not None:
            raise TokenSuperpositionError(
                f'{type(model).__name__} cannot read bags: {why}; superpose the output only (sides = "output")'
            )

    def train(self, *args: Any, **kwargs: Any) -> Any:
        if isinstance(self.train_dataset, Plan):  # callbacks may have been added since
            warn_early_stop(self, self.train_dataset)
        return super().train(*args, **kwargs)

    def create_accelerator_and_postprocess(self) -> None:
        """Under FSDP, gradients are averaged over the processes in float32; accelerate would do it in bfloat16."""
        super().create_accelerator_and_postprocess()
        plugin: Any = getattr(self.accelerator.state, "fsdp_plugin", None)
        if plugin is not None and plugin.mixed_precision_policy is not None:
            plugin.mixed_precision_policy = replace(plugin.mixed_precision_policy, reduce_dtype=torch.float32)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        if "shift_labels" not in inputs:
            if model.training and not self._told_ordinary:
                self._told_ordinary = True
                logger.warning(
                    "the batches have labels and no shift_labels, so they are trained on without bags; for TST give a "
                    "PlannedDataset or a StreamedPlan as train_dataset"
                )
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        targets: Tensor = inputs["shift_labels"]
        inputs = {k: v for k, v in inputs.items() if k not in ("shift_labels", "labels")} | self._without_cache
        weights = weights_for(targets, self.weighting) if targets.dim() == 3 else None
        reduction = "mean" if num_items_in_batch is None else "sum"
        whole = return_outputs and not model.training  # whoever evaluates asks for all logits
        if self._hidden is not None and self.head is not None and not whole:
            with self._hidden as states:
                outputs = model(**inputs, logits_to_keep=1)
                hidden = states.take()
            head = whole_head(self._bare_model)
            if self.get_tp_size() > 1 and isinstance(head.weight, DTensor) and not isinstance(hidden, DTensor):
                hidden = DTensor.from_local(hidden, head.weight.device_mesh, run_check=False)  # the same everywhere
            with self.accelerator.autocast():
                score = partial(
                    linear_multi_hot_cross_entropy,
                    weight=head.weight,
                    place_weights=weights,
                    bias=head.bias,
                    softcap=self.head.softcap,
                    logit_scale=self.head.logit_scale,
                    loss=self.bag_loss,
                )
                z_loss = self.head.z_loss if model.training else 0.0
                loss = score(hidden, targets=targets, reduction=reduction, z_loss=z_loss)
                if self.mtp is not None and model.training:  # over as many rows, so that accumulation changes nothing
                    further = score(self.mtp(hidden), targets=self.mtp.targets(targets), reduction="sum")
                    rows = 1 if reduction == "sum" else (any_target(targets, self.weighting) != -100).sum().clamp(min=1)
                    loss = loss + further * (self.mtp.weight / self.mtp.heads) / rows
        else:
            outputs = model(**inputs)
            loss = multi_hot_cross_entropy(
                logits_of(outputs), targets, weights, loss=self.bag_loss, reduction=reduction
            )
        accumulated = 1
        if num_items_in_batch is not None:  # rows of the whole step: see _get_num_items_in_batch
            loss = loss / (num_items_in_batch + (num_items_in_batch == 0))
            accumulated = self.current_gradient_accumulation_steps
            if self.args.average_tokens_across_devices:
                loss = loss * (self.accelerator.num_processes // self.get_tp_size())
        if model.training and getattr(outputs, "aux_loss", None) is not None:  # mixture of experts
            weight = auxiliary_weight(self._bare_model)
            loss = loss + weight * outputs.aux_loss.to(loss.device) / accumulated
        return (loss, outputs) if return_outputs else loss

    @property
    def _bare_model(self) -> nn.Module:
        """Without DDP and the compiler; with FSDP2. accelerate's ``unwrap_model`` takes DDP out of a compiled model for
        good, which then averages the gradients of every micro-batch."""
        return getattr(self.model, "_orig_mod", cast(nn.Module, self.model))

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Any, Any]:
        if "shift_labels" not in inputs:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        if inputs["shift_labels"].dim() == 3 or inputs["input_ids"].dim() == 3:
            refuse_bags("in batches")
        inputs = self._without_repeated(self._prepare_inputs(inputs))
        with torch.no_grad(), self.compute_loss_context_manager():
            if prediction_loss_only:
                return self.compute_loss(model, inputs).detach(), None, None
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
        return loss.detach(), logits_of(outputs).detach(), inputs["shift_labels"]

    def _without_repeated(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The last batches without targets in the samples that accelerate has repeated to fill them on all processes.

        ``Trainer`` counts a batch's mean for each of its samples, and leaves as many out as were repeated.
        """
        state = self.accelerator.gradient_state
        if self.args.world_size == 1 or not state.end_of_dataloader or state.remainder <= 0:
            return inputs
        targets: Tensor = inputs["shift_labels"]
        replica, rows = self.args.process_index // self.get_tp_size(), len(targets)
        kept = torch.arange(replica * rows, (replica + 1) * rows, device=targets.device) < state.remainder
        return inputs | {"shift_labels": targets.where(kept.view(-1, *[1] * (targets.dim() - 1)), -100)}

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        made = self.optimizer is not None
        optimizer = super().create_optimizer(model)
        if not made:
            scale_embedding_lr(optimizer, self.model, self.embedding_lr_factor)
        return optimizer

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        if self.lr_scheduler is None and self.lr_factor is not None:
            factor = self.lr_factor  # in a plain function: LambdaLR would save an object's fields and restore them
            used: Any = optimizer or self.optimizer
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(used, lambda step: factor(step))
            self._created_lr_scheduler = True  # another training begins another
        return super().create_scheduler(num_training_steps, optimizer)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds phase (counted from 0, of the schedule), bag sizes, latent and raw tokens so far and ``figures``; with
        ragged bags, how full this step's were. So the Trainer's own reports (TensorBoard, W&B, ...) have them, too."""
        plan, step = self.train_dataset, self.state.global_step
        if isinstance(plan, Plan):
            phase_index = plan.schedule.phase_index(max(step - 1, 0))
            counts = plan.schedule.counts(plan.batch_size, plan.sequence_length, step)
            superposed = plan.schedule.phases[phase_index].is_superposed
            logs |= {"phase": phase_index, "superposed": int(superposed), **counts}
            if self.figures is not None:
                logs |= self.figures(step, counts["latent_tokens"], counts["raw_tokens"])
            if isinstance(plan, PlannedDataset) and plan.boundaries is not None and "loss" in logs:
                logs["tokens_per_bag"] = plan.tokens_per_bag(max(step - 1, 0))
        super().log(logs, start_time)

    def floating_point_ops(self, inputs: Mapping[str, Any]) -> int:
        """Compute follows latent positions: a bag counts once."""
        ids = inputs["input_ids"]
        return super().floating_point_ops({**inputs, "input_ids": ids[..., 0] if ids.dim() == 3 else ids})

    def _get_train_sampler(self, train_dataset: Any = None) -> torch.utils.data.Sampler[int] | None:
        dataset: Any = self.train_dataset if train_dataset is None else train_dataset
        return (
            SequentialSampler(dataset) if isinstance(dataset, PlannedDataset) else super()._get_train_sampler(dataset)
        )

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        check_held_out(eval_dataset)
        return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader[Any]:
        check_held_out(test_dataset)
        return super().get_test_dataloader(test_dataset)

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Tensor | int | None:
        """Items are latent positions with a target. ``Trainer`` counts tokens, which is s times as many in a bag."""

        def rows(batch: Any) -> Any:
            if "shift_labels" not in batch:
                return batch
            valid = any_target(batch["shift_labels"], self.weighting)
            return {"labels": valid, "shift_labels": valid}

        return super()._get_num_items_in_batch([rows(b) for b in batch_samples], device)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """A checkpoint, which is written by an internal call, has the heads for further tokens beside the model, and
        what tells the plan from others."""
        super().save_model(output_dir, _internal_call)
        if not (_internal_call and output_dir is not None and self.args.should_save):
            return
        if self.mtp is not None:
            self.mtp.save(Path(output_dir))
        if isinstance(self.train_dataset, Plan):
            Path(output_dir).mkdir(parents=True, exist_ok=True)  # of shards nothing was written yet
            (Path(output_dir) / PLAN).write_text(json.dumps(self.train_dataset.fingerprint()), encoding="utf-8")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        path = Path(resume_from_checkpoint) / PLAN
        if isinstance(self.train_dataset, Plan) and path.exists():
            saved = json.loads(path.read_text(encoding="utf-8"))
            self.train_dataset.check_fingerprint(saved, "start without this checkpoint")
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self.mtp is not None:
            self.mtp.load(Path(resume_from_checkpoint))

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        assert self._signature_columns is not None
        if "shift_labels" not in self._signature_columns:
            self._signature_columns.append("shift_labels")


def any_target(targets: Tensor, weighting: Weighting) -> Tensor:  # (B, L, s) or (B, L) -> (B, L)
    """-100 where there is no target that the loss counts: none at all, or only some of weight 0."""
    if targets.dim() < 3:
        return targets
    if (weights := weights_for(targets, weighting)) is None:
        return targets.amax(-1)
    counts = target_weights(targets.flatten(0, -2), weights, -100, torch.float32)[1]
    return torch.where(counts, 0, -100).view(targets.shape[:-1])
