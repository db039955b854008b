"""Let a model read bags: ids of shape (B, L, s) become the mean of the s token embeddings."""

from __future__ import annotations

import inspect
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from token_superposition.errors import TokenSuperpositionError

M = TypeVar("M", bound=nn.Module)


def bag_embedding(embedding: nn.Module, ids: Tensor) -> Tensor:  # (..., s) -> (..., d)
    """Mean over the last axis of what ``embedding`` gives for each id, accumulated in float32.

    A plain float32 or float64 ``nn.Embedding`` goes through ``embedding_bag``, which never holds (..., s, d). Any
    other one (scaled, quantised, adapted, half-precision) is asked for the s rows and these are averaged.
    """
    base = _stock_class(type(embedding))
    if base is nn.Embedding:
        e = cast(nn.Embedding, embedding)
        plain = e.max_norm is None and e.padding_idx is None and not e.sparse and not e.scale_grad_by_freq
        if plain and e.weight.dtype in (torch.float32, torch.float64):
            return F.embedding_bag(ids.reshape(-1, ids.shape[-1]), e.weight).unflatten(0, ids.shape[:-1])
    rows: Tensor = base.forward(cast(Any, embedding), ids)
    return rows.to(torch.promote_types(rows.dtype, torch.float32)).mean(-2).to(rows.dtype)


def superpose(model: M, embedding: nn.Module | None = None) -> M:
    """Make ``model`` accept ids of shape (B, L, s) beside (B, L); returns the same object.

    The input embedding (``model.get_input_embeddings()``, or ``embedding``, or the model's only ``nn.Embedding``)
    averages bags. A model whose forward takes ``inputs_embeds`` is fed these for bags, so that code which reads the
    shape of ``input_ids`` never sees a third axis. Parameters, buffers, their names and the state dict are untouched,
    and ordinary ids take the path they took before. Doing it twice changes nothing; ``unsuperpose`` undoes it.

    Raises ``TokenSuperpositionError`` if the input embedding cannot be found.
    """
    embedding = embedding if embedding is not None else find_embedding(model)
    if not is_superposed(embedding):
        stock = type(embedding)
        embedding.__class__ = type(f"Bag{stock.__name__}", (_BagMixin, stock), {"__module__": __name__})
    if "inputs_embeds" in inspect.signature(model.forward).parameters and not _feeders(model):
        model.register_forward_pre_hook(_FeedEmbeddings(embedding), with_kwargs=True)
    return model


def unsuperpose(model: M) -> M:
    """Undo ``superpose``: every class and hook is what it was; returns the same object."""
    hooks = cast(Any, model)
    for key in _feeders(model):
        del hooks._forward_pre_hooks[key]
        hooks._forward_pre_hooks_with_kwargs.pop(key, None)
    for module in model.modules():
        if is_superposed(module):
            module.__class__ = _stock_class(type(module))
    return model


def is_superposed(embedding: nn.Module) -> bool:
    return isinstance(embedding, _BagMixin)


def find_embedding(model: nn.Module) -> nn.Module:
    """The module that maps token ids to vectors."""
    get = getattr(model, "get_input_embeddings", None)
    if get is not None:
        return get()
    found = {name: m for name, m in model.named_modules() if isinstance(m, nn.Embedding)}
    if len(found) != 1:
        raise TokenSuperpositionError(
            f"{type(model).__name__} has {len(found)} embeddings ({', '.join(found) or 'none'}); "
            "name the token embedding: superpose(model, embedding=model.wte)"
        )
    return next(iter(found.values()))


class _BagMixin:
    """Mixed into the class of an embedding: ids of rank 3 are bags."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        ids = args[0] if args else next(iter(kwargs.values()))
        if ids.dim() == 3:
            return bag_embedding(cast(nn.Module, self), ids)
        return super().forward(*args, **kwargs)  # type: ignore[misc]  # the stock class, next in line


class _FeedEmbeddings:
    """Forward pre-hook of a model: bags of ``input_ids`` are replaced by ``inputs_embeds``."""

    def __init__(self, embedding: nn.Module):
        self.embedding = embedding

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        ids = args[0] if args else kwargs.get("input_ids")
        if ids is None or ids.dim() != 3:
            return None
        return (None, *args[1:]) if args else (), {
            **kwargs,
            **({} if args else {"input_ids": None}),
            "inputs_embeds": self.embedding(ids),
        }


def _feeders(model: nn.Module) -> list[int]:
    return [key for key, hook in cast(Any, model)._forward_pre_hooks.items() if isinstance(hook, _FeedEmbeddings)]


def _stock_class(cls: type) -> type:
    return next(c for c in cls.__mro__ if not issubclass(c, _BagMixin))
