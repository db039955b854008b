"""The loss of bags as the inner loss of torchtitan's ``ChunkedLossWrapper``.

The wrapper calls it on the logits of a part of the positions and goes backward at once, so that the (B, L, V) logits
never exist whole. The loss and its gradient by the logits are made in one pass, in the memory of one float32 copy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import torch
import torch.distributed as dist
import tyro
from torch import Tensor
from torch.distributed.tensor import DTensor
from torchtitan.components.loss import BaseLoss
from torchtitan.config import CompileConfig
from torchtitan.distributed.spmd_types import current_spmd_mesh, spmd_mesh_size

from token_superposition.errors import TokenSuperpositionError
from token_superposition.loss.chunked import loss_and_gradient, own_targets
from token_superposition.loss.targets import as_rows, target_weights
from token_superposition.weights import Weighting, weights_for

IGNORED = -100


class BagLoss(BaseLoss):
    """Multi-hot cross-entropy, summed over the rows of a chunk and divided by the rows of the whole step.

    Logits (B, l, V), or this process's columns of them under tensor parallelism: three all-reduces of one number a
    row (maximum, sum of exponentials, gathered logits) for any bag size, none in the backward pass. Labels (B, l) or
    (B, l, s); ``global_valid_tokens`` counts rows that have a target, on all processes and micro-batches.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(BaseLoss.Config):
        weighting: Annotated[Weighting, tyro.conf.Suppress] = "uniform"
        """Weights of the places in a target bag. Set by the trainer: ``superposition.weighting``."""
        vocab_size: Annotated[int, tyro.conf.Suppress] = 0
        """Set by the trainer from the data."""

    def __init__(self, config: Config, *, compile_config: CompileConfig | None = None):
        self.config = config
        self.fn = bag_loss  # not compiled: it is one pass over the logits, most of it one gather and one exponential

    def __call__(
        self, pred: Tensor, labels: Tensor, global_valid_tokens: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        group = None
        if isinstance(pred, DTensor):  # spmd_backend partial_dtensor
            group, pred = pred.device_mesh.get_group("tp"), pred.to_local()
        elif spmd_mesh_size("tp") > 1:
            mesh = current_spmd_mesh()
            assert mesh is not None
            group = mesh.get_group("tp")
        weights = weights_for(labels, self.config.weighting) if labels.dim() == 3 else None
        loss = self.fn(pred, labels, weights, self.config.vocab_size, group)
        return loss if global_valid_tokens is None else loss / global_valid_tokens, {}


def bag_loss(
    logits: Tensor,  # (..., V), or this process's columns of it
    targets: Tensor,  # (..., s) int64, or (...) for s = 1
    weights: Tensor | None = None,  # (s,)
    vocab_size: int = 0,
    group: dist.ProcessGroup | None = None,
) -> Tensor:  # () sum over the rows, the same on every process of the group
    """Raises ``TokenSuperpositionError`` if the shapes do not fit."""
    start = 0
    if group is not None:
        share = -(-vocab_size // dist.get_world_size(group))  # as DTensor shards
        start = min(share * dist.get_rank(group), vocab_size)
    rows, bags = as_rows(logits, targets)
    return _SummedLoss.apply(rows, bags, weights, start, "" if group is None else group.group_name)


class _SummedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,  # (N, V)
        targets: Tensor,  # (N, s)
        weights: Tensor | None,
        start: int,
        group: str,
    ) -> Tensor:
        z = logits.to(torch.promote_types(logits.dtype, torch.float32), copy=True)
        w, valid = target_weights(targets, weights, IGNORED, z.dtype)
        losses, gradient = loss_and_gradient(z, *own_targets(targets, w, start, z.shape[1], group), 0.0, 0.0, group)
        ctx.save_for_backward(torch.where(valid.unsqueeze(1), gradient, 0).to(logits.dtype))
        return torch.where(valid, losses, 0).sum()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise TokenSuperpositionError("the loss of bags has no second derivative; leave create_graph=True out")
        (gradient,) = ctx.saved_tensors
        return gradient * grads[0].to(gradient.dtype), None, None, None, None
