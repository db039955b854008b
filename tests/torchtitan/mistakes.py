"""What torchtitan cannot train, in a process that is told to be one of four. Judged by ``test_parts``."""

from __future__ import annotations

import torch

from tests.torchtitan.cpu_shim import pretend
from token_superposition import TokenSuperpositionError
from token_superposition.experiment.config import Config, TrainConfig

BAD = (
    "--training.global_batch_size 6",
    "--superposition.ratio 1",
    "--dataloader.dataset_path nowhere",
    "--training.seq_len 65536",
    "--superposition.loss sum-to-one",
    "--debug.spmd_typechecking",
    "--lr_scheduler.total_steps 5",
)

OTHERS = ("other data", "other loss", "other chunks", "other metrics")

UNSUPPORTED = {
    "muon": TrainConfig(optimizer="muon"),
    "skip": TrainConfig(on_nonfinite="skip"),
    "keep": TrainConfig(keep=5),
}


def say_what_is_wrong() -> None:
    """Prints the error of each, and whether there was a process group."""
    pretend()
    for attempt in (*BAD, *OTHERS, "old torch", *UNSUPPORTED):
        try:
            build(attempt)
        except TokenSuperpositionError as e:
            print("said:", e, torch.distributed.is_initialized())


def build(attempt: str) -> None:
    from torchtitan.components.dataloader import BaseDataLoader
    from torchtitan.components.loss import CrossEntropyLoss
    from torchtitan.components.metrics import MetricsProcessor
    from torchtitan.config import ConfigManager

    from token_superposition.engines.torchtitan.config_registry import trainer_config

    if attempt in UNSUPPORTED:
        trainer_config(Config(train=UNSUPPORTED[attempt]), "unsupported")
        return
    if attempt in OTHERS:
        config = ConfigManager().parse_args(["--module", "tests.torchtitan.registry", "--config", "llama"])
        if attempt == "other data":
            config.dataloader = BaseDataLoader.Config()
        elif attempt == "other loss":
            config.loss = CrossEntropyLoss.Config()
        elif attempt == "other chunks":
            config.loss.loss_fn = CrossEntropyLoss.Config()
        else:
            config.metrics = MetricsProcessor.Config()
        config.build()
    if attempt == "old torch":
        del torch.distributed.set_timeout  # pyright: ignore
    flags = attempt if attempt in BAD else BAD[4]
    ConfigManager().parse_args(f"--module tests.torchtitan.registry --config llama {flags}".split()).build()
