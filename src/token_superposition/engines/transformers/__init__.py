"""Token superposition for the transformers ``Trainer``."""

from token_superposition.engines.transformers.trainer import TSTTrainer

__all__ = ["TSTTrainer"]
