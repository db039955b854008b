"""The specification: slow, obvious forms of what the other modules compute. Tests compare against these."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def multi_hot_cross_entropy(
    logits: Tensor,  # (N, V)
    targets: Tensor,  # (N, s)
    weights: Tensor | None = None,  # (s,)
    ignore_index: int = -100,
) -> Tensor:  # () mean over the rows that have a valid target
    """For each row, the weighted mean over its valid targets of ordinary cross-entropy."""
    rows: list[Tensor] = []
    for z, bag in zip(logits, targets, strict=True):
        terms: list[Tensor] = []
        total = 0.0
        for i, y in enumerate(bag.tolist()):
            w = 1.0 if weights is None else float(weights[i])
            if y != ignore_index and w > 0:
                terms.append(w * F.cross_entropy(z, torch.tensor(y)))
                total += w
        if terms:
            rows.append(torch.stack(terms).sum() / total)
    return torch.stack(rows).mean() if rows else logits.sum() * 0


def sum_to_one_cross_entropy(
    logits: Tensor,  # (N, V)
    targets: Tensor,  # (N, s)
    ignore_index: int = -100,
) -> Tensor:  # () mean over the rows that have a valid target
    """For each row, minus the log of the summed probability of the distinct valid targets."""
    rows: list[Tensor] = []
    for z, bag in zip(logits, targets, strict=True):
        members = sorted(set(bag.tolist()) - {ignore_index})
        if members:
            rows.append(-torch.log(torch.softmax(z, 0)[members].sum()))
    return torch.stack(rows).mean() if rows else logits.sum() * 0


def bag_embedding(
    weight: Tensor,  # (V, d)
    ids: Tensor,  # (B, L, s); a place below 0 is not there
) -> Tensor:  # (B, L, d)
    """Mean of the rows of ``weight`` that each bag names; 0 for a bag with no place."""

    def mean(bag: Tensor) -> Tensor:  # (s,) -> (d,)
        there = bag[bag >= 0]
        return weight[there].sum(0) / max(len(there), 1)

    return torch.stack([torch.stack([mean(bag) for bag in row]) for row in ids])


def fold(
    tokens: list[int], length: int, input_bag: int, output_bag: int
) -> tuple[list[list[int]], list[list[int]]]:  # L bags of inputs, L bags of targets
    """Position j reads tokens [j*a, (j+1)*a) and predicts the b tokens after them."""
    a, b = input_bag, output_bag
    inputs = [tokens[j * a : (j + 1) * a] for j in range(length)]
    targets = [tokens[(j + 1) * a : (j + 1) * a + b] for j in range(length)]
    return inputs, targets


def ragged_fold(
    tokens: list[int], begins: list[bool], length: int, input_bag: int, output_bag: int
) -> tuple[list[list[int]], list[list[int]]]:  # L bags of inputs, L bags of targets
    """Bags of at most ``input_bag`` tokens, a new one wherever ``begins``; each predicts up to ``output_bag`` tokens
    after it, as far as the next boundary beyond the first of them."""
    bags: list[list[int]] = []  # of places
    for i in range(len(tokens)):
        if not bags or begins[i] or len(bags[-1]) == input_bag:
            bags.append([])
        bags[-1].append(i)
    targets: list[list[int]] = []
    for bag in bags[1 : length + 1]:
        ends = bag[0] + 1
        while ends < bag[0] + output_bag and not begins[ends]:
            ends += 1
        targets.append(tokens[bag[0] : ends])
    return [[tokens[i] for i in bag] for bag in bags[:length]], targets
