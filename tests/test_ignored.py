"""Options that a command does not read: refused, with the command or the option that does; of a plan, the compiler."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from token_superposition.cli import main

ALL = """
[compare]
seeds = [3, 4]
baseline_lengths = [1, 2]
[[compare.variants]]
name = "halved"
superposition = { anneal = [4, 2] }
[sweep]
bag_sizes = [2, 4]
"""


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("train --compare.seeds 0 1", "--compare.seeds is [0, 1], which tst train, of one run, does not read; give it"),
        ("train --sweep.bag-sizes 8", "--sweep.bag-sizes is [8], which tst train, of one run, does not read; give it"),
        ("compare --sweep.keep 0.5", "--sweep.keep is 0.5, which tst compare does not read; give it to tst sweep"),
        ("compare --train.seed 7", "--train.seed is 7, but the runs have compare.seeds, [3, 4]; give it among"),
        ("sweep --train.seed 7", "--train.seed is 7, but the runs have compare.seeds, [3, 4]; give it among"),
        (
            "sweep --superposition.bag-size 8",
            "--superposition.bag-size is 8, but the sweep has sweep.bag_sizes, [2, 4]",
        ),
        ("sweep --compare.baseline-lengths 1 3", "--compare.baseline-lengths is [1.0, 3.0], which tst sweep does not"),
    ],
)
def test_an_option_of_another_command_is_refused(
    typed: str, said: str, write_config: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Typed, that is: one file may hold every section."""
    path, (command, *options) = write_config(append=ALL), typed.split()
    assert main([command, str(path), *options, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"tst: error: {said}") and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (
            "--compare.seeds 0 1",
            "--compare.seeds is [0, 1], which tst plan, of one run, does not read; tst compare --dry-r",
        ),
        (
            "--sweep.bag-sizes 8",
            "--sweep.bag-sizes is [8], which tst plan, of one run, does not read; tst sweep --dry-run",
        ),
        (
            "--superposition.anneal 4 2 --superposition.bag-size 8",
            "--superposition.bag-size is 8, but the bag sizes are",
        ),
    ],
)
def test_a_plan_is_of_one_run(
    typed: str, said: str, write_config: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(write_config(append=ALL))
    assert main(["plan", path, *typed.split()]) == 2
    assert capsys.readouterr().err.startswith(f"tst: error: {said}")


def test_a_file_may_hold_every_section(
    write_config: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All commands get as far as its data; --train.seed may be typed where there are no others."""
    whole, one = str(write_config(append=ALL)), str(write_config(name="one.toml"))
    for typed in (["train", whole, "--train.seed", "7"], ["compare", whole], ["sweep", whole],
                  ["compare", one, "--train.seed", "7"]):  # fmt: skip
        assert main([*typed, "--data.path", str(tmp_path / "nowhere"), "--out", str(tmp_path / "out")]) == 2
        assert "nowhere" in capsys.readouterr().err


def test_a_plan_asks_for_no_compiler(
    write_config: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It may be for another machine, and trains nothing."""
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    monkeypatch.setenv("CXX", "no-compiler")
    assert main(["plan", str(write_config()), "--train.compile", "--json"]) == 0
    assert main(["train", str(write_config()), "--train.compile"]) == 2
    assert "no-compiler is not there" in capsys.readouterr().err
