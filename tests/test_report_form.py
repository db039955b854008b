"""The report of files that are older, or of another form than what is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.test_accountings import directory_of, experiment
from token_superposition import TokenSuperpositionError
from token_superposition.cli import main
from token_superposition.report import write_report


def test_the_report_of_an_older_summary_says_what_to_do(tmp_path: Path) -> None:
    out = directory_of(experiment(), tmp_path / "old")
    summary = json.loads((out / "summary.json").read_text())
    del summary["comparison"]["variants"]["tst"]["speedup_per_seed"]
    (out / "summary.json").write_text(json.dumps(summary))
    with pytest.raises(TokenSuperpositionError, match="give tst compare again"):
        write_report(out)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("summary.json", [], "has not the form that tst compare writes"),
        ("summary.json", {"runs": []}, "has not the form"),
        ("summary.json", {"runs": 3}, "has not the form"),
        ("summary.json", {"runs": [{"name": "baseline"}]}, "KeyError('directory')"),
        ("summary.json", {"comparison": {"variants": []}}, "has not the form"),
        ("summary.json", {"comparison": {"variants": {"tst": {"speedup_per_seed": []}}}}, "KeyError('delta_val_loss')"),
        ("summary.json", {"data": 0}, "UndefinedError"),
        ("summary.json", {"config": None}, "has not the form"),
        ("summary.json", {"samples": [{"text": ""}]}, "has not the form"),
        ("runs/tst-seed1/metrics.jsonl", [1], "has lines that are no metrics"),
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
