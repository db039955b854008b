"""Weights of the places in a bag: how much the i-th token after a bag counts in the loss."""

from __future__ import annotations

from functools import cache
from typing import Literal, get_args

import torch
from torch import Tensor, nn

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
    if not torch.compiler.is_compiling():  # there it may be a symbol, which a look at its value would make a constant
        bag_size = require_int("bag_size", bag_size, 1)
    i = torch.arange(1, bag_size + 1, dtype=torch.float64)
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


def weights_for(bags: Tensor, weighting: Weighting) -> Tensor | None:  # (..., s) -> (s,)
    """``place_weights`` on the device of ``bags``, or None where they are uniform.

    They are made once: a copy to the device would make every step wait, and break a CUDA graph.
    """
    if weighting == "uniform":
        return None
    make = _kept if may_keep(bags) else _on
    return make(weighting, bags.shape[-1], bags.device)


def may_keep(like: Tensor) -> bool:
    """Whether what is made beside ``like`` may be kept for later calls.

    Beside a fake tensor a fake one is made, which would come back in a real run; a compiled graph makes its own.
    """
    return not torch.compiler.is_compiling() and type(like) in (Tensor, nn.Parameter)


def _on(weighting: Weighting, bag_size: int, device: torch.device) -> Tensor:  # (s,)
    return place_weights(weighting, bag_size).to(device, non_blocking=True)


_kept = cache(_on)
