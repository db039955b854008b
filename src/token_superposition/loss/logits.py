"""The loss for callers who hold logits."""

from __future__ import annotations

import torch
from torch import Tensor

from token_superposition.loss.targets import Reduction, as_rows, reduce, target_weights


def multi_hot_cross_entropy(
    logits: Tensor,  # (..., V)
    targets: Tensor,  # (..., s) int64, or (...) for s = 1; a bag is a multiset
    place_weights: Tensor | None = None,  # (s,) weights of the places in a bag; None is uniform
    *,
    ignore_index: int = -100,
    z_loss: float = 0.0,
    reduction: Reduction = "mean",
) -> Tensor:  # ()
    """Cross-entropy of each row against a bag of s targets (arXiv 2605.06546, eq. 3).

    ``logsumexp(z) - sum_i w_i z[y_i]``, with ``w`` renormalised over the valid targets of the row; a target that
    occurs twice counts twice. A row without a valid target contributes 0. ``mean`` is over the rows that have one.
    ``z_loss`` adds that multiple of ``logsumexp(z)**2`` to every row. For s = 1 this is ordinary cross-entropy.
    Computed in float32, or float64 for float64 logits, in one pass and without a copy per target.

    >>> multi_hot_cross_entropy(torch.zeros(1, 4), torch.tensor([[0, 0, 3]]))  # ln 4
    tensor(1.3863)
    """
    logits, targets = as_rows(logits, targets)
    z = logits.to(torch.promote_types(logits.dtype, torch.float32))
    w, valid = target_weights(targets, place_weights, ignore_index, z.dtype)
    lse = z.logsumexp(1)
    # Relative to the logsumexp before they are summed: exact also where logits are large.
    picked = ((z.gather(1, targets.where(w > 0, 0)) - lse.unsqueeze(1)) * w).sum(1)
    return reduce(torch.where(valid, z_loss * lse.square() - picked, 0).sum(), valid, reduction)
