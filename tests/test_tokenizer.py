"""The byte-level BPE that is trained on a text."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from tests.conftest import text
from token_superposition.data.tokenizer import END_OF_TEXT, train_bpe

SPACES = " " * 900
WRITTEN = [*text(200), "    indented_names = 'größer', 1234567\n\n\n\tand a tab  ", "x" * 1023, f"{SPACES}end"]


def test_it_is_that_of_gpt2s_words() -> None:
    plain: Any = Tokenizer(models.BPE())
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    plain.train_from_iterator(WRITTEN, trainer)
    ours = train_bpe(iter(WRITTEN), 500)
    assert ours.get_vocab() == plain.get_vocab()
    for written in WRITTEN:
        ids = ours(written, add_special_tokens=False)["input_ids"]
        assert ids == plain.encode(written).ids and ours.decode(ids) == written


@pytest.mark.parametrize("run", ["a", "7", "=", " ", "я"])
def test_a_word_without_end_is_several_in_training(run: str) -> None:
    """Training takes the square of its length: a megabyte of it would take hours."""
    tokenizer = train_bpe(iter([run * 9000]), 280)
    tokens = [tokenizer.decode([i]) for i in range(len(tokenizer))]
    assert max(map(len, tokens)) == 1024
    ids = tokenizer(run * 5000, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == run * 5000
