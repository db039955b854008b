"""What a ``TSTTrainer`` refuses: a plan that its arguments do not fit, and one with bags as held-out text."""

from __future__ import annotations

import logging
from typing import Any

from transformers import EarlyStoppingCallback, SchedulerType, Trainer

from token_superposition.data.plan import PlannedDataset
from token_superposition.data.stream import StreamedPlan
from token_superposition.errors import TokenSuperpositionError
from token_superposition.loss.targets import BagLoss, check_loss
from token_superposition.schedule import WSD
from token_superposition.weights import Weighting, place_weights

logger = logging.getLogger(__name__)
Plan = PlannedDataset | StreamedPlan


def check_plan(trainer: Trainer, plan: Plan, lr_factor: object) -> None:
    """Raise ``TokenSuperpositionError`` where the arguments would read the plan otherwise; sets ``max_steps``."""
    args = trainer.args
    if args.n_gpu > 1:
        raise TokenSuperpositionError(
            f"this process sees {args.n_gpu} GPUs and would use all by DataParallel, which cannot read bags; start "
            "one process for each (torchrun or accelerate launch), or show it one (CUDA_VISIBLE_DEVICES=0)"
        )
    if (parts := trainer.get_cp_size() * trainer.get_sp_size()) > 1:
        raise TokenSuperpositionError(
            f"a sequence is spread over {parts} processes (context or sequence parallelism), which TSTTrainer does "
            "not train; set cp_size and sp_size to 1, or train with OLMo-core"
        )
    whole: Any = getattr(args.accelerator_config, "split_batches", False)  # then a batch is that of all processes
    replicas = 1 if whole else args.world_size // trainer.get_tp_size()
    batch = args.per_device_train_batch_size * replicas * args.gradient_accumulation_steps
    if batch != plan.batch_size:
        raise TokenSuperpositionError(
            f"the plan has {plan.batch_size} sequences a step, the arguments give {batch} (per device "
            f"{args.per_device_train_batch_size} x {replicas} processes x {args.gradient_accumulation_steps} "
            "accumulated); make them equal, or the switch comes at the wrong step"
        )
    for name, right in (("ignore_data_skip", False), ("auto_find_batch_size", False), ("dataloader_in_order", True)):
        if getattr(args, name) is not right:
            raise TokenSuperpositionError(
                f"{name} is {not right}, but the step decides which samples of the plan are read; set it to {right}"
            )
    total = plan.schedule.total_steps
    if args.max_steps > total:
        raise TokenSuperpositionError(f"max_steps is {args.max_steps}, the plan has {total}; plan more steps")
    if args.max_steps <= 0:
        args.max_steps = total
    if isinstance(lr_factor, WSD) and lr_factor.total_steps < args.max_steps:
        raise TokenSuperpositionError(
            f"lr_factor is for {lr_factor.total_steps} steps, the run has {args.max_steps}, whose last ones "
            "would be at a rate of 0; make them equal"
        )
    switch = max(plan.schedule.switches, default=0)
    if switch and args.max_steps <= switch:
        logger.warning(
            "max_steps is %d: the run ends before the switch to ordinary training at %d", args.max_steps, switch
        )
    if isinstance(lr_factor, WSD) and lr_factor.decay_steps and lr_factor.total_steps > args.max_steps:
        logger.warning(
            "lr_factor is for %d steps, the run ends after %d: without all of its decay; make them equal",
            lr_factor.total_steps,
            args.max_steps,
        )


def check_objective(weighting: Weighting, bag_loss: BagLoss) -> None:
    """Raise ``TokenSuperpositionError`` for what is misspelt, and for weights that the loss has no place for."""
    place_weights(weighting, 1)
    check_loss(bag_loss)
    if bag_loss != "multi-hot" and weighting != "uniform":
        raise TokenSuperpositionError(
            f"bag_loss {bag_loss!r} takes a bag as one label, without weights of its places; leave weighting "
            f"{weighting!r} out, or take the multi-hot loss"
        )


def warn_early_stop(trainer: Trainer, plan: Plan) -> None:
    args, switch = trainer.args, max(plan.schedule.switches, default=0)
    if not switch or args.eval_delay > switch:
        return
    if any(isinstance(c, EarlyStoppingCallback) for c in trainer.callback_handler.callbacks):
        what = "early stopping"
    elif args.lr_scheduler_type == SchedulerType.REDUCE_ON_PLATEAU:
        what = "reduce_lr_on_plateau"
    else:
        return
    logger.warning(
        "%s looks at validations before the switch at step %d, where the model trains on bags and may seem to get "
        "worse; give eval_delay=%d",
        what,
        switch,
        switch + 1,
    )


def check_held_out(dataset: object) -> None:
    """Raise ``TokenSuperpositionError`` for a plan that has bags, which would be validated on them."""
    if isinstance(dataset, Plan) and any(p.is_superposed for p in dataset.schedule.phases):
        refuse_bags(f"a {type(dataset).__name__}")


def refuse_bags(kind: str) -> None:
    raise TokenSuperpositionError(
        f"the validation text is {kind} with bags; give ValidationSet(tokens, length): a model is validated on single "
        "tokens"
    )
