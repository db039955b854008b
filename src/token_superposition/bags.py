"""Fold a stream of tokens into bags of inputs and bags of targets."""

from __future__ import annotations

from torch import Tensor

from token_superposition.errors import TokenSuperpositionError, require_int


def span(length: int, input_bag: int = 1, output_bag: int = 1) -> int:
    """Number of raw tokens that ``length`` latent positions need, look-ahead included.

    >>> span(128), span(128, 4, 4)
    (129, 516)
    """
    return length * input_bag + output_bag


def fold(
    tokens: Tensor,  # (..., L * input_bag + output_bag) contiguous raw tokens
    input_bag: int = 1,
    output_bag: int = 1,
    *,
    labels: Tensor | None = None,  # same shape as tokens; where -100, the token is not a target
) -> tuple[Tensor, Tensor]:  # ids (..., L) or (..., L, input_bag); targets (..., L) or (..., L, output_bag)
    """Fold contiguous tokens into the inputs and the targets of ``L`` latent positions.

    Position ``j`` reads tokens ``[j*a, (j+1)*a)`` and predicts the multiset of the ``b`` tokens after them
    (``a = input_bag``, ``b = output_bag``). ``a = b = s`` is token superposition, ``a = s, b = 1`` input-only,
    ``a = 1, b = s`` output-only superposition, ``a = b = 1`` ordinary next-token training (arXiv 2605.06546).
    A bag size of 1 adds no axis: the rank of the tensors carries the phase. Nothing is copied.

    Raises ``TokenSuperpositionError`` unless the length of ``tokens`` is ``L * a + b`` for a whole ``L >= 1``.

    >>> import torch
    >>> ids, targets = fold(torch.arange(8), 2, 2)
    >>> ids.tolist(), targets.tolist()
    ([[0, 1], [2, 3], [4, 5]], [[2, 3], [4, 5], [6, 7]])
    >>> ids, targets = fold(torch.arange(4))
    >>> ids.tolist(), targets.tolist()
    ([0, 1, 2], [1, 2, 3])
    """
    a, b = require_int("input_bag", input_bag, 1), require_int("output_bag", output_bag, 1)
    length, rest = divmod(tokens.shape[-1] - b, a)
    if length < 1 or rest:
        raise TokenSuperpositionError(
            f"cannot fold {tokens.shape[-1]} tokens into input bags of {a} and output bags of {b}; "
            f"give L * {a} + {b} tokens, for example {span(max(length, 1), a, b)}"
        )
    ids = tokens[..., : length * a]
    targets = (tokens if labels is None else labels)[..., a:]
    if a > 1:
        ids = ids.unflatten(-1, (length, a))
    if b > 1 or a > 1:
        targets = targets.unfold(-1, b, a)
    return ids, targets if b > 1 else targets.reshape(ids.shape[: tokens.dim()])
