"""What a configuration says reaches the run: its seed, its numbers, its times, its last validation."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch.nn.functional import cross_entropy
from transformers import TrainerControl, TrainerState, default_data_collator, set_seed

from token_superposition.data.plan import PlannedDataset
from token_superposition.data.store import TokenStore
from token_superposition.errors import TokenSuperpositionError
from token_superposition.experiment.config import load_config
from token_superposition.experiment.files import read_metrics
from token_superposition.experiment.launch import Launch
from token_superposition.experiment.metrics import MetricsWriter
from token_superposition.experiment.model import build_model
from token_superposition.experiment.resume import changes
from token_superposition.experiment.run import train, training_arguments

Write = Callable[..., Path]


def test_the_seed_decides_weights_and_samples(write_config: Write, prepared: Path, tmp_path: Path) -> None:
    config = load_config(write_config(bag_size=1, steps=2))
    config = replace(config, train=replace(config.train, seed=5))
    train(config, tmp_path / "run")
    store = TokenStore(prepared)
    plan = PlannedDataset(store, config.schedule, 16, 4, seed=5)
    set_seed(5)
    model: Any = build_model(config, store.meta)
    batch = default_data_collator([plan[i] for i in range(4)])
    expected = cross_entropy(model(batch["input_ids"]).logits.flatten(0, 1), batch["shift_labels"].flatten())
    assert read_metrics(tmp_path / "run/metrics.jsonl")[0]["loss"] == pytest.approx(expected.item(), rel=1e-5)


def test_the_trainer_is_told_what_the_configuration_says(write_config: Write, tmp_path: Path) -> None:
    said: dict[str, Any] = {"weight_decay": 0.3, "max_grad_norm": 0.7, "learning_rate": 2e-3, "seed": 5}
    said |= {"beta1": 0.8, "beta2": 0.7, "log_every": 3, "eval_every": 5}
    config = load_config(write_config())
    args = training_arguments(replace(config, train=replace(config.train, **said)), tmp_path, Launch())
    names = {"log_every": "logging_steps", "eval_every": "eval_steps", "beta1": "adam_beta1", "beta2": "adam_beta2"}
    assert {name: getattr(args, names.get(name, name)) for name in said} == said


@pytest.mark.parametrize("event", ["on_evaluate", "on_save"])
def test_validation_and_saving_are_in_no_step(event: str, tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path / "m.jsonl", 1.0, 1.0)
    everything: Any = (None, TrainerState(), TrainerControl())
    writer.go_on_from(5.0)
    time.sleep(1)
    getattr(writer, event)(*everything)
    writer.on_step_end(*everything)
    assert 5.0 <= writer.seconds < 5.9


@pytest.mark.parametrize("eval_every", [6, 7])
def test_a_run_that_is_killed_after_its_last_validation_has_it_once(
    eval_every: int, write_config: Write, tmp_path: Path
) -> None:
    config, out = load_config(write_config(eval_every=eval_every, save_every=6)), tmp_path / "run"
    train(config, out)
    whole = read_metrics(out / "metrics.jsonl")
    assert [m["step"] for m in whole if "val_loss" in m] == [eval_every, 12, 12]
    (out / "run.json").unlink()
    shutil.rmtree(out / "model")
    train(config, out)
    again = read_metrics(out / "metrics.jsonl")
    assert [m | {"seconds": 0} for m in again] == [m | {"seconds": 0} for m in whole]


@pytest.mark.parametrize(
    ("sides", "setting"),
    [
        ("input", {"weighting": "power"}),
        ("input", {"loss": "sum-to-one"}),
        ("output", {"input_weighting": "power"}),
        ("output", {"place_signal": 0.5}),
        ("output", {"shift": True}),
    ],
)
def test_a_setting_of_bags_that_there_are_not_is_refused(
    sides: Any, setting: dict[str, Any], write_config: Write
) -> None:
    config = load_config(write_config())
    ((name, value),) = setting.items()
    both = replace(config.superposition, **setting)
    both.check()
    with pytest.raises(TokenSuperpositionError, match=rf"superposition.{name} is {value!r}, but .*{sides!r} has no"):
        replace(both, sides=sides).check()
    # A run that was begun when it was not refused goes on without it.
    before, now = (replace(config, superposition=replace(c, sides=sides)) for c in (both, config.superposition))
    assert not changes(before, now)
    assert bool(changes(config, replace(config, superposition=both)))
