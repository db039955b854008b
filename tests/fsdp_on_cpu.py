"""``python -m tests.fsdp_on_cpu CONFIG [OPTIONS]`` is ``tst train`` with accelerate's FSDP2 on CPU processes.

accelerate turns FSDP off where it finds no accelerator, and a run refuses it there. Here the run is told of one, and
accelerate's state, after the process group is there, what it says itself on a GPU; wrapping, training, checkpoints and
export are then accelerate's, transformers' and torch's.
"""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from typing import Any

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

from token_superposition.experiment.launch import Launch


def shard_on_cpu() -> None:
    initialize = AcceleratorState.__init__

    def with_fsdp(self: Any, *args: Any, **kwargs: Any) -> None:
        initialize(self, *args, **kwargs)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.fsdp_plugin = FullyShardedDataParallelPlugin()  # read from the launcher's FSDP_... variables
            if self.mixed_precision != "no":
                self.fsdp_plugin.set_mixed_precision(self.mixed_precision)
            self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = with_fsdp
    found = Launch.from_environment()
    Launch.from_environment = lambda: replace(found, device_memory=math.inf)


def train_sharded(arguments: list[str]) -> None:
    from token_superposition.cli.arguments import parse, split_config
    from token_superposition.cli.quiet import quiet
    from token_superposition.cli.train import TrainCommand
    from token_superposition.experiment.run import train

    quiet()
    shard_on_cpu()
    config, rest = split_config(arguments)
    options = parse(TrainCommand, "train", rest, TrainCommand(config))
    train(options.config, options.out)


if __name__ == "__main__":
    train_sharded(sys.argv[1:])
