"""Reach the hidden states in front of a causal LM's output head, so that training needs no (B, L, V) logits."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn


class HiddenStates:
    """Keeps the last hidden states of a decoder's latest forward pass, until they are taken."""

    def __init__(self, decoder: nn.Module):
        self._latest: Tensor | None = None
        decoder.register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, args: Any, output: Any) -> None:
        self._latest = last_hidden_state(output)

    def take(self) -> Tensor:  # (B, L, d)
        hidden, self._latest = self._latest, None
        assert hidden is not None, "the decoder has not run"
        return hidden


def last_hidden_state(output: Any) -> Tensor:
    return output.last_hidden_state if hasattr(output, "last_hidden_state") else output[0]


def why_not_fused(model: nn.Module) -> str | None:
    """Why the logits of ``model`` are not plainly ``head(hidden)``; None if they are.

    Told by a forward pass over 4 ids in which the head's input is compared with the decoder's output, and the head's
    output is replaced by a ramp from -100 to 100 that must come out unchanged: a soft cap, a scale, or a
    projection between decoder and head shows, whatever the weights are.
    """
    if not hasattr(model, "get_output_embeddings") or not hasattr(model, "get_decoder"):
        return "it is not a transformers causal LM"
    if "logits_to_keep" not in inspect.signature(model.forward).parameters:
        return "its forward has no logits_to_keep"
    head, decoder = model.get_output_embeddings(), model.get_decoder()  # pyright: ignore[reportCallIssue]
    if type(head) is not nn.Linear or decoder is model:
        return f"its output head is a {type(head).__name__}" if decoder is not model else "its decoder is not separate"
    if head.weight.is_meta:
        return "its weights are on the meta device"
    seen: dict[str, Tensor] = {}
    ramp = torch.linspace(-100, 100, head.out_features, device=head.weight.device, dtype=head.weight.dtype)

    def keep_hidden(module: nn.Module, args: Any, output: Any) -> None:
        seen["hidden"] = last_hidden_state(output)

    def replace_logits(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        seen["input"] = args[0]
        return ramp.to(output.dtype).expand_as(output)

    handles = [decoder.register_forward_hook(keep_hidden), head.register_forward_hook(replace_logits)]
    training = model.training
    try:
        with torch.no_grad():
            ids = torch.arange(4, device=head.weight.device).remainder(head.out_features).unsqueeze(0)
            logits = model.eval()(input_ids=ids, use_cache=False).logits
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    if not torch.equal(seen["input"].float(), seen["hidden"].float()):
        return "the hidden states are changed between decoder and head"
    if not torch.equal(logits.float(), ramp.float().expand_as(logits)):
        return "the logits are changed after the head (soft cap or scale)"
    return None
