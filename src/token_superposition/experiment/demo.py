"""``tst demo``: baseline and TST on the text of this Python installation, in the minutes given."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from token_superposition.data.installation import installed_documents
from token_superposition.data.prepare import PrepareOptions, Progress, prepare
from token_superposition.errors import TokenSuperpositionError
from token_superposition.experiment.compare import compare, cores, default_parallel
from token_superposition.experiment.config import Config, load_preset

VOCAB_SIZE = 2048
BYTES_PER_TOKEN = 2.8  # a little above what that vocabulary gives on the demo's text, so that the text suffices
MIN_TEXT_BYTES = 8 * 2**20
OVERHEAD = 1.08  # validation, start and end of the runs, as a share of their steps

# With this many steps TST ended below the baseline with every seed tried, with 560 steps above it: see LOG.md.
DEMO = load_preset("demo")
STEPS = DEMO.train.steps

Bars = Callable[[], AbstractContextManager[Progress]]


def demo(out: str | Path, minutes: float | None, console: Console, bars: Bars, seed: int = 0) -> str | None:
    """Prepare the data, train both runs side by side and write ``summary.json``.

    ``minutes`` is the time of the two runs together, and how fast this machine is decides the number of steps; None
    takes the steps with which TST was seen to win. Returns a warning if the steps are fewer. Raises
    ``TokenSuperpositionError`` if ``out`` is in use or the minutes are not enough for any run.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise TokenSuperpositionError(f"{out} exists already; choose another --out or remove it")
    if minutes is not None and not 0 < minutes < 10_000:
        raise TokenSuperpositionError(f"minutes is {minutes}; give a number above 0, such as 10")
    config = replace(DEMO, data=replace(DEMO.data, path=str(out / "data")), train=replace(DEMO.train, seed=seed))
    with console.status("measuring the speed of this machine"):
        step_minutes = seconds_per_step(config) / 60
    # The baseline's process also runs the decay of the shorter baseline.
    step_minutes *= OVERHEAD * (1 + min(config.compare.baseline_lengths) * config.train.decay_ratio)
    minutes = STEPS * step_minutes if minutes is None else minutes
    steps = round(minutes / step_minutes)
    fewest = 3 * config.train.warmup_steps  # the short baseline needs its warm-up, too
    if steps < fewest:
        raise TokenSuperpositionError(
            f"{minutes:g} minutes are enough for {steps} steps here ({60 * step_minutes:.2f} s a step); "
            f"give at least {fewest * step_minutes:.1f}"
        )
    config = replace(config, train=replace(config.train, steps=steps, eval_every=max(steps // 20, 1)))
    raw_tokens = config.schedule.raw_tokens(config.train.batch_size, config.data.sequence_length)
    note = None
    if steps < STEPS:
        note = (
            f"{minutes:g} minutes are {steps} steps on this machine, too few to expect that TST wins: this demo was "
            f"seen to win with {STEPS:,} steps, about {STEPS * step_minutes:.0f} minutes here, and to lose with 560."
        )
        console.print(f"[yellow]note[/yellow]: {note}", soft_wrap=True, highlight=False)
    text_bytes = max(int(raw_tokens * BYTES_PER_TOKEN * 1.1), MIN_TEXT_BYTES)
    options = PrepareOptions(
        vocab_size=VOCAB_SIZE, max_bytes=text_bytes, tokenizer_bytes=10 * 2**20, validation_share=0.05
    )
    with bars() as progress:
        prepare((), out / "data", options, progress, installed_documents)
    about = f"about {steps * step_minutes:.0f} minutes" if steps * step_minutes >= 1 else "less than a minute"
    console.print(f"training baseline and TST side by side: {steps:,} steps each, {about}")
    compare(config, out, console, note)
    return note


def seconds_per_step(config: Config, processes: int | None = None) -> float:
    """Time of a training step on random tokens while the runs of the demo share the machine."""
    n = processes or default_parallel(2)
    with ProcessPoolExecutor(n, mp_context=multiprocessing.get_context("spawn")) as pool:
        times = list(pool.map(_time_steps, [config] * n, [max(cores() // n, 1)] * n))
    return max(times)


def _time_steps(config: Config, threads: int) -> float:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from token_superposition.loss import linear_multi_hot_cross_entropy

    torch.set_num_threads(threads)
    device = torch.accelerator.current_accelerator() or "cpu"
    settings = AutoConfig.for_model(
        config.model.architecture, vocab_size=VOCAB_SIZE, **config.model.options, pad_token_id=None
    )
    model: Any = torch.nn.Module.to(AutoModelForCausalLM.from_config(settings), device)
    optimizer = torch.optim.AdamW(model.parameters())
    ids = torch.randint(VOCAB_SIZE, (config.train.batch_size, config.data.sequence_length), device=device)
    times: list[float] = []
    for _ in range(6):
        start = time.perf_counter()
        hidden = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
        linear_multi_hot_cross_entropy(hidden, model.get_output_embeddings().weight, ids).backward()
        optimizer.step()
        optimizer.zero_grad()
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        times.append(time.perf_counter() - start)
    return sorted(times[2:])[len(times[2:]) // 2]
