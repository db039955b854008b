"""How long a training step takes on this machine, measured on random tokens."""

from __future__ import annotations

import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch

from token_superposition.experiment.config import Config

LONG_SECONDS = 10.0  # a step longer than this is not timed: one sequence is, times their number


def gpus() -> int:
    return torch.accelerator.device_count() if torch.accelerator.is_available() else 0


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def default_parallel(runs: int) -> int:
    """Runs at a time: one per GPU; without a GPU one per core, where small models lose less than by sharing cores."""
    return max(min(runs, gpus() or cores()), 1)


def seconds_per_step(config: Config, vocab_size: int, processes: int) -> float:
    """Time of an ordinary step while so many runs share this machine, or one of its GPUs."""
    n = max(processes // gpus(), 1) if gpus() else processes
    # Clean processes with either; a program that has loaded its fork server does not load everything n times.
    method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    with ProcessPoolExecutor(n, mp_context=multiprocessing.get_context(method)) as pool:
        times = list(pool.map(time_steps, [config] * n, [vocab_size] * n, [max(cores() // n, 1)] * n))
    return max(times)


def time_steps(config: Config, vocab_size: int, threads: int) -> float:
    """The same in this process alone, with so many threads."""
    from accelerate.utils import compile_regions
    from transformers import AutoModelForCausalLM

    from token_superposition.experiment.launch import Launch
    from token_superposition.experiment.model import model_settings
    from token_superposition.experiment.run import muon
    from token_superposition.loss import linear_multi_hot_cross_entropy

    torch.set_num_threads(threads)
    # Unasked, a torch built for CUDA names it as its accelerator on a machine without a GPU, too.
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    settings = model_settings(config.model, vocab_size, 0, config.data.sequence_length)
    model: Any = torch.nn.Module.to(AutoModelForCausalLM.from_config(settings, dtype=torch.float32), device)
    if config.train.activation_checkpointing:
        model.activation_checkpointing_enable()
    optimizer = muon(config, model) or torch.optim.AdamW(model.parameters())
    autocast = torch.autocast(device.type, torch.bfloat16, Launch().bfloat16(config.train.precision))

    def step(sequences: int) -> float:
        ids = torch.randint(vocab_size, (sequences, config.data.sequence_length), device=device)
        start = time.perf_counter()
        with autocast:
            hidden = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
            loss = linear_multi_hot_cross_entropy(hidden, model.get_output_embeddings().weight, ids)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        return time.perf_counter() - start

    batch = config.train.batch_size
    micro = config.train.micro_batch_size or batch
    step(1)
    one = step(1)
    if one * micro > LONG_SECONDS:
        return one * batch
    if config.train.compile:
        model = compile_regions(model)
        step(micro)
    times = [step(micro) for _ in range(6)]
    return sorted(times[2:])[len(times[2:]) // 2] * (batch / micro)
