"""run.json, with which a finished run says what it was."""

from __future__ import annotations

import json
import os
import platform
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any, cast

import torch

from token_superposition.data.plan import PlannedDataset
from token_superposition.errors import TokenSuperpositionError
from token_superposition.experiment.config import Config
from token_superposition.experiment.files import DIVERGED, METRICS, RESULT, read_metrics
from token_superposition.experiment.form import misfit, restored
from token_superposition.experiment.resume import data_digest

BEGAN = "model_sha256"
"""In run.json, beside the result: of what ``model.path`` held."""


@dataclass(frozen=True)
class RunResult:
    """What a finished run says of itself, in run.json."""

    seed: int
    bag_size: int
    """Largest input or output bag."""
    ratio: float
    """Share of the steps before the last switch."""
    steps: int
    latent_tokens: int
    raw_tokens: int
    epochs: float
    """How often the text was read."""
    flops: float
    """3 x the matrix-product FLOPs of a forward pass over one sequence, counted by torch, x sequences; of OLMo-core its
    own count.

    With those of the heads for further tokens, if the run had any.
    """
    train_seconds: float
    """Time in training steps, without validation and saving."""
    steady_seconds: float | None
    """The same at the pace of each phase, without what is done once, such as compiling.

    None where a phase has fewer than two logged steps; runs of before have train_seconds there.
    """
    phase_step_seconds: list[float | None]
    """Median time of a step in each phase; where bag sizes are mixed, in all the steps on bags and in the rest.

    None for a phase with fewer than two logged steps.
    """
    val_loss: float
    """Next-token loss on held-out text, nats per token."""
    val_bpb: float
    """The same in bits per byte of text, by the bytes per token of the whole held-out text."""
    parameters: int
    """Of the finished model."""
    hardware: str
    versions: dict[str, str]
    data_sha256: str
    """Of what was read: vocabulary, tokens and documents of both splits."""
    precision: str
    """In which it was computed, whatever train.precision auto is elsewhere."""

    @classmethod
    def of(
        cls,
        config: Config,
        plan: PlannedDataset,
        *,
        flops: float,
        train_seconds: float,
        times: StepTimes,
        val_loss: float,
        bits_per_byte: float,
        parameters: int,
        precision: str,
        engine: str | None = None,
    ) -> RunResult:
        """The counts follow from the plan, which reads a token store, hardware and versions from this process.

        ``engine`` names a package.
        """
        schedule, counts = plan.schedule, (plan.batch_size, plan.sequence_length)
        packages = ("token-superposition", "torch", "transformers", *([engine] if engine else []))
        return cls(
            seed=config.train.seed,
            bag_size=max(max(p.input_bag, p.output_bag) for p in schedule.phases),
            ratio=(schedule.switches[-1] if schedule.switches else 0) / schedule.total_steps,
            steps=schedule.total_steps,
            latent_tokens=schedule.latent_tokens(*counts),
            raw_tokens=schedule.raw_tokens(*counts),
            epochs=plan.epochs,
            flops=flops,
            train_seconds=train_seconds,
            steady_seconds=times.steady,
            phase_step_seconds=times.by_phase,
            val_loss=val_loss,
            val_bpb=val_loss * bits_per_byte,
            parameters=parameters,
            hardware=hardware(),
            versions={name: version(name) for name in packages} | {"python": platform.python_version()},
            data_sha256=data_digest(plan.tokens.meta),
            precision=precision,
        )


@dataclass(frozen=True)
class StepTimes:
    """Of a run, in seconds, from its logged steps: a phase's first has what is done once in it, such as compiling."""

    by_phase: list[float | None]
    """Median time of a step in each phase; None where fewer than two were logged."""
    steady: float | None
    """Of all steps at that pace; None where a phase has none."""

    @classmethod
    def of(cls, out: Path, starts: list[int], total_steps: int) -> StepTimes:
        """Of the run in ``out``, whose phases begin after the steps ``starts``."""
        lines = [m for m in read_metrics(out / METRICS) if "loss" in m]
        by_phase: list[float | None] = []
        steady: float | None = 0.0
        for start, end in zip(starts, [*starts[1:], total_steps], strict=True):
            inside = [m for m in lines if start < m["step"] <= end]
            paces = [(b["seconds"] - a["seconds"]) / (b["step"] - a["step"]) for a, b in pairwise(inside)]
            by_phase.append(median(paces) if paces else None)
            steady = steady + (end - start) * median(paces) if paces and steady is not None else None
        return cls(by_phase, steady)


def result_file(directory: Path) -> Path | None:
    """Of a run that is over, finished or diverged."""
    return next((p for name in (RESULT, DIVERGED) if (p := directory / name).exists()), None)


def result_json(result: RunResult, model_sha256: str | None) -> dict[str, Any]:
    """What is written of a run, which began with the weights ``model_sha256`` (``model_digest``), if with any."""
    return asdict(result) | ({} if model_sha256 is None else {BEGAN: model_sha256})


def began_with(path: Path) -> str | None:
    """The weights that a run began with (``model_digest``), of which those of before say nothing."""
    return json.loads(path.read_text(encoding="utf-8")).get(BEGAN)


def read_result(path: Path) -> RunResult:
    """Raises ``TokenSuperpositionError`` for a file of another form, such as one of an earlier version."""
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(content, dict):
            cast(dict[str, Any], content).pop(BEGAN, None)
        content = restored(content, RunResult)
        wrong = misfit(content, RunResult, path.name)
    except (ValueError, RecursionError) as e:
        content, wrong = None, str(e)
    if wrong:
        raise TokenSuperpositionError(
            f"{path} has not the form that a run of this version writes ({wrong}); remove {path.parent}, and it is "
            "trained again, or take the version that wrote it"
        )
    return RunResult(**content)


def hardware() -> str:
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    name = platform.processor() or platform.machine()
    try:
        with Path("/proc/cpuinfo").open(encoding="utf-8") as f:
            name = next((line.split(":", 1)[1].strip() for line in f if line.startswith("model name")), name)
    except OSError:
        pass
    return f"{name}, {torch.get_num_threads()} of {os.cpu_count()} cores"
