"""Train a byte-level BPE, or load an existing tokenizer; either is saved as transformers saves one."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from token_superposition.errors import TokenSuperpositionError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

END_OF_TEXT = "<|endoftext|>"
MIN_VOCAB = 257  # every byte and the end of text


def train_bpe(texts: Iterator[str], vocab_size: int) -> PreTrainedTokenizerBase:
    """A byte-level BPE with GPT-2's pre-tokenisation: no unknown token, any text comes back unchanged.

    Raises ``TokenSuperpositionError`` for a ``vocab_size`` below 257, which every byte and the end of text need.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    check_vocab_size(vocab_size)
    bpe: Any = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END_OF_TEXT, bos_token=END_OF_TEXT)


def check_vocab_size(vocab_size: int) -> None:
    if vocab_size < MIN_VOCAB:
        raise TokenSuperpositionError(f"vocab size is {vocab_size}; give at least {MIN_VOCAB}, a token for every byte")


def load_tokenizer(name_or_path: str) -> PreTrainedTokenizerBase:
    """A fast tokenizer that has an end-of-text token, from a directory or the hub. No remote code is run.

    Raises ``TokenSuperpositionError`` for one that cannot be loaded, has no fast form or no end-of-text token, or makes
    no tokens of text.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name_or_path, trust_remote_code=False)
    except Exception as e:
        raise TokenSuperpositionError(
            f"the tokenizer {name_or_path} cannot be loaded ({first_line(e)}); give a directory or a hub name"
        ) from None
    if not tokenizer.is_fast:
        raise TokenSuperpositionError(f"the tokenizer {name_or_path} has no fast form; convert it to tokenizer.json")
    if not tokenizer("text", add_special_tokens=False)["input_ids"]:  # what transformers makes of a config.json alone
        raise TokenSuperpositionError(
            f"the tokenizer {name_or_path} makes no tokens of text; is its tokenizer.json missing?"
        )
    if tokenizer.eos_token_id is None:
        raise TokenSuperpositionError(f"the tokenizer {name_or_path} has no end-of-text token; set its eos_token")
    return tokenizer


def begin_token(tokenizer: Any) -> int | None:
    """The token that the tokenizer itself puts before a text, if that is its BOS, as with Llama 3's; else None.

    None, too, where BOS is the end-of-text token: the document before ends with it.
    """
    first: int = tokenizer("text")["input_ids"][0]
    return first if first == tokenizer.bos_token_id != tokenizer.eos_token_id else None


def can_be_cut(backend: Any) -> bool:
    """Whether a long text may be tokenised in pieces: not where a tokenizer adds a space before every text.

    At line ends the pieces must have the words of the whole, and where there is none near, inside a word, its letters.
    """

    def words(text: str) -> list[str]:
        text = backend.normalizer.normalize_str(text) if backend.normalizer else text
        return [word for word, _ in backend.pre_tokenizer.pre_tokenize_str(text)]

    def ids(text: str) -> list[int]:
        return backend.encode(text, add_special_tokens=False).ids

    if not backend.pre_tokenizer or any(words("a\n") + words(b) != words(f"a\n{b}") for b in ("b", " b")):
        return False
    return backend.decode(ids("xq") + ids("zj")) == backend.decode(ids("xqzj"))


def tokenizer_sha256(directory: Path) -> str:
    """Identity of a saved tokenizer: the hash of its tokenizer.json."""
    return hashlib.sha256((directory / "tokenizer.json").read_bytes()).hexdigest()
