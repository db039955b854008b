"""Variants as configuration: the limit case is the plain method bit for bit, and a resumed run is the same run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from token_superposition import TokenSuperpositionError
from token_superposition.experiment.config import Config, load_config
from token_superposition.experiment.metrics import read_metrics
from token_superposition.experiment.run import train

Run = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def run(write_config: Callable[..., Path], tmp_path: Path) -> Run:
    """Trains a tiny run with settings of [superposition] and [train]; gives the lines of its metrics without times."""

    def go(
        name: str, settings: dict[str, Any], resume_from: Path | None = None, **changes: Any
    ) -> list[dict[str, Any]]:
        config = changed(load_config(write_config()), settings, **changes)
        train(config, tmp_path / name, resume_from=resume_from)
        lines = read_metrics(tmp_path / name / "metrics.jsonl")
        return [{k: v for k, v in m.items() if k != "seconds"} for m in lines]

    return go


def changed(config: Config, settings: dict[str, Any], **changes: Any) -> Config:
    superposition = replace(config.superposition, **settings)
    return replace(config, superposition=superposition, train=replace(config.train, **changes))


@pytest.mark.parametrize(
    ("plain", "variant"),
    [
        ({"bag_size": 1}, {"shift": True}),
        ({"bag_size": 1}, {"loss": "sum-to-one"}),
        ({"anneal": (4,)}, {"mixture": 1.0}),
    ],
)
def test_the_limit_case_is_the_plain_method(plain: dict[str, Any], variant: dict[str, Any], run: Run) -> None:
    assert run("variant", plain | variant) == run("plain", plain)


@pytest.mark.parametrize(
    ("plain", "variant"),
    [({}, {"shift": True}), ({}, {"loss": "sum-to-one"}), ({"anneal": (4, 2)}, {"mixture": 1.0})],
)
def test_the_variant_is_another_run_and_resumes_as_itself(
    plain: dict[str, Any], variant: dict[str, Any], run: Run, tmp_path: Path
) -> None:
    whole = run("whole", plain | variant, save_at=(4, 9))
    assert [m["loss"] for m in whole if "loss" in m] != [m["loss"] for m in run("plain", plain) if "loss" in m]
    for step in (4, 9):
        checkpoint = tmp_path / f"whole/checkpoints/checkpoint-{step}"
        assert run(f"resumed{step}", plain | variant, checkpoint, save_at=(4, 9)) == whole


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mixture": 0.5}, "superposition.mixture is 0.5, but there are no bag sizes to mix; set superposition.anneal"),
        ({"mixture": 2.0, "anneal": (4, 2)}, "mixture is 2.0; give a number in"),
    ],
)
def test_bad_input_has_one_clear_line(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(TokenSuperpositionError, match=message):
        changed(Config(), settings).check()
