"""The loss over somebody else's fused loss of a single target.

With y0 a valid target of the row, and the weights summing to 1,

    loss(x, y) = CE(x W^T, y0) + x . (W[y0] - sum_i w_i W[y_i])

since the logsumexp cancels: the library does the work over V, and s + 1 rows of the head make the rest. With a soft cap
the s + 1 logits are capped before they are summed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from token_superposition.errors import TokenSuperpositionError
from token_superposition.loss.chunked import CHUNK_ROWS, CHUNK_ROWS_ACCELERATOR

IGNORED = -100


def native(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, softcap: float, z_loss: float
) -> Tensor:
    """Sum of the single-target losses by ``torch.nn.functional.linear_cross_entropy`` (torch 2.13 and later)."""
    if not hasattr(F, "linear_cross_entropy"):
        raise TokenSuperpositionError(
            f"impl='native' needs torch 2.13 or later, this is {torch.__version__}; choose impl='chunked'"
        )
    if softcap or z_loss:
        raise TokenSuperpositionError("impl='native' has neither softcap nor z_loss; choose impl='chunked'")
    chunk = CHUNK_ROWS if hidden.device.type == "cpu" else CHUNK_ROWS_ACCELERATOR  # its own choice is slow on a CPU
    options = torch.nn.LinearCrossEntropyOptions(
        allow_retain_graph=True, chunking_method=None, batch_chunk_size=min(chunk, max(hidden.shape[0], 1))
    )
    losses = F.linear_cross_entropy(  # whose own sum has the type of the logits: in float16 it is soon infinite
        hidden, weight, targets, linear_bias=bias, reduction="none", ignore_index=IGNORED, options=options
    )
    return losses.sum(dtype=torch.promote_types(losses.dtype, torch.float32))


def liger(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, softcap: float, z_loss: float
) -> Tensor:
    """Sum of the single-target losses by Liger-Kernel."""
    try:
        from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction as Fused
    except ImportError:
        raise TokenSuperpositionError(
            "impl='liger' needs the package liger-kernel; install it or choose impl='chunked'"
        ) from None
    # input, weight, target, bias, class weights, ignore_index, z-loss, label smoothing, reduction, softcap
    result = Fused.apply(hidden, weight, targets, bias, None, IGNORED, z_loss, 0.0, "sum", softcap or None)
    return result[0] if isinstance(result, tuple) else result


def by_identity(
    single_target: Any,
    hidden: Tensor,  # (N, d)
    weight: Tensor,  # (V, d)
    bias: Tensor | None,  # (V,)
    targets: Tensor,  # (N, s)
    target_weights: Tensor,  # (N, s)
    valid: Tensor,  # (N,)
    dtype: torch.dtype,
    softcap: float,
    logit_scale: float,
    z_loss: float,
) -> Tensor:  # () the sum over rows
    x = torch.where(valid.unsqueeze(1), hidden, 0).to(dtype) * logit_scale
    head, b = weight.to(dtype), None if bias is None else bias.to(dtype)
    used = target_weights > 0
    y = torch.where(used, targets, 0).long()  # torch's loss takes nothing else
    first = y.gather(1, used.int().argmax(1, keepdim=True))
    rows = torch.cat((first, y), 1)
    coefficients = torch.cat((valid.to(target_weights).unsqueeze(1), -target_weights), 1)
    # First, since it refuses a target beyond the vocabulary: the library may read there.
    rest = weighted_logits(x, head, b, rows, coefficients, softcap)[0]
    with torch.autocast(x.device.type, enabled=False):
        loss = single_target(x, head, b, torch.where(valid, first.squeeze(1), IGNORED), softcap, z_loss)
    return loss.to(target_weights.dtype) + rest


@torch.library.custom_op("token_superposition::weighted_logits", mutates_args=())
def weighted_logits(
    x: Tensor,  # (N, d)
    weight: Tensor,  # (V, d)
    bias: Tensor | None,  # (V,)
    rows: Tensor,  # (N, k) int64 in [0, V)
    coefficients: Tensor,  # (N, k)
    softcap: float,
) -> tuple[Tensor, Tensor]:
    """``sum_nk c_nk cap(x_n . weight[rows_nk] + bias[rows_nk])`` and its derivative by each of these logits, (N, k)."""
    acc = coefficients.dtype
    logits = torch.empty_like(coefficients)
    for k in range(rows.shape[1]):  # never (N, k, d)
        logits[:, k] = (x.to(acc) * weight.index_select(0, rows[:, k])).sum(1)  # refuses an id below 0, too
    if bias is not None:
        logits += bias[rows]
    if not softcap:
        return torch.where(coefficients != 0, coefficients * logits, 0).sum(), coefficients.clone()
    t = (logits / softcap).tanh()
    return (coefficients * softcap * t).sum(), coefficients * (1 - t * t)


@weighted_logits.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor, coefficients: Tensor, softcap: float
) -> tuple[Tensor, Tensor]:
    return coefficients.new_empty(()), torch.empty_like(coefficients)


@torch.library.custom_op("token_superposition::weighted_logits_backward", mutates_args=())
def weighted_logits_backward(
    grad: Tensor,  # ()
    x: Tensor,  # (N, d)
    weight: Tensor,  # (V, d)
    rows: Tensor,  # (N, k)
    slopes: Tensor,  # (N, k)
    needed: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    slopes = slopes * grad
    grad_x, grad_weight, grad_bias = x.new_empty(0), weight.new_empty(0), weight.new_empty(0)
    if needed[0]:
        grad_x = F.embedding_bag(rows, weight.to(slopes.dtype), mode="sum", per_sample_weights=slopes).to(x.dtype)
    if needed[1]:
        total = torch.zeros_like(weight, dtype=slopes.dtype)
        for k in range(rows.shape[1]):
            total.index_add_(0, rows[:, k], x * slopes[:, k : k + 1])
        grad_weight = total.to(weight.dtype)
    if needed[2]:
        grad_bias = slopes.new_zeros(weight.shape[0]).index_add_(0, rows.reshape(-1), slopes.reshape(-1))
    return grad_x, grad_weight, grad_bias.to(weight.dtype)


@weighted_logits_backward.register_fake
def _(
    grad: Tensor, x: Tensor, weight: Tensor, rows: Tensor, slopes: Tensor, needed: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.empty_like(x) if needed[0] else x.new_empty(0),
        torch.empty_like(weight) if needed[1] else weight.new_empty(0),
        weight.new_empty(weight.shape[0] if needed[2] else 0),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    x, weight, _, rows, _, _ = inputs
    ctx.save_for_backward(x, weight, rows, output[1])


def _backward(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 6
    x, weight, rows, slopes = ctx.saved_tensors
    needed = ctx.needs_input_grad[:3]
    grads = weighted_logits_backward(grad, x, weight, rows, slopes, needed)
    return (*[g if need else None for g, need in zip(grads, needed, strict=True)], None, None, None)


weighted_logits.register_autograd(_backward, setup_context=_setup_context)
