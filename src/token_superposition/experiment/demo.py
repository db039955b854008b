"""``tst demo``: baseline and TST on the text of this Python installation, in the minutes given."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from token_superposition.data.installation import installed_documents
from token_superposition.data.prepare import PrepareOptions, Progress, prepare
from token_superposition.errors import TokenSuperpositionError
from token_superposition.experiment.compare import compare
from token_superposition.experiment.config import Config, load_preset, load_written, save_config
from token_superposition.experiment.files import CONFIG, SUMMARY
from token_superposition.experiment.jobs import refuse_launcher
from token_superposition.experiment.speed import default_parallel, seconds_per_step

VOCAB_SIZE = 2048
BYTES_PER_TOKEN = 2.8  # a little above what that vocabulary gives on the demo's text, so that the text suffices
MIN_TEXT_BYTES = 8 * 2**20
OVERHEAD = 1.08  # validation, start and end of the runs, as a share of their steps

# With this many steps TST ended below the baseline with every seed tried, with 560 and r = 0.4 above it: see LOG.md.
DEMO = load_preset("demo")
STEPS = DEMO.train.steps

Bars = Callable[[], AbstractContextManager[Progress]]


def demo(out: str | Path, minutes: float | None, console: Console, bars: Bars, seed: int = 0) -> str | None:
    """Prepare the data, train both runs side by side and write ``summary.json``.

    ``minutes`` is the time of the two runs together, and how fast this machine is decides the number of steps; None
    takes the steps with which TST was seen to win. A demo that was interrupted goes on, with the steps that it has.
    Returns a warning if the steps are fewer. Raises ``TokenSuperpositionError`` if ``out`` is in use or the minutes are
    not enough for any run.
    """
    refuse_launcher()
    out = Path(out)
    config = replace(DEMO, data=replace(DEMO.data, path=str(out / "data")), train=replace(DEMO.train, seed=seed))
    begun = unfinished(out, config)
    if minutes is not None and not 0 < minutes < 10_000:
        raise TokenSuperpositionError(f"minutes is {minutes}; give a number above 0, such as 10")
    config.check()
    with console.status("measuring the speed of this machine"):
        step_minutes = seconds_per_step(config, VOCAB_SIZE, default_parallel(2)) / 60
    # The baseline's process also runs the decay of the shorter baseline.
    step_minutes *= OVERHEAD * (1 + min(config.compare.baseline_lengths) * config.train.decay_ratio)
    if begun is not None:
        console.print(f"going on with the {begun:,} steps that were begun in {out}", highlight=False, soft_wrap=True)
        minutes = round(begun * step_minutes, 2)
    minutes = STEPS * step_minutes if minutes is None else minutes
    steps = begun or round(minutes / step_minutes)
    fewest = 3 * config.train.warmup_steps  # the short baseline needs its warm-up, too
    if steps < fewest:
        raise TokenSuperpositionError(
            f"{minutes:g} minutes are enough for {steps} steps here ({60 * step_minutes:.2f} s a step); "
            f"give at least {math.ceil(10 * fewest * step_minutes) / 10:g}"
        )
    config = replace(config, train=replace(config.train, steps=steps, eval_every=max(steps // 20, 1)))
    raw_tokens = config.schedule.raw_tokens(config.train.batch_size, config.data.sequence_length)
    note = None
    if steps < STEPS:
        note = (
            f"{minutes:g} minutes are {steps} steps on this machine, too few to expect that TST wins: this demo was "
            f"seen to win with {STEPS:,} steps, here --minutes {math.ceil(STEPS * step_minutes)}; with 560, and "
            "r = 0.4, TST lost."
        )
        console.print(f"[yellow]note[/yellow]: {note}", soft_wrap=True, highlight=False)
    text_bytes = max(int(raw_tokens * BYTES_PER_TOKEN * 1.1), MIN_TEXT_BYTES)
    options = PrepareOptions(
        vocab_size=VOCAB_SIZE, max_bytes=text_bytes, tokenizer_bytes=10 * 2**20, validation_share=0.05
    )
    out.mkdir(parents=True, exist_ok=True)
    save_config(config, out / CONFIG)  # first, so that also what is interrupted before the runs can go on
    if not (out / "data").exists():
        with bars() as progress:
            prepare((), out / "data", options, progress, installed_documents)
    about = f"about {steps * step_minutes:.0f} minutes" if steps * step_minutes >= 1 else "less than a minute"
    console.print(f"training baseline and TST side by side: {steps:,} steps each, {about}")
    compare(config, out, console, note)
    return note


def unfinished(out: Path, config: Config) -> int | None:
    """The steps of the demo that was begun in ``out``, None where there is none.

    Raises ``TokenSuperpositionError`` where ``out`` holds anything else, or a finished one.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    if (out / CONFIG).exists() and not (out / SUMMARY).exists():
        there = load_written(out / CONFIG)
        of_time = {name: getattr(there.train, name) for name in ("steps", "eval_every")}
        if there == replace(config, train=replace(config.train, **of_time)):
            return there.train.steps
    raise TokenSuperpositionError(f"{out} exists already; choose another --out or remove it")
