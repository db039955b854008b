"""What a launcher (torchrun, accelerate launch) has decided: read, and checked before any process group starts."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from token_superposition.errors import TokenSuperpositionError
from token_superposition.experiment.config import Config, TrainConfig

BYTES_PER_PARAMETER = 16  # float32 weights, gradients and AdamW's two moments
GB = 1e9


@dataclass(frozen=True)
class Launch:
    """The processes of a run, from the environment that a launcher leaves; without one, a single process."""

    processes: int = 1
    local_processes: int = 1
    """Of them, on this machine."""
    sharded: bool = False
    """FSDP: weights, gradients and optimizer state are spread over the processes."""
    mixed_precision: str = "no"
    """Of the launch file."""
    device_memory: float | None = None
    """Bytes of this process's GPU; infinite for an accelerator that does not tell, None without one."""

    @classmethod
    def from_environment(cls) -> Launch:
        """Raises ``TokenSuperpositionError`` for more processes than GPUs."""
        e = os.environ
        processes = int(e.get("WORLD_SIZE", 1))
        memory = None
        if torch.cuda.is_available():
            here, gpus = int(e.get("LOCAL_WORLD_SIZE", processes)), torch.cuda.device_count()
            if here > gpus:
                raise TokenSuperpositionError(
                    f"{here} processes are launched on this machine, which has {gpus} GPUs; launch at most {gpus} here"
                )
            memory = torch.cuda.get_device_properties(int(e.get("LOCAL_RANK", 0))).total_memory
        elif torch.accelerator.is_available():
            memory = math.inf
        return cls(
            processes,
            int(e.get("LOCAL_WORLD_SIZE", processes)),
            e.get("ACCELERATE_USE_FSDP", "false").lower() == "true",
            e.get("ACCELERATE_MIXED_PRECISION", "no"),
            memory,
        )

    def check(self, config: Config) -> None:
        """Raises ``TokenSuperpositionError`` for what accelerate would change or ignore without a word."""
        self.micro_batch(config)
        if self.sharded and os.environ.get("FSDP_VERSION", "1") != "2":
            raise TokenSuperpositionError(
                "the launch file asks for FSDP version 1, under which the output head cannot be read; "
                "set fsdp_version: 2 in it"
            )
        if self.sharded and self.device_memory is None:
            raise TokenSuperpositionError(
                "the launch file asks for FSDP and this machine has no accelerator, where accelerate trains with DDP "
                "and does not say so; launch with ddp.yaml or torchrun"
            )
        if self.sharded and config.train.optimizer != "adamw":
            raise TokenSuperpositionError(
                f"train.optimizer is {config.train.optimizer!r}, which was not made for FSDP; launch with ddp.yaml"
            )
        for name in ("reset_optimizer", "reset_embeddings"):
            if self.sharded and getattr(config.superposition, name):
                raise TokenSuperpositionError(
                    f"superposition.{name} is true, which was not made for FSDP; launch with ddp.yaml"
                )
        if self.sharded and (heads := config.superposition.trained_heads):
            raise TokenSuperpositionError(
                f"superposition.mtp_heads is {heads}, which was not made for FSDP; launch with ddp.yaml"
            )
        if self.mixed_precision not in ("no", "bf16"):
            raise TokenSuperpositionError(
                f"the launch file asks for mixed_precision {self.mixed_precision}; set it to bf16 or no "
                "(train.precision goes before it)"
            )

    def micro_batch(self, config: Config) -> int:
        """Sequences that one process computes at once."""
        t = config.train
        micro = t.micro_batch_size or max(t.batch_size // self.processes, 1)
        step = micro * self.processes
        if t.batch_size % step:
            near = max(t.batch_size // step, 1) * step
            raise TokenSuperpositionError(
                f"train.batch_size {t.batch_size} is not a multiple of {step} ({self.processes} processes x "
                f"micro-batch {micro}); use {near} or {near + step}, or another train.micro_batch_size"
            )
        return micro

    def bfloat16(self, precision: Literal["auto", "float32", "bfloat16"]) -> bool:
        """train.precision decides; ``auto`` is the launch file's bf16, else what the hardware multiplies natively."""
        return precision == "bfloat16" or (
            precision == "auto" and (self.mixed_precision == "bf16" or native_bfloat16())
        )

    def precision(self, wanted: Literal["auto", "float32", "bfloat16"]) -> str:
        """What ``wanted`` is here."""
        return "bfloat16" if self.bfloat16(wanted) else "float32"

    def variables(self, train: TrainConfig) -> dict[str, str]:
        """What accelerate takes from the environment and from nowhere else, for as long as the run lasts."""
        variables = {
            "ACCELERATE_MIXED_PRECISION": "bf16" if self.bfloat16(train.precision) else "no",
            # Layer by layer: less to compile, and no layer again at the switch. A launcher writes False where nobody
            # has asked for it.
            "ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION": "true",
        }
        if self.sharded and train.activation_checkpointing:  # FSDP's own: the other one gathers a layer once more
            variables["FSDP_ACTIVATION_CHECKPOINTING"] = "true"
        return variables

    def check_memory(self, parameters: int) -> None:
        """Raises ``TokenSuperpositionError`` where not even weights, gradients and optimizer state have room.

        The least that training needs; activations come on top. Also the float32 weights that every process
        initialises in the machine's memory before it shares them out.
        """
        state = BYTES_PER_PARAMETER * parameters
        mine = state / self.processes if self.sharded else state
        host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        if self.device_memory is not None:
            if mine > self.device_memory:
                least = int(state // self.device_memory)
                raise TokenSuperpositionError(
                    f"{parameters / 1e9:.2f}B parameters with gradients and optimizer state need {mine / GB:.1f} GB on "
                    f"each of {self.processes} processes, the GPU here has {self.device_memory / GB:.1f} GB; launch "
                    f"with fsdp2.yaml on more than {least} GPUs, or take a smaller model"
                )
            need = 4 * parameters * self.local_processes
        else:
            need = mine * self.local_processes
        if need > host:
            raise TokenSuperpositionError(
                f"{parameters / 1e9:.2f}B parameters need {need / GB:.1f} GB of memory in {self.local_processes} "
                f"processes on this machine, which has {host / GB:.1f} GB; take a smaller model or fewer processes"
            )

    def check_checkpoint(self, checkpoint: Path) -> None:
        """Raises ``TokenSuperpositionError`` for a checkpoint of the other kind of run."""
        of_shards = any(checkpoint.glob("pytorch_model_fsdp*"))
        if of_shards != self.sharded:
            kinds = {True: "with FSDP (fsdp2.yaml)", False: "without FSDP (ddp.yaml, torchrun or one process)"}
            raise TokenSuperpositionError(
                f"{checkpoint} was written {kinds[of_shards]} and this run is launched {kinds[self.sharded]}; "
                "launch it as before, or choose another --out"
            )


def native_bfloat16() -> bool:
    """Whether this machine multiplies bfloat16 faster than float32."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return supported is not None and supported()
