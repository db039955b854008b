"""What does not divide is said in one line, before a process group starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

import torch
from torchtitan.config import ParallelismConfig
from torchtitan.tools.utils import device_module

from token_superposition.engines.torchtitan.models import balance_coefficient
from token_superposition.errors import TokenSuperpositionError, require_int
from token_superposition.experiment.files import METRICS, MODEL

Part = TypeVar("Part")


def machine() -> None:
    """Raises ``TokenSuperpositionError`` where torchtitan would stop in the middle of the first step."""
    if not device_module.is_available():
        raise TokenSuperpositionError(
            "torchtitan found no accelerator and has no CPU support; run it on a GPU, or train with tst train"
        )
    if not hasattr(torch.distributed, "set_timeout"):
        raise TokenSuperpositionError(
            f"torchtitan 0.3.0 calls torch.distributed.set_timeout, which torch {torch.__version__} does not have; "
            "install torch 2.14 or later"
        )


def expect(name: str, given: object, wanted: type[Part]) -> Part:
    """``given``, a part of the configuration. Raises ``TokenSuperpositionError`` if it is of another class."""
    if not isinstance(given, wanted):
        raise TokenSuperpositionError(
            f"config.{name} is a {type(given).__qualname__}, with which TSTTrainer cannot train; "
            f"give a {wanted.__module__}.{wanted.__qualname__} (trainer_config sets it) or a subclass"
        )
    return given


def foreign(folder: Path, start: str | None) -> None:
    """Raises ``TokenSuperpositionError`` where a run in ``folder`` would overwrite what none of ours has written."""
    metrics, model = folder / METRICS, folder / MODEL
    if start is not None and Path(start).resolve() == model.resolve():
        raise TokenSuperpositionError(
            f"model.path {start} lies where the finished model of dump_folder {folder} goes; choose another dump_folder"
        )
    first = metrics.read_text(encoding="utf-8", errors="replace").partition("\n")[0] if metrics.is_file() else ""
    theirs = metrics if first and "latent_tokens" not in first else model
    if theirs == metrics or (model.exists() and not metrics.exists()):
        raise TokenSuperpositionError(f"{theirs} would be overwritten, and no run wrote it; choose another dump_folder")


def data_parallel(parallelism: ParallelismConfig, world_size: int) -> int:
    """Processes that read different data. Raises ``TokenSuperpositionError`` if the degrees are not the world's."""
    p = parallelism
    if p.context_parallel_degree > 1:
        raise TokenSuperpositionError(
            f"parallelism.context_parallel_degree is {p.context_parallel_degree}; the torchtitan engine does not split "
            "bags over positions: give 1"
        )
    if p.spmd_backend == "full_dtensor":
        raise TokenSuperpositionError(
            "parallelism.spmd_backend is full_dtensor, which shards integer bags as if they were hidden states; "
            "give spmd_types or partial_dtensor"
        )
    others = p.tensor_parallel_degree * p.pipeline_parallel_degree
    given = others * p.data_parallel_replicate_degree * max(p.data_parallel_shard_degree, 1)
    if world_size % given or (p.data_parallel_shard_degree > 0 and world_size != given):
        raise TokenSuperpositionError(
            f"{world_size} processes cannot be divided into tensor x pipeline x replicate x shard = "
            f"{p.tensor_parallel_degree} x {p.pipeline_parallel_degree} x {p.data_parallel_replicate_degree} x "
            f"{p.data_parallel_shard_degree}; change parallelism or --nproc-per-node"
        )
    for part in p.module_fqns_per_model_part or []:
        if not any(name == "norm" or name.startswith("layers.") for name in part):
            raise TokenSuperpositionError(
                f"parallelism.module_fqns_per_model_part has a part {part} without a norm, of which one of the "
                "optimizer's groups would be empty; put a layer into it"
            )
    sharding = world_size // (p.pipeline_parallel_degree * p.data_parallel_replicate_degree)
    if sharding % p.expert_parallel_degree:
        raise TokenSuperpositionError(
            f"parallelism.expert_parallel_degree {p.expert_parallel_degree} does not divide the {sharding} processes "
            "of a replica's pipeline stage; change one of them"
        )
    return world_size // others


def batch_sizes(batch: int, local: int, processes: int) -> int:  # the micro-batch of one process
    """``local`` -1 is a process's whole share of the batch of a step."""
    require_int("training.global_batch_size", batch, 1)
    if local == -1 and batch % processes == 0:
        return batch // processes
    unit = max(local, 1) * processes
    if batch % unit:
        raise TokenSuperpositionError(
            f"training.global_batch_size {batch} is not a multiple of {processes} data-parallel processes x "
            f"micro-batch {max(local, 1)}; give for example {max(batch // unit, 1) * unit}, or change "
            "training.local_batch_size"
        )
    return local


def model_divides(settings: Any, parallelism: ParallelismConfig) -> None:
    tensor, expert = parallelism.tensor_parallel_degree, parallelism.expert_parallel_degree
    for key, what in (("num_attention_heads", "attention heads"), ("num_key_value_heads", "key-value heads")):
        _tensor_divides(tensor, getattr(settings, key), what, f"model.options.{key}")
    if expert > 1 and (getattr(settings, "num_experts", None) or 1) % expert:
        raise TokenSuperpositionError(
            f"{getattr(settings, 'num_experts', None) or 'no'} experts cannot be divided over "
            f"parallelism.expert_parallel_degree {expert}; change one of them"
        )


def logits_divide(vocab_size: int, parallelism: ParallelismConfig, sequence_length: int, num_chunks: int) -> None:
    tensor = parallelism.tensor_parallel_degree
    _tensor_divides(tensor, vocab_size, "tokens of the vocabulary", "the tokenizer's vocabulary")
    if parallelism.enable_sequence_parallel:
        _tensor_divides(tensor, sequence_length, "positions of a sequence", "data.sequence_length")
    if sequence_length % num_chunks:
        raise TokenSuperpositionError(
            f"training.seq_len {sequence_length} is not a multiple of loss.num_chunks {num_chunks}; change one of them"
        )


def _tensor_divides(tensor: int, value: int, what: str, where: str) -> None:
    if value % tensor:
        raise TokenSuperpositionError(
            f"{value} {what} cannot be divided over parallelism.tensor_parallel_degree {tensor}; "
            f"give a degree that divides {value}, or change {where}"
        )


def planned_steps(steps: int, of_curve: int | None) -> int:
    """Those of the learning rate's curve, of which ``steps`` may be the first; the phases are shares of them."""
    if of_curve is not None and of_curve < steps:
        raise TokenSuperpositionError(
            f"lr_scheduler.total_steps {of_curve} is less than training.steps {steps}; change one of them"
        )
    return of_curve or steps


def routers_balance(settings: Any, parallelism: ParallelismConfig, compiled: bool) -> bool:
    """Whether there are no experts or something balances them: the auxiliary loss of a mixture of experts.

    It looks at all layers and at whole sequences. Raises ``TokenSuperpositionError`` where these are divided.
    """
    without = (
        "to train without it, set output_router_logits = false under [model.options] of a TOML file, and nothing "
        "balances the experts"
    )
    if not balance_coefficient(settings):
        return not getattr(settings, "num_experts", None)
    for name in ("tensor_parallel_degree", "pipeline_parallel_degree"):
        if getattr(parallelism, name) > 1:
            raise TokenSuperpositionError(
                f"parallelism.{name} is {getattr(parallelism, name)}; the router's auxiliary loss needs 1: use expert "
                f"parallelism; {without}"
            )
    if compiled:
        raise TokenSuperpositionError(
            "compile.enable is true, and the router's auxiliary loss is not compiled: give --compile.no-enable; "
            f"{without}"
        )
    return True
