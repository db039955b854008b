"""Configurations for the tests: the TOML files of the directory that TST_TEST_CONFIGS names."""

from __future__ import annotations

import os
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from torchtitan.models.common import Embedding
from torchtitan.models.llama3 import Llama3Model

from token_superposition.engines.torchtitan import TSTTrainer
from token_superposition.engines.torchtitan.config_registry import trainer_config
from token_superposition.engines.torchtitan.models import checked_settings, model_spec
from token_superposition.experiment.config import ModelConfig, load_config


def load(name: str) -> TSTTrainer.Config:
    return trainer_config(load_config(Path(os.environ["TST_TEST_CONFIGS"]) / f"{name}.toml"), name)


def llama() -> TSTTrainer.Config:
    return load("llama")


def power() -> TSTTrainer.Config:
    return load("power")


class OwnModel(Llama3Model):
    """A model that somebody wrote for torchtitan."""

    @dataclass(kw_only=True, slots=True)
    class Config(Llama3Model.Config):
        pass


def own() -> TSTTrainer.Config:
    """A spec without anything of ours in it, and a ``model`` that describes another model."""
    config = load("own")
    spec = model_spec(checked_settings(config.model, 320, 0, 16), 16, 4)

    def copy(of: Any, cls: Any, **changed: Any) -> Any:
        return cls(**{f.name: getattr(of, f.name) for f in fields(of)} | changed)

    embedding = copy(spec.model.tok_embeddings, Embedding.Config)
    config.model_spec = replace(spec, model=copy(spec.model, OwnModel.Config, tok_embeddings=embedding))
    config.model = ModelConfig(options={"num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 1})
    return config


def moe() -> TSTTrainer.Config:
    return load("moe")


def balanced() -> TSTTrainer.Config:
    return load("balanced")
