"""What a run says of its time, where too few of its steps are logged to tell compiling from training."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

from token_superposition.experiment.config import load_config
from token_superposition.experiment.result import read_result
from token_superposition.experiment.run import train
from token_superposition.experiment.summary import Run, comparison


def test_a_phase_that_is_logged_once_has_no_steady_time(write_config: Callable[..., Path], tmp_path: Path) -> None:
    """6 + 6 steps with a log every 6: nothing says how long compiling took, and equal time is not measured."""
    train(load_config(write_config(log_every=6)), tmp_path / "run")
    file = tmp_path / "run/run.json"
    result = read_result(file)
    assert result.phase_step_seconds == [None, None] and result.train_seconds > 0
    assert result.steady_seconds is None
    file.write_text(json.dumps(json.loads(file.read_text()) | {"steady_seconds": result.train_seconds}))
    before = read_result(file)  # as it was written until now
    assert before.steady_seconds == result.train_seconds
    for tst in (result, before):
        baseline = replace(result, steady_seconds=1.0, phase_step_seconds=[0.1])
        runs = [Run(**asdict(r), name=name) for name, r in (("baseline", baseline), ("tst", tst))]
        found = comparison(runs)["equal_time"]
        assert math.isnan(found["ratio"]) and math.isnan(found["seconds"]) and not found["ratio_per_seed"]
