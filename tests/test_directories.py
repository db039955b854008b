"""Where the runs of a comparison lie, so that one of more seeds, or of fewer, finds done what is done."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from token_superposition.experiment.compare import jobs_of
from token_superposition.experiment.config import CompareConfig, Config, save_config


def test_further_seeds_leave_the_runs_of_the_first_where_they_are() -> None:
    """So that they are skipped as done."""
    config = replace(Config(), compare=CompareConfig(seeds=(3,), baseline_lengths=(1.0, 2.0)))
    more = replace(config, compare=replace(config.compare, seeds=(3, 4)))
    further = {j.directory: j.config for j in jobs_of(more)}
    assert len(further) == 6 and all(further[j.directory].train == j.config.train for j in jobs_of(config))


def test_seeds_that_are_given_later_find_the_run_without_one(tmp_path: Path) -> None:
    config = replace(
        Config(), compare=CompareConfig(baseline_lengths=(1.0, 2.0)), train=replace(Config().train, seed=7)
    )
    for job in jobs_of(config):
        (tmp_path / "runs" / job.directory).mkdir(parents=True)
        save_config(job.config, tmp_path / "runs" / job.directory / "config.toml")
    more = replace(config, compare=replace(config.compare, seeds=(6, 7)))
    directories = {(j.name, j.config.train.seed): j.directory for j in jobs_of(more, tmp_path)}
    for name in ("baseline", "baseline-x2", "tst"):
        assert directories[name, 7] == name and directories[name, 6] == f"{name}-seed6"
    assert [j.trunk for j in jobs_of(more, tmp_path) if j.trunk] == ["baseline-x2-seed6", "baseline-x2"]
    for job in jobs_of(more):
        (tmp_path / "seeds/runs" / job.directory).mkdir(parents=True)
        save_config(job.config, tmp_path / "seeds/runs" / job.directory / "config.toml")
    found = {j.directory for j in jobs_of(config, tmp_path / "seeds")}  # and the other way round
    assert found == {"baseline-x2-seed7", "baseline-seed7", "tst-seed7"}
