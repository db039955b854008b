"""The model card of an exported model: what the files of its run say of it, and nothing else."""

from __future__ import annotations

import dataclasses
import warnings
from dataclasses import asdict, dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import tomli_w
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from token_superposition.data.store import TokenStore, file_sha256, json_sha256
from token_superposition.errors import TokenSuperpositionError
from token_superposition.experiment.checkpoints import read_manifest
from token_superposition.experiment.config import Config, load_written
from token_superposition.experiment.files import CONFIG, METRICS, RESULT, read_metrics
from token_superposition.experiment.result import read_result
from token_superposition.experiment.resume import data_digest
from token_superposition.experiment.tree import without_none
from token_superposition.schedule import Phase

TEMPLATE = files("token_superposition") / "report" / "model_card.md.j2"


@dataclass(frozen=True)
class Figures:
    """A run as far as ``step``; what its directory does not say is None or empty."""

    step: int
    total_steps: int | None
    val_loss: float | None
    """Next-token loss on held-out text, nats per token."""
    val_bpb: float | None
    latent_tokens: int | None
    raw_tokens: int | None
    flops: float | None
    hardware: str | None
    versions: dict[str, str]
    config: Config | None
    data: tuple[tuple[str, str], ...]

    @classmethod
    def of(cls, run: Path, checkpoint: int | None) -> Figures:
        """Of the finished run, or at the step ``checkpoint``: a loss only where it was validated at that very step."""
        config = load_written(run / CONFIG) if (run / CONFIG).exists() else None
        result: dict[str, Any] = {}
        if checkpoint is not None:
            manifest = read_manifest(run / "checkpoints" / f"checkpoint-{checkpoint}")
            result = {"steps": checkpoint, "data_sha256": json_sha256(manifest["data"])}
        elif (run / RESULT).exists():
            result = asdict(read_result(run / RESULT))
        lines = read_metrics(run / METRICS)
        step = result.get("steps", lines[-1]["step"] if lines else 0)
        known: dict[str, Any] = {k: v for line in lines if line["step"] == step for k, v in line.items()}
        if config is not None:
            counts = (config.train.batch_size, config.data.sequence_length, step)
            known["latent_tokens"] = config.schedule.latent_tokens(*counts)
            known["raw_tokens"] = config.schedule.raw_tokens(*counts)
        flops = next((m["flops"] / m["step"] * step for m in lines if m["step"] and "flops" in m), None)
        known = {"flops": flops} | known | result
        return cls(
            step=step,
            total_steps=config.train.steps if config else None,
            val_loss=known.get("val_loss"),
            val_bpb=known.get("val_bpb"),
            latent_tokens=known.get("latent_tokens"),
            raw_tokens=known.get("raw_tokens"),
            flops=known["flops"],
            hardware=known.get("hardware"),
            versions=known.get("versions", {}),
            config=config,
            data=data_rows(config, result.get("data_sha256")) if config else (),
        )


def data_rows(config: Config, digest: str | None) -> tuple[tuple[str, str], ...]:
    """What the token store is, without saying where; empty, with a warning, if it is gone or not that of ``digest``."""
    path = Path(config.data.path)
    try:
        store = TokenStore(path)
    except TokenSuperpositionError as e:
        _warn_without_data(path, str(e).partition(";")[0])
        return ()
    meta = store.meta
    if digest is not None and data_digest(meta) != digest:
        _warn_without_data(path, "it is other data than the run read")
        return ()
    return (
        (
            "training text",
            f"{meta.train.tokens:,} tokens, {meta.train.documents:,} documents, {meta.train.bytes:,} bytes",
        ),
        ("held-out text", f"{meta.validation.tokens:,} tokens, {meta.validation.documents:,} documents"),
        ("vocabulary", f"{meta.vocab_size:,}"),
        ("SHA-256 of the tokenizer", f"`{meta.tokenizer_sha256}`"),
        ("SHA-256 of the data (meta.json)", f"`{file_sha256(store.directory / 'meta.json')}`"),
    )


def _warn_without_data(path: Path, why: str) -> None:
    remedy = "" if path.is_absolute() else ", or give the command where the run was started"
    warnings.warn(
        f"the model card says nothing of the data, which was looked for at {path.absolute()} ({why}); put the data "
        f"there{remedy}",
        stacklevel=1,
    )


def model_card(figures: Figures, name: str, parameters: int, dtype: str) -> ModelCard:
    """README.md with the front matter that the hub reads: losses are in its model index."""
    found = {"nats per token": figures.val_loss, "bits per byte": figures.val_bpb}
    evaluation = [
        EvalResult(
            task_type="text-generation",
            dataset_type="held-out",
            dataset_name="held-out text of the training data",
            metric_type="loss" if unit == "nats per token" else "bits_per_byte",
            metric_name=f"next-token loss, {unit}",
            metric_value=value,
        )
        for unit, value in found.items()
        if value is not None
    ]
    superposed = figures.config is not None and any(p.is_superposed for p in figures.config.schedule.phases)
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["token-superposition-training"] if superposed else None,
        model_name=name,
        eval_results=evaluation or None,
    )
    tables = [("Figures", _figures(figures)), ("Data", list(figures.data)), ("Made with", _made_with(figures))]
    return ModelCard.from_template(
        data,
        template_str=TEMPLATE.read_text(encoding="utf-8"),
        name=name,
        parameters=f"{parameters:,}",
        dtype=dtype,
        schedule=_schedule(figures),
        superposed=superposed,
        unfinished=superposed and _trained(figures)[-1].is_superposed,
        tables=[(title, rows) for title, rows in tables if rows],
        config=_config(figures.config),
    )


def _trained(figures: Figures) -> list[Phase]:
    """The phases up to the checkpoint's step, the last of them cut there."""
    assert figures.config is not None
    found: list[Phase] = []
    left = figures.step
    for phase in figures.config.schedule.phases:
        if steps := min(phase.steps, left):
            found.append(replace(phase, steps=steps))
        left -= steps
    return found


def _schedule(figures: Figures) -> str:
    config = figures.config
    if config is None:
        return "the run left no configuration"
    phases = _trained(figures)
    if len(phases) > 8:
        return f"{len(phases)} phases of bag sizes up to {max(max(p.input_bag, p.output_bag) for p in phases)}"
    named = [
        f"{p.steps:,} steps " + (f"that read bags of {p.input_bag} and predict bags of {p.output_bag}"
                                 if p.is_superposed else "on ordinary tokens")
        for p in phases
    ]  # fmt: skip
    return ", then ".join(named)


def _figures(figures: Figures) -> list[tuple[str, str]]:
    steps = f"{figures.step:,}" if figures.total_steps is None else f"{figures.step:,} of {figures.total_steps:,}"
    rows = [("steps", steps)]
    for label, value, form in (
        ("next-token loss on held-out text, nats per token", figures.val_loss, ".4f"),
        ("the same, bits per byte", figures.val_bpb, ".4f"),
        ("latent tokens (positions computed)", figures.latent_tokens, ","),
        ("raw tokens (text read)", figures.raw_tokens, ","),
        ("FLOPs of training", figures.flops, ".3e"),
    ):
        if value is not None:
            rows.append((label, format(value, form)))
    return rows


def _made_with(figures: Figures) -> list[tuple[str, str]]:
    rows = list(figures.versions.items())
    return rows + ([("hardware", figures.hardware)] if figures.hardware else [])


def _config(config: Config | None) -> str | None:
    """The configuration as TOML; of paths, which tell of a machine, the last name only."""
    if config is None:
        return None
    data = dataclasses.replace(config.data, path=Path(config.data.path).name)
    model = config.model
    if model.path is not None:
        model = dataclasses.replace(model, path=Path(model.path).name)
    content = dataclasses.asdict(dataclasses.replace(config, data=data, model=model))
    return tomli_w.dumps(without_none(content)).strip()
