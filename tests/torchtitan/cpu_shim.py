"""torchtitan on a CPU: what it expects of a GPU and of torch 2.14, for the tests alone. Run in place of torchtitan.train.

    torchrun --nproc-per-node 2 -m tests.torchtitan.cpu_shim --module MODULE --config FUNCTION ...

None of it touches what the tests are about: model, loss, data, optimizer and checkpoints are the stock ones and ours.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch


def pretend() -> None:
    """Call before torchtitan is imported."""
    torch._utils._get_available_device_type = lambda: "cpu"  # torchtitan reads it when it is imported
    cpu = torch.cpu
    cpu.get_device_name = lambda device=None: "CPU"
    cpu.get_device_properties = lambda device=None: SimpleNamespace(total_memory=1)
    cpu.reset_peak_memory_stats = cpu.empty_cache = lambda: None
    cpu.memory_stats = lambda device=None: {}

    from torchtitan.distributed import utils

    utils.set_pg_timeouts = lambda timeout, parallel_dims: None  # torch.distributed.set_timeout is of torch 2.14


if __name__ == "__main__":
    pretend()
    from torchtitan.train import main

    main()
