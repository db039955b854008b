"""Trackers: which of the ``Trainer``'s own reports a run has, and what each logged line says beside the loss."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from token_superposition.errors import TokenSuperpositionError
from token_superposition.experiment.budget import GPUS
from token_superposition.experiment.config import TrainConfig

PROJECT = "token-superposition"


def check_trackers(train: TrainConfig) -> None:
    """Raises ``TokenSuperpositionError`` for a tracker that is not installed."""
    for name in train.report_to:
        if find_spec(name) is None:
            raise TokenSuperpositionError(f"train.report_to names {name}, which is not installed; pip install {name}")


def report_variables(train: TrainConfig, out: Path) -> dict[str, str]:
    """What trackers take from the environment and from nowhere else, for as long as the run lasts."""
    variables: dict[str, str] = {}
    if "tensorboard" in train.report_to:
        variables["TENSORBOARD_LOGGING_DIR"] = str(out / "tensorboard")
    if "wandb" in train.report_to:
        wanted = {"WANDB_PROJECT": PROJECT, "WANDB_DIR": str(out)}
        variables |= {name: os.environ.get(name, value) for name, value in wanted.items()}
    return variables


def report_arguments(train: TrainConfig, out: Path) -> dict[str, Any]:
    """Of ``TrainingArguments``; the run is named after ``out``."""
    return {"report_to": list(train.report_to) or "none", "run_name": out.name, "project": PROJECT}


def device_peak() -> float | None:
    """Dense bfloat16 FLOP/s of this process's GPU by its data sheet, or None where that is not known."""
    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name()
    return next((gpu.flops for kind, gpu in GPUS.items() if kind in name and "PCIe" not in name), None)


@dataclass
class Rates:
    """Throughput between two logged steps."""

    step_flops: float
    peak: float | None
    """FLOP/s of all devices together."""
    _last: tuple[int, float, int, int] | None = field(default=None)

    def at(self, step: int, seconds: float, latent_tokens: int, raw_tokens: int) -> dict[str, float]:
        """``seconds`` is the time in training steps so far. Rates are left out where no step came in between."""
        figures = {"flops": self.step_flops * step}
        last, self._last = self._last, (step, seconds, latent_tokens, raw_tokens)
        if last is None or step == last[0] or seconds <= last[1]:
            return figures
        elapsed = seconds - last[1]
        figures["latent_tokens_per_second"] = (latent_tokens - last[2]) / elapsed
        figures["raw_tokens_per_second"] = (raw_tokens - last[3]) / elapsed
        if self.peak is not None:
            figures["mfu"] = self.step_flops * (step - last[0]) / elapsed / self.peak
        return figures
