"""FLOPs of a training step, counted by torch as the matrix products run."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


@torch.no_grad()
def flops_per_sequence(model: nn.Module, sequence_length: int) -> float:
    """FLOPs of training on one sequence: 3 x its forward pass, matrix products counted as they run."""
    device = next(model.parameters()).device
    training = model.training
    experts: dict[Any, Any] = {torch.ops.aten._grouped_mm: _grouped_mm_flops}  # torch's counter leaves it out
    counter = FlopCounterMode(display=False, custom_mapping=experts)
    with counter, sdpa_kernel(SDPBackend.MATH):  # fused attention is not counted
        model.eval()(input_ids=torch.zeros(1, sequence_length, dtype=torch.long, device=device), use_cache=False)
    model.train(training)
    return 3.0 * counter.get_total_flops()


def _grouped_mm_flops(rows: list[int], matrices: list[int], *_: Any, **__: Any) -> int:
    """Every row is multiplied by one of the matrices: (n, k) by (E, k, m)."""
    return 2 * rows[0] * rows[1] * matrices[-1]
