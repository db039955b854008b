"""A configuration of a sweep."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from token_superposition.experiment.config import CompareConfig, Config, SweepConfig


def swept(seeds: tuple[int, ...] = (), train: dict[str, Any] | None = None, **values: Any) -> Config:
    config = replace(Config(), sweep=SweepConfig(**values), compare=CompareConfig(seeds=seeds))
    return replace(config, train=replace(config.train, **(train or {})))
