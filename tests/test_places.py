"""Weights and signal of the places of a bag that is read: against lookups, limit cases, nothing left in the model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM

from benchmarks.measure import peak_bytes
from tests.conftest import TINY, VOCAB, tiny
from tests.test_variants import changed
from token_superposition import TokenSuperpositionError, bag_embedding, superpose, unsuperpose
from token_superposition.experiment.config import Config, load_config
from token_superposition.experiment.files import read_metrics
from token_superposition.experiment.run import train
from token_superposition.experiment.superposition import SuperpositionConfig
from token_superposition.places import _kept_signs, _signs, place_factors, placed_bag_mean, shares  # pyright: ignore
from token_superposition.weights import Weighting, _kept, place_weights, weights_for  # pyright: ignore

IDS = torch.randint(VOCAB, (2, 6, 3), generator=torch.Generator().manual_seed(1))
SIGNAL = 0.5
READINGS: list[tuple[float, Weighting]] = [(SIGNAL, "uniform"), (0.0, "power"), (0.25, "exponential")]
readings = pytest.mark.parametrize("signal, weighting", READINGS)


def signs(bag_size: int, width: int) -> Tensor:
    return place_factors(bag_size, width, 1.0, torch.empty(0, dtype=torch.float64)) - 1


def test_the_signs_are_those_of_every_version() -> None:
    """A run that goes on with a later version reads its bags as it did."""
    bits = (_signs(3, 16, torch.device("cpu")) > 0).int()
    rows = ["".join(map(str, row)) for row in bits.tolist()]
    assert rows == ["0010001011011110", "0101100010111100", "1100110001010100"]


def by_hand(
    rows: Tensor, signal: float = SIGNAL, weighting: Weighting = "uniform"
) -> Tensor:  # (..., s, d) -> (..., d)
    s, d = rows.shape[-2:]
    weights = place_weights(weighting, s).double().flip(0)  # the last token has the first weight
    return (rows * (1 + signal * signs(s, d)) * (weights / weights.sum()).unsqueeze(1)).sum(-2)


def lines_of(config: Config, out: Path, branch_from: Path | None = None) -> list[dict[str, Any]]:
    train(config, out, branch_from=branch_from)
    return [{k: v for k, v in m.items() if k != "seconds"} for m in read_metrics(out / "metrics.jsonl")]


def test_signs_are_of_a_place() -> None:
    p = signs(16, 4096)
    assert set(p.unique().tolist()) == {-1.0, 1.0}
    assert torch.equal(signs(4, 4096), p[:4])  # whatever the bag size
    similar = p @ p.T / 4096
    assert (similar - torch.eye(16)).abs().max() < 0.1 and p.mean(1).abs().max() < 0.1
    assert torch.equal(place_factors(2, 8, 0.25, torch.empty(0)), (1 + 0.25 * signs(2, 8)).float())


@readings
@pytest.mark.parametrize("architecture", TINY)
def test_bags_are_read_with_their_places(architecture: str, signal: float, weighting: Weighting) -> None:
    """Against float64; the embedding is plain, tied, scaled inside (Gemma 3) or outside it (Gemma 1, 2)."""
    model = tiny(architecture).double().eval()
    if architecture == "qwen3_moe":
        model.set_experts_implementation("eager")  # the grouped product has no float64
    rows = model.get_input_embeddings()(IDS)
    expected, plain = (
        model(inputs_embeds=by_hand(rows, signal, weighting)).logits,
        model(inputs_embeds=rows.mean(2)).logits,
    )
    ordinary, names = model(IDS[..., 0]).logits, list(model.state_dict())
    superpose(model, place_signal=signal, input_weighting=weighting)
    torch.testing.assert_close(model(input_ids=IDS).logits, expected)
    assert not torch.allclose(expected, plain)
    assert not torch.allclose(model(input_ids=IDS.flip(2)).logits, expected)  # order is seen
    assert torch.equal(model(IDS[..., 0]).logits, ordinary)  # dropped at the switch
    assert list(model.state_dict()) == names
    torch.testing.assert_close(superpose(unsuperpose(model))(input_ids=IDS).logits, plain)


def test_without_signal_and_weights_it_is_the_plain_embedding() -> None:
    model = superpose(tiny("llama"), place_signal=0.0, input_weighting="uniform").eval()
    plain = superpose(tiny("llama")).eval()
    assert torch.equal(model(input_ids=IDS).logits, plain(input_ids=IDS).logits)
    table = nn.Embedding(9, 4, padding_idx=2)
    assert torch.equal(bag_embedding(table, IDS % 9, 0.0, "uniform"), bag_embedding(table, IDS % 9))
    for dtype in (torch.float64, torch.bfloat16):  # the path of weighted bags, with the weights of the plain mean
        w, ids = torch.randn(9, 4, dtype=dtype), IDS.reshape(-1, 3) % 9
        got = placed_bag_mean(w, ids, 0, -1, 0.0, "uniform")
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(got.double(), w[ids].double().mean(1), rtol=eps, atol=eps)


@given(st.integers(1, 6), st.sampled_from(["uniform", "power", "exponential", "first", "fitted"]), st.integers(0, 999))
def test_shares_of_ragged_bags(s: int, weighting: Weighting, seed: int) -> None:
    """Those that are there share 1, by their order from the end; in a whole bag they are the weights themselves."""
    ids = torch.randint(-2, 3, (20, s), generator=torch.Generator().manual_seed(seed))
    got = shares(ids, weighting, torch.float64)
    weights = place_weights(weighting, s).double()
    for row, share in zip(ids, got, strict=True):
        there = [i for i in reversed(range(s)) if row[i] >= 0]
        want = torch.zeros(s, dtype=torch.float64)
        for rank, place in enumerate(there):
            want[place] = weights[rank] / weights[: len(there)].sum()
        torch.testing.assert_close(share, want)
    whole = shares(torch.ones(1, s, dtype=torch.long), weighting, torch.float64)[0]
    torch.testing.assert_close(whole.flip(0), weights / weights.sum())


def test_a_model_reads_bags_in_one_way() -> None:
    model = superpose(tiny("llama"), place_signal=SIGNAL).eval()
    once = model(input_ids=IDS).logits
    assert torch.equal(superpose(model, place_signal=SIGNAL)(input_ids=IDS).logits, once)
    assert torch.equal(copy.deepcopy(model)(input_ids=IDS).logits, once)
    with pytest.raises(TokenSuperpositionError, match=r"place_signal 0.5 already, not 0.0; unsuperpose it first"):
        superpose(model)
    with pytest.raises(TokenSuperpositionError, match=r"weighting uniform already, not power; unsuperpose it first"):
        superpose(model, place_signal=SIGNAL, input_weighting="power")
    assert type(unsuperpose(model).get_input_embeddings()) is nn.Embedding
    assert not hasattr(model.get_input_embeddings(), "place_signal")
    assert not hasattr(model.get_input_embeddings(), "weighting")


@readings
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("padding", [None, 5])
def test_value_and_gradient_are_those_of_lookups(
    dtype: torch.dtype, padding: int | None, signal: float, weighting: Weighting
) -> None:
    g = torch.Generator().manual_seed(2)
    ids = torch.randint(12, (4, 7, 5), generator=g)
    ids[0] = 5
    table = nn.Embedding(12, 8, padding_idx=padding, dtype=dtype)
    exact = table.weight.detach().double().requires_grad_()
    weigh = torch.randn(4, 7, 8, generator=g, dtype=torch.float64)
    expected, got = by_hand(exact[ids], signal, weighting), bag_embedding(table, ids, signal, weighting)
    assert got.dtype == dtype
    rounding = {torch.float32: 1e-6, torch.float64: 1e-14, torch.bfloat16: 2**-8}[dtype]  # once, of the result
    torch.testing.assert_close(got.double(), expected, rtol=rounding, atol=rounding)
    (want,) = torch.autograd.grad((expected * weigh.to(dtype)).sum(), exact)
    if padding is not None:
        want[padding] = 0
    (grad,) = torch.autograd.grad((got * weigh.to(dtype)).sum(), table.weight)
    torch.testing.assert_close(grad.double(), want, rtol=rounding, atol=10 * rounding)


@readings
def test_an_embedding_that_is_not_stock_is_asked_for_rows(signal: float, weighting: Weighting) -> None:
    table = nn.Embedding(12, 8, scale_grad_by_freq=True, dtype=torch.float64)
    ids = IDS % 12
    torch.testing.assert_close(bag_embedding(table, ids, signal, weighting), by_hand(table(ids), signal, weighting))


@pytest.mark.parametrize(("signal", "weighting"), [(0.0, "uniform"), (SIGNAL, "uniform"), (0.0, "power")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("padding", [None, 0])
def test_an_id_beyond_the_table_is_refused(
    dtype: torch.dtype, padding: int | None, signal: float, weighting: Weighting
) -> None:
    """As torch refuses it in a lookup. A place below 0 is empty; the last row is still there."""
    table = nn.Embedding(12, 8, padding_idx=padding, dtype=dtype)
    assert bag_embedding(table, torch.tensor([[[11, -1]]]), signal, weighting).abs().sum() > 0
    for ids in ([[1, 12]], [[10**6, -1]]):
        with pytest.raises((IndexError, RuntimeError)):
            bag_embedding(table, torch.tensor([ids]), signal, weighting)


@readings
def test_parts_of_a_vocabulary_sum_to_the_whole(signal: float, weighting: Weighting) -> None:
    weight = torch.randn(11, 4, dtype=torch.float64, requires_grad=True)
    ids = torch.randint(11, (9, 3))
    whole = by_hand(weight[ids], signal, weighting)
    parts = [placed_bag_mean(weight[a:b], ids, a, 7, signal, weighting) for a, b in ((0, 6), (6, 11))]
    torch.testing.assert_close(parts[0] + parts[1], whole)
    (want,) = torch.autograd.grad(whole.square().sum(), weight)
    want[7] = 0
    torch.testing.assert_close(torch.autograd.grad((parts[0] + parts[1]).square().sum(), weight)[0], want)


@readings
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_a_bag_are_never_made(dtype: torch.dtype, signal: float, weighting: Weighting) -> None:
    table, ids = nn.Embedding(10, 256, dtype=dtype), torch.randint(10, (4, 100, 32))
    grad = torch.ones(4, 100, 256, dtype=dtype)
    peak = peak_bytes(lambda: bag_embedding(table, ids, signal, weighting).backward(grad))
    assert 0 < peak < ids.numel() * 256 * dtype.itemsize / 4  # a quarter of (B, L, s, d)


@readings
@pytest.mark.parametrize("stock", [True, False])
@pytest.mark.parametrize("aside", [FakeTensorMode, torch.inference_mode])
def test_shapes_alone_leave_nothing_behind(
    signal: float, weighting: Weighting, stock: bool, aside: Callable[[], Any]
) -> None:
    """Signs and weights are kept between calls: not those of shapes, and those made without gradients serve with."""
    _kept_signs.cache_clear()
    _kept.cache_clear()
    with aside():
        ids = torch.zeros(2, 3, 4, dtype=torch.long)
        table = nn.Embedding(7, 5, scale_grad_by_freq=not stock)
        assert bag_embedding(table, ids, signal, weighting).shape == (2, 3, 5)
    table, ids = nn.Embedding(7, 5, scale_grad_by_freq=not stock), torch.randint(7, (2, 3, 4))
    want = by_hand(table.weight[ids].double(), signal, weighting).float()
    got = bag_embedding(table, ids, signal, weighting)
    torch.testing.assert_close(got, want)
    got.sum().backward()


def test_weights_are_made_once() -> None:
    _kept.cache_clear()
    for _ in range(2):
        bag_embedding(nn.Embedding(7, 5), torch.randint(7, (2, 3, 4)), 0.0, "power").sum().backward()
    kept = weights_for(IDS, "power")
    assert kept is weights_for(IDS[0], "power") and (_kept.cache_info().hits, _kept.cache_info().misses) == (2, 2)


@readings
def test_it_compiles_whole(signal: float, weighting: Weighting) -> None:
    table = nn.Embedding(10, 8)
    superpose(table, table, place_signal=signal, input_weighting=weighting)
    torch._dynamo.reset()
    compiled = torch.compile(table, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(IDS % 10), by_hand(table.weight[IDS % 10].double(), signal, weighting).float())
    compiled(IDS % 10).sum().backward()
    assert table.weight.grad is not None


def test_where_no_bag_is_read_it_is_the_plain_method(write_config: Callable[..., Path], tmp_path: Path) -> None:
    plain = changed(load_config(write_config()), {"bag_size": 1})
    stock = tiny("llama").eval()
    marked = superpose(tiny("llama"), place_signal=0.5, input_weighting="power").eval()
    assert torch.equal(marked(input_ids=IDS[..., 0]).logits, stock(input_ids=IDS[..., 0]).logits)
    other = changed(plain, {"place_signal": 0.5, "input_weighting": "power"})
    assert lines_of(plain, tmp_path / "plain") == lines_of(other, tmp_path / "other")


@pytest.mark.parametrize("reading", [{"place_signal": SIGNAL}, {"input_weighting": "power"}], ids=str)
def test_a_run_resumes_and_ends_as_a_stock_model(
    reading: dict[str, Any], write_config: Callable[..., Path], tmp_path: Path
) -> None:
    unread = load_config(write_config())
    config, plain = changed(unread, reading, save_at=(4, 6, 9)), lines_of(unread, tmp_path / "plain")
    whole = lines_of(config, tmp_path / "whole")
    losses = [[m["loss"] for m in lines if "loss" in m] for lines in (plain, whole)]
    assert not set(losses[0]) & set(losses[1]) and all(abs(a - b) < 0.5 for a, b in zip(*losses, strict=True))
    for step in (4, 6, 9):  # before, at and after the switch
        checkpoint = tmp_path / f"whole/checkpoints/checkpoint-{step}"
        assert lines_of(config, tmp_path / f"{step}", checkpoint) == whole
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path / "whole/model", output_loading_info=True)
    assert not any(info.values())
    assert [p.name for p in sorted((tmp_path / "whole/model").iterdir())] == [
        p.name for p in sorted((tmp_path / "plain/model").iterdir())
    ]
    assert (tmp_path / "whole/model/config.json").read_text() == (tmp_path / "plain/model/config.json").read_text()


def test_refusals() -> None:
    with pytest.raises(TokenSuperpositionError, match=r"superposition.place_signal is 1.5; give a number in \[0, 1\]"):
        changed(Config(), {"place_signal": 1.5}).check()
    with pytest.raises(TokenSuperpositionError, match=r"place_signal is nan; give a number in \[0, 1\]"):
        superpose(tiny("llama"), place_signal=float("nan"))
    with pytest.raises(TokenSuperpositionError, match=r"superposition.place_signal is 0.5; the other engine does not"):
        replace(SuperpositionConfig(), place_signal=0.5).refuse_variants("other")
    with pytest.raises(TokenSuperpositionError, match=r"input_weighting is 'power'; the other engine does not"):
        replace(SuperpositionConfig(), input_weighting="power").refuse_variants("other")
    with pytest.raises(TokenSuperpositionError, match=r"weighting is 'last'; choose one of uniform, power"):
        superpose(tiny("llama"), input_weighting="last")  # pyright: ignore
