from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from token_superposition import TokenSuperpositionError, loss, place_weights, reference
from token_superposition import linear_multi_hot_cross_entropy as linear
from token_superposition import multi_hot_cross_entropy as on_logits

WEIGHTINGS = ["uniform", "power", "exponential", "first", "fitted"]


def example(n: int, d: int, v: int, s: int, masked: float, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, d, generator=g, dtype=torch.float64).requires_grad_()
    head = torch.randn(v, d, generator=g, dtype=torch.float64).requires_grad_()
    bias = torch.randn(v, generator=g, dtype=torch.float64).requires_grad_()
    targets = torch.randint(v, (n, s), generator=g)
    targets[torch.rand(n, s, generator=g) < masked] = -100
    return hidden, head, bias, targets


@settings(deadline=None, max_examples=60)
@given(
    n=st.integers(0, 7),
    d=st.integers(1, 5),
    v=st.integers(1, 9),  # few tokens: bags repeat them
    s=st.integers(1, 5),
    masked=st.sampled_from([0.0, 0.3, 1.0]),
    weighting=st.sampled_from(WEIGHTINGS),
    rows=st.integers(1, 3),  # rows in a chunk
    seed=st.integers(0, 99),
)
def test_both_forms_and_their_gradients_are_the_reference(
    n: int, d: int, v: int, s: int, masked: float, weighting: str, rows: int, seed: int
) -> None:
    hidden, head, bias, targets = example(n, d, v, s, masked, seed)
    w = place_weights(weighting, s).double()  # pyright: ignore[reportArgumentType]
    expected = reference.multi_hot_cross_entropy(hidden @ head.T + bias, targets, w)
    grads = torch.autograd.grad(expected, (hidden, head, bias))
    whole = loss.CHUNK_ELEMENTS
    try:
        loss.CHUNK_ELEMENTS = rows * v
        chunked = linear(hidden, head, targets, w, bias=bias)
        results = [(chunked, torch.autograd.grad(chunked, (hidden, head, bias)))]
    finally:
        loss.CHUNK_ELEMENTS = whole
    plain = on_logits(hidden @ head.T + bias, targets, w)
    results.append((plain, torch.autograd.grad(plain, (hidden, head, bias))))
    for value, gradients in results:
        torch.testing.assert_close(value, expected)
        for got, want in zip(gradients, grads, strict=True):
            torch.testing.assert_close(got, want)
            assert got.isfinite().all()


def test_full_bags_equal_the_papers_mean_of_cross_entropies() -> None:
    hidden, head, _, targets = example(6, 4, 11, 3, 0.0, 1)
    logits = hidden @ head.T
    published = sum(F.cross_entropy(logits, targets[:, i]) for i in range(3)) / 3
    torch.testing.assert_close(linear(hidden, head, targets), published)


def test_gradcheck() -> None:
    hidden, head, bias, targets = example(4, 3, 7, 3, 0.2, 2)
    assert torch.autograd.gradcheck(
        lambda h, w, b: linear(h, w, targets, bias=b, reduction="sum"), (hidden, head, bias)
    )


def test_one_target_is_ordinary_cross_entropy() -> None:
    logits = torch.randn(5, 13)
    targets = torch.randint(13, (5,))
    torch.testing.assert_close(on_logits(logits, targets), F.cross_entropy(logits, targets))


def test_repeated_tokens_count_twice() -> None:
    logits = torch.tensor([[0.0, 1.0, 3.0]])
    twice = on_logits(logits, torch.tensor([[2, 2, 0]]))
    torch.testing.assert_close(twice, logits.logsumexp(1)[0] - (3 + 3 + 0) / 3)


def test_order_in_a_bag_matters_only_through_weights() -> None:
    hidden, head, _, targets = example(5, 4, 9, 4, 0.2, 3)
    shuffled = targets[:, [2, 0, 3, 1]]
    torch.testing.assert_close(linear(hidden, head, targets), linear(hidden, head, shuffled))
    w = place_weights("power", 4)
    assert not torch.isclose(linear(hidden, head, targets, w), linear(hidden, head, shuffled, w))


def test_untrained_model_starts_at_ln_v() -> None:
    """Flattening bags into single targets would start far below (METHOD: trap 1)."""
    hidden, head = torch.randn(64, 16) * 0.02, torch.randn(500, 16) * 0.02
    for s in (1, 4):
        assert abs(linear(hidden, head, torch.randint(500, (64, s))).item() - math.log(500)) < 0.01


def test_extreme_logits_stay_finite() -> None:
    logits = torch.tensor([[1e4, -1e4, 0.0], [-1e4, -1e4, -1e4]], requires_grad=True)
    value = on_logits(logits, torch.tensor([[1, 1], [0, 2]]))
    value.backward()
    assert value.isfinite() and logits.grad is not None and logits.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_sums_in_float32(dtype: torch.dtype) -> None:
    hidden, head, _, targets = example(64, 8, 50, 4, 0.1, 4)
    expected = reference.multi_hot_cross_entropy((hidden @ head.T), targets)
    got = linear(hidden.to(dtype), head.to(dtype), targets)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), expected, rtol=2e-2, atol=2e-2)


def test_autocast_keeps_float32_parameters_and_gradients() -> None:
    hidden, head = torch.randn(8, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
    targets = torch.randint(9, (8, 2))
    with torch.autocast("cpu", torch.bfloat16):
        value = linear(hidden, head, targets)
    value.backward()
    assert head.grad is not None and head.grad.dtype == torch.float32
    torch.testing.assert_close(value, linear(hidden, head, targets), rtol=2e-2, atol=2e-2)


def test_no_gradient_is_formed_without_need() -> None:
    hidden, head = torch.randn(8, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
    with torch.no_grad():
        assert not linear(hidden, head, torch.randint(9, (8, 2))).requires_grad


def test_whole_logits_are_never_made() -> None:
    """8,192 rows by 50,000 tokens would be 1.6 GB; the largest tensor made is one chunk."""
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):  # pyright: ignore
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor):
                largest = max(largest, out.numel())
            return out

    hidden, head = torch.randn(8192, 4, requires_grad=True), torch.randn(50_000, 4, requires_grad=True)
    with Watch():
        linear(hidden, head, torch.randint(50_000, (8192, 4))).backward()
    assert largest <= loss.CHUNK_ELEMENTS


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: on_logits(torch.randn(2, 3), torch.zeros(3, 2, dtype=torch.long)), "do not fit rows"),
        (
            lambda: on_logits(torch.randn(2, 3), torch.zeros(2, 2, dtype=torch.long), torch.ones(3)),
            "one weight per place",
        ),
        (lambda: linear(torch.randn(2, 3), torch.randn(5, 4), torch.zeros(2, dtype=torch.long)), "must be equal"),
        (lambda: place_weights("cubic", 2), "choose one of uniform"),  # pyright: ignore
        (lambda: place_weights("power", 0), "at least 1"),
    ],
)
def test_bad_input_has_one_clear_line(call, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(TokenSuperpositionError, match=message):
        call()


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_weights_sum_to_one_and_never_rise(weighting: str) -> None:
    w = place_weights(weighting, 6)  # pyright: ignore
    assert w.sum().item() == pytest.approx(1) and (w.diff() <= 1e-6).all()


def test_fitted_weights_are_the_papers_power_law() -> None:
    raw = torch.tensor([3.63 + 1.35 * i**-1.25 for i in (1, 2, 3)])
    torch.testing.assert_close(place_weights("fitted", 3), raw / raw.sum())
