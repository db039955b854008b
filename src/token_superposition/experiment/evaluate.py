"""Next-token loss of a finished model, on held-out tokens of a token store or on text files. The bag size is 1."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import ConcatDataset, DataLoader, Dataset
from transformers import PreTrainedTokenizerBase

from token_superposition.data.plan import ValidationSet
from token_superposition.data.store import TokenStore
from token_superposition.data.tokenizer import GivenBack, begin_token, load_tokenizer
from token_superposition.engines.transformers.fit import positions, reads
from token_superposition.engines.transformers.head import HiddenStates, read_head
from token_superposition.errors import TokenSuperpositionError, require_int
from token_superposition.experiment.files import CONFIG
from token_superposition.experiment.generate import run_of
from token_superposition.loss import linear_multi_hot_cross_entropy, multi_hot_cross_entropy

DEFAULT_LENGTH, LONGEST_DEFAULT = 1024, 4096
IGNORED = -100


@dataclass(frozen=True)
class Loss:
    """How well a model predicts a text."""

    text: str
    """What was read, and where it was cut."""
    tokens: int
    """That were predicted."""
    bytes: float
    """Of UTF-8 text that they stand for; of a token store by its mean over the held-out text."""
    loss: float
    """Mean over the tokens, nats."""
    perplexity: float
    bits_per_byte: float
    sequence_length: int
    stride: int

    @classmethod
    def of(cls, text: str, nats: float, tokens: int, size: float, sequence_length: int, stride: int) -> Loss:
        perplexity = math.exp(min(nats / tokens, 700))
        bits = nats / math.log(2) / size
        return cls(text, tokens, size, nats / tokens, perplexity, bits, sequence_length, stride)


class StridedText(Dataset[dict[str, Tensor]]):
    """Windows of ``sequence_length`` tokens over ``ids``, each ``stride`` further, for the tokens after the first.

    A window predicts what the one before it did not: its last ``stride`` tokens, which have at least
    ``sequence_length - stride`` tokens before them; the first window predicts all of its own.
    """

    def __init__(self, ids: Tensor, sequence_length: int, stride: int):  # (n + 1,)
        self.ids, self.sequence_length, self.stride = ids, sequence_length, stride

    def __len__(self) -> int:
        return 1 + max(math.ceil((len(self.ids) - 1 - self.sequence_length) / self.stride), 0)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        start = index * self.stride
        ids = self.ids[start : start + self.sequence_length + 1]
        targets = ids[1:].clone()
        if index:
            targets[: self.sequence_length - self.stride] = IGNORED
        return {"input_ids": ids[:-1], "shift_labels": targets}


def evaluate_store(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    directory: Path,
    *,
    sequence_length: int | None = None,
    trained_length: int | None = None,
    max_tokens: int | None = None,
    batch_size: int = 8,
) -> Loss:
    """The figure that a run ends with, on the held-out part of a token store, by the run's length and ``max_tokens``.

    Raises ``TokenSuperpositionError`` if the store was made with another tokenizer than the model's.
    """
    store = TokenStore(directory, "validation")
    length = length_of(model, sequence_length, trained_length)
    if load_tokenizer(str(directory / "tokenizer")).get_vocab() != tokenizer.get_vocab():
        raise TokenSuperpositionError(
            f"{directory} was prepared with another tokenizer than the model's; give its text with --text, or prepare "
            "it again with --tokenizer MODEL"
        )
    nats, tokens = total_loss(model, ValidationSet(store, length, max_tokens), batch_size)
    size = tokens * store.split.bytes_per_token
    return Loss.of(f"held-out text of {directory}", nats, tokens, size, length, length)


def evaluate_text(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    files: Sequence[Path],
    *,
    sequence_length: int | None = None,
    trained_length: int | None = None,
    stride: int | None = None,
    max_tokens: int | None = None,
    batch_size: int = 8,
) -> Loss:
    """On UTF-8 files, each a document of its own, after the token that begins one (which is not counted).

    Bytes are those of the files: figures of models with different tokenizers may be compared. With ``max_tokens`` a
    file is cut after that many tokens in all, and the bytes are those of the text that remains; ``Loss.text`` says so,
    and names the files that were read.

    Raises ``TokenSuperpositionError`` for a file that cannot be read or is not UTF-8, if no file has text, for a
    ``sequence_length`` that ``length_of`` refuses, a ``stride`` that is no whole number from 1 to that length, and a
    ``batch_size`` that is none of at least 1.
    """
    length = length_of(model, sequence_length, trained_length)
    stride = require_int("stride", max(length // 2, 1) if stride is None else stride, 1)
    if stride > length:
        raise TokenSuperpositionError(f"stride {stride} would leave out text; give at most {length}")
    bos = begin_token(tokenizer)
    begin: Any = tokenizer.eos_token_id if bos is None else bos
    parts: list[StridedText] = []
    names: list[str] = []
    left, size, cut = max_tokens, 0, False
    for file in files:
        if cut := left == 0:
            break
        try:
            text = file.read_bytes().decode("utf-8-sig")
        except (OSError, UnicodeDecodeError) as e:
            why = e.strerror if isinstance(e, OSError) else e
            raise TokenSuperpositionError(
                f"{file} cannot be read as UTF-8 text ({why}); name files of text, one by one"
            ) from None
        encoded: Any = tokenizer(  # as tst prepare does: where the text spells a special token, it is text
            text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True, verbose=False
        )
        ids: list[int] = encoded["input_ids"]
        if left is not None and left < len(ids):
            kept, ends = left, [end for _, end in encoded["offset_mapping"]]
            while kept and ends[kept] == ends[kept - 1]:  # a character of several tokens, of which only some are kept
                kept -= 1
            ids, text, cut, left = ids[:kept], text[: ends[kept - 1] if kept else 0], True, kept
        given_back = GivenBack(tokenizer)
        given_back.add([text], [ids])
        given_back.require(str(file))
        if ids:
            names.append(file.name)
            parts.append(StridedText(torch.tensor([begin, *ids]), length, stride))
        left, size = None if left is None else left - len(ids), size + len(text.encode())
    if not parts and cut:
        raise TokenSuperpositionError(f"max-tokens {max_tokens} ends within the first character of the text; give more")
    if not parts:
        raise TokenSuperpositionError(f"there is no text in {', '.join(map(str, files)) or 'no file'}")
    nats, tokens = total_loss(model, ConcatDataset(parts), batch_size)
    read = ", ".join(names) + (f" (cut after {tokens:,} tokens)" if cut else "")
    return Loss.of(read, nats, tokens, size, length, stride)


def settings_of(model: str | Path) -> dict[str, int]:
    """The numbers in [data] of the run that ``model`` names; empty where it is no run, or its file cannot be read."""
    if (run := run_of(model)) is None:
        return {}
    try:  # not ``load_config``: a run of another version has them, too
        data: Any = tomllib.loads((run / CONFIG).read_text(encoding="utf-8")).get("data")
    except (OSError, ValueError):
        return {}
    found = cast(dict[str, Any], data) if isinstance(data, dict) else {}
    return {name: value for name, value in found.items() if type(value) is int}


def length_of(model: Any, wanted: int | None, trained: int | None = None) -> int:
    """Tokens of a sequence: what is wanted, or was ``trained`` with, or all positions of the model, up to 4,096.

    Raises ``TokenSuperpositionError`` if more are wanted than the model has positions for or was trained with, or no
    whole number of at least 1.
    """
    named = positions(model)
    if wanted is not None and named is not None and wanted > max(named, trained or 0):
        raise TokenSuperpositionError(
            f"sequence-length is {wanted}; the model has {named} positions, give at most that"
        )
    chosen = trained or min(named or DEFAULT_LENGTH, LONGEST_DEFAULT)
    length = chosen if wanted is None else require_int("sequence-length", wanted, 1)
    if not reads(model, length):
        raise TokenSuperpositionError(
            f"the model cannot read {length} tokens, though it names {named} positions; give a smaller "
            "--sequence-length"
        )
    return length


@torch.no_grad()
def total_loss(model: Any, samples: Dataset[dict[str, Tensor]], batch_size: int) -> tuple[float, int]:
    """Sum of the cross-entropies in nats over the targets, and their number. Without whole logits where that can be."""
    head = read_head(model.eval())
    states = None if isinstance(head, str) else HiddenStates.of(model.get_decoder())
    nats, tokens = 0.0, 0
    for batch in DataLoader(samples, require_int("batch-size", batch_size, 1), collate_fn=_pad):
        ids, targets = batch["input_ids"].to(model.device), batch["shift_labels"].to(model.device)
        if states is not None and not isinstance(head, str):
            with states:
                model(input_ids=ids, use_cache=False, logits_to_keep=1)
                hidden = states.take()
            output = model.get_output_embeddings()
            loss = linear_multi_hot_cross_entropy(
                hidden,
                output.weight,
                targets,
                bias=output.bias,
                softcap=head.softcap,
                logit_scale=head.logit_scale,
                reduction="sum",
            )
        else:
            loss = multi_hot_cross_entropy(model(input_ids=ids, use_cache=False).logits, targets, reduction="sum")
        nats, tokens = nats + loss.item(), tokens + int((targets != IGNORED).sum())
    return nats, tokens


def _pad(samples: list[dict[str, Tensor]]) -> dict[str, Tensor]:  # windows of any length -> (B, longest)
    """At the end, where a causal model does not see it."""
    ids = pad_sequence([s["input_ids"] for s in samples], batch_first=True)
    targets = pad_sequence([s["shift_labels"] for s in samples], batch_first=True, padding_value=IGNORED)
    return {"input_ids": ids, "shift_labels": targets}
