"""The mean of bags with empty places: against the reference in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.conftest import tiny
from token_superposition import (
    bag_embedding,
    reference,
    superpose,
)
from token_superposition.embedding import bag_mean

RAGGED = torch.tensor([[[3, 5, 3], [4, -1, -1], [0, 6, -1]], [[6, 6, 6], [0, -1, -1], [1, 2, 3]]])


class Doubled(nn.Embedding):
    """One that we do not know."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def test_gradcheck_against_the_reference() -> None:
    weight = torch.randn(7, 4, dtype=torch.float64, requires_grad=True)

    def ours(w: Tensor) -> Tensor:
        return bag_mean(w, RAGGED.reshape(-1, 3), 0, -1).unflatten(0, RAGGED.shape[:2])

    torch.testing.assert_close(ours(weight), reference.bag_embedding(weight, RAGGED))
    nothing = torch.full((1, 1, 3), -1)
    empty = bag_mean(weight, nothing.reshape(-1, 3), 0, -1)
    assert torch.equal(empty, reference.bag_embedding(weight, nothing)[0]) and not empty.any()
    assert torch.autograd.gradcheck(ours, (weight,))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["plain", "padding row", "unknown"])
@pytest.mark.parametrize("compiled", [False, True])
def test_absent_places_are_not_in_the_mean(kind: str, dtype: torch.dtype, compiled: bool) -> None:
    table = (Doubled if kind == "unknown" else nn.Embedding)(7, 4, padding_idx=5 if kind == "padding row" else None)
    table = table.to(dtype)
    weight = table.weight.detach().double().requires_grad_()
    want = reference.bag_embedding(weight, RAGGED) * (2 if kind == "unknown" else 1)
    grad = torch.randn(want.shape)
    superpose(table, table)
    torch._dynamo.reset()
    got = torch.compile(table, backend="aot_eager", fullgraph=True)(RAGGED) if compiled else table(RAGGED)
    rounding: dict[str, float] = {"rtol": 1e-6, "atol": 1e-6}
    if dtype == torch.bfloat16:
        rounding = {"rtol": 2**-7, "atol": 2**-6}
    torch.testing.assert_close(got.double(), want, **rounding)
    got.backward(grad.to(dtype))
    want.backward(grad.to(dtype).double())
    assert weight.grad is not None and table.weight.grad is not None
    if kind == "padding row":
        weight.grad[5] = 0
    torch.testing.assert_close(table.weight.grad.double(), weight.grad, **rounding)


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 300), st.integers(1, 5), st.sampled_from([0, 3]), st.sampled_from([-1, 3, 5]), st.integers(0, 99))
def test_a_part_of_a_vocabulary(n: int, s: int, start: int, padding: int, seed: int) -> None:
    """The parts that two processes hold add up to the mean, and so do their gradients, on any order of absence."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(-2, 9, (n, s), generator=g)
    ids[:, 0].clamp_(min=0)
    whole = torch.randn(9, 3, generator=g).double().requires_grad_()
    want = reference.bag_embedding(whole, ids.unsqueeze(0))[0]
    parts = [whole.detach()[:4].requires_grad_(), whole.detach()[4:].requires_grad_()]
    got = bag_mean(parts[0], ids, 0, -1) + bag_mean(parts[1], ids, 4, -1)
    torch.testing.assert_close(got, want)
    grad = torch.randn(want.shape, generator=g).double()
    (expected,) = torch.autograd.grad(want, whole, grad)
    torch.testing.assert_close(torch.cat(torch.autograd.grad(got, parts, grad)), expected)


def test_the_operator_as_torch_asks_and_without_memory() -> None:
    weight = torch.randn(7, 4, requires_grad=True)
    torch.library.opcheck(bag_mean, (weight, RAGGED.reshape(-1, 3), 0, 3))
    for device in (torch.device("meta"), FakeTensorMode()):
        with device:
            for dtype in (torch.float32, torch.bfloat16):
                ids = torch.zeros(2, 3, 4, dtype=torch.long)
                assert bag_embedding(nn.Embedding(7, 5, dtype=dtype), ids).shape == (2, 3, 5)


def test_a_scaled_embedding_scales_what_is_there() -> None:
    embedding = tiny("gemma3_text").get_input_embeddings()
    want = reference.bag_embedding(embedding.weight, RAGGED) * 32**0.5  # pyright: ignore
    torch.testing.assert_close(bag_embedding(embedding, RAGGED), want, rtol=1e-4, atol=1e-5)
