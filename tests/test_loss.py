"""Every implementation of the loss against the float64 specification, and the properties that make it TST's loss."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from token_superposition import TokenSuperpositionError, place_weights, reference
from token_superposition import linear_multi_hot_cross_entropy as linear
from token_superposition import multi_hot_cross_entropy as on_logits

WEIGHTINGS = ["uniform", "power", "exponential", "first", "fitted"]
IN_FLOAT64 = ["reference", "chunked", "native", "triton"]
ALL = [*IN_FLOAT64, "liger"]  # on a CPU the last two run in Triton's interpreter


def example(
    n: int, d: int, v: int, s: int, masked: float, seed: int, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, d, generator=g).to(dtype).requires_grad_()
    head = torch.randn(v, d, generator=g).to(dtype).requires_grad_()
    bias = torch.randn(v, generator=g).to(dtype).requires_grad_()
    targets = torch.randint(v, (n, s), generator=g)
    targets[torch.rand(n, s, generator=g) < masked] = -100
    return hidden, head, bias, targets


def specification(
    hidden: Tensor,
    head: Tensor,
    bias: Tensor,
    targets: Tensor,
    w: Tensor | None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    z_loss: float = 0.0,
) -> Tensor:
    """``reference`` on whole logits in float64, with everything the loss can do."""
    logits = hidden.double() @ head.double().T * logit_scale + bias.double()
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    rows = (targets != -100).any(1) if w is None else ((targets != -100) & (w > 0)).any(1)
    extra = (logits.logsumexp(1).square() * rows).sum() / rows.sum().clamp(min=1)
    return reference.multi_hot_cross_entropy(logits, targets, w) + z_loss * extra


def options_of(impl: str, rich: bool) -> dict[str, Any]:
    """What beyond the plain loss an implementation can do (Liger's soft cap does not run in the interpreter)."""
    if impl == "native":
        return {"logit_scale": 0.7} if rich else {}
    if impl == "liger" and not torch.cuda.is_available():
        return {"logit_scale": 0.7, "z_loss": 0.1} if rich else {}
    return {"softcap": 2.0, "logit_scale": 0.7, "z_loss": 0.1} if rich else {}


@pytest.mark.parametrize("impl", IN_FLOAT64)
@settings(deadline=None, max_examples=30)
@given(
    n=st.integers(0, 7),
    d=st.integers(1, 5),
    v=st.integers(1, 9),  # few tokens: bags repeat them
    s=st.integers(1, 5),
    masked=st.sampled_from([0.0, 0.3, 1.0]),
    weighting=st.sampled_from(WEIGHTINGS),
    rows=st.integers(1, 3),  # rows in a chunk: also not a divisor of n
    rich=st.booleans(),
    seed=st.integers(0, 99),
)
def test_value_and_gradients_are_the_specification(
    impl: Any, n: int, d: int, v: int, s: int, masked: float, weighting: Any, rows: int, rich: bool, seed: int
) -> None:
    hidden, head, bias, targets = example(n, d, v, s, masked, seed)
    w, options = place_weights(weighting, s).double(), options_of(impl, rich)
    expected = specification(hidden, head, bias, targets, w, **options)
    got = linear(hidden, head, targets, w, bias=bias, impl=impl, chunk_rows=rows, **options)
    torch.testing.assert_close(got, expected)
    wanted = torch.autograd.grad(expected, (hidden, head, bias))
    for gradient, want in zip(torch.autograd.grad(got, (hidden, head, bias)), wanted, strict=True):
        torch.testing.assert_close(gradient, want)


@pytest.mark.parametrize("impl", ["liger", "triton"])
@settings(deadline=None, max_examples=12)
@given(
    n=st.integers(0, 4),
    v=st.sampled_from([1, 5, 37]),
    s=st.integers(1, 5),
    masked=st.sampled_from([0.0, 0.3, 1.0]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    rich=st.booleans(),
    seed=st.integers(0, 99),
)
def test_kernels_are_the_specification(
    impl: Any, n: int, v: int, s: int, masked: float, dtype: torch.dtype, rich: bool, seed: int
) -> None:
    hidden, head, bias, targets = example(n, 3, v, s, masked, seed, dtype)
    w, options = place_weights("power", s), options_of(impl, rich)
    expected = specification(hidden, head, bias, targets, w, **options)
    got = linear(hidden, head, targets, w, bias=bias, impl=impl, **options)
    near: dict[str, float] = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 3e-2, "atol": 3e-2}
    torch.testing.assert_close(got.double(), expected, **near)
    wanted = torch.autograd.grad(expected, (hidden, head, bias))
    for gradient, want in zip(torch.autograd.grad(got, (hidden, head, bias)), wanted, strict=True):
        assert gradient.dtype == dtype
        torch.testing.assert_close(gradient, want, **near)


def test_kernel_reads_a_vocabulary_of_several_tiles() -> None:
    hidden, head, bias, targets = example(3, 4, 9001, 3, 0.2, 5, torch.float32)
    targets[0] = torch.tensor([8191, 8192, 8192])  # both sides of the first tile's end, one twice
    expected = specification(hidden, head, bias, targets, None)
    got = linear(hidden, head, targets, bias=bias, impl="triton")
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)
    wanted = torch.autograd.grad(expected, (hidden, head, bias))
    for gradient, want in zip(torch.autograd.grad(got, (hidden, head, bias)), wanted, strict=True):
        torch.testing.assert_close(gradient, want, rtol=1e-4, atol=1e-5)


def test_kernel_reads_on_where_all_of_a_tile_is_ruled_out() -> None:
    hidden, head, _, _ = example(2, 4, 9001, 3, 0.0, 5, torch.float64)
    bias = torch.zeros(9001, dtype=torch.float64)
    bias[:8192] = -math.inf  # the first tile, with a soft cap or in float64
    targets = torch.tensor([[8192, 8193, 9000], [9000, 9000, 8500]])
    found = [linear(hidden, head, targets, bias=bias, impl=impl) for impl in ("triton", "reference")]
    torch.testing.assert_close(found[0], found[1])
    gradients = [torch.autograd.grad(loss, (hidden, head)) for loss in found]
    for gradient, want in zip(*gradients, strict=True):
        torch.testing.assert_close(gradient, want)


@settings(deadline=None, max_examples=30)
@given(
    shape=st.tuples(st.integers(0, 5), st.integers(1, 9), st.integers(1, 4)),
    masked=st.sampled_from([0.0, 0.3, 1.0]),
    weighting=st.sampled_from(WEIGHTINGS),
    seed=st.integers(0, 99),
)
def test_on_logits_is_the_specification(shape: tuple[int, int, int], masked: float, weighting: Any, seed: int) -> None:
    n, v, s = shape
    hidden, head, bias, targets = example(n, 3, v, s, masked, seed)
    w = place_weights(weighting, s).double()
    expected = specification(hidden, head, bias, targets, w, z_loss=0.1)
    got = on_logits(hidden @ head.T + bias, targets, w, z_loss=0.1)
    torch.testing.assert_close(got, expected)
    wanted = torch.autograd.grad(expected, hidden)[0]
    torch.testing.assert_close(torch.autograd.grad(got, hidden)[0], wanted)


@pytest.mark.parametrize("impl", ALL)
def test_full_bags_equal_the_papers_mean_of_cross_entropies(impl: Any) -> None:
    hidden, head, _, targets = example(6, 4, 11, 3, 0.0, 1, torch.float32)
    logits = hidden @ head.T
    published = sum((F.cross_entropy(logits, targets[:, i]) for i in range(3)), torch.zeros(())) / 3
    got = linear(hidden, head, targets, impl=impl)
    torch.testing.assert_close(got, published)
    wanted = torch.autograd.grad(published, (hidden, head))
    for gradient, want in zip(torch.autograd.grad(got, (hidden, head)), wanted, strict=True):
        torch.testing.assert_close(gradient, want)


@pytest.mark.parametrize("impl", IN_FLOAT64)
def test_gradcheck(impl: Any) -> None:
    hidden, head, bias, targets = example(4, 3, 7, 3, 0.2, 2)
    w, options = place_weights("power", 3), options_of(impl, True)

    def loss(h: Tensor, weight: Tensor, b: Tensor) -> Tensor:
        return linear(h, weight, targets, w, bias=b, reduction="sum", impl=impl, **options)

    assert torch.autograd.gradcheck(loss, (hidden, head, bias))


@pytest.mark.parametrize("impl", ["liger", "triton"])
def test_what_runs_on_a_gpu_says_so(impl: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("token_superposition.loss.linear.INTERPRETED", False)
    with pytest.raises(TokenSuperpositionError, match=f"impl is '{impl}', which runs on a GPU"):
        linear(ONES, ONES, LABELS, impl=impl)
    monkeypatch.setattr("token_superposition.loss.linear.HAS_TRITON", False)
    with pytest.raises(TokenSuperpositionError, match="triton is not installed; choose 'chunked'"):
        linear(ONES, ONES, LABELS, impl=impl)


@pytest.mark.parametrize("impl", ["liger"])
def test_gradient_in_float32_by_differences(impl: Any) -> None:
    """Liger works in float32, too coarse for gradcheck: one direction, a central difference in float64."""
    hidden, head, bias, targets = example(4, 3, 7, 3, 0.2, 2, torch.float32)
    options = options_of(impl, True)
    value = linear(hidden, head, targets, bias=bias, impl=impl, **options)
    gradients = torch.autograd.grad(value, (hidden, head, bias))
    directions = [torch.randn(t.shape, generator=torch.Generator().manual_seed(3)) for t in (hidden, head, bias)]

    def along(step: float) -> float:
        moved = [t.detach().double() + step * u for t, u in zip((hidden, head, bias), directions, strict=True)]
        return specification(*moved, targets, None, **options).item()

    slope = sum((g * u).sum().item() for g, u in zip(gradients, directions, strict=True))
    assert slope == pytest.approx((along(1e-5) - along(-1e-5)) / 2e-5, rel=1e-4)


@pytest.mark.parametrize("impl", ALL)
def test_one_target_is_ordinary_cross_entropy(impl: Any) -> None:
    hidden, head, bias, targets = example(5, 4, 13, 1, 0.2, 7, torch.float32)
    expected = F.cross_entropy(hidden @ head.T + bias, targets[:, 0])
    torch.testing.assert_close(linear(hidden, head, targets[:, 0], bias=bias, impl=impl), expected)
    torch.testing.assert_close(on_logits(hidden @ head.T + bias, targets), expected)


@pytest.mark.parametrize("impl", ALL)
def test_a_masked_row_adds_nothing_whatever_it_holds(impl: Any) -> None:
    hidden, head, _, targets = example(4, 3, 7, 2, 0.0, 8, torch.float32)
    targets[1] = -100
    expected = linear(hidden[[0, 2, 3]], head, targets[[0, 2, 3]], impl=impl)
    wanted = torch.autograd.grad(expected, (hidden, head))
    for garbage in (math.nan, math.inf, 1e4):
        dirty = hidden.detach().clone()
        dirty[1] = garbage
        got = linear(dirty.requires_grad_(), head, targets, impl=impl)
        torch.testing.assert_close(got, expected)
        for gradient, want in zip(torch.autograd.grad(got, (dirty, head)), wanted, strict=True):
            torch.testing.assert_close(gradient, want)


@pytest.mark.parametrize("impl", ALL)
def test_extreme_logits(impl: Any) -> None:
    """Logits of 1e4 and -1e4: finite, and what float64 gives."""
    hidden = torch.tensor([[1e4], [-1e4], [1.0]], requires_grad=True)
    head = torch.tensor([[1.0], [-1.0], [0.5]], requires_grad=True)
    targets = torch.tensor([[1, 1], [0, 2], [0, -100]])
    got = linear(hidden, head, targets, impl=impl)
    expected = specification(hidden, head, torch.zeros(3), targets, None)
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)
    wanted = torch.autograd.grad(expected, (hidden, head))
    for gradient, want in zip(torch.autograd.grad(got, (hidden, head)), wanted, strict=True):
        torch.testing.assert_close(gradient, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("impl", "softcap"),  # native's part that is torch's gives NaN
    [("liger", None), *((i, cap) for i in ("reference", "chunked", "triton", "on logits") for cap in (None, 2.0))],
)
@pytest.mark.parametrize("masked", [0, 1])
def test_a_token_that_is_ruled_out(impl: Any, softcap: float | None, masked: int) -> None:
    """A bias of -inf at id 0, which stands for masked targets inside: the other targets are scored as ever."""
    hidden, head, bias, targets = example(6, 4, 7, 3, 0.0, 6, torch.float32)
    targets = targets.clamp(min=1)
    targets[:, masked], targets[2] = -100, -100
    bias.data[0] = -math.inf

    def loss(h: Tensor, w: Tensor) -> Tensor:
        if impl != "on logits":
            return linear(h, w, targets, bias=bias, impl=impl, softcap=softcap)
        logits = h @ w.T + bias
        return on_logits(logits if softcap is None else softcap * torch.tanh(logits / softcap), targets)

    logits = hidden.double() @ head.double().T + bias
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    expected = sum(F.cross_entropy(logits, targets[:, i]) for i in {0, 1, 2} - {masked}) / 2
    torch.testing.assert_close(loss(hidden, head).double(), expected, rtol=1e-5, atol=1e-5)
    wanted = torch.autograd.grad(expected, (hidden, head))
    for gradient, want in zip(torch.autograd.grad(loss(hidden, head), (hidden, head)), wanted, strict=True):
        torch.testing.assert_close(gradient, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("impl", ALL)
def test_inputs_need_not_be_contiguous(impl: Any) -> None:
    hidden, head, _, targets = example(6, 4, 11, 3, 0.2, 9, torch.float32)
    expected = linear(hidden, head, targets, impl=impl)
    strided = [t.detach().T.contiguous().T for t in (hidden, head, targets)]
    assert not any(t.is_contiguous() for t in strided)
    h, w, y = strided[0].requires_grad_(), strided[1].requires_grad_(), strided[2]
    got = linear(h, w, y, impl=impl)
    torch.testing.assert_close(got, expected)
    wanted = torch.autograd.grad(expected, (hidden, head))
    for gradient, want in zip(torch.autograd.grad(got, (h, w)), wanted, strict=True):
        torch.testing.assert_close(gradient, want)


@pytest.mark.parametrize(
    ("impl", "loss"),
    [*((i, "multi-hot") for i in (*ALL, "on logits")), *((i, "sum-to-one") for i in ("chunked", "on logits"))],
)
@pytest.mark.parametrize("target", [-1, 11])
def test_a_target_outside_the_vocabulary_is_refused(impl: Any, loss: Any, target: int) -> None:
    """As torch refuses it, not left out as a masked one; its place counts for nothing where its weight is 0."""
    hidden, head, _, targets = example(6, 4, 11, 3, 0.2, 9, torch.float32)
    w = None if loss == "sum-to-one" else torch.tensor([1.0, 1.0, 0.0])

    def score(y: Tensor) -> Tensor:
        if impl == "on logits":
            return on_logits(hidden @ head.T, y, w, loss=loss)
        return linear(hidden, head, y, w, impl=impl, loss=loss, chunk_rows=4)

    targets[5, 0] = target
    with pytest.raises((IndexError, RuntimeError), match=r"out of (bounds|range)"):
        score(targets)
    targets[5, 0], targets[5, 2] = 3, target
    assert w is None or score(targets).isfinite()


def test_the_reference_takes_the_transforms_of_torch_func() -> None:
    """Gradients of single rows, as the docstring has it; the operators of the others have none."""
    hidden, head, _, targets = example(5, 4, 9, 3, 0.2, 1)
    one = torch.func.grad(lambda h, y: linear(h, head.detach(), y, impl="reference"))
    rows = torch.func.vmap(one)(hidden.detach().unsqueeze(1), targets.unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(rows, torch.autograd.grad(linear(hidden, head, targets, reduction="sum"), hidden)[0])


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


@pytest.mark.parametrize("impl", ALL)
@pytest.mark.parametrize("wrong", [-0.5, math.nan, math.inf])
def test_a_weight_that_is_no_weight_is_refused(impl: Any, wrong: float) -> None:
    hidden, head, _, targets = example(5, 4, 9, 3, 0.0, 1)
    weights = torch.tensor([1.0, wrong, 0.5])
    message = f"place_weights is {wrong} at place 1; give a finite number of at least 0"
    with pytest.raises(TokenSuperpositionError, match=message):
        linear(hidden, head, targets, weights, impl=impl)
    with pytest.raises(TokenSuperpositionError, match=message):
        on_logits(hidden @ head.T, targets, weights)


def test_compiled_a_negative_weight_leaves_its_place_out() -> None:
    """As in the specification: no value can be looked at there."""
    hidden, head, _, targets = example(5, 4, 9, 3, 0.2, 1)
    weights = torch.tensor([1.0, -0.5, 0.5])
    torch._dynamo.reset()
    compiled = torch.compile(linear, backend="eager", fullgraph=True)
    expected = reference.multi_hot_cross_entropy(hidden @ head.T, targets, weights)
    torch.testing.assert_close(compiled(hidden, head, targets, weights), expected)


def test_untrained_model_starts_at_ln_v() -> None:
    """Flattening bags into single targets would start far below (METHOD: trap 1)."""
    hidden, head = torch.randn(64, 16) * 0.02, torch.randn(500, 16) * 0.02
    for s in (1, 4):
        assert abs(linear(hidden, head, torch.randint(500, (64, s))).item() - math.log(500)) < 0.01


def test_no_gradient_is_formed_without_need() -> None:
    hidden, head = torch.randn(8, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
    with torch.no_grad():
        assert not linear(hidden, head, torch.randint(9, (8, 2))).requires_grad


ONES, LABELS = torch.ones(2, 3), torch.zeros(2, dtype=torch.long)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: on_logits(torch.randn(2, 3), torch.zeros(3, 2, dtype=torch.long)), "do not fit rows"),
        (
            lambda: on_logits(torch.randn(2, 3), torch.zeros(2, 2, dtype=torch.long), torch.ones(3)),
            "one weight per place",
        ),
        (lambda: linear(torch.randn(2, 3), torch.randn(5, 4), torch.zeros(2, dtype=torch.long)), "must be equal"),
        (lambda: linear(ONES, ONES, LABELS, impl="fast"), "choose one of auto, reference"),  # pyright: ignore
        (lambda: linear(ONES, ONES, LABELS, softcap=0.0), "softcap is 0.0; give a finite number above 0"),
        (lambda: linear(ONES, ONES, LABELS, softcap=math.inf), "softcap is inf; give a finite number above 0"),
        (lambda: linear(ONES, ONES, LABELS, z_loss=None), "z_loss is None; give a finite number"),  # pyright: ignore
        (lambda: linear(ONES, ONES, LABELS, logit_scale="2"), "logit_scale is '2'; give a finite"),  # pyright: ignore
        (
            lambda: linear(ONES, ONES, LABELS, logit_scale=torch.nn.Parameter(torch.ones(()))),  # pyright: ignore
            "logit_scale asks for a gradient, which impl='auto' has not; .* multiply hidden by it",
        ),
        (lambda: linear(ONES, ONES, LABELS, chunk_rows=0), "chunk_rows is 0; give a whole number of at least 1"),
        (lambda: on_logits(ONES, LABELS.numpy()), "targets are of type ndarray; give a tensor"),  # pyright: ignore
        (lambda: linear(ONES, ONES, LABELS, softcap=1.0, impl="native"), "choose impl='chunked'"),
        (lambda: linear(ONES, ONES, LABELS, reduction="none"), "choose 'mean' or 'sum'"),  # pyright: ignore
        (lambda: place_weights("cubic", 2), "choose one of uniform"),  # pyright: ignore
        (lambda: place_weights("power", 0), "at least 1"),
    ],
)
def test_bad_input_has_one_clear_line(call: Callable[[], object], message: str) -> None:
    with pytest.raises(TokenSuperpositionError, match=message):
        call()
