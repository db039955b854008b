"""The report of files of another form than what is written."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from tests.test_accountings import directory_of, experiment, run
from token_superposition.cli import main


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("summary.json", [], "has not the form that tst compare writes"),
        ("summary.json", {"format": 2}, "has not the form that tst compare writes (summary.json: format is 2)"),
        ("summary.json", {"runs": []}, "runs are not all beside a baseline"),
        ("summary.json", {"runs": 3}, "runs is 3"),
        ("summary.json", {"runs": [{"name": "baseline"}]}, "runs[0] has no seed"),
        ("summary.json", {"runs": [asdict(run("tst", 0, 1, 3.0))]}, "runs are not all beside a baseline"),
        ("summary.json", {"runs": [asdict(run("tst", 0, 1, 3.0)) | {"lr": 1}]}, "runs[0] has lr, which is unknown"),
        ("summary.json", {"runs": [asdict(run("tst", 0, 1, 3.0)) | {"versions": {"torch": 2}}]}, "torch is 2"),
        ("summary.json", {"data": 0}, "data is 0"),
        ("summary.json", {"config": None}, "config is None"),
        ("summary.json", {"samples": [{"text": ""}]}, "samples[0] has no name"),
        ("runs/tst-seed1/metrics.jsonl", [1], "has lines that are no metrics"),
        ("runs/tst-seed1/metrics.jsonl", {"step": 1, "seconds": 1.0, "flops": 1.0}, "line 1 has no raw_tokens"),
        ("runs/tst-seed1/metrics.jsonl", {}, "has lines that are no metrics"),
        ("runs/tst-seed1/metrics.jsonl", {"step": 1, "val_loss": "low"}, "has lines that are no metrics"),
    ],
)
def test_a_report_of_files_of_another_form_has_one_line(
    file: str, content: Any, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = directory_of(experiment(), tmp_path / "out") / file
    whole = json.loads(path.read_text()) if file == "summary.json" and content else None
    path.write_text(json.dumps({**whole, **content} if whole else content))
    assert main(["report", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("tst: error: ") and error.count("\n") == 1 and "; " in error, error
    assert message in error and file in error and "tst compare again" in error, error


@pytest.mark.parametrize(
    ("content", "message"),
    [({"precision": None}, "precision is None"), (None, "has no"), ({"lr": 1}, "lr, which is unknown")],
)
def test_a_run_of_another_version_is_not_taken_up(
    content: Any, message: str, two_seeds: tuple[Path, Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, finished, _ = two_seeds
    shutil.copytree(finished, tmp_path / "out")
    path = tmp_path / "out/runs/tst-seed3/run.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | content if content else {}))
    assert main(["compare", str(config), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("tst: error: ") and error.count("\n") == 1 and str(path) in error, error
    assert message in error and f"remove {path.parent}" in error, error


def test_a_bug_of_the_report_is_not_told_as_a_fault_of_its_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def faulty(contents: Any) -> None:
        raise KeyError("missing")

    monkeypatch.setattr("token_superposition.report.page.verdicts", faulty)
    with pytest.raises(KeyError, match="missing"):
        main(["report", str(directory_of(experiment(), tmp_path / "out"))])
