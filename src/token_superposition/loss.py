"""Cross-entropy of a row against a bag of targets: one logsumexp, whatever the bag size."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from token_superposition.errors import TokenSuperpositionError

Reduction = Literal["mean", "sum"]

# Elements of one chunk of logits in linear_multi_hot_cross_entropy: 32 MiB in float32.
CHUNK_ELEMENTS = 2**23


def multi_hot_cross_entropy(
    logits: Tensor,  # (..., V)
    targets: Tensor,  # (..., s) int64, or (...) for s = 1; a bag is a multiset
    weights: Tensor | None = None,  # (s,) place-in-bag weights; None is uniform
    *,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
) -> Tensor:  # ()
    """Cross-entropy of each row against a bag of s targets (arXiv 2605.06546, eq. 3).

    ``logsumexp(z) - sum_i w_i z[y_i]``, with ``w`` renormalised over the valid targets of the row; a target that
    occurs twice counts twice. A row without a valid target contributes 0. ``mean`` is over the rows that have one.
    For s = 1 this is ordinary cross-entropy. Computed in float32, or float64 for float64 logits.

    >>> multi_hot_cross_entropy(torch.zeros(1, 4), torch.tensor([[0, 0, 3]]))  # ln 4
    tensor(1.3863)
    """
    logits, targets = _rows(logits, targets)
    z = logits.float() if logits.dtype != torch.float64 else logits
    w, valid = target_weights(targets, weights, ignore_index, z.dtype)
    picked = z.gather(1, targets.clamp(min=0)) * w
    loss = torch.where(valid, z.logsumexp(1) - picked.sum(1), 0).sum()
    return _reduce(loss, valid, reduction)


def linear_multi_hot_cross_entropy(
    hidden: Tensor,  # (..., d)
    head_weight: Tensor,  # (V, d)
    targets: Tensor,  # (..., s) int64, or (...) for s = 1
    weights: Tensor | None = None,  # (s,)
    *,
    bias: Tensor | None = None,  # (V,)
    ignore_index: int = -100,
    reduction: Reduction = "mean",
) -> Tensor:  # ()
    """``multi_hot_cross_entropy(hidden @ head_weight.T + bias, targets, weights)`` without the (N, V) logits.

    Rows are taken in chunks. Each chunk costs the matrix products of an ordinary head (logits, gradient of hidden,
    gradient of the head) for any s. The gradient of the head is summed in float32. Under autocast the products run
    in the autocast dtype. Once differentiable.
    """
    hidden, targets = _rows(hidden, targets)
    if hidden.shape[1] != head_weight.shape[1]:
        raise TokenSuperpositionError(
            f"hidden has width {hidden.shape[1]} but the head has width {head_weight.shape[1]}; they must be equal"
        )
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    w, valid = target_weights(targets, weights, ignore_index, torch.promote_types(dtype, torch.float32))
    # The gradient is formed with the loss, so the backward pass needs no second product with the head.
    differentiate = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (hidden, head_weight, bias)
    )
    loss: Tensor = _ChunkedLoss.apply(hidden, head_weight, bias, targets, w, valid, dtype, differentiate)  # type: ignore[no-untyped-call]
    return _reduce(loss, valid, reduction)


def target_weights(
    targets: Tensor,  # (N, s)
    weights: Tensor | None,  # (s,)
    ignore_index: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # (N, s) summing to 1 in each row with a valid target, else to 0; (N,) bool
    """Weight of every target: the place's weight, renormalised over the valid targets of its row."""
    if weights is None:
        weights = targets.new_ones(targets.shape[1], dtype=dtype)
    elif weights.shape != targets.shape[1:]:
        raise TokenSuperpositionError(
            f"weights has shape {tuple(weights.shape)} for bags of {targets.shape[1]}; give one weight per place"
        )
    w = weights.to(targets.device, dtype) * (targets != ignore_index)
    total = w.sum(1, keepdim=True)
    return w / torch.where(total > 0, total, 1), total.squeeze(1) > 0


def _rows(x: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:  # (N, d), (N, s)
    if targets.dim() == x.dim() - 1:
        targets = targets.unsqueeze(-1)
    if targets.dim() != x.dim() or targets.shape[:-1] != x.shape[:-1] or not targets.shape[-1]:
        raise TokenSuperpositionError(
            f"targets of shape {tuple(targets.shape)} do not fit rows of shape {tuple(x.shape)}; "
            f"give {tuple(x.shape[:-1])} for ordinary targets or {(*x.shape[:-1], 's')} for bags"
        )
    return x.reshape(-1, x.shape[-1]), targets.reshape(-1, targets.shape[-1])


def _reduce(total: Tensor, valid: Tensor, reduction: Reduction) -> Tensor:
    if reduction == "sum":
        return total
    if reduction == "mean":
        return total / valid.sum().clamp(min=1)
    raise TokenSuperpositionError(f"reduction is {reduction!r}; choose 'mean' or 'sum'")


class _ChunkedLoss(torch.autograd.Function):
    """Sum over rows of the multi-hot cross-entropy of ``hidden @ head.T + bias``."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,  # (N, d)
        head: Tensor,  # (V, d)
        bias: Tensor | None,  # (V,)
        targets: Tensor,  # (N, s)
        w: Tensor,  # (N, s)
        valid: Tensor,  # (N,)
        dtype: torch.dtype,
        differentiate: bool,
    ) -> Tensor:
        head_c = head.detach().to(dtype)
        chunk = max(CHUNK_ELEMENTS // head.shape[0], 1)
        total = w.new_zeros(())
        grad_hidden = torch.empty_like(hidden) if differentiate else None
        grad_head = torch.zeros_like(head, dtype=w.dtype) if differentiate else None
        grad_bias = torch.zeros_like(bias, dtype=w.dtype) if differentiate and bias is not None else None
        for i in range(0, hidden.shape[0], chunk):
            h, y, wi, ok = (
                hidden[i : i + chunk].to(dtype),
                targets[i : i + chunk].clamp(min=0),
                w[i : i + chunk],
                valid[i : i + chunk],
            )
            z = (h @ head_c.T).to(w.dtype)
            if bias is not None:
                z = z + bias.to(w.dtype)
            lse = z.logsumexp(1)
            total += torch.where(ok, lse - (z.gather(1, y) * wi).sum(1), 0).sum()
            if grad_hidden is not None and grad_head is not None:
                # d loss / d z = softmax(z) - sum_i w_i onehot(y_i); repeated targets add up
                g = z.sub_(lse.unsqueeze(1)).exp_().mul_(ok.unsqueeze(1)).scatter_add_(1, y, -wi)
                if grad_bias is not None:
                    grad_bias += g.sum(0)
                g = g.to(dtype)
                grad_hidden[i : i + chunk] = g @ head_c
                grad_head += g.T @ h
        if grad_hidden is not None and grad_head is not None:
            ctx.save_for_backward(grad_hidden, grad_head.to(head.dtype), grad_bias)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[misc]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        grad_hidden, grad_head, grad_bias = ctx.saved_tensors
        scaled = [None if g is None else (g * grad).to(g.dtype) for g in (grad_hidden, grad_head, grad_bias)]
        return (*scaled, None, None, None, None, None)
