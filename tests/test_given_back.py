"""A tokenizer that does not know a text would lose it: said, or refused where it is much."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tests.conftest import text, tiny
from token_superposition import TokenSuperpositionError
from token_superposition.data.prepare import PrepareOptions, prepare
from token_superposition.data.store import Meta
from token_superposition.experiment.evaluate import evaluate_text

GREEK = ["γράμματα", "άλλα γράμματα ακόμη", "και άλλα"] * 4


def english(folder: Path, unknown: str | None) -> PreTrainedTokenizerFast:
    """Of the letters of English; what is another it leaves out, or makes ``unknown``."""
    backend: Any = Tokenizer(models.BPE(unk_token=unknown))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    special = ["</s>", *([unknown] if unknown else [])]
    backend.train_from_iterator(text(60), trainers.BpeTrainer(vocab_size=300, special_tokens=special))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token=unknown)
    tokenizer.save_pretrained(folder)
    return tokenizer


def prepared(texts: list[str], tmp_path: Path) -> Meta:
    options = PrepareOptions(tokenizer=str(tmp_path / "tokenizer"), validation_share=0.3)
    return prepare((), tmp_path / "data", options, documents=lambda _: iter(texts))


@pytest.mark.parametrize("unknown", [None, "<unk>"])
def test_a_text_that_the_tokenizer_does_not_know_is_refused(unknown: str | None, tmp_path: Path) -> None:
    tokenizer = english(tmp_path / "tokenizer", unknown)
    with pytest.raises(TokenSuperpositionError, match=r"the tokenizer gives back 0%.* have one trained"):
        prepared([t + " " * i for i, t in enumerate(GREEK)], tmp_path)
    assert not (tmp_path / "data").exists()
    (tmp_path / "greek.txt").write_text(f"a {' '.join(GREEK)}", encoding="utf-8")
    with pytest.raises(TokenSuperpositionError, match=r"letters of .*greek.txt the tokenizer gives back"):
        evaluate_text(tiny("llama"), tokenizer, [tmp_path / "greek.txt"], sequence_length=8)


@pytest.mark.parametrize("unknown", [None, "<unk>"])
def test_a_little_that_is_lost_is_counted(unknown: str | None, tmp_path: Path) -> None:
    """Every 21st letter is Greek, and one document is Greek alone."""
    english(tmp_path / "tokenizer", unknown)
    texts = [f"{letter * 20}λ" for letter in "abcdefghijklmnopqrstuvwxyz" if letter in "".join(text(60))]
    meta = prepared([*texts, "λ"], tmp_path)
    assert meta.lost == {"letters": pytest.approx(1 / 21, abs=0.003)}
    none = {} if unknown else {"of which this tokenizer makes no token": 1}
    assert meta.dropped == none and Meta.load(tmp_path / "data") == meta


def test_it_is_the_whole_text_of_which_little_may_be_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Documents come sorted by their language; which is the first does not matter."""
    monkeypatch.setattr("token_superposition.data.prepare.BATCH_BYTES", 1)  # each document is looked at by itself
    english(tmp_path / "tokenizer", None)
    texts = [GREEK[0] * 3, *(f"{t} {i}" for i, t in enumerate(text(60)))]
    with pytest.warns(UserWarning, match=r"so far the tokenizer gives back 0%; .* below 90%"):
        meta = prepared(texts, tmp_path)
    assert 0.005 < meta.lost["letters"] < 0.1
    shutil.rmtree(tmp_path / "data")
    assert prepared(texts[::-1], tmp_path).lost == meta.lost


def test_a_text_of_which_too_much_is_lost_already_is_not_read_to_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("token_superposition.data.prepare.BATCH_BYTES", 1)
    english(tmp_path / "tokenizer", None)
    (tmp_path / "text").mkdir()
    for i in range(100):
        greek = GREEK[0] + " " * i
        (tmp_path / f"text/{i:02}.txt").write_text(greek if i < 40 else f"{i} {text(9)[i % 9]}", encoding="utf-8")
    options = PrepareOptions(tokenizer=str(tmp_path / "tokenizer"), validation_share=0.1)
    with (
        pytest.raises(TokenSuperpositionError, match=r"of the letters of the first 1\d% of the text .* back 0%"),
        pytest.warns(UserWarning, match="so far"),
    ):
        prepare([str(tmp_path / "text")], tmp_path / "data", options)


def test_only_the_text_that_is_evaluated_must_be_known(tmp_path: Path) -> None:
    tokenizer, model = english(tmp_path / "tokenizer", None), tiny("llama")
    (tmp_path / "both.txt").write_text(f"{text(1)[0]} {' '.join(GREEK)}", encoding="utf-8")
    assert evaluate_text(model, tokenizer, [tmp_path / "both.txt"], max_tokens=6, sequence_length=8).tokens == 6
    with pytest.raises(TokenSuperpositionError, match=r"letters of .*both.txt"):
        evaluate_text(model, tokenizer, [tmp_path / "both.txt"], sequence_length=8)


def test_case_accents_and_spaces_are_no_letters_that_are_lost(tmp_path: Path) -> None:
    """A tokenizer of lower case and words loses the line ends alone."""
    backend: Any = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer, backend.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    special = ["[UNK]", "[SEP]"]
    backend.train_from_iterator([*text(60), "éa"], trainers.WordPieceTrainer(vocab_size=300, special_tokens=special))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="[SEP]", unk_token="[UNK]")
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    meta = prepared([f"{t.upper()}\nÉa {i % 10}" for i, t in enumerate(text(60))], tmp_path)
    assert meta.lost == {"line ends": 1.0}
