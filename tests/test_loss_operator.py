"""The loss and the bag embedding inside a training step: compile, checkpointing, accumulation, memory."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from benchmarks.measure import peak_bytes
from token_superposition import TokenSuperpositionError, bag_embedding, place_weights
from token_superposition import linear_multi_hot_cross_entropy as linear
from token_superposition.embedding import bag_mean
from token_superposition.loss.chunked import linear_multi_hot_loss
from token_superposition.loss.single_target import weighted_logits
from token_superposition.loss.targets import target_weights


def example(n: int = 12, d: int = 4, v: int = 19, s: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    hidden, head = torch.randn(n, d, generator=g), torch.randn(v, d, generator=g)
    targets = torch.randint(v, (n, s), generator=g)
    targets[1], targets[2, 0] = -100, -100
    return hidden.requires_grad_(), head.requires_grad_(), targets


def gradients(loss: Callable[..., Tensor], *tensors: Tensor) -> list[Tensor]:
    value = loss(*tensors)
    return [value.detach(), *torch.autograd.grad(value, tensors)]


def assert_same(got: list[Tensor], want: list[Tensor]) -> None:
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("impl", ["auto", "reference", "chunked", "native"])
@pytest.mark.parametrize("autocast", [False, True])
def test_compiles_without_a_graph_break(impl: Any, autocast: bool) -> None:
    hidden, head, targets = example()

    def loss(h: Tensor, w: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return linear(h * 2, w, targets, impl=impl, softcap=None if impl == "native" else 3.0)

    torch._dynamo.reset()
    if impl == "native":  # torch's own operator breaks the graph
        compiled = torch.compile(loss, backend="aot_eager")
    else:
        compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    assert_same(gradients(compiled, hidden, head), gradients(loss, hidden, head))


def test_compiled_once_for_all_bags_of_one_rank() -> None:
    """A change of the bag size is at most one more graph; of the step, none."""
    hidden, head, _ = example()
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(linear, backend=counter, fullgraph=True)
    for s in (2, 3, 5, 8, 4):
        for _ in range(2):
            compiled(hidden, head, torch.randint(19, (12, s))).backward()
    assert counter.frame_count <= 2


def test_compiled_once_for_all_bags_with_weights_of_their_places() -> None:
    """Those of the targets, and those of the bags that are read."""
    hidden, head, _ = example()
    table = nn.Embedding(19, 4)

    def loss(bags: Tensor) -> Tensor:
        read = bag_embedding(table, bags, input_weighting="exponential")
        return linear(hidden * read, head, bags, place_weights("power", bags.shape[1]))

    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss, backend=counter, fullgraph=True)
    for s in (2, 3, 5, 8, 4):
        bags = torch.randint(19, (12, s))
        torch.testing.assert_close(compiled(bags), loss(bags))
    assert counter.frame_count <= 2


def test_the_step_compiles_as_a_whole() -> None:
    table = nn.Embedding(19, 4)
    head, targets = torch.randn(19, 4, requires_grad=True), torch.randint(19, (2, 5, 3))
    ids = torch.randint(19, (2, 5, 3))

    def step(weight: Tensor, head: Tensor) -> Tensor:
        return linear(torch.tanh(bag_embedding(table, ids)) * weight, head, targets)

    scale = torch.ones(4, requires_grad=True)
    torch._dynamo.reset()
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    want = torch.autograd.grad(step(scale, head), (scale, head, table.weight))
    assert_same(list(torch.autograd.grad(compiled(scale, head), (scale, head, table.weight))), list(want))


def test_registered_as_torch_asks() -> None:
    """Schema, fake tensors and autograd of every operator, by torch's own check."""
    hidden, head, targets = example()
    w, valid = target_weights(targets, None, -100, torch.float32)
    bias = torch.zeros(19, requires_grad=True)
    settings = (torch.float32, 2.0, 0.5, 0.1, "torch", 5, [True, True, True], 0, "", False)
    torch.library.opcheck(
        linear_multi_hot_loss,
        (hidden, head, bias, targets, w, valid, *settings),
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )
    rows = targets.clamp(min=0)
    torch.library.opcheck(weighted_logits, (hidden, head, bias, rows, torch.ones(rows.shape), 2.0))
    torch.library.opcheck(bag_mean, (head, rows, 0, 3))


@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_gradcheck_of_the_weighted_logits(softcap: float) -> None:
    g = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(*shape, generator=g).double().requires_grad_() for shape in ((5, 3), (7, 3), (7,)))
    rows, coefficients = torch.randint(7, (5, 4), generator=g), torch.randn(5, 4, generator=g).double()

    def total(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return weighted_logits(x, weight, bias, rows, coefficients, softcap)[0]

    assert torch.autograd.gradcheck(total, (x, weight, bias))


@pytest.mark.parametrize("reentrant", [False, True])
def test_under_activation_checkpointing(reentrant: bool) -> None:
    hidden, head, targets = example()

    def plain(h: Tensor, w: Tensor) -> Tensor:
        return linear(h.tanh(), w, targets)

    def checkpointed(h: Tensor, w: Tensor) -> Tensor:
        out: Any = checkpoint(plain, h, w, use_reentrant=reentrant)
        return out

    def grads(loss: Callable[..., Tensor]) -> list[Tensor]:
        hidden.grad = head.grad = None
        loss(hidden, head).backward()
        assert hidden.grad is not None and head.grad is not None
        return [hidden.grad, head.grad]

    assert_same(grads(checkpointed), grads(plain))


def test_gradients_add_up_over_micro_batches() -> None:
    hidden, head, targets = example()
    whole = gradients(lambda h, w: linear(h, w, targets, reduction="sum"), hidden, head)[2]
    head.grad = None
    for part in range(0, 12, 4):
        linear(hidden[part : part + 4].detach(), head, targets[part : part + 4], reduction="sum").backward()
    assert head.grad is not None
    torch.testing.assert_close(head.grad, whole)


@pytest.mark.parametrize("impl", ["reference", "chunked", "native", "triton"])
def test_bias_and_targets_of_every_kind_or_a_refusal(impl: Any) -> None:
    """Of another shape a bias would be spread over tokens or rows in silence; ids may be int32, as ``fold`` gives."""
    hidden, head, targets = example()
    want = linear(hidden, head, targets, impl="reference")
    torch.testing.assert_close(linear(hidden, head, targets.int(), bias=torch.zeros(19), impl=impl), want)
    for shape in ((), (1,), (3,), (12, 1), (1, 19)):
        with pytest.raises(TokenSuperpositionError, match="bias has shape"):
            linear(hidden, head, targets, bias=torch.zeros(shape), impl=impl)


@pytest.mark.parametrize("impl", ["chunked", "native", "triton"])
def test_a_retained_graph_gives_the_same_gradients_again(impl: Any) -> None:
    hidden, head, targets = example()
    loss = linear(hidden, head, targets, impl=impl) * 3
    first = torch.autograd.grad(loss, (hidden, head), retain_graph=True)
    kept = [g.clone() for g in first]
    second = torch.autograd.grad(loss, (hidden, head))
    assert_same(list(second), kept)
    assert_same(list(first), kept)


def test_second_derivatives_are_refused_not_wrong() -> None:
    hidden, head, targets = example()
    with pytest.raises(TokenSuperpositionError, match="only impl='reference' has second derivatives"):
        torch.autograd.grad(linear(hidden, head, targets), hidden, create_graph=True)
    (once,) = torch.autograd.grad(linear(hidden, head, targets, impl="reference"), hidden, create_graph=True)
    assert torch.autograd.grad(once.square().sum(), head)[0].abs().sum() > 0


@pytest.mark.parametrize("impl", ["chunked", "native", "reference"])
def test_derivatives_that_only_the_reference_has(impl: Any) -> None:
    hidden, head, targets = example()
    places = torch.tensor([3.0, 2.0, 1.0], requires_grad=True)

    def forward_mode() -> Tensor:
        return torch.func.jvp(lambda h: linear(h, head, targets, impl=impl), (hidden,), (hidden * 2,))[1]

    def by_places() -> Tensor:
        return torch.autograd.grad(linear(hidden, head, targets, places, impl=impl), places)[0].abs().sum()

    for derivative, message in ((forward_mode, "no forward-mode derivative"), (by_places, "place_weights asks for a")):
        if impl == "reference":
            assert derivative() != 0
        else:
            with pytest.raises(TokenSuperpositionError, match=message):
                derivative()
    with torch.no_grad():
        linear(hidden, head, targets, places, impl=impl)


@pytest.mark.parametrize("impl", ["chunked", "native", "triton"])
@pytest.mark.parametrize("frozen", ["hidden", "head"])
def test_a_frozen_input_gets_no_gradient(impl: Any, frozen: str) -> None:
    hidden, head, targets = example()
    want = gradients(lambda h, w: linear(h, w, targets), hidden, head)[1:]
    (hidden if frozen == "hidden" else head).requires_grad_(False)
    linear(hidden, head, targets, impl=impl).backward()
    assert (hidden.grad is None) == (frozen == "hidden") and (head.grad is None) == (frozen == "head")
    kept = head.grad if frozen == "hidden" else hidden.grad
    assert kept is not None
    torch.testing.assert_close(kept, want[1 if frozen == "hidden" else 0])


def test_deterministic_algorithms() -> None:
    hidden, head, targets = example()
    table = nn.Embedding(19, 4, dtype=torch.bfloat16)
    torch.use_deterministic_algorithms(True)
    try:
        runs = [gradients(lambda h, w: linear(h, w, targets), hidden, head) for _ in range(2)]
        for _ in range(2):
            table.weight.grad = None
            bag_embedding(table, targets.clamp(min=0)).float().sum().backward()
            assert table.weight.grad is not None
            runs.append([table.weight.grad.clone()])
    finally:
        torch.use_deterministic_algorithms(False)
    for first, second in ((runs[0], runs[1]), (runs[2], runs[3])):
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_nothing_is_kept_after_the_step() -> None:
    hidden, head, targets = example()

    def tensors() -> int:
        return sum(issubclass(type(o), Tensor) for o in gc.get_objects())

    linear(hidden.tanh(), head, targets).backward()  # makes the leaves' gradients
    gc.collect()
    gc.disable()  # a reference cycle would stay
    try:
        before = tensors()
        for _ in range(3):
            linear(hidden.tanh(), head, targets).backward()
        linear(hidden.tanh(), head, targets)  # never differentiated
        assert tensors() == before
    finally:
        gc.enable()


@pytest.mark.parametrize(
    ("n", "d", "chunk"),
    [(4096, 4, 240), (64, 256, 64)],  # whole logits would show, or a second gradient of the head
)
def test_one_chunk_of_logits_and_one_gradient_are_held(n: int, d: int, chunk: int) -> None:
    hidden, head = torch.randn(n, d, requires_grad=True), torch.randn(20_000, d, requires_grad=True)
    targets = torch.randint(20_000, (n, 4))
    peak = peak_bytes(lambda: linear(hidden, head, targets, impl="chunked").backward())
    gradients = 4 * (hidden.numel() + head.numel())
    assert 0 < peak - gradients < 1.1 * 4 * chunk * 20_000


def test_a_chunk_has_no_more_rows_than_its_bytes_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("token_superposition.loss.chunked.CHUNK_BYTES", 32 * 4 * 20_000)
    hidden, head = torch.randn(240, 4, requires_grad=True), torch.randn(20_000, 4, requires_grad=True)
    targets = torch.randint(20_000, (240, 4))
    peak = peak_bytes(lambda: linear(hidden, head, targets, impl="chunked").backward())
    assert 0 < peak < 2 * 4 * 32 * 20_000


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_a_bag_are_never_made(dtype: torch.dtype) -> None:
    table, ids = nn.Embedding(10, 256, dtype=dtype), torch.randint(10, (4, 100, 32))
    grad = torch.ones(4, 100, 256, dtype=dtype)
    peak = peak_bytes(lambda: bag_embedding(table, ids).backward(grad))
    assert 0 < peak < ids.numel() * 256 * dtype.itemsize / 2  # half of (B, L, s, d)


def test_the_step_reads_nothing_back() -> None:
    """No operation whose result the host must wait for on a GPU (there, tests/test_gpu.py asks CUDA itself)."""
    hidden, head, targets = example()
    table, ids = nn.Embedding(19, 4), targets.clamp(min=0)

    def step() -> None:
        linear(hidden + bag_embedding(table, ids), head, targets, softcap=3.0, z_loss=0.1, chunk_rows=5).backward()

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as p:
        step()
    seen = {e.name for e in p.events()}
    assert {"token_superposition::linear_multi_hot_loss", "aten::mm"} <= seen  # the profile looks inside the operator
    waiting = ("item", "_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "unique", "equal", "tolist")
    assert not {f"aten::{name}" for name in waiting} & seen


def test_a_chunk_of_low_precision_counts_its_logits_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("token_superposition.loss.chunked.CHUNK_BYTES", 32 * 4 * 20_000)
    hidden, head = (torch.randn(n, 4, dtype=torch.bfloat16, requires_grad=True) for n in (240, 20_000))
    targets = torch.randint(20_000, (240, 4))
    peak = peak_bytes(lambda: linear(hidden, head, targets, impl="chunked").backward())
    assert 0 < peak < 2.5 * 32 * 4 * 20_000  # 3.9 with chunks of 64 rows
