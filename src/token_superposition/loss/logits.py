"""The loss for callers who hold logits."""

from __future__ import annotations

import torch
from torch import Tensor

from token_superposition.loss.targets import (
    BagLoss,
    Reduction,
    as_rows,
    bag_members,
    check_loss,
    reduce,
    target_weights,
)


def multi_hot_cross_entropy(
    logits: Tensor,  # (..., V)
    targets: Tensor,  # (..., s) int64, or (...) for s = 1; a bag is a multiset
    place_weights: Tensor | None = None,  # (s,) weights of the places in a bag, from 0 up; None is uniform
    *,
    ignore_index: int = -100,
    z_loss: float = 0.0,
    loss: BagLoss = "multi-hot",
    reduction: Reduction = "mean",
) -> Tensor:  # ()
    """Cross-entropy of each row against a bag of s targets (arXiv 2605.06546, eq. 3).

    ``logsumexp(z) - sum_i w_i z[y_i]``, with ``w`` renormalised over the valid targets of the row; a target that
    occurs twice counts twice. A row without a valid target contributes 0. ``mean`` is over the rows that have one.
    ``z_loss`` adds that multiple of ``logsumexp(z)**2`` to every row. For s = 1 this is ordinary cross-entropy.
    ``loss="sum-to-one"`` takes the bag as one composite label: ``logsumexp(z) - logsumexp(z[y])`` over its distinct
    tokens, minus the log of the probability that the next token is one of them. Distinct, because a token counted twice
    would count its probability twice: the sum could pass 1 and the loss fall below 0. It has no place weights.
    Computed in float32, or float64 for float64 logits, in one pass and without a copy per target.
    Raises ``TokenSuperpositionError`` for shapes that do not fit, for a ``loss`` or ``reduction`` of another name, for
    place weights with ``loss="sum-to-one"``, and for negative or infinite ones or nan (where they lie on the CPU and
    the call is not compiled: else nothing waits for their values).

    >>> multi_hot_cross_entropy(torch.zeros(1, 4), torch.tensor([[0, 0, 3]]))  # ln 4
    tensor(1.3863)
    >>> multi_hot_cross_entropy(torch.zeros(1, 4), torch.tensor([[0, 0, 3]]), loss="sum-to-one")  # ln 4 - ln 2
    tensor(0.6931)
    """
    logits, targets = as_rows(logits, targets)
    z = logits.to(torch.promote_types(logits.dtype, torch.float32))
    check_loss(loss)
    weigh = target_weights if loss == "multi-hot" else bag_members
    w, valid = weigh(targets, place_weights, ignore_index, z.dtype)
    lse = z.logsumexp(1)
    # Relative to the logsumexp before they are summed: exact also where logits are large.
    relative = (z.gather(1, targets.where(w > 0, 0)) - lse.unsqueeze(1)).where(w > 0, 0)  # a masked one may be -inf
    if loss == "multi-hot":
        picked = (relative * w).sum(1)
    else:
        picked = relative.masked_fill((w == 0) & valid.unsqueeze(1), -torch.inf).logsumexp(1)
    return reduce(torch.where(valid, z_loss * lse.square() - picked, 0).sum(), valid, reduction)
