"""The mean of a bag that is read: how its places count, the fixed signs that may tell them apart, and its gradient."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from token_superposition.errors import require_number
from token_superposition.weights import Weighting, may_keep, weights_for

SEED = 0x9E3779B9


def check_signal(name: str, signal: float) -> None:
    require_number(name, signal, 0, 1, hint=": 0 for none")


def place_factors(bag_size: int, width: int, signal: float, like: Tensor) -> Tensor:  # (s, d)
    """``1 + signal * p_i`` with the signs ``p_i`` (+1 or -1 for each of d) of place i, on ``like``'s device.

    An added vector would be the same in the mean of every bag; a product is not.
    """
    signs = (_kept_signs if may_keep(like) else _signs)(bag_size, width, like.device)
    return 1 + signal * signs.to(torch.promote_types(like.dtype, torch.float32))


def _signs(bag_size: int, width: int, device: torch.device) -> Tensor:  # (s, d)
    """Drawn for each place from its own seed, so a place keeps its signs in bags of another size."""
    seeds = (torch.Generator().manual_seed(SEED + place) for place in range(bag_size))
    rows = [torch.randint(2, (width,), generator=g, device="cpu") * 2 - 1 for g in seeds]
    return torch.stack(rows).to(device)


_kept_signs = lru_cache(_signs)


@torch.library.custom_op("token_superposition::bag_mean", mutates_args=())
def bag_mean(
    weight: Tensor,  # (V, d), or the rows of tokens start .. start + V
    ids: Tensor,  # (N, s); a place below 0 is not there
    start: int | None,  # None: weight is the whole table, and torch refuses an id of V or more
    padding_idx: int,  # this row gets no gradient; -1 for none
) -> Tensor:  # (N, d) sum over the ids whose row is here, over the number of places that are there
    """``embedding_bag`` with the gradient summed in float32, for part of a vocabulary too."""
    inside, local = local_ids(ids, start, weight.shape[0])
    total = F.embedding_bag(local, weight, mode="sum", per_sample_weights=inside.to(weight.dtype))
    return total / places(ids)[1]


@bag_mean.register_fake
def _(weight: Tensor, ids: Tensor, start: int | None, padding_idx: int) -> Tensor:
    return weight.new_empty(ids.shape[0], weight.shape[1])


@torch.library.custom_op("token_superposition::bag_mean_backward", mutates_args=())
def bag_mean_backward(
    grad: Tensor,  # (N, d)
    weight: Tensor,  # (V, d)
    ids: Tensor,  # (N, s)
    start: int | None,
    padding_idx: int,
) -> Tensor:  # (V, d)
    inside, local = local_ids(ids, start, weight.shape[0])
    acc = torch.promote_types(grad.dtype, torch.float32)
    count = places(ids)[1]
    if grad.device.type == "cpu":
        total = torch.zeros_like(weight)
        s, v = ids.shape[1], weight.shape[0]
        full = bool((count == s).all())  # then sums are divided, which are fewer than rows
        for tokens, sums in _sums_by_token(grad, None if full else count, local.where(inside, v), v, acc):
            total[tokens] = (sums / s if full else sums).to(weight.dtype)
    else:  # in float32 for the whole vocabulary: tokens cannot be counted without waiting for the device
        share = grad.to(acc) / count
        summed = torch.zeros_like(weight, dtype=acc)
        for place in range(ids.shape[1]):  # never (N, s, d)
            summed.index_add_(0, local[:, place], share * inside[:, place : place + 1])
        total = summed.to(weight.dtype)
    if 0 <= (padding := padding_idx - (start or 0)) < weight.shape[0]:
        total[padding] = 0
    return total


ROWS = 128  # tokens, and places, that are summed at a time


def _sums_by_token(
    grad: Tensor,  # (N, d)
    count: Tensor | None,  # (N, 1) by which it is divided, if at all
    ids: Tensor,  # (N, s); those from v on are left out
    v: int,
    dtype: torch.dtype,
) -> Iterator[tuple[Tensor, Tensor]]:  # tokens (n,) and the sums of their bags' gradients (n, d) in dtype
    """Some tokens at a time: the places of the batch are sorted by token, so a few rows in ``dtype`` are enough."""
    by_token, place = ids.reshape(-1).sort(stable=True)
    bags = place.div_(ids.shape[1], rounding_mode="floor")
    tokens, token_of, counts = torch.unique_consecutive(by_token, return_inverse=True, return_counts=True)
    ends = counts.cumsum(0).tolist()
    sums = torch.empty(ROWS, grad.shape[1], dtype=dtype, device=grad.device)
    last = len(tokens) - (len(tokens) > 0 and bool(tokens[-1] >= v))
    for first in range(0, last, ROWS):
        stop = min(first + ROWS, last)
        part = sums[: stop - first].zero_()
        begin, end = ends[first - 1] if first else 0, ends[stop - 1]
        for i in range(begin, end, ROWS):
            some = slice(i, min(i + ROWS, end))
            rows = grad[bags[some]].to(dtype)
            part.index_add_(0, token_of[some] - first, rows if count is None else rows / count[bags[some]])
        yield tokens[first:stop], part


@bag_mean_backward.register_fake
def _(grad: Tensor, weight: Tensor, ids: Tensor, start: int | None, padding_idx: int) -> Tensor:
    return torch.empty_like(weight)


@torch.library.custom_op("token_superposition::placed_bag_mean", mutates_args=())
def placed_bag_mean(
    weight: Tensor,  # (V, d), or the rows of tokens start .. start + V
    ids: Tensor,  # (N, s); a place below 0 is not there
    start: int | None,  # None: weight is the whole table, and torch refuses an id of V or more
    padding_idx: int,  # this row gets no gradient; -1 for none
    signal: float,
    weighting: str,
) -> Tensor:  # (N, d) sum over the places that are there of share * weight[id] * (1 + signal * p_place)
    """Place by place, (N, d) at a time; sums and gradients are accumulated in float32 (float64 for float64)."""
    factors = place_factors(ids.shape[1], weight.shape[1], signal, weight)
    share = shares(ids, cast(Weighting, weighting), factors.dtype)
    total = torch.zeros(ids.shape[0], weight.shape[1], dtype=factors.dtype, device=weight.device)
    for place, factor in enumerate(factors):
        inside, local = local_ids(ids[:, place], start, weight.shape[0])
        total.addcmul_(F.embedding(local, weight).to(total.dtype), factor * (share[:, place] * inside).unsqueeze(1))
    return total.to(weight.dtype)


@placed_bag_mean.register_fake
def _(weight: Tensor, ids: Tensor, start: int | None, padding_idx: int, signal: float, weighting: str) -> Tensor:
    return weight.new_empty(ids.shape[0], weight.shape[1])


@torch.library.custom_op("token_superposition::placed_bag_mean_backward", mutates_args=())
def placed_bag_mean_backward(
    grad: Tensor,  # (N, d)
    weight: Tensor,  # (V, d)
    ids: Tensor,  # (N, s)
    start: int | None,
    padding_idx: int,
    signal: float,
    weighting: str,
) -> Tensor:  # (V, d)
    factors = place_factors(ids.shape[1], weight.shape[1], signal, weight)
    share, grad = shares(ids, cast(Weighting, weighting), factors.dtype), grad.to(factors.dtype)
    total = torch.zeros_like(weight, dtype=factors.dtype)
    for place, factor in enumerate(factors):
        inside, local = local_ids(ids[:, place], start, weight.shape[0])
        total.index_add_(0, local, grad * (factor * (share[:, place] * inside).unsqueeze(1)))
    if 0 <= (padding := padding_idx - (start or 0)) < weight.shape[0]:
        total[padding] = 0
    return total.to(weight.dtype)


@placed_bag_mean_backward.register_fake
def _(
    grad: Tensor, weight: Tensor, ids: Tensor, start: int | None, padding_idx: int, signal: float, weighting: str
) -> Tensor:
    return torch.empty_like(weight)


def places(ids: Tensor) -> tuple[Tensor, Tensor]:  # (..., s) -> which are there (..., s), how many (..., 1)
    """Places of a ragged bag: an id below 0 is none. A bag without any counts as one, so that its mean is 0."""
    there = ids >= 0
    return there, there.sum(-1, keepdim=True).clamp(min=1)


def shares(ids: Tensor, weighting: Weighting, dtype: torch.dtype) -> Tensor:  # (..., s) -> (..., s)
    """What each place counts in the mean of its bag: 0 where it is not there, together 1 (0 where none is).

    ``weighting`` gives the weights of ``place_weights`` from the end of the bag on: the last token that is there has
    the first of them. ``uniform`` is the mean.
    """
    there, count = places(ids)
    if (weights := weights_for(ids, weighting)) is None:
        return there.to(dtype) / count
    from_end = there.flip(-1).cumsum(-1).flip(-1) - 1
    found = weights.to(dtype)[from_end.clamp(min=0)] * there
    return found / found.sum(-1, keepdim=True).clamp(min=torch.finfo(dtype).tiny)


def local_ids(ids: Tensor, start: int | None, rows: int) -> tuple[Tensor, Tensor]:
    """Which ids are there and among the rows ``start .. start + rows``, and their rows (0 for the others).

    ``start`` is None where the rows are the whole table: an id beyond them stays as it is, and looking it up fails.
    """
    local = ids if start is None else ids - start
    inside = local >= 0 if start is None else (local >= 0) & (local < rows)
    return inside, torch.where(inside, local, 0)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])
    ctx.settings = inputs[2:]


def _mean_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return bag_mean_backward(grad, *ctx.saved_tensors, *ctx.settings), None, None, None


def _placed_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return placed_bag_mean_backward(grad, *ctx.saved_tensors, *ctx.settings), None, None, None, None, None


bag_mean.register_autograd(_mean_backward, setup_context=_setup_context)
placed_bag_mean.register_autograd(_placed_backward, setup_context=_setup_context)
