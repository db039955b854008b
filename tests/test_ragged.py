"""Bags that end at documents, lines and words: against a loop in plain Python, float64, and the plain method."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedTokenizerFast, default_data_collator

from tests.conftest import VOCAB, text, tiny, toml
from tests.test_trainer import Spy, arguments, losses
from token_superposition import (
    Phase,
    Schedule,
    TokenSuperpositionError,
    bag_embedding,
    fold,
    place_weights,
    ragged_fold,
    reference,
    span,
    superpose,
)
from token_superposition.data.boundaries import Boundaries, BoundaryKind, find_boundaries
from token_superposition.data.plan import PlannedDataset
from token_superposition.data.prepare import PrepareOptions, prepare
from token_superposition.data.store import Meta, TokenStore
from token_superposition.data.tokenizer import load_tokenizer
from token_superposition.embedding import bag_mean
from token_superposition.engines.transformers import TSTTrainer
from token_superposition.experiment.config import SuperpositionConfig, load_config
from token_superposition.experiment.metrics import read_metrics
from token_superposition.experiment.run import train

KINDS: tuple[BoundaryKind, ...] = ("document", "line", "word")
NOWHERE = Boundaries(np.zeros(VOCAB, bool), np.zeros(VOCAB, bool))


def present(bags: Tensor) -> list[list[int]]:  # (L, s) -> the tokens of each bag
    return [[t for t in bag if t >= 0] for bag in bags.tolist()]


# Folding


SIZE, SEED = st.integers(1, 6), st.integers(0, 99)


@settings(deadline=None)
@given(st.integers(1, 9), SIZE, SIZE, st.sampled_from([0.0, 0.1, 0.5, 1.0]), SEED)
def test_ragged_fold_is_the_reference(length: int, a: int, b: int, share: float, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1000, (3, span(length, a, b)), generator=g)
    begins = torch.rand(tokens.shape, generator=g) < share
    ids, targets = ragged_fold(tokens, begins, a, b)
    assert ids.shape == ((3, length, a) if a > 1 else (3, length))
    assert targets.shape == ((3, length, b) if b > 1 else (3, length))
    for row, at, i, t in zip(tokens.tolist(), begins.tolist(), ids, targets, strict=True):
        inputs, outputs = reference.ragged_fold(row, at, length, a, b)
        assert i.reshape(length, a).tolist() == [bag + [-1] * (a - len(bag)) for bag in inputs]
        assert t.reshape(length, b).tolist() == [bag + [-100] * (b - len(bag)) for bag in outputs]


@settings(deadline=None)
@given(st.integers(1, 9), SIZE, st.sampled_from([0.05, 0.3, 0.9]), SEED)
def test_no_bag_crosses_a_boundary_and_none_leaves_a_gap(length: int, s: int, share: float, seed: int) -> None:
    """Tokens are their own places, so a bag tells where it came from; every bag is there, whatever the boundaries."""
    begins = torch.rand(span(length, s, s), generator=torch.Generator().manual_seed(seed)) < share
    ids, targets = ragged_fold(torch.arange(len(begins)), begins, s, s)
    bags = present(ids.reshape(length, s))
    predicted = present(targets.reshape(length, s))
    assert predicted[:-1] == bags[1:]
    bags.append(predicted[-1])
    assert all(1 <= len(bag) <= s for bag in bags)
    assert list(chain(*bags)) == list(range(sum(map(len, bags))))
    assert not any(begins[place] for bag in bags for place in bag[1:])
    for bag, after in pairwise(bags):  # no bag ends early but at a boundary
        assert len(bag) == s or begins[after[0]]


@settings(deadline=None)
@given(st.integers(1, 9), SIZE, SIZE)
def test_without_boundaries_it_is_fold(length: int, a: int, b: int) -> None:
    tokens = torch.randint(1000, (2, span(length, a, b)))
    nowhere = torch.zeros_like(tokens, dtype=torch.bool)
    for got, want in zip(ragged_fold(tokens, nowhere, a, b), fold(tokens, a, b), strict=True):
        assert torch.equal(got, want) and got.dtype == want.dtype


def test_wrong_length_names_a_right_one() -> None:
    with pytest.raises(TokenSuperpositionError, match=r"cannot fold 9 tokens .* for example 8"):
        ragged_fold(torch.arange(9), torch.zeros(9, dtype=torch.bool), 2, 2)


def test_the_loop_in_the_documentation(prepared: Path) -> None:
    """As it stands there, on the store's own type of tokens: the sample of the plan."""
    page = Path(__file__).parents[1] / "docs" / "ragged.md"
    code = page.read_text().split("```python\n")[1].split("```")[0]
    tokenizer, store = load_tokenizer(str(prepared / "tokenizer")), TokenStore(prepared)
    boundaries = find_boundaries(tokenizer, "word")
    plan = PlannedDataset(store, Schedule([Phase(1, 3, 3)]), 16, 4, boundaries=boundaries)
    names: dict[str, Any] = {"tokenizer": tokenizer, "stream": store, "start": plan.start_of(2), "length": 16, "s": 3}
    exec(code, names)
    assert torch.equal(names["ids"], plan[2]["input_ids"]) and torch.equal(names["targets"], plan[2]["shift_labels"])


# The plan

BAGS = st.sampled_from([(1, 1), (3, 3), (4, 1), (1, 4), (4, 2)])


@settings(deadline=None, max_examples=50)
@given(st.lists(BAGS, min_size=1, max_size=3), st.integers(1, 5), st.booleans(), st.integers(0, 9))
def test_samples_begin_where_the_plain_plan_has_them(
    bags: list[tuple[int, int]], length: int, shift: bool, seed: int
) -> None:
    g = np.random.default_rng(seed)
    tokens = g.integers(0, 6, 3000)
    boundaries = Boundaries(g.random(6) < 0.3, g.random(6) < 0.3)
    schedule = Schedule(Phase(2, *b) for b in bags)
    plain, ragged = (PlannedDataset(tokens, schedule, length, 2, seed, 1, shift, b) for b in (None, boundaries))
    for i in range(len(plain)):
        start, phase = plain.start_of(i), schedule.at(i // 2)
        assert ragged.start_of(i) == start
        a, b = phase.input_bag, phase.output_bag
        if a == b == 1:
            assert all(torch.equal(ragged[i][key], value) for key, value in plain[i].items())
            continue
        here = tokens[start : start + span(length, a, b)]
        begins = [n == 0 or bool(boundaries.before[t] or boundaries.after[here[n - 1]]) for n, t in enumerate(here)]
        inputs, outputs = reference.ragged_fold(here.tolist(), begins, length, a, b)
        assert present(ragged[i]["input_ids"].reshape(length, a)) == inputs
        assert present(ragged[i]["shift_labels"].reshape(length, b)) == outputs
    for step in range(schedule.total_steps):
        ids = torch.stack([ragged[i]["input_ids"] for i in (2 * step, 2 * step + 1)])
        assert ragged.tokens_per_bag(step) == pytest.approx((ids >= 0).sum().item() / (2 * length))
        assert plain.tokens_per_bag(step) == schedule.at(step).input_bag


@pytest.mark.parametrize("bags", [(4, 4), (4, 1), (1, 4)])
def test_text_without_boundaries_gives_the_plain_samples(bags: tuple[int, int]) -> None:
    schedule, tokens = Schedule([Phase(5, *bags), Phase(5)]), np.random.default_rng(0).integers(0, VOCAB, 4000)
    plain, ragged = (PlannedDataset(tokens, schedule, 16, 4, boundaries=b) for b in (None, NOWHERE))
    for i in range(len(plain)):
        assert all(torch.equal(ragged[i][key], value) for key, value in plain[i].items())


# Tokenizers


def sentencepiece() -> PreTrainedTokenizerFast:
    """White space as a letter that is taken off the beginning of a text, bytes where a letter is missing."""
    bpe: Any = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    bpe.pre_tokenizer = pre_tokenizers.Metaspace()
    bpe.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Metaspace(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=special, show_progress=False, limit_alphabet=60)
    bpe.train_from_iterator((t.replace("\n", " ") for t in text()), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="</s>", unk_token="<unk>")


WORDS = "The river carries boats\nto the  sea, and bags hold tokens\n    return x + 12\n\n\nBag 7"


@pytest.mark.parametrize("which", ["byte-level", "sentencepiece"])
@pytest.mark.parametrize("kind", KINDS)
def test_boundaries_of_a_real_tokenizer(kind: BoundaryKind, which: str, prepared: Path) -> None:
    """Cut where they say, text is whole documents, lines, or words with the white space in front of them."""
    tokenizer: Any = load_tokenizer(str(prepared / "tokenizer")) if which == "byte-level" else sentencepiece()
    ids = [*tokenizer.encode(WORDS, add_special_tokens=False), tokenizer.eos_token_id]
    stream = np.array([*ids, *ids])
    boundaries = find_boundaries(tokenizer, kind)
    assert boundaries is not None and find_boundaries(tokenizer, "none") is None
    cuts = [*np.flatnonzero(boundaries.begins(stream)).tolist(), len(stream)]
    lead = ids[:1]  # in front of every part: the white space at the beginning of a text may be taken off

    def decode(tokens: list[int]) -> str:
        return tokenizer.backend_tokenizer.decode(lead + tokens, skip_special_tokens=False)

    parts = [decode(stream[i:j].tolist()).removeprefix(decode([])) for i, j in pairwise(cuts)]
    half = parts[: len(parts) // 2]
    document = "".join(half)
    assert parts == half * 2 and document.strip(" ") == WORDS + tokenizer.eos_token
    if kind == "document":
        assert len(half) == 1
    elif kind == "line":
        assert [p.strip(" ") for p in half[:2]] == ["The river carries boats\n", "to the  sea, and bags hold tokens\n"]
        assert not any("\n" in p.strip() for p in half)
    else:
        assert [w for p in half for w in p.split()] == document.split()  # no word is cut
        assert all(len(p.split()) <= 1 for p in half)


# The embedding

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


# Training


@pytest.mark.parametrize("bags", [(4, 4), (4, 1), (1, 4)])
@pytest.mark.parametrize("options", [{}, {"weighting": "power"}, {"bag_loss": "sum-to-one"}])
def test_first_step_on_ragged_bags_is_the_reference(
    options: dict[str, Any], bags: tuple[int, int], prepared: Path, tmp_path: Path
) -> None:
    """Loss and gradients of one step against float64 arithmetic on hand-averaged embeddings and whole logits."""
    boundaries = find_boundaries(load_tokenizer(str(prepared / "tokenizer")), "word")
    plan = PlannedDataset(TokenStore(prepared), Schedule([Phase(1, *bags)]), 16, 4, seed=1, boundaries=boundaries)
    batch, spy = default_data_collator([plan[i] for i in range(4)]), Spy()
    for key, bag, absent in zip(("input_ids", "shift_labels"), bags, (-1, -100), strict=True):
        empty = (batch[key].reshape(-1, bag) == absent).sum(1)
        assert set(empty.tolist()) >= {0, bag - 1}
    tied = bags == (4, 4)
    args = arguments(tmp_path, max_steps=1, max_grad_norm=0.0)
    trainer = TSTTrainer(
        tiny("llama", tie_word_embeddings=tied), args, train_dataset=plan, callbacks=[spy], **options
    )  # fmt: skip
    trainer.train()
    model = tiny("llama", tie_word_embeddings=tied).double()
    weight = model.get_input_embeddings().weight
    embeds = reference.bag_embedding(weight, batch["input_ids"].reshape(4, 16, -1))  # pyright: ignore
    logits, targets = model(inputs_embeds=embeds).logits.flatten(0, 1), batch["shift_labels"].reshape(64, -1)
    if "bag_loss" in options:
        loss = reference.sum_to_one_cross_entropy(logits, targets)
    else:
        w = place_weights(options.get("weighting", "uniform"), bags[1]).double()
        loss = reference.multi_hot_cross_entropy(logits, targets, w)
    assert losses(trainer)[0] == pytest.approx(loss.item(), rel=1e-4)
    loss.backward()
    for name, p in model.named_parameters():
        assert p.grad is not None
        torch.testing.assert_close(spy.grads[name].double(), p.grad, rtol=2e-3, atol=2e-6, msg=name)


Run = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def run(write_config: Callable[..., Path], tmp_path: Path) -> Run:
    """``tst train`` in this process: the lines of the metrics without times."""

    def go(
        name: str, data: str = "", resume_from: Path | None = None, save_at: tuple[int, ...] = (), **settings: Any
    ) -> list[dict[str, Any]]:
        path = write_config()
        lines = "".join(f"{key} = {toml(value)}\n" for key, value in settings.items())
        path.write_text(path.read_text().replace("[superposition]\n", f"[superposition]\n{lines}"))
        config = load_config(path)
        config = replace(
            config,
            data=replace(config.data, path=data or config.data.path),
            train=replace(config.train, save_at=save_at),
        )
        train(config, tmp_path / name, resume_from=resume_from)
        metrics = read_metrics(tmp_path / name / "metrics.jsonl")
        return [{k: v for k, v in m.items() if k != "seconds"} for m in metrics]

    return go


def test_one_long_document_is_the_plain_method(run: Run, tmp_path: Path) -> None:
    """Every loss and every validation, bit for bit: a sample that meets no boundary is the plain one."""
    (tmp_path / "text").mkdir()
    for i in range(2):
        (tmp_path / f"text/{i}.txt").write_text("\n".join(text(200 + i)))
    data = tmp_path / "data"
    prepare([str(tmp_path / "text")], data, PrepareOptions(vocab_size=VOCAB, validation_share=0.5, seed=0))
    assert Meta.load(data).train.documents == 1
    plain, ragged = run("plain", str(data)), run("ragged", str(data), boundaries="document")
    assert [m["tokens_per_bag"] for m in ragged if "loss" in m] == [4] * 6 + [1] * 6
    assert [{k: v for k, v in m.items() if k != "tokens_per_bag"} for m in ragged] == plain


def test_a_run_on_ragged_bags_resumes_as_itself(run: Run, tmp_path: Path) -> None:
    """With a bag size and a shift that change by step and by sample."""
    settings: dict[str, Any] = {"boundaries": "word", "anneal": [6, 3], "mixture": 1.0, "shift": True}
    saves = (4, 6)
    whole = run("whole", save_at=saves, **settings)
    trained = [m for m in whole if "loss" in m]
    for m in trained:
        assert 1 < m["tokens_per_bag"] < m["input_bag"] or m["tokens_per_bag"] == m["input_bag"] == 1
    assert Counter(m["input_bag"] for m in trained) == {6: 3, 3: 3, 1: 6}
    plain = [m for m in run("plain", **(settings | {"boundaries": "none"})) if "loss" in m]
    assert [m["raw_tokens"] for m in trained] == [m["raw_tokens"] for m in plain]  # passed over, but used up
    assert [m["loss"] for m in trained] != [m["loss"] for m in plain]
    for step in saves:
        checkpoint = tmp_path / f"whole/checkpoints/checkpoint-{step}"
        assert run(f"resumed{step}", resume_from=checkpoint, save_at=saves, **settings) == whole


def test_a_random_bag_size_for_every_step() -> None:
    """``mixture = 1``: as many steps of each size, and what a step has says nothing of the next."""
    schedule = SuperpositionConfig(anneal=(8, 4, 2), mixture=1.0, ratio=0.75).schedule(4000)
    sizes = [schedule.at(step).input_bag for step in range(3000)]
    assert Counter(sizes) == {8: 1000, 4: 1000, 2: 1000}
    pairs = Counter(pairwise(sizes))
    assert len(pairs) == 9 and all(abs(n - 333) < 60 for n in pairs.values())
