"""Let a model read bags: ids of shape (B, L, s) become the mean of the s token embeddings."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from types import MethodType
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from token_superposition.errors import TokenSuperpositionError
from token_superposition.places import bag_mean, check_signal, place_factors, placed_bag_mean, places, shares
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
    for the s rows and these are averaged. From a sharded weight comes a DTensor with the placement ``Partial``, from a
    replicated one a DTensor with the placement of the ids, as from ``nn.Embedding`` itself.

    Raises ``TokenSuperpositionError`` for ids that are neither int64 nor int32, and a place signal outside [0, 1].
    """
    if not torch.compiler.is_compiling():
        check_signal("place_signal", place_signal)
    if ids.dtype not in (torch.int64, torch.int32):
        raise TokenSuperpositionError(f"ids are {ids.dtype}; give int64 or int32, as fold does")
    e, weighting = cast(Any, embedding), input_weighting
    base = _stock_class(type(embedding))
    if not isinstance(embedding, nn.Embedding) or e.max_norm is not None or e.sparse or e.scale_grad_by_freq:
        return _mean_of_rows(base, e, ids, place_signal, weighting)
    scale: float | Tensor = 1.0
    if base.forward is not nn.Embedding.forward:
        if not (e.only_scales if is_superposed(embedding) else _only_scales(base)):
            return _mean_of_rows(base, e, ids, place_signal, weighting)
        scale = e.embed_scale
    pad = -1 if e.padding_idx is None else int(e.padding_idx)
    if hasattr(e.weight, "device_mesh"):
        out = _dtensor_bag_mean(e.weight, ids, pad, place_signal, weighting)
    elif not place_signal and pad < 0 and _is_exact(e.weight.dtype):
        share = shares(rows := ids.reshape(-1, ids.shape[-1]), weighting, e.weight.dtype)
        out = _embedding_bag(e.weight, rows, share).reshape(*ids.shape[:-1], e.weight.shape[1])
    elif not place_signal and pad < 0 and e.weight.is_cuda and weighting == "uniform":
        there, count = places(rows := ids.reshape(-1, ids.shape[-1]))  # a third in bfloat16 is too far from a third
        out = (_embedding_bag(e.weight, rows, there.to(e.weight.dtype)) / count).reshape(
            *ids.shape[:-1], e.weight.shape[1]
        )
    else:
        out = _local_mean(e.weight, ids, None, pad, place_signal, weighting)
    return out if isinstance(scale, float) and scale == 1 else out * torch.as_tensor(scale).to(out.device, out.dtype)


def _only_scales(stock: type) -> bool:
    """Whether the forward of an embedding is ``nn.Embedding``'s times its ``embed_scale``, told by its source."""
    forwards = [c for c in stock.__mro__ if "forward" in vars(c)]
    if forwards[1:2] != [nn.Embedding]:
        return False
    try:
        (function,) = ast.parse(textwrap.dedent(inspect.getsource(forwards[0].forward))).body
    except (OSError, TypeError, SyntaxError):
        return False
    *before, last = cast(ast.FunctionDef, function).body
    return all(map(_is_docstring, before)) and bool(SCALES.fullmatch(ast.unparse(last)))


SCALES = re.compile(r"return super\(\)\.forward\(\w+\) \* self\.embed_scale(\.to\(self\.weight\.dtype\))?")


def _is_docstring(line: ast.stmt) -> bool:
    return isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant)


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
        means = placed_bag_mean(weight, rows, start, padding_idx, place_signal, weighting)
    else:
        means = bag_mean(weight, rows, start, padding_idx)
    return means.reshape(*ids.shape[:-1], weight.shape[1])


def _dtensor_bag_mean(weight: Any, ids: Tensor, padding_idx: int, place_signal: float, weighting: Weighting) -> Tensor:
    """The rows that this process holds; ``Partial`` sums them over the processes when it is redistributed.

    Ids that are a DTensor, too, may be sharded: beside a replicated weight the means are where they are.
    """
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

    from token_superposition.sharding import local_rows

    rows, start, sharded = local_rows(weight)
    mesh = weight.device_mesh
    where: list[Any] = [Replicate()] * mesh.ndim  # the bags that this process has
    means = torch.empty(*ids.shape[:-1], weight.shape[1], device="meta")  # of all processes; shards may be uneven
    if isinstance(ids, DTensor):
        if not sharded:  # a process keeps whole bags of its own, and its gradient is a part of the sum
            own = [isinstance(p, Shard) and p.dim < ids.dim() - 1 for p in ids.placements]
            where = [p if keep else Replicate() for p, keep in zip(ids.placements, own, strict=True)]
            rows = weight.to_local(grad_placements=[Partial() if keep else Replicate() for keep in own])
        ids = ids.redistribute(mesh, where).to_local()
    out = _local_mean(rows, ids, start if sharded else None, padding_idx, place_signal, weighting)
    placements = [Partial()] if sharded else where
    return DTensor.from_local(out, mesh, placements, run_check=False, shape=means.shape, stride=means.stride())


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
            hooks = cast(Any, module)._forward_pre_hooks
            for key in (there := _ours(hooks)):
                hooks[key].read(module, embedding)  # replaced since, perhaps
            if not there:
                module.register_forward_pre_hook(_FeedEmbeddings(module, embedding), with_kwargs=True)
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
        for key in _ours(hooks._forward_pre_hooks):
            del hooks._forward_pre_hooks[key]
            hooks._forward_pre_hooks_with_kwargs.pop(key, None)
        for key in _ours(hooks._forward_hooks):
            del hooks._forward_hooks[key]
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
    if len(named := [m for m in model.modules() if is_superposed(m)]) == 1:
        return named[0]  # by whoever superposed it
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
            f"the {type(embedding).__name__} has a forward of its own, not its class's, as accelerate's hooks give it, "
            "and transformers' tensor parallelism; remove the hooks (accelerate.hooks.remove_hook_from_module) and "
            "attach them again afterwards, or shard with FSDP2 in place of tp_size"
        )
    vars(embedding).pop("forward", None)


class _BagMixin:
    """Mixed into the class of an embedding: ids of rank 3 are bags."""

    place_signal: float
    input_weighting: Weighting
    only_scales: bool

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
    members["only_scales"] = _only_scales(stock)
    return type(f"Bag{stock.__name__}", (_BagMixin, stock), members)


def _unpickle(stock: type, place_signal: float, input_weighting: Weighting) -> Any:
    made: Any = _bag_class(stock, place_signal, input_weighting)
    return made.__new__(made)


class OwnHook:
    """A hook that ``unsuperpose`` removes."""


class _FeedEmbeddings(OwnHook):
    """Forward pre-hook of a model: bags of ``input_ids`` are replaced by ``inputs_embeds``."""

    def __init__(self, model: nn.Module, embedding: nn.Module):
        self.read(model, embedding)

    def read(self, model: nn.Module, embedding: nn.Module) -> None:
        """``own`` is what the hooked model says is its embedding; it is seen by that whether it has been replaced."""
        self.embedding, self.own = embedding, _uncompiled(_own_embedding(model))
        parameters = inspect.signature(model.forward).parameters.values()
        names = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        self.ids_at = names.index("input_ids") if "input_ids" in names else 0
        self.embeddings_at = names.index("inputs_embeds") if "inputs_embeds" in names else None

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        ids = args[self.ids_at] if self.ids_at < len(args) else kwargs.get("input_ids")
        if not isinstance(ids, Tensor) or ids.dim() != 3 or ids.is_floating_point():
            return None
        if _uncompiled(_own_embedding(model)) is not self.own:
            raise TokenSuperpositionError(
                f"the input embedding of {type(model).__name__} was replaced or wrapped after superpose, which "
                "would go on with the old one; unsuperpose(model), then superpose(model)"
            )
        if not is_superposed(self.embedding):
            raise TokenSuperpositionError(
                f"the input embedding of {type(model).__name__} reads no bags any more: another model that shares it "
                "was given to unsuperpose; superpose(model) again"
            )
        new_args, new_kwargs = list(args), dict(kwargs)
        for at, name, value in (
            (self.ids_at, "input_ids", None),
            (self.embeddings_at, "inputs_embeds", self.embedding(ids)),
        ):
            if at is not None and at < len(args):
                new_args[at] = value
            else:
                new_kwargs[name] = value
        return tuple(new_args), new_kwargs


def _ours(hooks: dict[int, Any]) -> list[int]:
    return [key for key, hook in hooks.items() if isinstance(hook, OwnHook)]


def _stock_class(cls: type) -> type:
    """What ``_BagMixin`` was mixed into; also of a class that a wrapper (FSDP2) made of the result."""
    line = cls.__mro__
    return line[line.index(_BagMixin) + 1] if _BagMixin in line else cls
