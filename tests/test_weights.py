"""Weights of the places of a bag."""

from __future__ import annotations

import math

import pytest
import torch

from token_superposition import linear_multi_hot_cross_entropy as linear
from token_superposition import place_weights

WEIGHTINGS = ["uniform", "power", "exponential", "first", "fitted"]


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_weights_sum_to_one_and_never_rise(weighting: str) -> None:
    w = place_weights(weighting, 6)  # pyright: ignore
    assert w.sum().item() == pytest.approx(1) and (w.diff() <= 1e-6).all()


def test_fitted_weights_are_the_papers_power_law() -> None:
    raw = torch.tensor([3.63 + 1.35 * i**-1.25 for i in (1, 2, 3)])
    torch.testing.assert_close(place_weights("fitted", 3), raw / raw.sum())


def test_exponential_weights_fall_by_e() -> None:
    raw = torch.tensor([math.exp(-i) for i in (1, 2, 3)])
    torch.testing.assert_close(place_weights("exponential", 3), raw / raw.sum())


def test_the_reference_is_mapped_over_weights() -> None:
    hidden, head, targets = torch.randn(3, 4), torch.randn(7, 4), torch.randint(0, 7, (3, 2))
    weights = torch.tensor([[0.5, 0.5], [1.0, 0.0]])
    mapped = torch.func.vmap(lambda w: linear(hidden, head, targets, w, impl="reference"))(weights)
    torch.testing.assert_close(mapped, torch.stack([linear(hidden, head, targets, w) for w in weights]))
