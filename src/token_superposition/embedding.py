"""Let a model read bags: ids of shape (B, L, s) become the mean of the s token embeddings."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from types import MethodType
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from token_superposition.errors import TokenSuperpositionError
from token_superposition.places import check_signal, local_ids, place_factors, placed_bag_mean, places, shares
from token_superposition.weights import Weighting, place_weights

M = TypeVar("M", bound=nn.Module)


def bag_embedding(  # (..., s) -> (..., d)
    embedding: nn.Module, ids: Tensor, place_signal: float = 0.0, input_weighting: Weighting = "uniform"
) -> Tensor:
    """Mean over the last axis of what ``embedding`` gives for each id, accumulated in float32.

    A place whose id is below 0 is not there: the mean is over the others, and 0 where there are none. Another
    ``input_weighting`` than uniform makes it a weighted mean: the last token counts by the first weight of
    ``place_weights(input_weighting, s)``, the one before by the second. With a ``place_signal`` e, the embedding of the
    token at place i is first multiplied by ``1 + e * p_i``, where p_i is a fixed vector of +1 and -1.

    An ``nn.Embedding``, also one with a padding row, an ``embed_scale`` (Gemma) or a DTensor weight sharded over the
    vocabulary or replicated, never holds (..., s, d), forward or backward. Any other one (quantised, adapted) is asked
    for the s rows and these are averaged. From a sharded weight comes a DTensor with the placement ``Partial``, as
    from ``nn.Embedding`` itself.

    Raises ``TokenSuperpositionError`` for ids that are neither int64 nor int32.
    """
    if ids.dtype not in (torch.int64, torch.int32):
        raise TokenSuperpositionError(f"ids are {ids.dtype}; give int64 or int32, as fold does")
    e, weighting = cast(Any, embedding), input_weighting
    base = _stock_class(type(embedding))
    if not isinstance(embedding, nn.Embedding) or e.max_norm is not None or e.sparse or e.scale_grad_by_freq:
        return _mean_of_rows(base, e, ids, place_signal, weighting)
    scale: float | Tensor = 1.0
    if base.forward is not nn.Embedding.forward:
        if not hasattr(e, "embed_scale"):
            return _mean_of_rows(base, e, ids, place_signal, weighting)
        scale = e.embed_scale
    pad = -1 if e.padding_idx is None else int(e.padding_idx)
    if hasattr(e.weight, "device_mesh"):
        out = _dtensor_bag_mean(e.weight, ids, pad, place_signal, weighting)
    elif not place_signal and pad < 0 and _is_exact(e.weight.dtype):
        share = shares(rows := ids.reshape(-1, ids.shape[-1]), weighting, e.weight.dtype)
        out = _embedding_bag(e.weight, rows, share).unflatten(0, ids.shape[:-1])
    elif not place_signal and pad < 0 and e.weight.is_cuda and weighting == "uniform":
        there, count = places(rows := ids.reshape(-1, ids.shape[-1]))  # a third in bfloat16 is too far from a third
        out = (_embedding_bag(e.weight, rows, there.to(e.weight.dtype)) / count).unflatten(0, ids.shape[:-1])
    else:
        out = _local_mean(e.weight, ids, None, pad, place_signal, weighting)
    return out if isinstance(scale, float) and scale == 1 else out * torch.as_tensor(scale).to(out.device, out.dtype)


def _is_exact(dtype: torch.dtype) -> bool:
    return dtype in (torch.float32, torch.float64)


def _mean_of_rows(  # (..., s) -> (..., d)
    stock: Any, embedding: Any, ids: Tensor, place_signal: float, weighting: Weighting
) -> Tensor:
    there, count = places(ids)
    known = ids.where(there, ids[..., :1].clamp(min=0))
    if place_signal or weighting != "uniform":
        first: Tensor = stock.forward(embedding, known[..., 0])
        factors = place_factors(ids.shape[-1], first.shape[-1], place_signal, first)
        share = shares(ids, weighting, factors.dtype)
        total = first * factors[0] * share[..., :1]
        for place in range(1, len(factors)):
            total = total + stock.forward(embedding, known[..., place]) * factors[place] * share[..., place, None]
        return total.to(first.dtype)
    rows: Tensor = stock.forward(embedding, known)  # (..., s, d)
    rows = rows.where(there.unsqueeze(-1), 0)
    return (rows.to(torch.promote_types(rows.dtype, torch.float32)).sum(-2) / count).to(rows.dtype)


def _embedding_bag(weight: Tensor, ids: Tensor, share: Tensor) -> Tensor:  # (V, d), (N, s), (N, s) -> (N, d)
    """Torch's, with a weight for every place: no value is looked at, so nothing waits for the device."""
    return F.embedding_bag(ids.clamp(min=0), weight, mode="sum", per_sample_weights=share)


def _local_mean(
    weight: Tensor, ids: Tensor, start: int | None, padding_idx: int, place_signal: float, weighting: Weighting
) -> Tensor:
    rows = ids.reshape(-1, ids.shape[-1])
    if place_signal or weighting != "uniform":
        return placed_bag_mean(weight, rows, start, padding_idx, place_signal, weighting).unflatten(0, ids.shape[:-1])
    return bag_mean(weight, rows, start, padding_idx).unflatten(0, ids.shape[:-1])


@torch.library.custom_op("token_superposition::bag_mean", mutates_args=())
def bag_mean(
    weight: Tensor,  # (V, d), or the rows of tokens start .. start + V
    ids: Tensor,  # (N, s); a place below 0 is not there
    start: int | None,  # None: weight is the whole table, and torch refuses an id of V or more
    padding_idx: int,  # this row gets no gradient; -1 for none
) -> Tensor:  # (N, d) sum over the ids whose row is here, over the number of places that are there
    """``embedding_bag`` with the gradient summed in float32, for part of a vocabulary too."""
    inside, local = local_ids(ids, start, weight.shape[0])
    total = F.embedding_bag(local, weight, mode="sum", per_sample_weights=inside.to(weight.dtype))
    return total / places(ids)[1]


@bag_mean.register_fake
def _(weight: Tensor, ids: Tensor, start: int | None, padding_idx: int) -> Tensor:
    return weight.new_empty(ids.shape[0], weight.shape[1])


@torch.library.custom_op("token_superposition::bag_mean_backward", mutates_args=())
def bag_mean_backward(
    grad: Tensor,  # (N, d)
    weight: Tensor,  # (V, d)
    ids: Tensor,  # (N, s)
    start: int | None,
    padding_idx: int,
) -> Tensor:  # (V, d)
    inside, local = local_ids(ids, start, weight.shape[0])
    acc = torch.promote_types(grad.dtype, torch.float32)
    count = places(ids)[1]
    if grad.device.type == "cpu":
        total = torch.zeros_like(weight)
        s, v = ids.shape[1], weight.shape[0]
        full = bool((count == s).all())  # then sums are divided, which are fewer than rows
        for tokens, sums in _sums_by_token(grad, None if full else count, local.where(inside, v), v, acc):
            total[tokens] = (sums / s if full else sums).to(weight.dtype)
    else:  # in float32 for the whole vocabulary: tokens cannot be counted without waiting for the device
        share = grad.to(acc) / count
        summed = torch.zeros_like(weight, dtype=acc)
        for place in range(ids.shape[1]):  # never (N, s, d)
            summed.index_add_(0, local[:, place], share * inside[:, place : place + 1])
        total = summed.to(weight.dtype)
    if 0 <= (padding := padding_idx - (start or 0)) < weight.shape[0]:
        total[padding] = 0
    return total


ROWS = 128  # tokens, and places, that are summed at a time


def _sums_by_token(
    grad: Tensor,  # (N, d)
    count: Tensor | None,  # (N, 1) by which it is divided, if at all
    ids: Tensor,  # (N, s); those from v on are left out
    v: int,
    dtype: torch.dtype,
) -> Iterator[tuple[Tensor, Tensor]]:  # tokens (n,) and the sums of their bags' gradients (n, d) in dtype
    """Some tokens at a time: the places of the batch are sorted by token, so a few rows in ``dtype`` are enough."""
    by_token, place = ids.reshape(-1).sort(stable=True)
    bags = place.div_(ids.shape[1], rounding_mode="floor")
    tokens, token_of, counts = torch.unique_consecutive(by_token, return_inverse=True, return_counts=True)
    ends = counts.cumsum(0).tolist()
    sums = torch.empty(ROWS, grad.shape[1], dtype=dtype)
    last = len(tokens) - (len(tokens) > 0 and bool(tokens[-1] >= v))
    for first in range(0, last, ROWS):
        stop = min(first + ROWS, last)
        part = sums[: stop - first].zero_()
        begin, end = ends[first - 1] if first else 0, ends[stop - 1]
        for i in range(begin, end, ROWS):
            some = slice(i, min(i + ROWS, end))
            rows = grad[bags[some]].to(dtype)
            part.index_add_(0, token_of[some] - first, rows if count is None else rows / count[bags[some]])
        yield tokens[first:stop], part


@bag_mean_backward.register_fake
def _(grad: Tensor, weight: Tensor, ids: Tensor, start: int | None, padding_idx: int) -> Tensor:
    return torch.empty_like(weight)


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, int | None, int], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])
    ctx.place = inputs[2:]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return bag_mean_backward(grad, *ctx.saved_tensors, *ctx.place), None, None, None


bag_mean.register_autograd(_backward, setup_context=_setup_context)


def _dtensor_bag_mean(weight: Any, ids: Tensor, padding_idx: int, place_signal: float, weighting: Weighting) -> Tensor:
    """The rows that this process holds; ``Partial`` sums them over the processes when it is redistributed."""
    from torch.distributed.tensor import DTensor, Partial, Replicate

    from token_superposition.sharding import local_rows

    rows, start, sharded = local_rows(weight)
    local = ids.to_local() if isinstance(ids, DTensor) else ids
    out = _local_mean(rows, local, start if sharded else None, padding_idx, place_signal, weighting)
    mesh = weight.device_mesh
    return DTensor.from_local(out, mesh, [Partial() if sharded else Replicate()] * mesh.ndim, run_check=False)


def superpose(
    model: M, embedding: nn.Module | None = None, *, place_signal: float = 0.0, input_weighting: Weighting = "uniform"
) -> M:
    """Make ``model`` accept ids of shape (B, L, s) beside (B, L); returns the same object.

    The input embedding (``model.get_input_embeddings()``, also of a model inside ``model``, or ``embedding``, or the
    only ``nn.Embedding``) averages bags. Every module whose forward takes ``inputs_embeds`` (the model, its decoder,
    either of them inside a wrapper) is fed these for bags, so that code which reads the shape of ``input_ids`` never
    sees a third axis. What a model makes of ids beside that, such as a scale or further embeddings, is not done for
    bags: ``docs/architectures.md`` names such models. Parameters, buffers, their names and the state dict are
    untouched, and ordinary ids take the path they took before. Doing it twice changes nothing; ``unsuperpose`` undoes
    it. A model whose embedding is replaced or wrapped afterwards (adapters) raises at the next bags: superpose it then.

    ``input_weighting`` weighs the tokens of a bag that is read, and ``place_signal``, in [0, 1], lets it tell their
    places (see ``bag_embedding``); they mean nothing for ordinary ids and are not in the state dict. The weights of the
    *targets* are an argument of the loss.

    Raises ``TokenSuperpositionError`` if the input embedding cannot be found, is no module of the model that maps ids
    to vectors, reads bags in another way already, or has a forward of its own that hides its class's (accelerate's
    hooks): attach such hooks to a superposed model.
    """
    check_signal("place_signal", place_signal)
    place_weights(input_weighting, 1)
    if embedding is None:
        embedding = find_embedding(model)
    else:
        _check_embedding(model, embedding)
    embedding = cast(nn.Module, _uncompiled(embedding))
    if not is_superposed(embedding):
        _forget_own_forward(embedding)
        embedding.__class__ = _bag_class(type(embedding), place_signal, input_weighting)
    else:
        for name, wanted in (("place_signal", place_signal), ("input_weighting", input_weighting)):
            if (present := getattr(embedding, name)) != wanted:
                raise TokenSuperpositionError(
                    f"the model reads bags with {name} {present} already, not {wanted}; unsuperpose it first"
                )
    for module in model.modules():
        reads_ids = module is model or _uncompiled(_own_embedding(module)) is embedding
        if reads_ids and "inputs_embeds" in inspect.signature(module.forward).parameters:
            own = _own_embedding(module)
            for key in (there := _feeders(module)):
                cast(Any, module)._forward_pre_hooks[key].read(embedding, own)  # replaced since, perhaps
            if not there:
                module.register_forward_pre_hook(_FeedEmbeddings(embedding, own), with_kwargs=True)
    return model


def unsuperpose(model: M) -> M:
    """Undo ``superpose``: every class and hook is what it was; returns the same object.

    Raises ``TokenSuperpositionError``, and changes nothing, if something else has changed the embedding's class since
    (FSDP2's ``fully_shard``) or given it a forward of its own (accelerate's hooks).
    """
    for module in filter(is_superposed, model.modules()):
        if type(module).__mro__[1] is not _BagMixin:
            raise TokenSuperpositionError(
                f"the embedding was made a {type(module).__name__} after superpose (by fully_shard, for example), and "
                "that would be undone, too; leave it, since ordinary ids are read as before, or superpose it last"
            )
        _forget_own_forward(module)
    for module in model.modules():
        hooks = cast(Any, module)
        for key in _feeders(module):
            del hooks._forward_pre_hooks[key]
            hooks._forward_pre_hooks_with_kwargs.pop(key, None)
        if is_superposed(module):
            module.__class__ = _stock_class(type(module))
    return model


def is_superposed(embedding: nn.Module) -> bool:
    return isinstance(embedding, _BagMixin)


def find_embedding(model: nn.Module) -> nn.Module:
    """The module that maps token ids to vectors."""
    if (own := _own_embedding(model)) is not None:
        return own
    inside = {e for m in model.modules() if (e := _own_embedding(m)) is not None}
    if len(inside) == 1:
        return inside.pop()
    found = {name: m for name, m in model.named_modules() if isinstance(m, nn.Embedding)}
    if len(found) != 1:
        raise TokenSuperpositionError(
            f"{type(model).__name__} has {len(found)} embeddings ({', '.join(found) or 'none'}); "
            "name the token embedding: superpose(model, embedding=model.wte)"
        )
    return next(iter(found.values()))


def _check_embedding(model: nn.Module, embedding: object) -> None:
    """That it can be the one: a head that shares the weight, or the weight itself, would go unnoticed or fail later."""
    if not isinstance(embedding, nn.Module):
        what = f"of type {type(embedding).__name__}"
    elif isinstance(embedding, (nn.Linear, nn.ModuleDict, nn.ModuleList)):
        what = f"{'a' if isinstance(embedding, nn.Linear) else 'the container'} {type(embedding).__name__}"
    elif not any(_uncompiled(m) is _uncompiled(embedding) for m in model.modules()):
        what = f"one ({type(embedding).__name__}) that is not in the {type(model).__name__}"
    else:
        return
    raise TokenSuperpositionError(
        f"embedding is {what}; give the module of the model that maps ids to vectors: superpose(model, model.wte)"
    )


def _own_embedding(module: nn.Module) -> nn.Module | None:
    """What ``get_input_embeddings`` gives, where there is one."""
    try:
        return cast(Any, module).get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return None


def _uncompiled(module: nn.Module | None) -> nn.Module | None:
    """What ``torch.compile`` was given, which computes the same."""
    return getattr(module, "_orig_mod", module)


def _forget_own_forward(embedding: nn.Module) -> None:
    """Drop a forward of the instance that is its class's, as accelerate leaves one; refuse another, which hides it."""
    own = vars(embedding).get("forward")
    if own is not None and own != MethodType(type(embedding).forward, embedding):
        raise TokenSuperpositionError(
            f"the {type(embedding).__name__} has a forward of its own, not its class's, as accelerate's hooks give it; "
            "remove it (accelerate.hooks.remove_hook_from_module) and attach it again afterwards"
        )
    vars(embedding).pop("forward", None)


class _BagMixin:
    """Mixed into the class of an embedding: ids of rank 3 are bags."""

    place_signal: float
    input_weighting: Weighting

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        ids = args[0] if args else next(iter(kwargs.values()))
        if ids.dim() == 3:
            return bag_embedding(cast(nn.Module, self), ids, self.place_signal, self.input_weighting)
        return super().forward(*args, **kwargs)  # pyright: ignore  # of the stock class, next in line

    def __reduce_ex__(self, protocol: Any) -> Any:
        """The class is made by ``superpose``, so a pickle cannot find it by name: it says what it is made of."""
        made_of, stock = type(self).__mro__[1:3]
        if made_of is not _BagMixin:  # a wrapper made a class of its own of it
            return super().__reduce_ex__(protocol)
        return _unpickle, (stock, self.place_signal, self.input_weighting), cast(Any, self).__getstate__()


def _bag_class(stock: type, place_signal: float, input_weighting: Weighting) -> type:
    members = {"__module__": __name__, "place_signal": place_signal, "input_weighting": input_weighting}
    return type(f"Bag{stock.__name__}", (_BagMixin, stock), members)


def _unpickle(stock: type, place_signal: float, input_weighting: Weighting) -> Any:
    made: Any = _bag_class(stock, place_signal, input_weighting)
    return made.__new__(made)


class _FeedEmbeddings:
    """Forward pre-hook of a model: bags of ``input_ids`` are replaced by ``inputs_embeds``."""

    def __init__(self, embedding: nn.Module, own: nn.Module | None):
        self.read(embedding, own)

    def read(self, embedding: nn.Module, own: nn.Module | None) -> None:
        """``own`` is what the hooked model says is its embedding; it is seen by that whether it has been replaced."""
        self.embedding, self.own = embedding, _uncompiled(own)

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        ids = args[0] if args else kwargs.get("input_ids")
        if ids is None or ids.dim() != 3:
            return None
        if _uncompiled(_own_embedding(model)) is not self.own:
            raise TokenSuperpositionError(
                f"the input embedding of {type(model).__name__} was replaced or wrapped after superpose, which "
                "would go on with the old one; unsuperpose(model), then superpose(model)"
            )
        return (None, *args[1:]) if args else (), {
            **kwargs,
            **({} if args else {"input_ids": None}),
            "inputs_embeds": self.embedding(ids),
        }


def _feeders(model: nn.Module) -> list[int]:
    return [key for key, hook in cast(Any, model)._forward_pre_hooks.items() if isinstance(hook, _FeedEmbeddings)]


def _stock_class(cls: type) -> type:
    """What ``_BagMixin`` was mixed into; also of a class that a wrapper (FSDP2) made of the result."""
    line = cls.__mro__
    return line[line.index(_BagMixin) + 1] if _BagMixin in line else cls
