"""Qwen3-MoE's auxiliary loss for torchtitan's router.

torchtitan balances the experts by a bias on their choice, which transformers' Qwen3-MoE does not have: a model trained
with it routes otherwise once it is exported. The auxiliary loss leaves nothing behind in the model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torchtitan.models.common.moe import TokenChoiceTopKRouter


class BalancedRouter(TokenChoiceTopKRouter):
    """Adds to the gradient that of ``coefficient * E * sum_e f_e p_e``, the auxiliary loss of transformers.

    ``f_e`` is the number of choices of expert e for a position, ``p_e`` its mean probability, both over the positions
    of a micro-batch and over all layers; micro-batches and processes are averaged. The loss that is logged leaves it
    out. ``link`` must have been called.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(TokenChoiceTopKRouter.Config):
        coefficient: float = 0.0
        """``router_aux_loss_coef``; 0 for none."""
        rows: int = 1
        """Latent positions of a step, on all processes."""

    def __init__(self, config: Config):
        super().__init__(config)
        self.strength = config.coefficient * config.num_experts / config.rows
        self.choices: Tensor | None = None  # (E,) f of this layer in the latest forward pass
        self.layers: list[BalancedRouter] = []

    @staticmethod
    def link(model: torch.nn.Module) -> None:
        """Make the routers of a model known to each other: f is a mean over layers, ready for the backward pass."""
        routers = [m for m in model.modules() if isinstance(m, BalancedRouter)]
        for router in routers:
            router.layers = routers

    def forward(self, x_BLD: Tensor, expert_bias_E: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        top_scores, top_ids, scores = super().forward(x_BLD, expert_bias_E)
        if self.training and self.strength:
            chosen = torch.zeros_like(scores[0, 0]).scatter_add_(
                0, top_ids.flatten(), torch.ones_like(top_scores).flatten()
            )
            self.choices = chosen.detach() / top_ids[..., 0].numel()
            top_scores = _Balance.apply(top_scores, scores, self)
        return top_scores, top_ids, scores


class _Balance(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, top_scores: Tensor, scores: Tensor, router: BalancedRouter) -> Tensor:
        ctx.router, ctx.shape = router, scores.shape
        return top_scores.view_as(top_scores)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, Tensor, None]:
        router: BalancedRouter = ctx.router
        layers = router.layers
        f = torch.stack([layer.choices for layer in layers if layer.choices is not None]).mean(0)
        return grads[0], (f * (router.strength / len(layers))).expand(ctx.shape), None
