"""The configuration of a run: one tree of dataclasses, which is both the TOML file and the command's flags."""

from __future__ import annotations

import dataclasses
import math
import os
import re
import shutil
import sys
import tomllib
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import torch

from token_superposition.errors import TokenSuperpositionError, require_int, require_number, require_seed
from token_superposition.experiment.files import write_whole
from token_superposition.experiment.superposition import SuperpositionConfig
from token_superposition.experiment.tree import from_dict, without_none
from token_superposition.schedule import WSD, Schedule
from token_superposition.weights import Weighting


@dataclass(frozen=True)
class ModelConfig:
    """A causal language model of transformers."""

    architecture: str = "llama"
    """Model type of transformers: llama, qwen3, qwen3_moe, gpt2, mamba, ..."""
    options: dict[str, int | float | bool | str] = field(default_factory=dict[str, int | float | bool | str])
    """Fields of that model's configuration: hidden_size, num_hidden_layers, ... The vocabulary comes from the data."""
    path: str | None = None
    """Directory of a saved model to continue from, instead of architecture and options."""


@dataclass(frozen=True)
class DataConfig:
    """What is read."""

    path: str = "data"
    """Directory written by tst prepare."""
    sequence_length: int = 1024
    """Latent positions of a sequence (L)."""
    eval_tokens: int = 65_536
    """Held-out tokens of each validation during training, spread over the held-out text; all if it has fewer."""
    final_eval_tokens: int = 524_288
    """Held-out tokens of the last validation, likewise."""


_PRESETS = files("token_superposition") / "presets"


@dataclass(frozen=True)
class TrainConfig:
    """How it is trained: AdamW and a warm-up, stable, decay learning rate, as in the paper."""

    steps: int = 1000
    """Optimizer steps of the whole run."""
    batch_size: int = 64
    """Sequences of one optimizer step, over all processes and accumulated micro-batches."""
    micro_batch_size: int | None = None
    """Sequences that one process computes at once; the whole batch by default."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """muon: Muon for the hidden matrices, AdamW for embedding, head and the rest."""
    learning_rate: float = 1e-3
    """Peak learning rate. Tune it for the baseline."""
    embedding_lr_factor: float = 4.0
    """Learning rate of the token embeddings over that of the rest, in every run. TST gains more with 4; 1 is plain."""
    warmup_steps: int = 50
    """Steps over which the learning rate rises."""
    decay_ratio: float = 0.1
    """Share of the steps, at the end, over which it falls linearly to 0."""
    weight_decay: float = 0.1
    """AdamW's weight decay (not on biases and norms)."""
    beta1: float = 0.9
    """AdamW's first decay rate."""
    beta2: float = 0.95
    """AdamW's second decay rate."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of the computation; weights stay float32. auto: bfloat16 where the hardware multiplies it natively."""
    activation_checkpointing: bool = False
    """Compute the layers' activations again in the backward pass instead of keeping them: less memory, more time."""
    compile: bool = False
    """Compile the model's layers with torch.compile; on a CPU that takes a C++ compiler."""
    seed: int = 0
    """Decides initial weights and the order of the data."""
    log_every: int = 10
    """Steps between logged training losses."""
    eval_every: int = 100
    """Steps between validations; one more comes at the end."""
    save_every: int = 0
    """Steps between checkpoints; 0 for none but the finished model, and what SIGTERM or Ctrl-C saves."""
    save_at: tuple[int, ...] = ()
    """Steps at which a checkpoint is written as well (tst train); these stay."""
    keep: int = 3
    """Newest checkpoints that stay (tst train), beside those of save_at and of the switches; 0 keeps all."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """A gradient that is not finite never reaches the weights (tst train): the run stops, or it skips that step."""
    timeout_minutes: float = 30.0
    """A run that does not come on for so long ends with an error: a stalled loader, a dead process."""
    loader_workers: int = 0
    """Processes that read data ahead."""
    report_to: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    """Trackers that are told of the run beside metrics.jsonl, by the Trainer's own reports."""

    def refuse_unsupported(self, engine: str) -> None:
        """Raise ``TokenSuperpositionError`` for what only ``tst train`` has, were it asked for on another engine."""
        if self.optimizer != "adamw":
            raise TokenSuperpositionError(
                f"train.optimizer is {self.optimizer!r}; the {engine} engine has adamw only, so use tst train"
            )
        if self.report_to:
            raise TokenSuperpositionError(
                f"train.report_to is {', '.join(self.report_to)}; {engine} has callbacks of its own for that, and "
                "metrics.jsonl is always written, so leave it out"
            )
        if self.on_nonfinite != "stop":
            raise TokenSuperpositionError(
                f"train.on_nonfinite is {self.on_nonfinite!r}; {engine} stops at a loss that is not finite and skips "
                "no step, so leave it out or use tst train"
            )
        if self.keep not in (0, TrainConfig.keep):
            raise TokenSuperpositionError(
                f"train.keep is {self.keep}; the {engine} engine keeps every checkpoint: leave it out, or use tst train"
            )


@dataclass(frozen=True)
class Variant:
    """One more way of training in a comparison: its name and a [superposition] of its own."""

    name: str = "tst"
    """Name of the run's directory and of its row in the report."""
    superposition: SuperpositionConfig = field(default_factory=SuperpositionConfig)
    """Its first phase, whole: what is left out has its default, not the value that [superposition] gives it."""
    length: float = 1.0
    """It takes this multiple of train.steps. Where that is not 1, it takes as many more (or less) FLOPs as well: so it
    is seen how many steps of one way of training another is worth."""
    embedding_lr_factor: float | None = None
    """Its own train.embedding_lr_factor, which is that of the baseline and of tst by default."""
    learning_rate: float | None = None
    """Its own train.learning_rate, likewise: what suits one way of training need not suit another."""

    def steps(self, of_tst: int) -> int:
        return round(self.length * of_tst)

    @property
    def rates(self) -> dict[str, float]:
        """Of [train], what it has of its own."""
        own = {"embedding_lr_factor": self.embedding_lr_factor, "learning_rate": self.learning_rate}
        return {name: value for name, value in own.items() if value is not None}


@dataclass(frozen=True)
class CompareConfig:
    """What tst compare runs beside the baseline, which has the same model, data, steps and learning rate."""

    seeds: tuple[int, ...] = ()
    """Every run is repeated with each of these seeds; without any, train.seed is the seed."""
    variants: tuple[Variant, ...] = ()
    """Runs beside baseline and tst ([superposition])."""
    baseline_lengths: tuple[float, ...] = (1.0,)
    """Baselines of these multiples of the steps. They share one run and branch off it before their decay."""
    parallel: int = 0
    """Runs at a time; 0 chooses: one per GPU, or one per core of the CPU up to the number of runs."""


SweepSchedule = Literal["switch", "halving", "fading", "random"]


@dataclass(frozen=True)
class SweepConfig:
    """What tst sweep tries, every value with every other one; a list left out is the value of [superposition], [train].

    The baseline is always in it. compare.seeds are its seeds, compare.parallel the runs at a time.
    """

    bag_sizes: tuple[int, ...] = ()
    """Values of superposition.bag_size (s)."""
    ratios: tuple[float, ...] = ()
    """Values of superposition.ratio (r)."""
    weightings: tuple[Weighting, ...] = ()
    """Values of superposition.weighting."""
    schedules: tuple[SweepSchedule, ...] = ()
    """switch: bags of s, then 1; halving: s, s/2, ..., 2 in turn; fading: each of them fades into the next; random: one
    of them at random in each step. switch by default."""
    learning_rates: tuple[float, ...] = ()
    """Values of train.learning_rate, for the baseline as well."""
    keep: float = 1.0
    """Share of the settings that goes on from each seed to the next while the best is chosen; 1 is the full grid."""
    selection_seeds: int = 0
    """How many of the seeds, the first, choose the best setting; the others judge it. 0 is half of them."""


@dataclass(frozen=True)
class Config:
    """A training run, or a comparison or sweep of runs."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    superposition: SuperpositionConfig = field(default_factory=SuperpositionConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    compare: CompareConfig = field(default_factory=CompareConfig)
    sweep: SweepConfig = field(default_factory=SweepConfig)

    @property
    def schedule(self) -> Schedule:
        return self.superposition.schedule(self.train.steps)

    @property
    def kept_steps(self) -> tuple[int, ...]:
        """Steps whose checkpoints are written and stay: save_at and, with save_every, the switches (mixed: last)."""
        switches = self.schedule.switches[-1:] if self.superposition.mixture else self.schedule.switches
        return (*self.train.save_at, *(switches if self.train.save_every else ()))

    @property
    def wsd(self) -> WSD:
        switch = self.schedule.switches[-1:] if self.superposition.reset_optimizer else []
        return WSD(self.train.steps, self.train.warmup_steps, self.train.decay_ratio, *switch)

    def check(self) -> None:
        """Raise ``TokenSuperpositionError`` for the first value that cannot be trained with."""
        t = self.train
        for name in ("steps", "batch_size", "log_every", "eval_every"):
            require_int(f"train.{name}", getattr(t, name), 1)
        for name in ("warmup_steps", "save_every", "keep", "loader_workers"):
            require_int(f"train.{name}", getattr(t, name), 0)
        require_seed("train.seed", t.seed)
        require_int("data.sequence_length", self.data.sequence_length, 2)
        for name in ("eval_tokens", "final_eval_tokens"):
            require_int(f"data.{name}", getattr(self.data, name), 1)
        if t.micro_batch_size is not None:
            require_int("train.micro_batch_size", t.micro_batch_size, 1)
            if t.batch_size % t.micro_batch_size:
                raise TokenSuperpositionError(
                    f"train.batch_size {t.batch_size} is not a multiple of "
                    f"train.micro_batch_size {t.micro_batch_size}; change one of them"
                )
        for where, own in ("train", t), *((f"compare.variants {v.name}", v) for v in self.compare.variants):
            for name, hint in ("learning_rate", ", such as 1e-3"), ("embedding_lr_factor", ", such as 4"):
                if (value := getattr(own, name)) is not None:
                    require_number(f"{where}.{name}", value, 0, strictly=True, hint=hint)
        if not 0 < t.timeout_minutes < math.inf:
            raise TokenSuperpositionError(f"train.timeout_minutes is {t.timeout_minutes}; give a number above 0")
        for name in ("weight_decay", "max_grad_norm"):
            if not 0 <= (value := getattr(t, name)) < math.inf:
                raise TokenSuperpositionError(f"train.{name} is {value}; give a number from 0 up")
        for name in ("beta1", "beta2"):
            if not 0 <= (value := getattr(t, name)) < 1:
                raise TokenSuperpositionError(f"train.{name} is {value}; give a number in [0, 1)")
        if any(not 0 < step <= t.steps for step in t.save_at):
            raise TokenSuperpositionError(
                f"train.save_at is {list(t.save_at)}, the run has {t.steps} steps; give steps from 1 to {t.steps}"
            )
        if t.compile:
            _check_compiler()
        for seed in self.compare.seeds:
            require_seed("compare.seeds", seed)
        require_int("compare.parallel", self.compare.parallel, 0)
        if len(set(self.compare.seeds)) < len(self.compare.seeds):
            raise TokenSuperpositionError(f"compare.seeds are {list(self.compare.seeds)}; give each seed once")
        lengths = self.compare.baseline_lengths
        if any(not 0 < x < math.inf for x in lengths):
            raise TokenSuperpositionError(f"compare.baseline_lengths are {lengths}; give numbers above 0")
        for x in lengths:
            if not round(x * t.steps):
                raise TokenSuperpositionError(
                    f"compare.baseline_lengths has {x:g}, of {t.steps} steps not one; give at least {1 / t.steps:.3g}"
                )
        if len({round(x * t.steps) for x in (1.0, *lengths)}) < len({1.0, *lengths}):
            raise TokenSuperpositionError(
                f"compare.baseline_lengths are {lengths}, of {t.steps} steps; give lengths that differ by a step"
            )
        names = ["tst", *(v.name for v in self.compare.variants)]
        # For directories and legends; the names of baselines are told by how they begin.
        plain = re.compile(r"(?!baseline|_|.*-seed\d+$)\w[\w .,+=()-]{,59}(?<! )")
        if len(set(names)) < len(names) or not all(map(plain.fullmatch, names)):
            raise TokenSuperpositionError(
                f"compare.variants are named {', '.join(names[1:])}; give each its own plain name of at most 60 "
                "letters, digits and spaces or any of _.,+=()-, not tst, no baseline..., and no ...-seed0"
            )
        for v in self.compare.variants:
            if not 0 < v.length < math.inf or not v.steps(t.steps):
                raise TokenSuperpositionError(
                    f"compare.variants: the length of {v.name} is {v.length:g}, of {t.steps} steps; give a multiple "
                    "of the steps, such as 1.1"
                )
        for superposition, steps in (
            (self.superposition, t.steps),
            *((v.superposition, v.steps(t.steps)) for v in self.compare.variants),
        ):
            superposition.check()
            if superposition.mtp_heads >= self.data.sequence_length:
                raise TokenSuperpositionError(
                    f"superposition.mtp_heads {superposition.mtp_heads} look past the sequence; give less than "
                    f"data.sequence_length {self.data.sequence_length}"
                )
            superposition.schedule(steps)
        _ = self.wsd


def _check_compiler() -> None:
    compiler = os.environ.get("CXX") or {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")
    if not torch.accelerator.is_available() and shutil.which(compiler) is None:
        raise TokenSuperpositionError(
            f"train.compile is true, and torch.compile needs a C++ compiler on a CPU: {compiler} is not there; install "
            "it, name yours in CXX, or give --train.no-compile"
        )


def load_config(name: str | Path) -> Config:
    """Read a TOML file or, where there is no file of that name, the preset of that name.

    Raises ``TokenSuperpositionError``, with the nearest name for a key that does not exist.
    """
    path = Path(name)
    if not path.is_file() and str(name) in preset_names():
        return load_preset(str(name))
    try:
        content = path.read_text(encoding="utf-8-sig")  # an editor's byte-order mark is no part of it
    except FileNotFoundError:
        raise TokenSuperpositionError(
            f"{name} does not exist; give a TOML file, or one of the presets {', '.join(preset_names())}"
        ) from None
    except UnicodeDecodeError:
        raise TokenSuperpositionError(f"{name} is not UTF-8, as a TOML file is; save it as UTF-8") from None
    except (OSError, ValueError) as e:
        why = e.strerror if isinstance(e, OSError) else e
        raise TokenSuperpositionError(f"{name} is not a TOML file ({why}); name one, or a preset") from None
    return _parse(content, str(name))


def load_written(path: Path) -> Config:
    """Read the configuration that a run was started with, as ``save_config`` wrote it, be it an earlier version's.

    Raises ``TokenSuperpositionError`` where it cannot be read.
    """
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        why = e.strerror if isinstance(e, OSError) else e
        raise TokenSuperpositionError(f"{path} cannot be read ({why}); it was written when the run began") from None
    return from_dict(Config, as_written(tree), str(path))


def as_written(tree: dict[str, Any]) -> dict[str, Any]:
    """``tree`` with the value of each setting that the version which wrote it did not know, where the default is
    another today."""
    return tree | {"train": {"embedding_lr_factor": 1.0} | tree.get("train", {})}


def preset_names() -> list[str]:
    """Names of the configurations that come with the package."""
    return sorted(f.name.removesuffix(".toml") for f in _PRESETS.iterdir() if f.name.endswith(".toml"))


def load_preset(name: str) -> Config:
    """The configuration of that name in the package's ``presets`` folder."""
    return _parse((_PRESETS / f"{name}.toml").read_text(encoding="utf-8"), name)


def _parse(content: str, where: str) -> Config:
    try:
        tree = tomllib.loads(content)
    except ValueError as e:
        raise TokenSuperpositionError(f"{where} is not a TOML file ({e}); mend that line") from None
    return from_dict(Config, tree, where)


def save_config(config: Config, path: Path) -> None:
    import tomli_w

    write_whole(path, tomli_w.dumps(without_none(dataclasses.asdict(config))))
