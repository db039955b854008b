"""The bag as one composite label: value and gradients of the specification, and ordinary cross-entropy at s = 1."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from transformers import default_data_collator

from tests.conftest import tiny
from tests.test_loss import example
from tests.test_trainer import arguments, losses, plan_of
from token_superposition import TokenSuperpositionError, reference
from token_superposition import linear_multi_hot_cross_entropy as linear
from token_superposition import multi_hot_cross_entropy as on_logits
from token_superposition.engines.transformers import TSTTrainer
from token_superposition.experiment.config import Config
from token_superposition.experiment.superposition import SuperpositionConfig
from token_superposition.loss.vocab_parallel import VocabParallel


@pytest.mark.parametrize("impl", ["reference", "chunked"])
@settings(deadline=None, max_examples=30)
@given(
    n=st.integers(0, 7),
    d=st.integers(1, 5),
    v=st.integers(1, 9),  # few tokens: bags repeat them
    s=st.integers(1, 5),
    masked=st.sampled_from([0.0, 0.3, 1.0]),
    rows=st.integers(1, 3),
    rich=st.booleans(),
    seed=st.integers(0, 99),
)
def test_value_and_gradients_are_the_specification(
    impl: Any, n: int, d: int, v: int, s: int, masked: float, rows: int, rich: bool, seed: int
) -> None:
    hidden, head, bias, targets = example(n, d, v, s, masked, seed)
    options: dict[str, Any] = {"softcap": 2.0, "logit_scale": 0.7, "z_loss": 0.1} if rich else {}
    logits = hidden @ head.T * options.get("logit_scale", 1.0) + bias
    logits = 2.0 * torch.tanh(logits / 2.0) if rich else logits
    expected = reference.sum_to_one_cross_entropy(logits, targets)
    if rich:
        valid = (targets != -100).any(1)
        expected = expected + 0.1 * (logits.logsumexp(1).square() * valid).sum() / valid.sum().clamp(min=1)
    got = linear(hidden, head, targets, bias=bias, impl=impl, chunk_rows=rows, loss="sum-to-one", **options)
    torch.testing.assert_close(got, expected)
    wanted = torch.autograd.grad(expected, (hidden, head, bias))
    for gradient, want in zip(torch.autograd.grad(got, (hidden, head, bias)), wanted, strict=True):
        torch.testing.assert_close(gradient, want)


@pytest.mark.parametrize("impl", ["reference", "chunked"])
def test_gradcheck(impl: Any) -> None:
    hidden, head, bias, targets = example(4, 3, 7, 3, 0.2, 2)

    def loss(h: Tensor, weight: Tensor, b: Tensor) -> Tensor:
        return linear(h, weight, targets, bias=b, softcap=2.0, z_loss=0.1, impl=impl, loss="sum-to-one")

    assert torch.autograd.gradcheck(loss, (hidden, head, bias))


@pytest.mark.parametrize("impl", ["reference", "chunked"])
def test_one_target_is_ordinary_cross_entropy(impl: Any) -> None:
    hidden, head, bias, targets = example(5, 4, 13, 1, 0.2, 7, torch.float32)
    expected = F.cross_entropy(hidden @ head.T + bias, targets[:, 0])
    got = linear(hidden, head, targets[:, 0], bias=bias, impl=impl, loss="sum-to-one")
    torch.testing.assert_close(got, expected)
    wanted = torch.autograd.grad(expected, (hidden, head, bias))
    for gradient, want in zip(torch.autograd.grad(got, (hidden, head, bias)), wanted, strict=True):
        torch.testing.assert_close(gradient, want)


@pytest.mark.parametrize("impl", ["reference", "chunked"])
def test_extreme_logits_and_masked_rows(impl: Any) -> None:
    """A bag 2e4 below the best logit, a masked row of rubbish: finite, and what can be worked out by hand."""
    hidden = torch.tensor([[1e4], [1e4], [math.nan]], requires_grad=True)
    head = torch.tensor([[1.0], [-1.0], [-1.0]], requires_grad=True)
    targets = torch.tensor([[1, 2], [0, 2], [-100, -100]])
    got = linear(hidden, head, targets, impl=impl, loss="sum-to-one", reduction="sum")
    assert got.item() == pytest.approx(2e4 - math.log(2), rel=1e-6)  # the second bag has all the probability
    by_hidden, by_head = torch.autograd.grad(got, (hidden, head))
    assert by_hidden.flatten().tolist() == pytest.approx([2.0, 0.0, 0.0], rel=1e-3)
    assert by_head.flatten().tolist() == pytest.approx([1e4, -5e3, -5e3], rel=1e-3)


def test_the_bag_is_a_set_whose_probability_never_passes_one() -> None:
    logits = torch.tensor([[0.0, 1.0, 30.0]])
    repeated = on_logits(logits, torch.tensor([[2, 2, 0]]), loss="sum-to-one")
    assert 0 <= repeated.item() < 1e-6  # twice the probability of token 2 would give -ln 2
    torch.testing.assert_close(repeated, on_logits(logits, torch.tensor([[0, 2, -100]]), loss="sum-to-one"))
    whole = on_logits(torch.randn(4, 3), torch.tensor([[0, 1, 2]] * 4), loss="sum-to-one")
    torch.testing.assert_close(whole, torch.zeros(()))


def test_the_trainer_trains_on_it(prepared: Path, tmp_path: Path) -> None:
    """The first loss on bags is the float64 specification; without bags every loss is that of the plain method."""
    plan = plan_of(prepared, steps=4)
    trainer = TSTTrainer(tiny("llama"), arguments(tmp_path, max_steps=1), train_dataset=plan, bag_loss="sum-to-one")
    trainer.train()
    batch = default_data_collator([plan[i] for i in range(4)])
    model = tiny("llama").double()
    logits = model(inputs_embeds=model.get_input_embeddings()(batch["input_ids"]).mean(2)).logits
    expected = reference.sum_to_one_cross_entropy(logits.flatten(0, 1), batch["shift_labels"].flatten(0, 1))
    assert losses(trainer)[0] == pytest.approx(expected.item(), rel=1e-4)

    ordinary: list[list[float]] = []
    for loss in ("multi-hot", "sum-to-one"):
        plain = plan_of(prepared, steps=4, bag=1)
        trainer = TSTTrainer(tiny("llama"), arguments(tmp_path), train_dataset=plain, bag_loss=loss)  # pyright: ignore
        trainer.train()
        ordinary.append(losses(trainer))
    assert ordinary[0] == pytest.approx(ordinary[1], rel=1e-5)


ONES, BAGS = torch.ones(2, 3), torch.zeros(2, 2, dtype=torch.long)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: linear(ONES, ONES, BAGS, loss="hinge"), "loss is 'hinge'; choose one of multi-hot"),  # pyright: ignore
        (lambda: on_logits(ONES, BAGS, loss="hinge"), "loss is 'hinge'; choose one of multi-hot"),  # pyright: ignore
        (lambda: linear(ONES, ONES, BAGS, torch.ones(2), loss="sum-to-one"), "place_weights are given for the sum-to"),
        (lambda: linear(ONES, ONES, BAGS, loss="sum-to-one", impl="native"), "impl='native' has no sum-to-one loss"),
        (lambda: linear(ONES, ONES, BAGS, loss="sum-to-one", impl="liger"), "impl='liger' has no sum-to-one loss"),
        (lambda: linear(ONES, ONES, BAGS, loss="sum-to-one", impl="triton"), "use impl='chunked' on a whole head"),
        (
            lambda: replace(Config(), superposition=SuperpositionConfig(loss="sum-to-one", weighting="power")).check(),
            "superposition.loss sum-to-one has no place weights; leave superposition.weighting 'power' out",
        ),
    ],
)
def test_bad_input_has_one_clear_line(call: Callable[[], object], message: str) -> None:
    with pytest.raises(TokenSuperpositionError, match=message):
        call()


def test_a_sharded_head_is_refused(tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        place = VocabParallel(dist.group.WORLD, 0)  # pyright: ignore
        with pytest.raises(TokenSuperpositionError, match="a head sharded over the vocabulary has no sum-to-one loss"):
            linear(ONES, ONES, BAGS, loss="sum-to-one", vocab_parallel=place)
    finally:
        dist.destroy_process_group()
