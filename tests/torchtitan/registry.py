"""Configurations for the tests: whatever TOML file TST_TEST_CONFIG names."""

from __future__ import annotations

import os

from token_superposition.engines.torchtitan import TSTTrainer
from token_superposition.engines.torchtitan.config_registry import trainer_config
from token_superposition.experiment.config import load_config


def toy() -> TSTTrainer.Config:
    return trainer_config(load_config(os.environ["TST_TEST_CONFIG"]), "toy")
