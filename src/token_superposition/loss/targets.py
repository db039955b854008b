"""What every form of the loss does with its targets: shapes, weights, reduction."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from token_superposition.errors import TokenSuperpositionError

Reduction = Literal["mean", "sum"]
BagLoss = Literal["multi-hot", "sum-to-one"]
"""How a row is scored against its bag: the mean of the targets' cross-entropies, or the bag as one composite label."""


def as_rows(x: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:  # (N, d), (N, s)
    """Flatten (..., d) and (..., s) or (...) to rows. Raises ``TokenSuperpositionError`` if they do not fit."""
    for name, value in (("targets", targets), ("rows", x)):
        if not isinstance(value, Tensor):  # pyright: ignore  # an array, a list
            raise TokenSuperpositionError(f"{name} are of type {type(value).__name__}; give a tensor")
    if targets.dtype not in (torch.int64, torch.int32):
        raise TokenSuperpositionError(f"targets are {targets.dtype}; give int64 or int32, as fold does")
    if not x.dim() or not x.shape[-1]:
        raise TokenSuperpositionError(f"rows have shape {tuple(x.shape)}; give at least one value in each: (..., d)")
    given = tuple(targets.shape)
    if targets.dim() == x.dim() - 1:
        targets = targets.unsqueeze(-1)
    if targets.dim() != x.dim() or targets.shape[:-1] != x.shape[:-1] or not targets.shape[-1]:
        raise TokenSuperpositionError(
            f"targets of shape {given} do not fit rows of shape {tuple(x.shape)}; "
            f"give {tuple(x.shape[:-1])} for ordinary targets or {(*x.shape[:-1], 's')} for bags"
        )
    return x.reshape(-1, x.shape[-1]), targets.reshape(-1, targets.shape[-1])


def target_weights(
    targets: Tensor,  # (N, s)
    place_weights: Tensor | None,  # (s,)
    ignore_index: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # (N, s) summing to 1 in each row with a valid target, else to 0; (N,) bool
    """Weight of every target: its place's weight, renormalised over the valid targets of its row."""
    if place_weights is None:
        place_weights = targets.new_ones(targets.shape[1], dtype=dtype)
    else:
        _check_weights(place_weights, targets.shape[1])
    w = place_weights.to(targets.device, dtype).clamp(min=0) * (targets != ignore_index)
    total = w.sum(1, keepdim=True)
    return w / torch.where(total > 0, total, 1), total.squeeze(1) > 0


def _check_weights(place_weights: Tensor, bag_size: int) -> None:
    """Values are read where they lie on the CPU: else the step would wait for them, or a compiled graph would break."""
    if not isinstance(place_weights, Tensor):  # pyright: ignore  # a name, a list
        raise TokenSuperpositionError(
            f"place_weights is {place_weights!r}; give a tensor ({bag_size},), such as "
            f"place_weights('exponential', {bag_size})"
        )
    if place_weights.shape != (bag_size,):
        raise TokenSuperpositionError(
            f"place_weights has shape {tuple(place_weights.shape)} for bags of {bag_size}; give one weight per place"
        )
    plain = type(place_weights) in (Tensor, torch.nn.Parameter)  # no fake tensor
    mapped = torch._C._functorch.is_batchedtensor(place_weights)  # pyright: ignore  # inside torch.func.vmap
    if torch.compiler.is_compiling() or place_weights.device.type != "cpu" or not plain or mapped:
        return
    for place, weight in enumerate(place_weights.tolist()):
        if not 0 <= weight < math.inf:
            raise TokenSuperpositionError(
                f"place_weights is {weight} at place {place}; give a finite number of at least 0, which leaves it out"
            )


def bag_members(
    targets: Tensor,  # (N, s)
    place_weights: Tensor | None,
    ignore_index: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # (N, s) 1 at the first place of each valid token, else 0; (N,) bool
    """The bag as a set, for the sum-to-one loss: a token that occurs twice is one member."""
    if place_weights is not None:
        raise TokenSuperpositionError(
            "place_weights are given for the sum-to-one loss, where a bag is one label without places; leave them out"
        )
    valid = targets != ignore_index
    repeated = (targets.unsqueeze(2) == targets.unsqueeze(1)).tril(-1).any(2)
    return (valid & ~repeated).to(dtype), valid.any(1)


def check_loss(loss: str) -> None:
    if loss not in get_args(BagLoss):
        raise TokenSuperpositionError(f"loss is {loss!r}; choose one of {', '.join(get_args(BagLoss))}")


def reduce(total: Tensor, valid: Tensor, reduction: Reduction) -> Tensor:  # (), (N,) -> ()
    if reduction == "sum":
        return total
    if reduction == "mean":
        return total / valid.sum().clamp(min=1)
    raise TokenSuperpositionError(f"reduction is {reduction!r}; choose 'mean' or 'sum'")
