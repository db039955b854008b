"""Muon for the hidden matrices and AdamW for the rest, as one optimizer with one state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Muon, Optimizer


class MuonAdamW(Optimizer):
    """``torch.optim.Muon`` for ``matrices``, ``torch.optim.AdamW`` for ``others``; each is stepped as it is.

    Muon's steps are scaled to the size of AdamW's (``match_rms_adamw``), so both take the same learning rate.
    Parameters of less than two axes (norms, biases) have no weight decay.
    """

    def __init__(
        self,
        matrices: list[Tensor],
        others: list[Tensor],
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.95),
        weight_decay: float = 0.1,
    ):
        self._parts: list[tuple[Optimizer, str]] = []  # with a setting that only its groups have
        if matrices:
            muon = Muon(matrices, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
            self._parts.append((muon, "ns_steps"))
        decayed = {"params": [p for p in others if p.dim() > 1], "weight_decay": weight_decay}
        plain = {"params": [p for p in others if p.dim() < 2], "weight_decay": 0.0}
        if groups := [g for g in (decayed, plain) if g["params"]]:
            self._parts.append((AdamW(groups, lr=lr, betas=betas), "betas"))
        super().__init__([group for part, _ in self._parts for group in part.param_groups], {})

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # pyright: ignore
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part, mark in self._parts:  # groups and state are ours: a checkpoint that was loaded replaced them
            part.param_groups = [group for group in self.param_groups if mark in group]
            part.state = self.state
            part.step()
        return loss


def split_parameters(model: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """The hidden weight matrices of a causal LM, and all else: embeddings, head, norms, biases, stacked experts."""
    causal: Any = model
    outside = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    outside |= {id(p) for p in causal.get_output_embeddings().parameters()}
    matrices: list[Tensor] = []
    others: list[Tensor] = []
    for name, p in model.named_parameters():
        if p.requires_grad:
            hidden = p.dim() == 2 and name.endswith("weight") and id(p) not in outside
            (matrices if hidden else others).append(p)
    return matrices, others
