"""The loss in low precision: what is summed in float32, when gradients are rounded, and autocast."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from tests.test_loss import example
from token_superposition import linear_multi_hot_cross_entropy as linear
from token_superposition import reference


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_sums_in_float32(dtype: torch.dtype) -> None:
    hidden, head, _, targets = example(64, 8, 50, 4, 0.1, 4)
    expected = reference.multi_hot_cross_entropy((hidden @ head.T), targets)
    got = linear(hidden.to(dtype), head.to(dtype), targets)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gradients_of_low_precision_are_scaled_before_they_are_rounded(dtype: torch.dtype) -> None:
    """Their sum over 16,384 rows is beyond float16, their mean is not."""
    hidden, head, bias, _ = example(1, 8, 32, 1, 0.0, 4, dtype)
    rows = (hidden + 6).expand(16384, -1)
    targets = torch.zeros(16384, dtype=torch.long)
    linear(rows, head, targets, bias=bias).backward()
    exact = [t.detach().double().requires_grad_() for t in (rows, head, bias)]
    wanted = torch.autograd.grad(F.cross_entropy(exact[0] @ exact[1].T + exact[2], targets), exact[1:])
    for got, want in zip((head.grad, bias.grad), wanted, strict=True):
        assert got is not None and got.dtype == dtype
        torch.testing.assert_close(got.double(), want, rtol=0.03, atol=0.03)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_sum_over_many_rows_is_no_rounder_than_a_row(dtype: torch.dtype) -> None:
    """Of 16,384 rows it is beyond float16, and more than bfloat16 counts."""
    if not hasattr(F, "linear_cross_entropy"):
        pytest.skip("needs torch 2.13")
    hidden, head, _, targets = example(16384, 16, 256, 4, 0.0, 4, dtype)
    expected = linear(hidden.double(), head.double(), targets, impl="reference")
    torch.testing.assert_close(linear(hidden, head, targets, impl="native").double(), expected, rtol=2e-3, atol=0)


def test_autocast_keeps_float32_parameters_and_gradients() -> None:
    hidden, head = torch.randn(8, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
    targets = torch.randint(9, (8, 2))
    with torch.autocast("cpu", torch.bfloat16):
        value = linear(hidden, head, targets)
    value.backward()
    assert head.grad is not None and head.grad.dtype == torch.float32
    torch.testing.assert_close(value, linear(hidden, head, targets), rtol=2e-2, atol=2e-2)


def test_the_gradient_of_a_wide_head_is_made_in_tiles_of_its_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 3 rows here, the last one of 1."""
    monkeypatch.setattr("token_superposition.loss.chunked.TILE_ELEMENTS", 12)
    hidden, head, _, targets = example(6, 4, 10, 3, 0.2, 9, torch.bfloat16)
    exact = head.detach().double().requires_grad_()
    linear(hidden, head, targets).backward()
    (want,) = torch.autograd.grad(linear(hidden.double(), exact, targets), exact)
    assert head.grad is not None
    torch.testing.assert_close(head.grad.double(), want, rtol=0.03, atol=0.03)
