"""torchtitan on a CPU: what it expects of a GPU and of torch 2.14, for the tests alone.

    torchrun --nproc-per-node 2 -m tests.torchtitan.cpu_shim --module MODULE --config FUNCTION ... [THEN ...]

Runs ``torchtitan.train``. Several runs, divided by THEN, share the time that the imports take; ``VOCABULARY out`` is
the one of ``vocabulary.py``. None of it touches what the tests are about: model, loss, data, optimizer and checkpoints
are the stock ones and ours.
"""

from __future__ import annotations

import os
import sys
import time
from functools import partial
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

    torch.distributed.set_timeout = lambda timeout, group=None: None  # of torch 2.14

    from torchtitan.distributed import utils

    utils.set_pg_timeouts = lambda timeout, parallel_dims: None  # its barrier names a device, which gloo refuses

    from torch.distributed.fsdp._fully_shard import _fsdp_collectives as fsdp
    from torch.distributed.pipelining import schedules

    factors = fsdp._get_gradient_divide_factors  # gloo has no PREMUL_SUM: gradients are summed, then divided by 1
    fsdp._get_gradient_divide_factors = lambda *args: factors(*args[:5], True)

    schedules.PipelineScheduleSingle.step, schedules.PipelineScheduleSingle.eval = step, evaluate  # of torch 2.14


def step(self, *, arg_mbs=None, kwarg_mbs=None, target_mbs=None, losses=None, loss_kwargs=None, return_outputs=False):
    """Of a pipeline: it is given its micro-batches, which older ones divide a batch into."""
    self._stage.has_backward = self._has_backward
    self._stage.clear_runtime_states()
    self._step_microbatches(arg_mbs, kwarg_mbs, target_mbs, losses, return_outputs, loss_kwargs=loss_kwargs)


def evaluate(self, **microbatches):
    self._has_backward = False
    try:
        self.step(**microbatches)
    finally:
        self._has_backward = True


def run(arguments: str) -> None:
    pretend()
    from torchtitan import trainer
    from torchtitan.train import main

    # At its end the first process waits 2 s for the others; here the store is that of who started them.
    trainer.time = SimpleNamespace(perf_counter=time.perf_counter, sleep=lambda seconds: None)
    from tests.torchtitan import vocabulary

    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = torch.distributed.TCPStore(address, port, is_master=False, wait_for_workers=False)
    start = torch.distributed.init_process_group
    for i, flags in enumerate(arguments.split(" THEN ")):
        # The processes of each run meet under keys of their own: those of the run before are still in the store.
        keys = torch.distributed.PrefixStore(f"run {i}", store)
        torch.distributed.init_process_group = partial(start, store=keys, rank=rank, world_size=world)
        sys.argv[1:] = flags.split(" ")
        if sys.argv[1] == "VOCABULARY":
            vocabulary.run(sys.argv[2])
        else:
            main()


if __name__ == "__main__":
    run(" ".join(sys.argv[1:]))
