"""The loss from hidden states and the output head, without their (N, V) logits."""

from __future__ import annotations

import os
from importlib.util import find_spec
from math import inf
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from token_superposition.errors import TokenSuperpositionError, require_int, require_number
from token_superposition.loss.chunked import linear_multi_hot_loss
from token_superposition.loss.logits import multi_hot_cross_entropy
from token_superposition.loss.targets import (
    BagLoss,
    Reduction,
    as_rows,
    bag_members,
    check_loss,
    reduce,
    target_weights,
)
from token_superposition.loss.vocab_parallel import VocabParallel, local_head

Implementation = Literal["auto", "reference", "chunked", "native", "liger", "triton"]
IMPLEMENTATIONS: tuple[str, ...] = get_args(Implementation)
HAS_TRITON = find_spec("triton") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # triton without a GPU


def linear_multi_hot_cross_entropy(
    hidden: Tensor,  # (..., d)
    weight: Tensor,  # (V, d) the output head; a DTensor sharded over V if hidden is one, or rows with vocab_parallel
    targets: Tensor,  # (..., s) int64, or (...) for s = 1; a bag is a multiset
    place_weights: Tensor | None = None,  # (s,) weights of the places in a bag, from 0 up; None is uniform
    *,
    bias: Tensor | None = None,  # (V,)
    ignore_index: int = -100,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    z_loss: float = 0.0,
    loss: BagLoss = "multi-hot",
    reduction: Reduction = "mean",
    impl: Implementation = "auto",
    chunk_rows: int | None = None,
    vocab_parallel: VocabParallel | None = None,
) -> Tensor:  # ()
    """Multi-hot cross-entropy of ``hidden @ weight.T`` (arXiv 2605.06546, eq. 3) without the (N, V) logits.

    The logits are ``z = hidden @ weight.T * logit_scale + bias``, then ``softcap * tanh(z / softcap)`` if a soft cap
    is given. The loss of a row is ``logsumexp(z) - sum_i w_i z[y_i] + z_loss * logsumexp(z)**2`` with ``w``
    renormalised over the valid targets; a row without any contributes 0, whatever it holds. ``mean`` is over the rows
    that have a valid target. Under autocast the matrix products run in the autocast dtype; everything else, and the
    gradient of the head over the rows, is computed in float32 (float64 for float64 inputs).

    ``loss="sum-to-one"`` replaces the sum over ``i`` by ``logsumexp(z[y])`` over the distinct tokens of the bag (see
    ``multi_hot_cross_entropy``), for ``reference`` and ``chunked`` and a head that is not sharded.

    ``impl``:

    - ``reference``: materialises the logits; the specification; any order of derivative.
    - ``chunked``: some rows at a time on any device. Three matrix products for any s, as for an ordinary head.
    - ``native``: ``torch.nn.functional.linear_cross_entropy`` of torch 2.13 plus s + 1 gathered rows.
    - ``liger``: the same over Liger-Kernel (CUDA).
    - ``triton``: ``chunked``, with the work between the matrix products in one kernel of ours (CUDA).
    - ``auto``: ``triton`` on CUDA where it is installed, the loss is multi-hot and the head is not sharded; else
      ``chunked``. Each was the fastest at every size measured (benchmarks/results.csv): on two CPU cores, and on an
      H100 with 16,384 rows, V 128,256 and d 576 to 4,096, where ``chunked`` took 1.3 to 3.0 times as long.

    A head that is sharded over the vocabulary needs the same hidden states and targets on every process of its mesh or
    group. A DTensor says so by a ``hidden`` that is a DTensor, too; under FSDP2, where processes have different rows,
    the head must be whole: ``unshard()`` of its module gathers it.

    All but ``reference`` can be differentiated once, backward, and by ``hidden``, ``weight`` and ``bias`` alone; the
    transforms of ``torch.func`` (``grad``, ``vmap``) need ``reference``, too. ``chunk_rows`` sets the rows of a chunk
    of ``chunked`` and ``triton``. Raises ``TokenSuperpositionError`` for shapes that do not fit and for what ``impl``
    cannot do.

    >>> linear_multi_hot_cross_entropy(torch.zeros(1, 2), torch.ones(4, 2), torch.tensor([[0, 0, 3]]))  # ln 4
    tensor(1.3863)
    """
    if not isinstance(weight, Tensor):  # pyright: ignore  # the head itself
        raise TokenSuperpositionError(
            f"weight is a {type(weight).__name__}; give the tensor (V, d) of the head, such as model.lm_head.weight"
        )
    if bias is not None and bias.shape != weight.shape[:1]:  # of a DTensor the whole shape, on every process the same
        raise TokenSuperpositionError(
            f"bias has shape {tuple(bias.shape)} beside a head of shape {tuple(weight.shape)}; give one number for "
            "each row of the head"
        )
    hidden, weight, bias, targets, vocab_start, group = local_head(hidden, weight, bias, targets, vocab_parallel)
    hidden, targets = as_rows(hidden, targets)
    _check(hidden, weight, impl, chunk_rows)
    check_loss(loss)
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    weigh = target_weights if loss == "multi-hot" else bag_members
    w, valid = weigh(targets, place_weights, ignore_index, torch.promote_types(dtype, torch.float32))
    _check_constants(impl, place_weights=place_weights, softcap=softcap, logit_scale=logit_scale, z_loss=z_loss)
    cap = 0.0 if softcap is None else softcap
    if group and impl not in ("auto", "chunked"):
        raise TokenSuperpositionError(f"impl={impl!r} cannot read a head sharded over the vocabulary; choose 'chunked'")
    if loss == "sum-to-one" and (group or impl not in ("auto", "chunked", "reference")):
        where = "a head sharded over the vocabulary" if group else f"impl={impl!r}"
        raise TokenSuperpositionError(f"{where} has no sum-to-one loss; use impl='chunked' on a whole head")
    if impl == "reference":
        rows = torch.where(valid.unsqueeze(1), hidden, 0)
        logits = rows.to(w.dtype) @ weight.to(w.dtype).T * logit_scale
        logits = logits if bias is None else logits + bias
        logits = torch.tanh(logits / cap) * cap if cap else logits
        return multi_hot_cross_entropy(
            logits, targets, place_weights, ignore_index=ignore_index, z_loss=z_loss, loss=loss, reduction=reduction
        )
    if not torch.compiler.is_compiling() and any(
        t is not None and unpack_dual(t).tangent is not None for t in (hidden, weight, bias)
    ):
        raise TokenSuperpositionError(f"impl={impl!r} has no forward-mode derivative; choose impl='reference'")
    if impl in ("native", "liger") and hidden.shape[0]:  # no rows: they divide by them
        from token_superposition.loss import single_target

        library = single_target.native if impl == "native" else single_target.liger
        total = single_target.by_identity(
            library, hidden, weight, bias, targets, w, valid, dtype, cap, logit_scale, z_loss
        )
        return reduce(total, valid, reduction)
    enabled = torch.is_grad_enabled()
    total = cast(Any, linear_multi_hot_loss)(
        hidden,
        weight,
        bias,
        targets,
        w,
        valid,
        dtype,
        cap,
        logit_scale,
        z_loss,
        "triton" if impl == "triton" or (impl == "auto" and _kernel_serves(hidden, group, loss)) else "torch",
        chunk_rows or 0,
        [t is not None and enabled and t.requires_grad for t in (hidden, weight, bias)],
        vocab_start,
        group,
        loss == "sum-to-one",
    )[0]
    return reduce(total, valid, reduction)


def _kernel_serves(hidden: Tensor, group: str, loss: BagLoss) -> bool:
    return hidden.is_cuda and HAS_TRITON and not group and loss == "multi-hot"


def _check_constants(impl: str, **values: float | Tensor | None) -> None:
    """Only the reference has a gradient for what is neither hidden states nor the head."""
    for name, value in values.items():
        if isinstance(value, Tensor):
            if value.requires_grad and torch.is_grad_enabled() and impl != "reference":
                other = ", or multiply hidden by it" if name == "logit_scale" else ""
                raise TokenSuperpositionError(
                    f"{name} asks for a gradient, which impl={impl!r} has not; choose impl='reference'{other}, or "
                    "detach it"
                )
        elif not torch.compiler.is_compiling() and (value is not None or name in ("logit_scale", "z_loss")):
            require_number(name, value, 0.0 if name == "softcap" else -inf, strictly=True)


def _check(hidden: Tensor, weight: Tensor, impl: str, chunk_rows: int | None) -> None:
    if weight.dim() != 2 or not weight.shape[0]:
        raise TokenSuperpositionError(f"the head has shape {tuple(weight.shape)}; give (V, d) with V of at least 1")
    if hidden.shape[1] != weight.shape[1]:
        raise TokenSuperpositionError(
            f"hidden has width {hidden.shape[1]} but the head has width {weight.shape[1]}; they must be equal"
        )
    if impl not in IMPLEMENTATIONS:
        raise TokenSuperpositionError(f"impl is {impl!r}; choose one of {', '.join(IMPLEMENTATIONS)}")
    if impl in ("triton", "liger") and not HAS_TRITON:
        raise TokenSuperpositionError(f"impl is {impl!r}, and triton is not installed; choose 'chunked'")
    if impl in ("triton", "liger") and hidden.device.type == "cpu" and not INTERPRETED:
        raise TokenSuperpositionError(f"impl is {impl!r}, which runs on a GPU, and hidden is on the CPU; use 'chunked'")
    if chunk_rows is not None:
        require_int("chunk_rows", chunk_rows, 1)
