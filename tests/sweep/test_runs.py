"""One real sweep, called twice."""

from __future__ import annotations

import csv
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from tests.conftest import CONFIG, TINY, toml, tst
from tests.processes import command_with_forks
from token_superposition.cli import main
from token_superposition.experiment.config import load_config
from token_superposition.experiment.grid import grid_of
from token_superposition.experiment.halving import Design
from token_superposition.experiment.jobs import check_jobs, unfinished
from token_superposition.experiment.sweep import (
    dry_run,
    jobs_of,
    read_rows,
)


def sweep(*arguments: str) -> str:
    return tst(*arguments, target=command_with_forks).stdout


@pytest.fixture(scope="module")
def tiny_sweep(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Path]:
    """A real one: two bag sizes and the baseline with the first seed, the better one with the second."""
    root = tmp_path_factory.mktemp("sweep")
    options = "\n".join(f"{k} = {toml(v)}" for k, v in TINY["llama"].items())
    content = CONFIG.format(architecture="llama", options=options, data=prepared).replace("steps = 12", "steps = 4")
    (root / "config.toml").write_text(content + "[compare]\nseeds = [3, 4]\n[sweep]\nbag_sizes = [2, 4]\n")
    arguments = ["sweep", str(root / "config.toml"), "--sweep.keep", "0.5", "--out", str(root / "out")]
    sweep(*arguments)
    return arguments, root / "out"


def test_a_real_sweep_writes_what_it_promises(tiny_sweep: tuple[list[str], Path]) -> None:
    _, out = tiny_sweep
    losses = {p.parent.name: json.loads(p.read_text())["val_loss"] for p in out.glob("runs/*/run.json")}
    first = {s: losses[f"s{s}-r0.5-lr0.003-seed3"] for s in (2, 4)}
    s = min(first, key=first.__getitem__)
    baselines = {seed: losses.pop(f"baseline-lr0.003-seed{seed}") for seed in (3, 4)}
    assert set(losses) == {"s2-r0.5-lr0.003-seed3", "s4-r0.5-lr0.003-seed3", f"s{s}-r0.5-lr0.003-seed4"}
    with (out / "sweep.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert {line["run"] for line in lines} == {p.name for p in (out / "runs").iterdir()} and len(lines) == 5
    assert not [k for line in lines for k, v in line.items() if v == ""]
    for row in read_rows(out / "sweep.csv"):
        assert row.difference == row.val_loss - baselines[row.seed] and row.baseline_loss == baselines[row.seed]
        assert row.round == (1 if row.seed == 3 else 2) and row.latent_tokens == 4 * 4 * 16
        assert row.raw_tokens == row.latent_tokens * (1 if row.bag_size == 1 else (1 + row.bag_size) / 2)
        assert not (out / "runs" / row.run / "model").exists()
    summary = json.loads((out / "sweep.json").read_text())
    assert summary["best"]["cell"]["bag_size"] == s and summary["command"].startswith("tst sweep ")
    assert summary["best"]["judged"]["per_seed"] == [losses[f"s{s}-r0.5-lr0.003-seed4"] - baselines[4]]
    assert (out / "report.html").read_text().count("<svg") == 2  # one ratio: no curve over it
    assert main(["verify", str(out)]) == 0  # though it keeps no models


def test_a_second_call_trains_nothing_and_the_report_is_written_again(
    tiny_sweep: tuple[list[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, out = tiny_sweep
    before = {p: p.stat().st_mtime_ns for p in out.rglob("runs/**/*")}
    table = (out / "sweep.csv").read_bytes()
    (out / "report.html").unlink()
    assert main(arguments) == 0
    assert {p: p.stat().st_mtime_ns for p in out.rglob("runs/**/*")} == before
    assert (out / "sweep.csv").read_bytes() == table and "best setting" in capsys.readouterr().out
    (out / "report.html").unlink()
    assert main(["report", str(out)]) == 0 and (out / "report.html").exists()
    assert main([*arguments, "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "Every run is done; tst sweep" in printed and "1: 3 runs, 0 to train" in printed
    assert main([*arguments, "--train.weight-decay", "0.3"]) == 2
    assert "is a run of another configuration" in capsys.readouterr().err


def test_a_sweep_that_lacks_a_baseline_of_an_earlier_round_trains_it(
    tiny_sweep: tuple[list[str], Path], tmp_path: Path
) -> None:
    """As one is left that was interrupted when all cells of a round were done."""
    arguments, finished = tiny_sweep
    out = shutil.copytree(finished, tmp_path / "out")
    (out / "runs/baseline-lr0.003-seed3/run.json").unlink()
    sweep(*arguments[:-1], str(out))
    assert (out / "sweep.csv").read_text().count("baseline-lr0.003-seed3") == 1
    assert (
        json.loads((out / "sweep.json").read_text())["best"]
        == json.loads((finished / "sweep.json").read_text())["best"]
    )


def test_what_finished_after_the_sweep_was_killed_is_not_kept_either(
    tiny_sweep: tuple[list[str], Path], tmp_path: Path
) -> None:
    """Its run went on alone, and nobody was there to remove its model."""
    arguments, finished = tiny_sweep
    out = shutil.copytree(finished, tmp_path / "out")
    for name in ("model", "checkpoints"):
        (out / "runs/s2-r0.5-lr0.003-seed3" / name / "checkpoint-4").mkdir(parents=True)
    assert main([*arguments[:-1], str(out)]) == 0
    assert not [*out.glob("runs/*/model"), *out.glob("runs/*/checkpoints")]


def test_a_sweep_does_not_go_into_a_comparison_that_is_not_finished_nor_the_reverse(
    tiny_sweep: tuple[list[str], Path],
    two_seeds: tuple[Path, Path, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Neither has its summary yet; each would overwrite the other's configuration."""
    arguments, sweep = tiny_sweep
    path, comparison, _ = two_seeds
    left = {"compare": shutil.copytree(comparison, tmp_path / "c"), "sweep": shutil.copytree(sweep, tmp_path / "s")}
    for out in left.values():
        for name in ("summary.json", "sweep.json"):
            (out / name).unlink(missing_ok=True)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    assert main([*arguments[:-1], str(left["compare"])]) == 2
    assert f"{left['compare']} holds a comparison; choose another --out for the sweep" in capsys.readouterr().err
    assert main(["compare", str(path), "--out", str(left["sweep"])]) == 2
    assert f"{left['sweep']} holds a sweep; choose another --out for the comparison" in capsys.readouterr().err
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_a_rate_with_which_all_diverges_is_a_result(tiny_sweep: tuple[list[str], Path], tmp_path: Path) -> None:
    config, out = tiny_sweep[0][1], shutil.copytree(tiny_sweep[1], tmp_path / "out")  # the other rate is done there
    rates = ["--sweep.learning-rates", "0.003", "1e20", "--sweep.bag-sizes", "2", "--compare.seeds", "3"]
    arguments = ["sweep", config, *rates, "--out", str(out)]
    printed = sweep(*arguments)
    assert printed.count("diverged: the run") == 2 and "learning rate 0.003" in printed
    diverged = {row.run for row in read_rows(out / "sweep.csv") if math.isnan(row.val_loss)}
    assert diverged == {p.parent.name for p in out.glob("runs/*/diverged.json")}
    assert diverged == {"baseline-lr1e+20-seed3", "s2-r0.5-lr1e+20-seed3"}
    before = {p: p.stat().st_mtime_ns for p in out.rglob("runs/**/*")}
    assert main(arguments) == 0 and {p: p.stat().st_mtime_ns for p in out.rglob("runs/**/*")} == before


def test_a_larger_sweep_in_the_same_place_trains_only_what_is_new(tiny_sweep: tuple[list[str], Path]) -> None:
    _, out = tiny_sweep
    config = load_config(out / "config.toml")
    wider = replace(
        config,
        sweep=replace(config.sweep, ratios=(0.25, 0.5), keep=1.0),
        compare=replace(config.compare, seeds=(3, 4, 5)),
    )
    grid = grid_of(wider)
    jobs = jobs_of(grid, Design.of(4, grid.seeds).rounds(grid.candidates, {})[0])
    check_jobs(jobs, out)
    assert len(jobs) == 15 and len(unfinished(jobs, out)) == 10
    assert dry_run(config, out).seconds == 0
