"""What the Trainer's own reports are told: read back from TensorBoard's event files of a real run."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.conftest import tst
from token_superposition import TokenSuperpositionError
from token_superposition.cli import main
from token_superposition.experiment.config import TrainConfig
from token_superposition.experiment.metrics import read_metrics
from token_superposition.experiment.tracking import Rates, check_trackers, report_arguments


def test_tensorboard_has_every_figure_in_both_phases(write_config: Callable[..., Path], tmp_path: Path) -> None:
    tst("train", write_config(append='report_to = ["tensorboard"]\n'), "--out", tmp_path / "a-run")
    lines = read_metrics(tmp_path / "a-run/metrics.jsonl")
    told: dict[str, dict[int, float]] = {}
    for file in sorted((tmp_path / "a-run/tensorboard").glob("events*")):
        events = EventAccumulator(str(file)).Reload()
        for tag in events.Tags()["scalars"]:
            told.setdefault(tag, {}).update({e.step: e.value for e in events.Scalars(tag)})
    steps = range(1, 13)
    assert told["train/superposed"] == {s: float(s <= 6) for s in steps}
    assert told["train/phase"] == {s: float(s > 6) for s in steps}
    assert told["train/input_bag"] == told["train/output_bag"] == {s: 4.0 if s <= 6 else 1.0 for s in steps}
    assert told["train/latent_tokens"] == {s: s * 64 for s in steps}
    assert told["train/raw_tokens"] == {s: min(s, 6) * 256 + max(s - 6, 0) * 64 for s in steps}
    for name, key, of in (
        ("train/loss", "loss", "loss"),
        ("train/flops", "flops", "loss"),
        ("eval/loss", "val_loss", "val_loss"),
    ):
        wanted = {m["step"]: m[key] for m in lines if of in m}
        assert told[name].keys() >= wanted.keys()
        assert [told[name][s] for s in wanted] == pytest.approx(list(wanted.values()), rel=1e-6), name
    assert sorted(told["eval/loss"]) == [4, 8, 12]  # one of them while superposed
    speed = told["train/latent_tokens_per_second"]
    assert speed.keys() == set(range(2, 13)) and min(speed.values()) > 0
    raw = told["train/raw_tokens_per_second"]
    assert all(raw[s] == pytest.approx(speed[s] * (4 if s <= 6 else 1), rel=1e-4) for s in speed)
    assert not (tmp_path / "a-run/checkpoints/runs").exists()


def test_rates_are_of_the_steps_since_the_last_line() -> None:
    rates = Rates(step_flops=100.0, peak=400.0)
    assert rates.at(10, 2.0, 640, 2560) == {"flops": 1000.0}
    assert rates.at(10, 2.0, 640, 2560) == {"flops": 1000.0}  # a validation after the same step
    assert rates.at(30, 12.0, 1920, 3840) == {
        "flops": 3000.0, "latent_tokens_per_second": 128.0, "raw_tokens_per_second": 128.0, "mfu": 0.5,
    }  # fmt: skip


def test_what_cannot_be_reported_to(
    write_config: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["train", str(write_config(append='report_to = ["tensorbord"]\n'))]) == 2
    assert "report_to[0] is 'tensorbord'; give one of tensorboard, wandb, trackio" in capsys.readouterr().err
    found = importlib.util.find_spec
    monkeypatch.setattr(
        "token_superposition.experiment.tracking.find_spec", lambda name: None if name == "trackio" else found(name)
    )
    with pytest.raises(TokenSuperpositionError, match="names trackio, which is not installed; pip install trackio"):
        check_trackers(TrainConfig(report_to=("tensorboard", "trackio")))
    with pytest.raises(TokenSuperpositionError, match="OLMo-core has callbacks of its own"):
        TrainConfig(report_to=("wandb",)).refuse_unsupported("OLMo-core")
    assert report_arguments(TrainConfig(), tmp_path / "x")["report_to"] == "none"
