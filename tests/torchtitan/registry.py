"""Configurations for the tests: the TOML files of the directory that TST_TEST_CONFIGS names."""

from __future__ import annotations

import os
from pathlib import Path

from token_superposition.engines.torchtitan import TSTTrainer
from token_superposition.engines.torchtitan.config_registry import trainer_config
from token_superposition.experiment.config import load_config


def load(name: str) -> TSTTrainer.Config:
    return trainer_config(load_config(Path(os.environ["TST_TEST_CONFIGS"]) / f"{name}.toml"), name)


def llama() -> TSTTrainer.Config:
    return load("llama")


def power() -> TSTTrainer.Config:
    return load("power")


def moe() -> TSTTrainer.Config:
    return load("moe")


def balanced() -> TSTTrainer.Config:
    return load("balanced")
