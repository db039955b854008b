"""Where bags must end: at documents, lines or words, found from each token alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from token_superposition.errors import TokenSuperpositionError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BoundaryKind = Literal["none", "document", "word", "line"]


@dataclass(frozen=True)
class Boundaries:
    """Two tables over the vocabulary, from which follows where in any text a bag must begin."""

    before: np.ndarray
    """(V,) bool: a bag begins at this token."""
    after: np.ndarray
    """(V,) bool: a bag ends with this token."""

    def begins(self, tokens: np.ndarray) -> np.ndarray:  # (n,) ids -> (n,) bool
        """Where a bag must begin, for ``ragged_fold``. The first token always begins one.

        >>> boundaries = Boundaries(before=np.array([False, True, False]), after=np.array([False, False, True]))
        >>> boundaries.begins(np.array([0, 0, 1, 2, 0])).tolist()
        [True, False, True, False, True]
        """
        begins = self.before[tokens]
        begins[:1] = True
        begins[1:] |= self.after[tokens[:-1]]
        return begins


def find_boundaries(tokenizer: PreTrainedTokenizerBase, kind: BoundaryKind) -> Boundaries | None:
    """The boundaries of ``kind``, or None for "none"; each kind has those of documents too.

    - ``document``: after the end-of-text token.
    - ``line``: after every token with a line feed in it.
    - ``word``: before a token that begins with white space, and after one that ends with it (and has more in it).

    A token's text is what it adds behind another one, so that the space which some tokenizers take off the beginning of
    a text is seen. Text that is written without spaces has no words to find.
    """
    if kind not in get_args(BoundaryKind):
        raise TokenSuperpositionError(f"boundaries is {kind!r}; choose one of {', '.join(get_args(BoundaryKind))}")
    if kind == "none":
        return None
    if tokenizer.eos_token_id is None:
        raise TokenSuperpositionError(
            f"boundaries is {kind!r}, but the tokenizer has no end-of-text token, after which documents end; set its "
            "eos_token"
        )
    ids = sorted(tokenizer.get_vocab().values())
    v = ids[-1] + 1  # there may be gaps
    before, after = np.zeros(v, bool), np.zeros(v, bool)
    if kind == "line":
        after[ids] = ["\n" in text for text in _texts(tokenizer, ids)]
    elif kind == "word":
        texts = _texts(tokenizer, ids)
        before[ids] = [text[:1].isspace() for text in texts]
        after[ids] = [text[-1:].isspace() and not text.isspace() for text in texts]
    after[tokenizer.eos_token_id] = True
    return Boundaries(before, after)


def _texts(tokenizer: Any, ids: list[int]) -> list[str]:
    """What each of these tokens adds to a text."""
    first: int = tokenizer.encode("a", add_special_tokens=False)[-1]
    pairs = [[first, i] for i in ids]
    lead, *texts = tokenizer.backend_tokenizer.decode_batch([[first], *pairs], skip_special_tokens=False)
    return [text.removeprefix(lead) for text in texts]
