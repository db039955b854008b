"""Where a command is started: under a launcher, beside files that are named like modules, without permissions."""

from __future__ import annotations

import json
import math
import shlex
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import tst
from tests.nobody import without_privileges
from tests.test_accountings import experiment
from token_superposition.cli import main
from token_superposition.data.plan import PlannedDataset
from token_superposition.data.store import TokenStore
from token_superposition.experiment.compare import write_summary
from token_superposition.experiment.config import load_config
from token_superposition.experiment.generate import load_model
from token_superposition.experiment.run import batch_of
from token_superposition.report.contents import read

Write = Callable[..., Path]


@pytest.mark.parametrize("command", ["compare", "sweep", "demo"])
def test_a_launcher_is_refused_where_each_process_would_start_all_runs(
    command: str,
    write_config: Write,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    sweep = "[sweep]\nbag_sizes = [2, 4]\n[compare]\nseeds = [0, 1]\n"
    config = [] if command == "demo" else [str(write_config(append=sweep if command == "sweep" else ""))]
    assert main([command, *config, "--out", str(tmp_path / "out")]) == 2
    assert "2 processes of this command were started (WORLD_SIZE)" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_runs_are_those_of_the_package_wherever_they_are_started(
    write_config: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside a file named like a module that they import, and by a launcher of one process, whose port is taken."""
    config = write_config()
    for name in ("datasets", "accelerate", "h2"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('not that one')")
    monkeypatch.chdir(tmp_path)
    launcher = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    tst("compare", config, "--out", "my runs", "--train.steps", "4", "--train.eval-every", "4", **launcher)
    assert len(list(tmp_path.glob("my runs/runs/*/run.json"))) == 2


def test_a_command_that_is_told_can_be_pasted(write_config: Write, prepared: Path, tmp_path: Path) -> None:
    config = load_config(write_config())
    plan = PlannedDataset(TokenStore(prepared), config.schedule, 16, 4)
    told = batch_of(plan, tmp_path / "my run", 3).partition("see it again: ")[2]
    out = str(tmp_path / "my run")
    assert shlex.split(told) == ["tst", "train", f"{out}/config.toml", "--out", f"{out}-replay"]


def test_an_evaluation_that_could_not_be_written_is_not_begun(
    finished_run: Path, prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (closed := tmp_path / "closed").mkdir(0o555)
    with without_privileges(tmp_path):
        assert main(["eval", str(finished_run), "--data", str(prepared), "--out", str(closed / "loss.json")]) == 2
    assert "loss.json cannot be written; give a file in a directory" in capsys.readouterr().err


def test_what_may_not_be_read_or_written_is_named_with_what_it_holds(
    two_seeds: tuple[Path, Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A comparison of somebody else's is shown all the same."""
    theirs = shutil.copytree(two_seeds[1], tmp_path / "theirs")
    theirs.chmod(0o555)
    with without_privileges(tmp_path):
        assert main(["report", str(theirs)]) == 2
    theirs.chmod(0o755)
    said = capsys.readouterr()
    assert "in short" in said.out and "cannot read or write" in said.err and "change its permissions" in said.err
    assert main(["report", str(theirs)]) == 0
    assert main(["train", str(two_seeds[0]), "--out", str(tmp_path / ("x" * 300))]) == 2
    assert "File name too long" in capsys.readouterr().err


def test_what_is_no_finished_model_is_told_for_what_it_is(
    two_seeds: tuple[Path, Path, str], finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    shutil.copy(finished_run / "config.toml", unfinished)
    (swept := tmp_path / "swept/runs/s4").mkdir(parents=True)  # as tst sweep leaves its runs
    (tmp_path / "swept/sweep.json").touch()
    for name in ("config.toml", "run.json"):
        shutil.copy(finished_run / name, swept)
    for given, expected in (
        (two_seeds[1], f"holds several runs; name one of them, such as {two_seeds[1]}/runs/baseline"),
        (unfinished, f"is a run that is not finished; give its command again, .* tst export {unfinished} OUT"),
        (swept, "is a finished run whose model was removed, as a sweep does; train one with tst train, its config"),
        (tmp_path / "swept", "is a sweep, which keeps no models; train one with tst train"),
    ):
        with pytest.raises(ValueError, match=expected):
            load_model(given)
    assert main(["export", str(finished_run / "model"), str(tmp_path / "exported")]) == 0
    assert (tmp_path / "exported/model.safetensors").is_file() and "of step 12" not in capsys.readouterr().err


def test_what_diverged_is_json_all_the_same(two_seeds: tuple[Path, Path, str], tmp_path: Path) -> None:
    config = load_config(two_seeds[0])
    runs = [replace(r, val_loss=math.nan, val_bpb=math.nan) if r.name == "tst" else r for r in experiment()]
    for r in runs:
        (tmp_path / "runs" / r.directory).mkdir(parents=True)
        (tmp_path / "runs" / r.directory / "metrics.jsonl").touch()
        shutil.copytree(two_seeds[1] / "runs/baseline-seed3/model", tmp_path / "runs" / r.directory / "model")
    write_summary(config, tmp_path, runs)
    written: Any = json.loads((tmp_path / "summary.json").read_text(), parse_constant=pytest.fail)
    assert {r["val_loss"] for r in written["runs"] if r["name"] == "tst"} == {None}
    found = [r.val_loss for r in read(tmp_path).runs]
    assert str(found) == str([r.val_loss for r in runs])  # nan is not equal to itself
