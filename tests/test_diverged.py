"""A comparison of which runs diverged: what is told of them, and how they are tried again."""

from __future__ import annotations

import math
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from tests.test_accountings import directory_of, experiment, shown
from token_superposition import TokenSuperpositionError
from token_superposition.experiment.compare import checked_jobs
from token_superposition.experiment.config import load_config
from token_superposition.experiment.jobs import unfinished
from token_superposition.experiment.summary import comparison


def test_a_run_that_diverged_is_told_and_nothing_is_made_of_it(tmp_path: Path) -> None:
    runs = [replace(r, val_loss=math.nan) if (r.name, r.seed) == ("tst", 1) else r for r in experiment(4)]
    found = comparison(runs)
    assert math.isnan(found["delta_val_loss"]) and found["delta_val_loss_interval"] is found["speedup"] is None
    for text in shown(directory_of(runs, tmp_path / "one")):
        assert "diverged with 1 of 3 seeds" in text and not re.search(r"\bnan\b", text)
    alone = [r for r in runs if r.seed == 1]
    found = comparison(alone)
    assert found["equal_loss"] is found["speedup"] is None and found["speedup_per_seed"] == []
    assert all("diverged with 1 of 1 seeds" in text for text in shown(directory_of(alone, tmp_path / "alone")))
    longest = [replace(r, val_loss=math.nan) if r.name == "baseline-x4" else r for r in experiment(4)]
    found = comparison(longest)
    assert math.isfinite(found["delta_val_loss"]) and found["speedup"] is None
    for text in shown(directory_of(longest, tmp_path / "longest")):
        assert "tst or a baseline of 4,000 steps diverged" in text and "equal time" in text


def test_a_report_of_runs_that_diverged_at_once(tmp_path: Path) -> None:
    runs = [replace(r, val_loss=math.nan) for r in experiment()]
    out = directory_of(runs, tmp_path / "out")
    for r in runs:
        (out / "runs" / r.directory / "metrics.jsonl").write_text("")
    assert all("diverged with 3 of 3 seeds" in text for text in shown(out))


def test_a_run_that_diverged_is_removed_before_it_is_tried_otherwise(
    two_seeds: tuple[Path, Path, str], tmp_path: Path
) -> None:
    path, finished, _ = two_seeds
    out = shutil.copytree(finished, tmp_path / "copy")
    directory = out / "runs/tst-seed3"
    (directory / "run.json").rename(directory / "diverged.json")
    config = load_config(path)
    assert not unfinished(checked_jobs(config, out), out)
    skip = replace(config, train=replace(config.train, on_nonfinite="skip"))
    with pytest.raises(TokenSuperpositionError, match=r"tst-seed3 diverged with train.on_nonfinite stop; remove it"):
        checked_jobs(skip, out)
    shutil.rmtree(directory)
    assert [j.directory for j in unfinished(checked_jobs(skip, out), out)] == ["tst-seed3"]
