"""Where a run goes on: the newest whole checkpoint, the one that was asked for, or none; and whether it may."""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from hashlib import file_digest, sha256
from pathlib import Path
from typing import Any, Literal

from token_superposition.data.store import Meta, SplitMeta, json_sha256
from token_superposition.errors import TokenSuperpositionError
from token_superposition.experiment.checkpoints import (
    checkpoints_in,
    damage,
    newest_whole,
    read_manifest,
    step_of,
)
from token_superposition.experiment.config import Config, as_written
from token_superposition.experiment.shards import check_shards
from token_superposition.experiment.tree import from_dict, without_none

Resume = Literal["auto", "never"] | Path
MAY_CHANGE = (
    "save_at",
    "micro_batch_size",
    "activation_checkpointing",
    "loader_workers",
    "save_every",
    "keep",
    "on_nonfinite",
    "timeout_minutes",
    "report_to",
)
"""Settings of [train] that a run may go on with: they change neither samples nor losses, but for rounding."""
OF_THE_DATA = {
    "data": ("sequence_length",),
    "train": ("seed", "batch_size", "optimizer", "embedding_lr_factor"),
    "superposition": ("shift", "boundaries", "mtp_heads"),
}
"""Settings that also a run which branches off another one must share with it, beside the precision."""


def data_identity(meta: Meta) -> dict[str, Any]:
    """What makes a token store the same text in the same tokens, wherever it lies."""

    def of(split: SplitMeta) -> str:
        return sha256("".join(s.sha256 + s.documents_sha256 for s in split.shards).encode()).hexdigest()

    return {
        "vocab_size": meta.vocab_size,
        "dtype": meta.dtype,
        "tokenizer_sha256": meta.tokenizer_sha256,
        "train_sha256": of(meta.train),
        "validation_sha256": of(meta.validation),
    }


def data_digest(meta: Meta) -> str:
    """SHA-256 of ``data_identity``."""
    return json_sha256(data_identity(meta))


def model_digest(path: str | None) -> str | None:
    """SHA-256 of the weights at ``model.path`` and their config.json; None without one, or where it is no directory.

    Raises ``TokenSuperpositionError`` for a file that cannot be read.
    """
    if path is None or not Path(path).is_dir():
        return None

    def of(file: Path) -> str:
        with file.open("rb") as f:
            return file_digest(f, "sha256").hexdigest()

    patterns = ("config.json", "*.safetensors", "pytorch_model*.bin")
    try:
        return json_sha256({p.name: of(p) for pattern in patterns for p in sorted(Path(path).glob(pattern))})
    except OSError as e:
        raise TokenSuperpositionError(
            f"model.path {path} cannot be read ({e.filename}: {e.strerror}); give the directory of a saved model"
        ) from None


def changes(old: Config, new: Config) -> list[str]:
    """What a run may not go on with, as "section.name old -> new"."""
    old, new = (replace(c, superposition=c.superposition.as_read()) for c in (old, new))
    return [
        f"{section}.{name} {getattr(a, name)!r} -> {getattr(b, name)!r}"
        for section in ("model", "data", "superposition", "train")
        if (a := getattr(old, section)) != (b := getattr(new, section))
        for name in a.__dataclass_fields__
        if getattr(a, name) != getattr(b, name) and not (section == "train" and name in MAY_CHANGE)
    ]


def says_all(path: Path, config: Config) -> bool:
    """Whether ``save_config`` would write into the file just what it says: with every default, so that hardly anybody
    has written it by hand."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8")) == without_none(asdict(config))
    except (OSError, ValueError):
        return False


def facts(config: Config, meta: Meta, precision: str, model_sha256: str | None) -> dict[str, Any]:
    """What the manifest of a checkpoint says of its run, which began with the weights ``model_sha256``, if with any."""
    began = {} if model_sha256 is None else {"model_sha256": model_sha256}
    return {"data": data_identity(meta), "config": without_none(asdict(config)), "precision": precision} | began


@dataclass(frozen=True)
class Start:
    """The search for a checkpoint to start from, in a directory of checkpoints and in what the user asked for."""

    checkpoints: Path
    resume: Resume = "auto"
    branch_from: Path | None = None

    def find(
        self, report: Callable[[str], None] = lambda line: None, check: Callable[[Path], str | None] = damage
    ) -> Path | None:
        """The checkpoint to start from, if any. Damaged ones are passed over, except one that was asked for by name.

        Raises ``TokenSuperpositionError`` for checkpoints that are in the way, and for a damaged one that was named.
        """
        there = checkpoints_in(self.checkpoints)
        named = self.branch_from
        if isinstance(self.resume, Path):
            if named is not None:
                raise TokenSuperpositionError(f"--resume {self.resume} and --branch-from {named} exclude each other")
            named = self.resume
            newer = [c for c in there if c.resolve() != named.resolve()]
            if named.resolve().parent == self.checkpoints.resolve():
                newer = [c for c in newer if step_of(c) > step_of(named)]
            if newer:
                raise TokenSuperpositionError(
                    f"{self.checkpoints} holds {newer[-1].name} as well, which --resume {named} would contradict; "
                    "remove it or choose another --out"
                )
        elif there:
            if self.resume == "never":
                raise TokenSuperpositionError(
                    f"{self.checkpoints} holds {there[-1].name} and --resume is never; choose another --out, or "
                    "--resume auto to go on from there"
                )
            return newest_whole(self.checkpoints, report, check)
        if named is not None:
            step_of(named)
            if problem := check(named):
                raise TokenSuperpositionError(f"{problem}; take another checkpoint")
        return named


def check_start(checkpoint: Path, config: Config, meta: Meta, precision: str, model_sha256: str | None = None) -> None:
    """Raises ``TokenSuperpositionError``, with the differences, for a checkpoint of another model, data or plan.

    Up to the checkpoint, the run must have read what this configuration reads, in the same ``precision`` (what
    train.precision is on this machine), and have begun with the same weights (``model_digest``; checkpoints of before
    do not say with which); how it trained may differ.
    """
    manifest = read_manifest(checkpoint)
    if step_of(checkpoint) > config.train.steps:
        raise TokenSuperpositionError(
            f"{checkpoint} is later than the {config.train.steps} steps of the run; give more train.steps, or an "
            "earlier checkpoint"
        )
    old = from_dict(Config, as_written(manifest["config"]), str(checkpoint))
    old = replace(old, superposition=old.superposition.as_read())
    differences = [
        f"data's {name} {_short(value)} -> {_short(now)}"
        for name, value in manifest["data"].items()
        if value != (now := data_identity(meta)[name])
    ]
    sections = {"model": tuple(config.model.__dataclass_fields__), **OF_THE_DATA}
    differences += [
        f"{section}.{name} {before!r} -> {now!r}"
        for section, names in sections.items()
        for name in names
        if (before := getattr(getattr(old, section), name)) != (now := getattr(getattr(config, section), name))
    ]
    if (before := manifest.get("model_sha256", model_sha256)) != model_sha256:
        differences.append(f"weights of model.path {_short(before)} -> {_short(model_sha256)}")
    if manifest["precision"] != precision:
        differences.append(f"train.precision {manifest['precision']!r} -> {precision!r}")
    a, b = old.schedule, config.schedule
    other = next((i for i in range(step_of(checkpoint)) if _bags(a, i) != _bags(b, i)), None)
    if other is not None:
        differences.append(f"bag sizes of step {other + 1} {_bags(a, other)} -> {_bags(b, other)}")
    if differences:
        raise TokenSuperpositionError(
            f"{checkpoint} was written by another run ({'; '.join(differences)}); give what it was trained with, or "
            "choose another --out"
        )
    check_shards(checkpoint)


def _bags(schedule: Any, step: int) -> tuple[int, int]:
    phase = schedule.at(step)
    return phase.input_bag, phase.output_bag


def _short(value: object) -> str:
    return value[:12] if isinstance(value, str) else str(value)
