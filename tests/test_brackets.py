"""Names and paths that look like rich's markup are printed as they are."""

from __future__ import annotations

import io
import re
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from tests.test_accountings import directory_of, experiment
from token_superposition.cli import main
from token_superposition.data.progress import bars
from token_superposition.experiment import jobs
from token_superposition.experiment.config import Config, DataConfig
from token_superposition.experiment.dry_run import DryRun, JobCost
from token_superposition.experiment.evaluate import Loss
from token_superposition.experiment.planning import plan
from token_superposition.experiment.progress import RunProgress
from token_superposition.report import print_table
from token_superposition.report.dry_run import print_dry_run
from token_superposition.report.evaluation import print_evaluation
from token_superposition.report.plan import print_plan


def comparison(console: Console, name: str, folder: Path) -> None:
    runs = [replace(r, name=name if r.name == "tst" else r.name) for r in experiment()]
    print_table(directory_of(runs, folder / "out"), console)


def dry_run(console: Console, name: str, folder: Path) -> None:
    job = JobCost(name, 2, 2, 8, 8, 1.0, 2.0, None)
    print_dry_run(DryRun([[job]], 1, 1.0, 1, 1.0), console)


def evaluation(console: Console, name: str, folder: Path) -> None:
    print_evaluation([Loss(name, 1, 1, 1, 1, 1, 1, 1)], {name: {name: 1.0}}, console)


def planned(console: Console, name: str, folder: Path) -> None:
    print_plan(plan(Config(data=DataConfig(path=name))), console)


def progress(console: Console, name: str, folder: Path) -> None:
    with RunProgress(console) as shown:
        shown.update(name, 10, [{"step": 1, "val_loss": 1.0, "raw_tokens": 1, "seconds": 1.0}])
        shown.bars.refresh()


def prepared(console: Console, name: str, folder: Path) -> None:
    with bars(console) as report:
        report(name, 1.0, 2.0)
    console.print(name, markup=False)  # in a pipe there are no bars


def diverged(console: Console, name: str, folder: Path) -> None:
    def start(job: jobs.Job, out: Path, slot: int, parallel: int) -> subprocess.Popen[bytes]:
        directory = out / "runs" / job.directory
        directory.mkdir(parents=True)
        (directory / "log.txt").write_text(name)
        (directory / "diverged.json").write_text("{}")
        return subprocess.Popen(["false"])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jobs, "_start", start)
        jobs.run_jobs([jobs.Job("tst", "tst", Config())], folder, 1, console)


@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.parametrize("name", ["[red]", "[/red]"])
@pytest.mark.parametrize("show", [comparison, dry_run, evaluation, planned, progress, prepared, diverged])
def test_a_name_in_brackets_is_printed_as_it_is(
    show: Callable[[Console, str, Path], None], name: str, terminal: bool, tmp_path: Path
) -> None:
    """As markup the first would be eaten, and the second raise."""
    out = io.StringIO()
    show(Console(file=out, force_terminal=terminal, width=120), name, tmp_path)
    assert name in re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", out.getvalue())


def test_commands_print_paths_and_fields_in_brackets(
    write_config: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", str(write_config(steps=4)), "--out", str(tmp_path / "[red]")]) == 0
    assert "[red]/model" in capsys.readouterr().out
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n' + "".join(f'{{"[red]": "text {i}"}}\n' for i in range(40)))
    options = ["--text-field", "[red]", "--vocab-size", "300", "--validation-share", "0.3"]
    assert main(["prepare", str(tmp_path / "a.jsonl"), "--out", str(tmp_path / "data"), *options]) == 0
    assert "(no text in field '[red]')" in capsys.readouterr().out
