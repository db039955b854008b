"""What a dry run says that the runs of a comparison take."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from token_superposition.experiment import dry_run as module
from token_superposition.experiment import speed
from token_superposition.experiment.compare import jobs_of
from token_superposition.experiment.config import Config, load_config


def test_what_is_left_of_a_run_is_the_end_of_its_schedule() -> None:
    """5 of 100 steps, after the switch: no bags, and of the validations those of step 96 and at the end."""
    config = Config()
    config = replace(config, train=replace(config.train, steps=100, eval_every=8, warmup_steps=5))
    (job,) = [j for j in jobs_of(config) if j.name == "tst"]
    step = config.train.batch_size * config.data.sequence_length
    cost = module.cost_of_job(job, 5, 1.0, held_out=600)
    assert cost.raw_tokens == cost.latent_tokens == 5 * step
    assert cost.step_equivalents == 5 + (600 + 600) / (3 * step)


def test_heads_for_further_tokens_take_time(
    write_config: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "seconds_per_step", lambda *_: 1.0)
    plain = load_config(write_config())
    heads = replace(plain, superposition=replace(plain.superposition, mtp_heads=3))
    before, after = (
        {j.directory: j.step_equivalents for j in module.dry_run(c, tmp_path / "out").jobs} for c in (plain, heads)
    )
    assert after["tst"] > before["tst"] and after["baseline"] == before["baseline"]


@pytest.mark.parametrize(
    ("batch", "micro", "expected"), [(6, None, 1.0), (6, 2, 3.0), (22, 11, 22.0), (22, 10, 2.2), (12, None, 12.0)]
)
def test_a_step_is_timed_whole_in_micro_batches_or_where_it_would_take_long_by_one_sequence(
    batch: int,
    micro: int | None,
    expected: float,
    write_config: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By a clock on which whatever is timed takes one second: more than ten sequences at a time would take long."""
    config = load_config(write_config())
    config = replace(config, train=replace(config.train, batch_size=batch, micro_batch_size=micro, compile=False))
    monkeypatch.setattr(speed, "time", SimpleNamespace(perf_counter=itertools.count(0.0, 1.0).__next__))
    assert speed.time_steps(config, 300, threads=torch.get_num_threads()) == pytest.approx(expected)
