"""A learning rate of their own for the token embeddings."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer

from token_superposition.errors import TokenSuperpositionError


def scale_embedding_lr(optimizer: Optimizer, model: Any, factor: float) -> None:
    """Put the token embeddings into a group of their own, the last one, of ``factor`` times their learning rate.

    ``model`` is of transformers. An embedding that is the head as well takes its head along. With factor 1 nothing is
    changed. Call it once, after the optimizer is made and before a scheduler is.

    Raises ``TokenSuperpositionError`` where the optimizer has no token embeddings, as of a frozen one.
    """
    if factor == 1:
        return
    weight = model.get_input_embeddings().weight
    for group in optimizer.param_groups:
        others = [p for p in group["params"] if p is not weight]
        if len(others) < len(group["params"]):
            group["params"] = others
            optimizer.add_param_group({**group, "params": [weight], "lr": group["lr"] * factor})
            return
    raise TokenSuperpositionError(
        f"embedding_lr_factor is {factor:g}, but the optimizer does not train the token embeddings; set it to 1"
    )
