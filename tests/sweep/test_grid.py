"""The cells of a sweep, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.sweep.settings import swept
from token_superposition import TokenSuperpositionError
from token_superposition.cli import main
from token_superposition.experiment.config import CompareConfig, Config, SweepConfig
from token_superposition.experiment.grid import Cell, directory, grid_of, halved


def test_cells_are_every_value_with_every_other_and_baselines_one_for_each_rate() -> None:
    config = swept((3, 4), bag_sizes=(1, 4, 6), ratios=(0.0, 0.2, 0.5), weightings=("uniform", "power"),
                   learning_rates=(1e-3, 4e-3))  # fmt: skip
    grid = grid_of(config)
    expected = {
        (s, r, w, lr) for s in (4, 6) for r in (0.2, 0.5) for w in ("uniform", "power") for lr in (1e-3, 4e-3)
    }  # bag size 1 and ratio 0 are the baseline
    assert {(c.bag_size, c.ratio, c.weighting, c.learning_rate) for c in grid.run_of} == expected
    assert len(grid.candidates) == len(grid.run_of) == 16 and all(c == run for c, run in grid.run_of.items())
    assert [b.learning_rate for b in grid.baselines] == [1e-3, 4e-3] and all(b.is_baseline for b in grid.baselines)
    jobs = [grid.job(c, seed) for c in (*grid.baselines, *grid.candidates) for seed in grid.seeds]
    assert len({j.directory for j in jobs}) == len({repr(j.config) for j in jobs}) == 36
    for job in jobs:
        assert job.config.data == config.data
        assert (job.config.compare, job.config.sweep) == (CompareConfig(), SweepConfig())
    cell = Cell(6, 0.5, "power", "switch", 4e-3)
    job = grid.job(cell, 4)
    assert job.directory == "s6-r0.5-power-lr0.004-seed4" and grid.baseline_of(cell) == grid.baselines[1]
    assert (job.config.train.learning_rate, job.config.train.seed) == (4e-3, 4)
    wanted = replace(config.superposition, bag_size=6, ratio=0.5, weighting="power")
    assert job.config.superposition == wanted and job.config.train.steps == config.train.steps


def test_what_is_not_swept_is_the_configurations() -> None:
    config = replace(swept(), superposition=replace(Config().superposition, bag_size=8, sides="output", ratio=0.25))
    grid = grid_of(config)
    (cell,) = grid.candidates
    assert (cell.bag_size, cell.ratio, cell.learning_rate, grid.seeds) == (8, 0.25, config.train.learning_rate, (0,))
    assert grid.job(cell, 0).config.superposition == config.superposition
    assert grid.job(grid.baselines[0], 0).config.schedule.raw_tokens(1, 1) == config.train.steps


def test_schedules_take_the_bag_sizes_down() -> None:
    grid = grid_of(swept(bag_sizes=(8,), ratios=(0.6,), schedules=("halving", "fading", "random"),
                         train={"steps": 100, "warmup_steps": 1}))  # fmt: skip
    halving, fading, random = (grid.job(c, 0).config.schedule for c in grid.candidates)
    assert [(p.steps, p.input_bag) for p in halving.phases] == [(20, 8), (20, 4), (20, 2), (40, 1)]
    assert halving.raw_tokens(1, 1) == fading.raw_tokens(1, 1) == random.raw_tokens(1, 1) == 20 * 14 + 40
    assert 4 < len(fading.phases) < len(random.phases)
    assert halved(5) == (5, 2) and halved(1) == ()


def test_cells_that_train_the_same_are_trained_once() -> None:
    grid = grid_of(swept(bag_sizes=(2, 3, 4), ratios=(0.3, 0.301), schedules=("switch", "halving"),
                         train={"steps": 100}))  # fmt: skip
    assert (
        len(grid.run_of) == 12 and len(grid.candidates) == 4
    )  # halving from 2 and 3 is one bag size, 0.301 is 30 steps
    for cell, run in grid.run_of.items():
        assert grid.job(cell, 0).config.schedule == grid.job(run, 0).config.schedule
        assert (cell.schedule == run.schedule) == (cell.bag_size == 4 or cell.schedule == "switch")
    inputs = swept(weightings=("uniform", "power"))
    inputs = replace(inputs, superposition=replace(inputs.superposition, sides="input"))
    with pytest.raises(TokenSuperpositionError, match=r"'power', but superposition\.sides 'input' has no such bags"):
        grid_of(inputs)  # one target: nothing to weigh


def test_a_larger_sweep_goes_on_with_the_runs_that_are_there(tmp_path: Path) -> None:
    """Whichever of the cells that train the same comes first in it."""
    settings: dict[str, Any] = {"bag_sizes": (2,), "train": {"steps": 40}}
    small = grid_of(swept(ratios=(0.3,), **settings)).of_runs_in(tmp_path)
    (there,) = small.candidates
    (tmp_path / "runs" / directory(there, small.seeds[0])).mkdir(parents=True)
    larger = grid_of(swept(ratios=(0.29, 0.3), schedules=("halving", "switch"), **settings)).of_runs_in(tmp_path)
    assert len(larger.run_of) == 4 and larger.candidates == (there,)


WRONG = [
    ({"bag_sizes": (1,)}, "nothing but the baseline"),
    ({"ratios": (0.0,)}, "nothing but the baseline"),
    ({"bag_sizes": (4, 2, 4)}, "sweep.bag_sizes are (4, 2, 4); leave out what is there twice"),
    ({"bag_sizes": (0,)}, "sweep.bag_sizes is 0"),
    ({"ratios": (0.3, 1.0)}, "ratio is 1.0; give a share"),
    ({"ratios": (0.3, -0.1)}, "ratio is -0.1"),
    ({"learning_rates": (0.0,)}, "sweep.learning_rates are (0.0,)"),
    ({"keep": 0.0}, "sweep.keep is 0.0"),
    ({"keep": 1.5}, "sweep.keep is 1.5"),
    ({"selection_seeds": 3}, "sweep.selection_seeds is 3, there are 2 seeds"),
    ({"seeds": (1, 1)}, "compare.seeds are (1, 1)"),
    (
        {"bag_sizes": tuple(range(2, 102)), "ratios": tuple(i / 100 for i in range(1, 52))},
        "10,200 runs, at most 10,000",
    ),
]


@pytest.mark.parametrize(("values", "message"), WRONG)
def test_an_unusable_grid_has_one_line(values: dict[str, Any], message: str) -> None:
    with pytest.raises(TokenSuperpositionError) as error:
        grid_of(swept(**{"seeds": (0, 1)} | values))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_what_contradicts_the_configuration_is_refused() -> None:
    config = swept(bag_sizes=(2, 4))
    with pytest.raises(TokenSuperpositionError, match=r"superposition.anneal is \(4, 2\), which fixes the bag sizes"):
        grid_of(replace(config, superposition=replace(config.superposition, anneal=(4, 2))))
    with pytest.raises(TokenSuperpositionError, match=r"superposition.mtp_heads is 2: heads add FLOPs"):
        grid_of(replace(config, superposition=replace(config.superposition, mtp_heads=2)))
    with pytest.raises(TokenSuperpositionError, match="no place weights"):
        summed = replace(config.superposition, loss="sum-to-one")
        grid_of(replace(swept(weightings=("uniform", "power")), superposition=summed))


def test_the_command_refuses_in_one_line_before_any_work(
    write_config: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    for options, message in (
        (["--sweep.bag-sizes", "1"], "nothing but the baseline"),
        (["--sweep.bag-sizes", "4", "4096"], "bag 4096); prepare more text or a shorter sequence"),
        (["--train.steps", "0"], "train.steps is 0"),
    ):
        assert main(["sweep", str(write_config()), "--out", str(out), *options]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1 and not out.exists()
    out.mkdir()
    (out / "sweep.json").write_text("{")
    assert main(["report", str(out)]) == 2
    assert "holds no finished sweep" in capsys.readouterr().err
