from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from token_superposition import TokenSuperpositionError, fold, ragged_fold, reference, span


@given(st.integers(1, 9), st.integers(1, 6), st.integers(1, 6), st.integers(1, 3))
def test_fold_is_the_reference(length: int, a: int, b: int, batch: int) -> None:
    tokens = torch.randint(1000, (batch, span(length, a, b)))
    ids, targets = fold(tokens, a, b)
    assert ids.shape == ((batch, length, a) if a > 1 else (batch, length))
    assert targets.shape == ((batch, length, b) if b > 1 else (batch, length))
    assert torch.equal(targets.view(-1), targets.flatten())  # nanoGPT's loss asks for a view
    for row, i, t in zip(tokens.tolist(), ids, targets, strict=True):
        inputs, outputs = reference.fold(row, length, a, b)
        assert i.reshape(length, a).tolist() == inputs
        assert t.reshape(length, b).tolist() == outputs


def test_labels_mask_targets_and_leave_inputs() -> None:
    tokens = torch.arange(8)
    labels = torch.where(tokens == 5, -100, tokens)
    ids, targets = fold(tokens, 2, 2, labels=labels)
    assert ids.tolist() == [[0, 1], [2, 3], [4, 5]]
    assert targets.tolist() == [[2, 3], [4, -100], [6, 7]]


@pytest.mark.parametrize("shape", [(2, 9), (2, 7), (8,)])
def test_labels_of_another_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(TokenSuperpositionError, match="one label for each token"):
        fold(torch.zeros(2, 8, dtype=torch.long), labels=torch.zeros(shape, dtype=torch.long))


def test_labels_become_of_a_type_that_the_loss_takes() -> None:
    tokens = torch.arange(8, dtype=torch.int16)
    ids, targets = fold(tokens, 2, 2, labels=tokens)
    assert (ids.dtype, targets.dtype) == (torch.int64, torch.int64)
    for labels, told in ((tokens.numpy(), "labels are of type ndarray"), (tokens.float(), "labels are torch.float32")):
        with pytest.raises(TokenSuperpositionError, match=told):
            fold(tokens, 2, 2, labels=labels)


@pytest.mark.parametrize(("n", "a", "b"), [(9, 2, 2), (3, 4, 4), (0, 1, 1), (1, 1, 1)])
def test_wrong_length_names_a_right_one(n: int, a: int, b: int) -> None:
    with pytest.raises(TokenSuperpositionError, match=f"cannot fold {n} tokens .* for example"):
        fold(torch.arange(n), a, b)


@pytest.mark.parametrize("bag", [0, -1, 1.5, True, "4"])
def test_bag_size_must_be_a_whole_number(bag: object) -> None:
    with pytest.raises(TokenSuperpositionError, match=r"input_bag is .* at least 1"):
        fold(torch.arange(10), bag, 1)  # pyright: ignore[reportArgumentType]
    for n, a, b, name in ((bag, 1, 1, "length"), (8, bag, 1, "input_bag"), (8, 1, bag, "output_bag")):
        with pytest.raises(TokenSuperpositionError, match=rf"{name} is .* at least 1"):
            span(n, a, b)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.uint16, torch.int32])
def test_tokens_of_any_whole_type_are_folded_to_one_that_models_take(dtype: torch.dtype) -> None:
    tokens = torch.arange(20).to(dtype)
    for folded, expected in zip(fold(tokens, 4, 4), fold(torch.arange(20), 4, 4), strict=True):
        assert folded.dtype == (dtype if dtype == torch.int32 else torch.int64) and torch.equal(folded.long(), expected)
    with pytest.raises(TokenSuperpositionError, match=r"tokens are torch.float32; give ids, which are whole"):
        fold(torch.zeros(20), 4, 4)
    with pytest.raises(TokenSuperpositionError, match="tokens are one number without an axis"):
        fold(torch.tensor(3))
    with pytest.raises(TokenSuperpositionError, match=r"tokens are of type ndarray; give .* torch.from_numpy"):
        fold(torch.arange(20).numpy(), 4, 4)  # pyright: ignore[reportArgumentType]
    with pytest.raises(TokenSuperpositionError, match=r"tokens are torch.float32; give ids, which are whole"):
        ragged_fold(torch.zeros(20), torch.zeros(20), 4, 4)


@pytest.mark.parametrize("shape", [(12,), (1, 12), (3, 12)])
@pytest.mark.parametrize(("a", "b"), [(1, 1), (2, 2), (4, 4), (2, 1), (1, 3)])
def test_targets_can_be_masked_in_place(shape: tuple[int, ...], a: int, b: int) -> None:
    n = 12 - (12 - b) % a
    tokens = torch.arange(36).view(3, 12)[: math.prod(shape) // 12].reshape(shape)[..., :n]
    ids, targets = fold(tokens, a, b)
    read = ids.clone()
    targets.view(-1).fill_(-100)
    assert torch.equal(ids, read) and int(tokens.min()) >= 0
