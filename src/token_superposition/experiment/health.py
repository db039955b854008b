"""A gradient that is not finite never reaches the weights; a loss that jumps is marked."""

from __future__ import annotations

import math
import statistics
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from token_superposition.errors import TokenSuperpositionError

WINDOW, ENOUGH, DEVIATIONS = 50, 20, 6.0
NORMAL = 1.4826  # standard deviations in a median deviation of normal noise


class Diverged(TokenSuperpositionError):
    """A gradient that is not finite ended a run."""


class GradientGuard(TrainerCallback):
    """Keeps gradients that are not finite from the optimizer, and tells of them.

    A gradient that is not finite has a norm that is not, and so has a loss that is not finite. The norm is there
    already and is equal on all processes. It stays on the device: the fused AdamW is told there (``found_inf``, as a
    gradient scaler tells it) to leave weights and state alone, and the host looks where it waits for the device
    anyway, at the steps that log, validate or save. With ``"stop"`` all steps from the first bad one on are left out,
    so that the weights are those before it, and the run ends there; with ``"skip"`` it goes on without that step. Any
    other optimizer finds no gradients, for which the host has to read the norm in every step.

    ``tell(step)`` adds to the message what was read in that step (1-based).
    """

    def __init__(self, action: Literal["stop", "skip"], tell: Callable[[int], str]):
        self.action, self.tell = action, tell
        self._norms: list[Tensor] = []
        self._stopped: Tensor | None = None
        self.skipped: list[int] = []
        """Steps that were left out since the last log."""

    def check(self, norm: Tensor, optimizer: Any, parameters: Iterable[nn.Parameter]) -> None:
        """Between the backward pass and the optimizer's step; ``norm`` is that of the whole gradient."""
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        self._norms.append(norm)
        bad = ~norm.isfinite()
        if self.action == "stop":
            bad = self._stopped = bad if self._stopped is None else self._stopped | bad
        inner = getattr(optimizer, "optimizer", optimizer)
        if inner.defaults.get("fused"):
            inner.found_inf = bad.float()
        elif bad.item():
            for p in parameters:
                p.grad = None

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Raises ``Diverged`` for a step that was left out, or warns of it."""
        waits = control.should_log or control.should_evaluate or control.should_save or control.should_training_stop
        if not self._norms or not (waits or self._norms[0].device.type == "cpu"):
            return
        norms = torch.stack(self._norms)
        first = state.global_step - len(self._norms) + 1
        self._norms = []
        for i, finite in enumerate(norms.isfinite().tolist()):
            if finite:
                continue
            step = first + i
            line = f"the gradient of step {step} has the norm {norms[i].item()}, {self.tell(step)}"
            if self.action == "stop":
                raise Diverged(f"{line}; train.on_nonfinite skip would leave such steps out")
            self.skipped.append(step)
            if state.is_world_process_zero:
                warnings.warn(f"left out: {line}", stacklevel=1)


def is_spike(lines: Sequence[dict[str, Any]], line: dict[str, Any]) -> bool:
    """Whether a logged loss is more than 6 standard deviations above the median of those before it.

    The standard deviation is taken from the median deviation, which earlier jumps do not widen.

    The last 50 with the same bag sizes count, for a loss on bags is no measure for one on tokens; of less than 20
    nothing is said. A function of the lines alone, so a resumed run marks the same ones.
    """
    phase = (line["input_bag"], line["output_bag"])
    same = [m["loss"] for m in lines if "loss" in m and (m["input_bag"], m["output_bag"]) == phase]
    same = [loss for loss in same[-WINDOW:] if math.isfinite(loss)]
    if len(same) < ENOUGH:
        return False
    middle = statistics.median(same)
    return line["loss"] > middle + DEVIATIONS * NORMAL * statistics.median(abs(loss - middle) for loss in same)
