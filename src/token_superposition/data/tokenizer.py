"""Train a byte-level BPE, or load an existing tokenizer; either is saved as transformers saves one."""

from __future__ import annotations

import hashlib
import unicodedata
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from token_superposition.errors import TokenSuperpositionError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

END_OF_TEXT = "<|endoftext|>"
MIN_VOCAB = 257  # every byte and the end of text
LONG_RUN = r"\p{L}{1024}|\p{N}{1024}|\s{1024}|[^\s\p{L}\p{N}]{1024}"
MOST_LOST = 0.1  # of the letters of a text; a tokenizer that gives back less does not know it


def train_bpe(texts: Iterator[str], vocab_size: int) -> PreTrainedTokenizerBase:
    """A byte-level BPE with GPT-2's pre-tokenisation: no unknown token, any text comes back unchanged.

    Training takes the square of the length of a word, so a run of letters, digits, signs or white space of more than
    1,024 characters (a sequence of DNA, padding) counts as several there.

    Raises ``TokenSuperpositionError`` for a ``vocab_size`` below 257, which every byte and the end of text need.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    check_vocab_size(vocab_size)
    bpe: Any = Tokenizer(models.BPE())
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(LONG_RUN), "isolated"), words])
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    bpe.pre_tokenizer = words
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
        raise TokenSuperpositionError(
            f"the tokenizer {name_or_path} has no end-of-text token; set eos_token in its tokenizer_config.json"
        )
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


class GivenBack:
    """How much of a text its tokens do not give back: what bits per byte would be too low by.

    Letters are all characters but white space, without case, accents and compatibility forms.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.backend: Any = tokenizer.backend_tokenizer
        self.unknown: str | None = tokenizer.unk_token
        self.there: Counter[str] = Counter()
        self.lost: Counter[str] = Counter()
        self.warned = False

    def add(self, texts: Sequence[str], ids: Sequence[list[int]]) -> None:
        for text, decoded in zip(texts, self.backend.decode_batch(list(ids), skip_special_tokens=False), strict=True):
            if self.unknown:
                decoded = decoded.replace(self.unknown, "")
            for name, count in (("letters", _letters), ("line ends", _line_ends)):
                had = count(text)
                self.there[name] += had.total()
                self.lost[name] += (had - count(decoded)).total()

    def require(self, what: str, read: float = 1.0) -> None:
        """Raises ``TokenSuperpositionError`` if more than ``MOST_LOST`` of the letters is lost.

        After the share ``read`` of a text, if that is so even should nothing of the rest be lost; else, once, it warns.
        """
        if not (lost := self.lost["letters"]) > MOST_LOST * self.there["letters"]:
            return
        share = 1 - lost / self.there["letters"]
        if lost * read > MOST_LOST * self.there["letters"]:
            raise TokenSuperpositionError(
                f"of the letters of {what} the tokenizer gives back {share:.0%}, and the rest would be lost; give one "
                "that knows this text, or leave it out and have one trained"
            )
        if not self.warned:
            self.warned = True
            warnings.warn(
                f"of the letters so far the tokenizer gives back {share:.0%}; a text is refused if at its end that is "
                f"below {1 - MOST_LOST:.0%}",
                stacklevel=2,
            )

    @property
    def shares(self) -> dict[str, float]:
        """What is lost, where it is a thousandth or more: 0.023 of the "letters", 1.0 of the "line ends"."""
        shares = {name: round(lost / self.there[name], 4) for name, lost in self.lost.items() if lost}
        return {name: share for name, share in shares.items() if share >= 0.001}


def _letters(text: str) -> Counter[str]:
    plain = unicodedata.normalize("NFKD", unicodedata.normalize("NFKD", text).casefold())
    return Counter({c: n for c, n in Counter(plain).items() if not c.isspace() and not unicodedata.combining(c)})


def _line_ends(text: str) -> Counter[str]:
    return Counter({"\n": text.count("\n")})


def tokenizer_sha256(directory: Path) -> str:
    """Identity of a saved tokenizer: the hash of its tokenizer.json."""
    return hashlib.sha256((directory / "tokenizer.json").read_bytes()).hexdigest()
