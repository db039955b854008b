"""Bags that end at documents, lines and words: against a loop in plain Python, float64, and the plain method."""

from __future__ import annotations

import copy
import json
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from tests.conftest import VOCAB, text
from token_superposition import (
    Phase,
    Schedule,
    TokenSuperpositionError,
    fold,
    ragged_fold,
    reference,
    span,
)
from token_superposition.data.boundaries import Boundaries, BoundaryKind, find_boundaries
from token_superposition.data.plan import PlannedDataset
from token_superposition.data.store import TokenStore
from token_superposition.data.tokenizer import load_tokenizer

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


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.float32])
@pytest.mark.filterwarnings("error")
def test_boundaries_may_be_numbers(dtype: torch.dtype) -> None:
    tokens, begins = torch.arange(8), torch.tensor([0, 0, 0, 1, 0, 1, 0, 0])
    want = ragged_fold(tokens, begins.bool(), 2, 2)
    for got, expected in zip(ragged_fold(tokens, begins.to(dtype), 2, 2), want, strict=True):
        assert torch.equal(got, expected)


def test_wrong_length_names_a_right_one() -> None:
    for begins in (torch.ones(1), torch.ones(2, 8), np.ones(8), [1] * 8):
        with pytest.raises(TokenSuperpositionError, match=r"begins is a \w+ of shape .*, tokens have \(8,\)"):
            ragged_fold(torch.arange(8), begins, 2, 2)  # pyright: ignore
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
    plain, ragged = (
        PlannedDataset(tokens, schedule, length, 2, seed, shift=shift, boundaries=b) for b in (None, boundaries)
    )
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


@pytest.mark.parametrize("kind", KINDS)
def test_boundaries_where_ids_have_a_gap(kind: BoundaryKind, prepared: Path) -> None:
    """As cl100k's have before its end-of-text token."""
    content = json.loads((prepared / "tokenizer/tokenizer.json").read_text())
    content["model"]["vocab"]["\u0120Q\u010a"] = 999  # " Q\n", which no merge makes
    whole = load_tokenizer(str(prepared / "tokenizer"))
    gap = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(content)), eos_token=whole.eos_token)
    found, expected = find_boundaries(gap, kind), find_boundaries(whole, kind)
    assert found is not None and expected is not None and len(gap) == VOCAB + 1
    for name in ("before", "after"):
        table = getattr(found, name)
        assert len(table) == 1000 and np.array_equal(table[:VOCAB], getattr(expected, name))
        assert not table[VOCAB:-1].any()
    assert (bool(found.before[999]), bool(found.after[999])) == (kind == "word", kind != "document")


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
    with pytest.raises(TokenSuperpositionError, match="boundaries is 'lines'; choose one of none, document"):
        find_boundaries(tokenizer, cast(Any, "lines"))
    endless = copy.deepcopy(tokenizer)
    endless.eos_token = None  # numpy's array[None] would be all of it
    with pytest.raises(TokenSuperpositionError, match=f"boundaries is '{kind}', but the tokenizer has no end-of-text"):
        find_boundaries(endless, kind)
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


def test_white_space_alone_ends_no_word(prepared: Path) -> None:
    tokenizer = load_tokenizer(str(prepared / "tokenizer"))
    found, space = find_boundaries(tokenizer, "word"), tokenizer.convert_tokens_to_ids("Ġ")
    assert found is not None and found.before[space] and not found.after[space]
