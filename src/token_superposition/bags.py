"""Fold a stream of tokens into bags of inputs and bags of targets."""

from __future__ import annotations

import torch
from torch import Tensor

from token_superposition.errors import TokenSuperpositionError, require_int


def span(length: int, input_bag: int = 1, output_bag: int = 1) -> int:
    """Number of raw tokens that ``length`` latent positions need, look-ahead included.

    >>> span(128), span(128, 4, 4)
    (129, 516)

    Raises ``TokenSuperpositionError`` for what is not a whole number of at least 1.
    """
    length = require_int("length", length, 1)
    return length * require_int("input_bag", input_bag, 1) + require_int("output_bag", output_bag, 1)


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
    A bag size of 1 adds no axis: the rank of the tensors carries the phase. The ids are a view of the tokens (of an
    int64 copy, unless they are int32 or int64); the targets are a copy, so that masking some leaves the ids alone, and
    contiguous, as models that flatten them by ``view`` want them.

    Raises ``TokenSuperpositionError`` unless the length of ``tokens`` is ``L * a + b`` for a whole ``L >= 1``, for
    tokens or labels that are no tensor of whole numbers, and for labels of another shape.

    >>> import torch
    >>> ids, targets = fold(torch.arange(8), 2, 2)
    >>> ids.tolist(), targets.tolist()
    ([[0, 1], [2, 3], [4, 5]], [[2, 3], [4, 5], [6, 7]])
    >>> ids, targets = fold(torch.arange(4))
    >>> ids.tolist(), targets.tolist()
    ([0, 1, 2], [1, 2, 3])
    """
    a, b = require_int("input_bag", input_bag, 1), require_int("output_bag", output_bag, 1)
    tokens = _whole_numbers(tokens)
    length = _positions(tokens.shape[-1], a, b)
    labels = None if labels is None else _whole_numbers(labels, "labels")
    if labels is not None and labels.shape != tokens.shape:
        raise TokenSuperpositionError(
            f"labels have shape {tuple(labels.shape)}, tokens {tuple(tokens.shape)}; give one label for each token, "
            "the token itself or -100"
        )
    ids = tokens[..., : length * a]
    targets = (tokens if labels is None else labels)[..., a:]
    if a > 1:
        ids = ids.unflatten(-1, (length, a))
    if b > 1 or a > 1:
        targets = targets.unfold(-1, b, a)
    if b == 1:
        targets = targets.reshape(ids.shape[: tokens.dim()])
    return ids, targets.clone(memory_format=torch.contiguous_format)


def ragged_fold(
    tokens: Tensor,  # (..., L * input_bag + output_bag) contiguous raw tokens
    begins: Tensor,  # the same shape, bool, or numbers that are 0 for no: a bag must begin at this token
    input_bag: int = 1,
    output_bag: int = 1,
) -> tuple[Tensor, Tensor]:  # int64 ids (..., L) or (..., L, input_bag), targets (..., L) or (..., L, output_bag)
    """``fold`` with bags that end early, so that none reaches over a boundary.

    A bag has up to ``input_bag`` tokens and ends where the next one must begin; bags follow each other without gaps.
    Position ``j`` reads bag ``j`` and predicts the tokens after it, up to ``output_bag`` of them and not past the
    boundary after the first: with ``input_bag = output_bag`` that is bag ``j + 1``. Empty places are -1 in ids, which
    the embedding of a superposed model leaves out of the mean, and -100 in targets. Ragged bags hold fewer tokens than
    there is room for, so the last tokens may go unread. Without boundaries it is ``fold``.

    Raises ``TokenSuperpositionError`` unless the length of ``tokens`` is ``L * a + b`` for a whole ``L >= 1``, for
    tokens that are no tensor of whole numbers, and for ``begins`` of another shape.

    >>> begins = torch.tensor([0, 0, 0, 1, 0, 1, 0, 0], dtype=torch.bool)
    >>> ids, targets = ragged_fold(torch.arange(8), begins, 2, 2)
    >>> ids.tolist(), targets.tolist()
    ([[0, 1], [2, -1], [3, 4]], [[2, -100], [3, 4], [5, 6]])
    """
    a, b = require_int("input_bag", input_bag, 1), require_int("output_bag", output_bag, 1)
    tokens = _whole_numbers(tokens).long()  # a type that has -1
    if (there := tuple(getattr(begins, "shape", ()))) != tuple(tokens.shape) or not isinstance(begins, Tensor):  # pyright: ignore
        raise TokenSuperpositionError(
            f"begins is a {type(begins).__name__} of shape {there}, tokens have {tuple(tokens.shape)}; give a tensor "
            "that says of each token whether a bag must begin at it"
        )
    n = tokens.shape[-1]
    length = _positions(n, a, b)
    place = torch.arange(n, device=tokens.device)
    begins = begins.bool() | (place == 0)
    segment_start = torch.where(begins, place, 0).cummax(-1).values
    bags_so_far = ((place - segment_start) % a == 0).cumsum(-1)
    wanted = torch.arange(1, length + 2, device=tokens.device).expand(*tokens.shape[:-1], -1)
    starts = torch.searchsorted(bags_so_far, wanted.contiguous())  # (..., L + 1)
    first, following = starts[..., :-1, None], starts[..., 1:, None]
    read, predicted = first + place[:a], following + place[:b]
    ids = _take(tokens, read).where(read < following, -1)
    segment = begins.cumsum(-1)
    targets = _take(tokens, predicted).where(_take(segment, predicted) == _take(segment, following), -100)
    return ids if a > 1 else ids.squeeze(-1), targets if b > 1 else targets.squeeze(-1)


def _whole_numbers(tokens: Tensor, what: str = "tokens") -> Tensor:
    """Of a type that embeddings and losses take: int64, unless it is int32."""
    if not isinstance(tokens, Tensor):  # pyright: ignore  # what a memory-mapped file is read as
        raise TokenSuperpositionError(
            f"{what} are of type {type(tokens).__name__}; give a tensor of ids, such as torch.from_numpy(array)"
        )
    if tokens.is_floating_point() or tokens.is_complex():
        raise TokenSuperpositionError(f"{what} are {tokens.dtype}; give ids, which are whole numbers")
    if tokens.dim() == 0:
        raise TokenSuperpositionError(f"{what} are one number without an axis; give a tensor of shape (..., n)")
    return tokens if tokens.dtype == torch.int32 else tokens.long()


def _take(values: Tensor, places: Tensor) -> Tensor:  # (..., n), (..., L, k) -> (..., L, k)
    return values.gather(-1, places.flatten(-2)).view_as(places)


def _positions(n: int, a: int, b: int) -> int:
    """How many positions ``n`` tokens are for."""
    length, rest = divmod(n - b, a)
    if length < 1 or rest:
        raise TokenSuperpositionError(
            f"cannot fold {n} tokens into input bags of {a} and output bags of {b}; "
            f"give L * {a} + {b} tokens, for example {span(max(length, 1), a, b)}"
        )
    return length
