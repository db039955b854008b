"""What the Trainer's own reports are told: read back from the files that the trackers write in a real run."""

from __future__ import annotations

import importlib.util
import json
import os
import sqlite3
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb.proto import wandb_internal_pb2

from tests.conftest import tst
from token_superposition import TokenSuperpositionError
from token_superposition.cli import main
from token_superposition.experiment.config import TrainConfig, load_config
from token_superposition.experiment.files import read_metrics
from token_superposition.experiment.run import train
from token_superposition.experiment.tracking import Rates, check_trackers, report_arguments, report_variables


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


def wandb_history(file: Path) -> list[dict[str, Any]]:
    """The logged lines of an offline run: records of LevelDB's log format, split at blocks of 32 KiB, after 7 bytes."""
    data, position, record = file.read_bytes(), 7, b""
    lines: list[dict[str, Any]] = []
    while position < len(data):
        if (left := 32768 - position % 32768) < 7:
            position += left
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + 7])
        record += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or its last part
            parsed: Any = wandb_internal_pb2.Record()  # pyright: ignore
            parsed.ParseFromString(record)
            record = b""
            if items := parsed.history.item:
                lines.append({i.key or ".".join(i.nested_key): json.loads(i.value_json) for i in items})
    return lines


def trackio_history(database: Path) -> list[dict[str, Any]]:
    with sqlite3.connect(f"file:{database}?mode=ro", uri=True) as connection:
        rows = connection.execute("SELECT metrics FROM metrics WHERE run_name = 'a-run' ORDER BY id").fetchall()
    return [json.loads(metrics) for (metrics,) in rows]


def test_wandb_and_trackio_are_told_the_same(write_config: Callable[..., Path], tmp_path: Path) -> None:
    config = write_config(append='report_to = ["wandb", "trackio"]\n')
    subprocess.run(  # W&B writes its file when the interpreter ends, which that of a forked process does not
        [sys.executable, "-m", "token_superposition", "train", config, "--out", tmp_path / "a-run"], check=True,
        env=os.environ | {"WANDB_MODE": "offline", "TRACKIO_DIR": str(tmp_path / "trackio")},
    )  # fmt: skip
    lines = read_metrics(tmp_path / "a-run/metrics.jsonl")
    (offline,) = (tmp_path / "a-run/wandb").glob("offline-run-*/*.wandb")
    for told in (wandb_history(offline), trackio_history(tmp_path / "trackio/token-superposition.db")):
        train = {x["train/global_step"]: x for x in told if "train/loss" in x}
        assert [x["train/superposed"] for x in train.values()] == [float(s <= 6) for s in range(1, 13)]
        assert [x["train/raw_tokens"] for x in train.values()] == [m["raw_tokens"] for m in lines if "loss" in m]
        assert [x["train/loss"] for x in train.values()] == pytest.approx([m["loss"] for m in lines if "loss" in m])
        validation = {x["train/global_step"]: x["eval/loss"] for x in told if "eval/loss" in x}
        assert validation == pytest.approx({m["step"]: m["val_loss"] for m in lines if "val_loss" in m})


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


def test_each_run_of_a_process_has_trackers_of_its_own(
    write_config: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What they take from the environment is not there any more for the next run; what the user set is."""
    config = load_config(write_config(append='report_to = ["tensorboard"]\n', steps=2, warmup_steps=1))
    before = dict(os.environ)
    for name in ("a", "b"):
        train(config, tmp_path / name)
        assert list((tmp_path / name / "tensorboard").glob("events*"))
        assert dict(os.environ) == before
    wandb = TrainConfig(report_to=("wandb",))
    assert report_variables(wandb, tmp_path / "x")["WANDB_DIR"] == str(tmp_path / "x")
    monkeypatch.setenv("WANDB_DIR", "elsewhere")
    assert report_variables(wandb, tmp_path / "x")["WANDB_DIR"] == "elsewhere"
