"""Reach the hidden states in front of a causal LM's output head, so that training needs no (B, L, V) logits."""

from __future__ import annotations

import inspect
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from typing import Any, cast

import torch
from torch import Tensor, nn

from token_superposition.embedding import OwnHook, find_embedding, is_superposed
from token_superposition.errors import TokenSuperpositionError, first_line


class HiddenStates:
    """The last hidden states of a decoder's forward pass inside ``with``, until they are taken.

    The decoder has one hook for everyone who asks. It stays while the decoder is superposed, since a compiled one would
    be compiled again for another; ``unsuperpose`` removes it.
    """

    def __init__(self, decoder: nn.Module):
        self._decoder = decoder
        self._hook = _Keep()

    @staticmethod
    def of(decoder: nn.Module) -> HiddenStates:
        return HiddenStates(decoder)

    def __enter__(self) -> HiddenStates:
        there = [hook for hook in cast(Any, self._decoder)._forward_hooks.values() if isinstance(hook, _Keep)]
        if there:
            self._hook = there[0]
        else:
            self._decoder.register_forward_hook(self._hook)
        self._hook.wanted = True
        return self

    def __exit__(self, *_: object) -> None:
        self._hook.wanted, self._hook.latest = False, None
        if not any(map(is_superposed, self._decoder.modules())):
            hooks = cast(Any, self._decoder)._forward_hooks
            for key in [key for key, hook in hooks.items() if hook is self._hook]:
                del hooks[key]

    def take(self) -> Tensor:  # (B, L, d)
        hidden, self._hook.latest = self._hook.latest, None
        assert hidden is not None, "the decoder has not run"
        return hidden


class _Keep(OwnHook):
    def __init__(self) -> None:
        self.wanted = False
        self.latest: Tensor | None = None

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if self.wanted:
            self.latest = last_hidden_state(output)


def last_hidden_state(output: Any) -> Tensor:
    return output.last_hidden_state if hasattr(output, "last_hidden_state") else output[0]


@dataclass(frozen=True)
class Head:
    """How the logits of a model come from the hidden states and its output head."""

    softcap: float | None = None
    logit_scale: float = 1.0
    z_loss: float = 0.0
    """Coefficient of ``logsumexp(z)**2`` in the model's own training loss (Bamba)."""


def whole_head(model: nn.Module) -> nn.Linear:
    """The output head of ``model`` with all its rows.

    Under FSDP2 its weight may have been freed after the forward pass, and what is left, this process's rows as a
    DTensor, is no head for its own hidden states. Gathered here, it is freed and its gradient
    scattered in the backward pass as always.
    """
    from torch.distributed.fsdp import FSDPModule

    head: nn.Linear = cast(Any, model).get_output_embeddings()
    owner = head if isinstance(head, FSDPModule) else model
    if isinstance(owner, FSDPModule):
        owner.unshard()
    return head


def auxiliary_weight(model: nn.Module) -> float:
    """Of a mixture of experts' auxiliary loss, by the names that models and configurations have for it."""
    if (of_model := getattr(model, "router_aux_loss_coef", None)) is not None:  # DBRX has it in another configuration
        return of_model
    text = cast(Any, model).config.get_text_config()
    return text.router_aux_loss_coef if hasattr(text, "router_aux_loss_coef") else text.aux_loss_coef


def ids_used_elsewhere(model: nn.Module) -> str | None:
    """Why ``model`` cannot read bags, or None: all that it knows of token ids must come through its input embedding.

    Told by 4 ids that are given as they are and as their embeddings: no other embedding may be looked up for the one
    than for the other (its weights may be 0 at first, so that the logits do not tell), and the logits must be the same.
    A model that takes no embeddings is given bags of one token in their place.
    """
    embedding: Any = find_embedding(model)
    if (weight := getattr(embedding, "weight", None)) is None or weight.is_meta:
        return None
    ids, options = probe_ids(model, weight), without_cache(model)
    takes_embeddings = "inputs_embeds" in inspect.signature(model.forward).parameters
    looked_up: list[str] = []
    handles = [
        module.register_forward_hook(lambda *_, name=name: looked_up.append(name))
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) and module is not embedding
    ]
    if not takes_embeddings:
        handles.append(embedding.register_forward_pre_hook(_without_bags, with_kwargs=True))
    try:
        with evaluating(model), torch.no_grad():
            by_ids = logits_of(model(input_ids=ids, **options))
            for_ids, looked_up[:] = set(looked_up), []
            instead = {"inputs_embeds": embedding(ids)} if takes_embeddings else {"input_ids": ids.unsqueeze(-1)}
            otherwise = logits_of(model(**instead, **options))
            if takes_embeddings:  # from those of single tokens some models find out the ids
                model(inputs_embeds=(instead["inputs_embeds"] + instead["inputs_embeds"].flip(1)) / 2, **options)
    except Exception as e:
        given = "embeddings" if takes_embeddings else "bags"
        return f"it does not take {given} in place of token ids ({first_line(e)})"
    finally:
        for handle in handles:
            handle.remove()
    if further := sorted(for_ids - set(looked_up)):
        return f"it looks token ids up in {further[0]} as well, where bags cannot be averaged"
    if not takes_embeddings and otherwise.shape != by_ids.shape:
        return f"it makes logits of shape {tuple(otherwise.shape)} of 4 bags; its code takes ids for (B, L)"
    if (by_ids - otherwise).abs().max() <= 16 * torch.finfo(by_ids.dtype).eps * by_ids.abs().max():
        return None
    given = "their embeddings, such as another scale" if takes_embeddings else "bags of one token"
    return f"it makes something else of token ids than of {given}"


def _without_bags(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Bags of one token are looked up as these: their mean may be weighted or signed."""

    def token(ids: Any) -> Any:
        return ids.squeeze(-1) if isinstance(ids, Tensor) and ids.dim() == 3 else ids

    return tuple(map(token, args)), {name: token(value) for name, value in kwargs.items()}


@contextmanager
def evaluating(model: nn.Module) -> Generator[None]:
    """Every module in evaluation mode; then each in the mode that it had.

    A forward pass leaves the parameters that FSDP2 gathered for it whole, of which an optimizer would take the copies.
    """
    from torch.distributed.fsdp import FSDPModule

    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
            if isinstance(module, FSDPModule):
                module.reshard()


def probe_ids(model: nn.Module, rows: Tensor) -> Tensor:  # (V, ...) -> (1, 4), fewer if V is below 5
    """Ids that are ordinary tokens: behind those that are often special, and not the padding, which models see."""
    pad = getattr(getattr(model, "config", None), "pad_token_id", None)
    ids = torch.arange(5, 10, device=rows.device).remainder(rows.shape[0])
    return ids[ids != (-1 if pad is None else pad)][:4].unsqueeze(0)


def check_causal(model: nn.Module) -> None:
    """Raises ``TokenSuperpositionError`` for a model whose logits see later tokens: it would be told its targets.

    Told by the gradient of the logits of 3 of 4 ids by the embedding of the last one, which is 0 in a causal model,
    exactly and in any dtype. A model on the meta device, and one that cannot read 4 ids, is not asked.
    """
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise TokenSuperpositionError(
            f"{type(model).__name__} has an encoder, which sees the tokens that shall be predicted; take a causal "
            "language model"
        )
    embedding = find_embedding(model)
    weight: Tensor | None = getattr(embedding, "weight", None)
    if weight is None or weight.is_meta:
        return
    read: list[Tensor] = []

    def keep(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        read.append(output.detach().requires_grad_())
        return read[0].clone()

    handle = embedding.register_forward_hook(keep)
    try:
        with evaluating(model), torch.enable_grad():
            logits = logits_of(model(input_ids=probe_ids(model, weight), **without_cache(model)))
            (gradient,) = torch.autograd.grad(logits[:, :-1].sum(), read[0])
    except Exception:
        return
    finally:
        handle.remove()
    if gradient.flatten(0, -2)[-1].abs().max() > 0:
        switch = hasattr(getattr(model, "config", None), "is_decoder")
        remedy = (
            "set model.options.is_decoder = true (is_decoder in its config.json)" if switch else "take a causal one"
        )
        raise TokenSuperpositionError(f"{type(model).__name__} sees the tokens that it shall predict; {remedy}")


def without_cache(model: nn.Module) -> dict[str, bool]:
    """``use_cache=False`` for a model that takes it."""
    parameters = inspect.signature(model.forward).parameters.values()
    takes = any(p.name == "use_cache" or p.kind is p.VAR_KEYWORD for p in parameters)
    return {"use_cache": False} if takes else {}


def logits_of(output: Any) -> Tensor:  # (B, L, V)
    return output["logits"] if isinstance(output, dict) else output.logits


def read_head(model: nn.Module) -> Head | str:
    """How ``model`` makes its logits, or why they cannot be made from the hidden states by ``Head`` alone.

    Told by a forward pass over 4 ids in which the head's input is compared with the decoder's output, and the head's
    output is replaced by a ramp from -100 to 100: what comes out is the ramp, or the ramp with the scale and the soft
    cap that the model's configuration names, or something that we do not know. Decoder and ramp ask for no gradient, so
    that one that is asked for shows a parameter behind them, also one that changes nothing yet. What is around the
    decoder is in training mode, so that what is done in training alone shows, such as dropout in front of the head.
    """
    if not hasattr(model, "get_output_embeddings") or not hasattr(model, "get_decoder"):
        return "it is not a transformers causal LM"
    if "logits_to_keep" not in inspect.signature(model.forward).parameters:
        return "its forward has no logits_to_keep"
    causal: Any = model
    head, decoder = causal.get_output_embeddings(), causal.get_decoder()
    if type(head) is not nn.Linear or decoder is model:
        return f"its output head is a {type(head).__name__}" if decoder is not model else "its decoder is not separate"
    if head.weight.is_meta:
        return "its weights are on the meta device"
    seen: dict[str, Tensor] = {}
    ramp = torch.linspace(-100, 100, head.out_features, device=head.weight.device, dtype=head.weight.dtype)

    def keep_hidden(module: nn.Module, args: Any, output: Any) -> Any:
        seen["hidden"] = last_hidden_state(output).detach()
        if not hasattr(output, "last_hidden_state"):
            return (seen["hidden"], *output[1:])
        output.last_hidden_state = seen["hidden"]
        return output

    def replace_logits(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        seen["input"] = args[0]
        return ramp.to(output.dtype).expand_as(output)

    inside = set(decoder.modules())
    handles = [decoder.register_forward_hook(keep_hidden), head.register_forward_hook(replace_logits)]
    try:
        with evaluating(model), torch.enable_grad():
            for module in model.modules():
                module.training = module not in inside
            logits = logits_of(model(input_ids=probe_ids(model, head.weight), **without_cache(model)))
    except Exception as e:
        return f"its forward fails for 4 ids ({first_line(e)})"
    finally:
        for handle in handles:
            handle.remove()
    if missing := [part for part, name in (("decoder", "hidden"), ("output head", "input")) if name not in seen]:
        return f"its forward does not call its {missing[0]}"
    if seen["input"].requires_grad or not torch.equal(seen["input"].float(), seen["hidden"].float()):
        return "the hidden states are changed between decoder and head"
    if logits.requires_grad:
        return "parameters change the logits after the head"
    if logits.shape[-1:] != ramp.shape:
        return f"of the head's {len(ramp)} logits come {logits.shape[-1]}"
    config: Any = model.config
    config = config.get_text_config()
    caps = [None, *(getattr(config, name, None) for name in ("final_logit_softcapping", "logits_soft_cap"))]
    scales = [1.0, getattr(config, "logit_scale", None), getattr(config, "lm_head_multiplier", None)]
    if getattr(config, "logits_scaling", None):
        scales.append(1 / config.logits_scaling)
    exact = torch.promote_types(logits.dtype, torch.float32)
    eps = max(torch.finfo(ramp.dtype).eps, torch.finfo(logits.dtype).eps)
    for softcap, scale in product(caps, [s for s in scales if s]):
        expected = ramp.to(exact) * scale
        expected = expected if softcap is None else torch.tanh(expected / softcap) * softcap
        tolerance = 0 if scale == 1 and softcap is None else 4 * eps
        if torch.allclose(logits.to(exact), expected.expand_as(logits), rtol=tolerance, atol=tolerance * 100):
            return Head(softcap, scale, getattr(config, "z_loss_coefficient", 0.0))
    return "the logits are changed after the head in a way that its configuration does not name"
