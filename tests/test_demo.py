"""``tst demo``, whole."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from tests.processes import FORKS
from token_superposition.data.progress import bars
from token_superposition.errors import TokenSuperpositionError
from token_superposition.experiment import demo as module
from token_superposition.experiment import jobs
from token_superposition.report import print_table, write_report


def test_demo_on_this_installation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole demo, with a smaller model and batch and less text than it ships with."""
    options = module.DEMO.model.options | {"hidden_size": 32, "intermediate_size": 32, "head_dim": 16}
    small = replace(
        module.DEMO,
        model=replace(module.DEMO.model, options=options),
        data=replace(module.DEMO.data, sequence_length=32, eval_tokens=512, final_eval_tokens=1024),
        train=replace(module.DEMO.train, batch_size=4, warmup_steps=2),
    )
    monkeypatch.setattr(module, "DEMO", small)
    monkeypatch.setattr(module, "MIN_TEXT_BYTES", 4 * 2**20)
    monkeypatch.setattr(jobs, "subprocess", FORKS)
    console = Console(record=True, width=100)
    with pytest.raises(TokenSuperpositionError, match=r"minutes are enough for 0 steps .*; give at least 0\.[1-9]$"):
        module.demo(tmp_path / "demo", 1e-6, console, lambda: bars(console))
    assert not (tmp_path / "demo").exists()
    note = module.demo(tmp_path / "demo", 0.02, console, lambda: bars(console), seed=3)
    summary = json.loads((tmp_path / "demo/summary.json").read_text())
    runs = {r["name"]: r for r in summary["runs"]}
    assert list(runs) == ["baseline", "tst", "baseline-x0.5"] and {r["seed"] for r in runs.values()} == {3}
    assert runs["tst"]["flops"] == runs["baseline"]["flops"] and runs["tst"]["epochs"] < 1
    assert (note is not None) == (runs["tst"]["steps"] < module.STEPS) and summary["note"] == note
    assert note is None or re.search(r"seen to win with 1,000 steps, here --minutes [1-9]\d*; with", note)
    assert summary["comparison"]["equal_loss_speedup"] is None or runs["tst"]["val_loss"] > runs["baseline"]["val_loss"]
    write_report(tmp_path / "demo")
    print_table(tmp_path / "demo", console)
    assert "equal FLOPs" in console.export_text() and (tmp_path / "demo/report.html").exists()

    # Interrupted before its end, it goes on with the same seed; finished, or with another one, it is left alone.
    with pytest.raises(TokenSuperpositionError, match="exists already"):
        module.demo(tmp_path / "demo", None, console, lambda: bars(console), seed=3)
    (tmp_path / "demo/summary.json").unlink()
    (tmp_path / "demo/runs/tst/run.json").unlink()
    with pytest.raises(TokenSuperpositionError, match="exists already"):
        module.demo(tmp_path / "demo", None, console, lambda: bars(console), seed=4)
    kept = [tmp_path / "demo" / name for name in ("data/meta.json", "runs/baseline/run.json")]
    before = [p.stat().st_mtime_ns for p in kept]
    module.demo(tmp_path / "demo", None, console, lambda: bars(console), seed=3)
    again = {r["name"]: r for r in json.loads((tmp_path / "demo/summary.json").read_text())["runs"]}
    assert [p.stat().st_mtime_ns for p in kept] == before and again["tst"]["val_loss"] == runs["tst"]["val_loss"]
    assert f"going on with the {runs['tst']['steps']:,} steps" in console.export_text()
