"""Weights of the places in a bag: how much the i-th token after a bag counts in the loss."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from token_superposition.errors import TokenSuperpositionError, require_int

Weighting = Literal["uniform", "power", "exponential", "first", "fitted"]

# Power law fitted to the mutual information between tokens at distance i in DCLM (arXiv 2605.06546).
FITTED_C0, FITTED_A, FITTED_K = 3.63, 1.35, -1.25


def place_weights(weighting: Weighting, bag_size: int) -> Tensor:  # (s,) float32, sums to 1
    """Place-in-bag weights of the families tried in arXiv 2605.06546, for i = 1..s.

    ``uniform``: 1/s. ``power``: 1/i. ``exponential``: exp(-i). ``first``: the first token only.
    ``fitted``: C0 + a * i^k with C0 = 3.63, a = 1.35, k = -1.25.

    Raises ``TokenSuperpositionError`` for another ``weighting``, and for a ``bag_size`` that is no whole number of at
    least 1.

    >>> place_weights("power", 2).tolist()
    [0.6666666865348816, 0.3333333432674408]
    """
    i = torch.arange(1, require_int("bag_size", bag_size, 1) + 1, dtype=torch.float64)
    match weighting:
        case "uniform":
            w = torch.ones_like(i)
        case "power":
            w = 1 / i
        case "exponential":
            w = torch.exp(-i)
        case "first":
            w = (i == 1).double()
        case "fitted":
            w = FITTED_C0 + FITTED_A * i**FITTED_K
        case _:
            raise TokenSuperpositionError(f"weighting is {weighting!r}; choose one of {', '.join(get_args(Weighting))}")
    return (w / w.sum()).float()
