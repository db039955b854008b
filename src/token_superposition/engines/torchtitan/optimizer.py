"""The optimizers of torchtitan, where the token embeddings have a group of their own."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torchtitan.components.optimizer import OptimizersContainer, ParamGroupConfig

EMBEDDINGS = r"tok_embeddings\.weight$"


class StageOptimizers(OptimizersContainer[Optimizer]):
    """``OptimizersContainer``, which refuses a pattern that no parameter has, but for the stages of a pipeline.

    Those behind the first one have no token embeddings, and are spared their group.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(OptimizersContainer.Config):
        pass

    @staticmethod
    def _build_param_groups(  # pyright: ignore[reportIncompatibleMethodOverride]
        model: nn.Module, param_group_configs: list[ParamGroupConfig], impl_kwargs: dict[str, Any]
    ) -> tuple[dict[str, list[dict[str, Any]]], dict[str, list[str]]]:
        has = any(re.search(EMBEDDINGS, name) for name, _ in model.named_parameters())
        groups = [group for group in param_group_configs if has or group.pattern != EMBEDDINGS]
        return OptimizersContainer._build_param_groups(model, groups, impl_kwargs)
