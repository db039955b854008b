"""What may be thrown away at the switch: the optimizer's state, or embedding and head. Both are expected to hurt."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

SEED_OFFSET = 1_000_003  # the model began with what its seed draws


class AtSwitch(TrainerCallback):
    """Before step ``step`` (0-based): forgets the optimizer's state, or initialises embedding and head again, or both.

    The new weights are a function of the arguments' seed, normal with the model's ``initializer_range``; their state in
    the optimizer goes with the old ones. It happens at the beginning of the step, never at the end of the one before,
    so a run that is resumed from a checkpoint of the switch does it as well. Not for parameters that are sharded.
    """

    def __init__(self, step: int, *, optimizer: bool = False, embeddings: bool = False):
        self.step, self.optimizer, self.embeddings = step, optimizer, embeddings

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        if state.global_step != self.step:
            return
        if self.optimizer:
            optimizer.state.clear()
        if self.embeddings:
            for weight in initialise_embeddings(model, args.seed + SEED_OFFSET):
                optimizer.state.pop(weight, None)


@torch.no_grad()
def initialise_embeddings(model: Any, seed: int) -> list[Tensor]:
    """Draw the input embedding and the output head (one if they are tied) again; returns the parameters."""
    generator = torch.Generator().manual_seed(seed)
    std: float = model.config.get_text_config().initializer_range
    changed: list[Tensor] = []
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        if any(module.weight is p for p in changed):
            continue
        fresh = torch.empty(module.weight.shape, device="cpu").normal_(0, std, generator=generator)
        if getattr(module, "padding_idx", None) is not None:
            fresh[module.padding_idx] = 0
        module.weight.copy_(fresh)
        changed.append(module.weight)
        if getattr(module, "bias", None) is not None:
            changed.append(module.bias.zero_())
    return changed
