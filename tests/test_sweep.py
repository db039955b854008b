"""Sweeps: cells, rounds and the best setting as pure functions on made-up losses; one real sweep, called twice."""

from __future__ import annotations

import csv
import json
import math
import random
import re
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from scipy import stats

from token_superposition import TokenSuperpositionError
from token_superposition.cli import main
from token_superposition.experiment.config import CompareConfig, Config, SweepConfig, load_config, save_config
from token_superposition.experiment.grid import Cell, Grid, grid_of, halved
from token_superposition.experiment.halving import Best, Design, Difference, ranked
from token_superposition.experiment.jobs import check_jobs, unfinished
from token_superposition.experiment.progress import RunProgress
from token_superposition.experiment.published import tables
from token_superposition.experiment.run import RunResult
from token_superposition.experiment.sweep import (
    dry_run,
    jobs_of,
    read_rows,
    write_sweep,
)
from token_superposition.report import print_table, write_report
from token_superposition.report.sweep import read_sweep
from token_superposition.report.sweep_figures import DIVERGING, colour_limit, sweep_pictures, text_colour


def swept(seeds: tuple[int, ...] = (), train: dict[str, Any] | None = None, **values: Any) -> Config:
    config = replace(Config(), sweep=SweepConfig(**values), compare=CompareConfig(seeds=seeds))
    return replace(config, train=replace(config.train, **(train or {})))


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
        assert job.config.data.common_bag == 12  # the same blocks of text in all of them
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
    assert len(grid_of(inputs).candidates) == 1  # one target: nothing to weigh


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
    with pytest.raises(TokenSuperpositionError, match="no place weights"):
        summed = replace(config.superposition, loss="sum-to-one")
        grid_of(replace(swept(weightings=("uniform", "power")), superposition=summed))


def test_the_command_refuses_in_one_line_before_any_work(
    write_config: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    for options, message in (
        (["--sweep.bag-sizes", "1"], "nothing but the baseline"),
        (["--sweep.bag-sizes", "64", "81", "125", "49"], "leave out bag sizes that are not powers of 2"),
        (["--train.steps", "0"], "train.steps is 0"),
    ):
        assert main(["sweep", str(write_config()), "--out", str(out), *options]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1 and not out.exists()
    out.mkdir()
    (out / "sweep.json").write_text("{")
    assert main(["report", str(out)]) == 2
    assert "holds no finished sweep" in capsys.readouterr().err


CELLS = tuple(Cell(s, r, "uniform", "switch", lr) for s in (2, 4, 8) for r in (0.1, 0.3) for lr in (1e-3, 2e-3))
BASELINES = tuple(Cell(1, 0.0, "uniform", "switch", lr) for lr in (1e-3, 2e-3))
DESIGNS = st.builds(
    lambda n, seeds, keep, first, selection: (
        CELLS[:n],
        Design.of(n, tuple(range(first, first + seeds)), keep, min(selection, seeds)),
    ),
    st.integers(1, len(CELLS)),
    st.integers(1, 7),
    st.sampled_from([0.1, 0.34, 0.5, 0.75, 0.99, 1.0]),
    st.integers(0, 3),
    st.integers(0, 7),
)


def run_all(
    cells: tuple[Cell, ...], design: Design, loss: Callable[[Cell, int], float]
) -> dict[tuple[Cell, int], float]:
    """What the command does: train what the last round lacks, until nothing lacks."""
    losses: dict[tuple[Cell, int], float] = {}
    while True:
        last = design.rounds(cells, losses)[-1]
        wanted = [(c, seed) for c in (*BASELINES, *last.cells) for seed in last.seeds]
        missing = [key for key in wanted if key not in losses]
        if not missing:
            return losses
        assert len(missing) == len(wanted)  # no run is asked for twice
        losses |= {key: loss(*key) for key in missing}


@settings(deadline=None)
@given(DESIGNS, st.integers(0, 2**32))
def test_each_round_keeps_the_best_by_the_mean_of_the_seeds_so_far(setting: Any, state: int) -> None:
    cells, design = setting
    generator = random.Random(state)
    values = {(c, seed): generator.choice([3.0, generator.gauss(3, 1), math.nan]) for c in (*BASELINES, *cells)
              for seed in design.seeds}  # fmt: skip
    losses = run_all(cells, design, lambda c, seed: values[c, seed])
    rounds = design.rounds(cells, losses)
    assert [seed for r in rounds for seed in r.seeds] == list(design.seeds)  # each seed once, hence each run once
    assert set(losses) >= {(b, seed) for b in BASELINES for seed in design.seeds}
    assert rounds[0].cells == cells
    for i, (before, after) in enumerate(pairwise(rounds), 1):
        so_far = design.seeds[:i]

        def score(cell: Cell, seeds: tuple[int, ...] = so_far) -> float:
            total = mean(losses[cell, seed] for seed in seeds)
            return total if math.isfinite(total) else math.inf

        dropped = set(before.cells) - set(after.cells)
        assert 1 <= len(after.cells) <= len(before.cells) and set(after.cells) <= set(before.cells)
        assert all(score(a) <= score(d) for a in after.cells for d in dropped)
    if not design.full:
        assert len(rounds[-1].cells) == 1 or not design.judging
    best = Best.of(design, cells, BASELINES, losses)
    assert not set(best.judged.seeds) & set(best.chosen.seeds)
    assert set(best.judged.seeds) | set(best.chosen.seeds) == set(design.seeds)
    assert best.cell == ranked(design.finalists(cells, losses), losses, design.choosing)[0]
    # More on disk than the rounds ask for, as a larger sweep leaves, changes nothing.
    assert design.rounds(cells, values) == rounds and Best.of(design, cells, BASELINES, values).cell == best.cell


def test_how_many_cells_and_seeds() -> None:
    assert Design.of(16, tuple(range(6)), 0.5).counts == (16, 8, 4)
    assert Design.of(16, tuple(range(6)), 0.5).judging == (3, 4, 5)
    assert Design.of(4, tuple(range(9)), 0.25).counts == (4,)  # one is left: all other seeds judge
    assert Design.of(4, (0, 1, 2)).counts == (4,) and Design.of(4, (0, 1, 2, 3)).counts == (4, 4)
    assert Design.of(4, (7,)).choosing == (7,) and Design.of(4, (7,)).judging == ()
    assert Design.of(1, (7, 8)).choosing == () and Design.of(1, (7, 8)).judging == (7, 8)  # nothing to choose
    assert Design.of(4, (0, 1, 2, 3), 1.0, selection_seeds=3).judging == (3,)


def test_the_interval_is_of_the_seeds_that_did_not_choose() -> None:
    a, b = Cell(4, 0.3, "uniform", "switch", 2e-3), Cell(8, 0.3, "uniform", "switch", 1e-3)
    slow, fast = BASELINES
    losses = {
        **{(slow, seed): 3.0 for seed in range(5)},
        **{(fast, seed): 3.4 for seed in range(5)},  # mistuned
        **{(a, seed): x for seed, x in enumerate((2.5, 2.5, 2.9, 2.8, 2.85))},  # lucky where it is chosen
        **{(b, seed): x for seed, x in enumerate((2.7, 2.7, 2.6, 2.6, 2.6))},
    }
    best = Best.of(Design.of(2, tuple(range(5))), (a, b), BASELINES, losses)
    assert (best.cell, best.baseline) == (a, slow)  # not the baseline of its own learning rate
    assert (best.chosen.seeds, best.judged.seeds) == ((0, 1), (2, 3, 4))
    assert best.chosen.mean == pytest.approx(-0.5)
    deltas = [-0.1, -0.2, -0.15]
    expected = stats.ttest_1samp(deltas, 0).confidence_interval(0.95)
    assert best.judged.per_seed == pytest.approx(deltas)
    assert best.judged.interval == pytest.approx((expected.low, expected.high))
    assert best.same_rate.mean == pytest.approx(-0.55)
    one = Best.of(Design.of(2, (0,)), (a, b), BASELINES, losses)
    assert (one.cell, one.judged.mean, one.judged.interval) == (a, None, None)
    assert Difference.of(losses | {(a, 2): math.nan}, a, slow, (2, 3)).interval is None


def test_settings_that_are_all_equal_flatter_only_where_they_are_chosen() -> None:
    """400 sweeps of nothing but noise: the choosing seeds see a gain, the judging seeds see none."""
    generator = random.Random(0)
    design, cells = Design.of(len(CELLS), (0, 1, 2, 3)), (*BASELINES, *CELLS)

    def simulated() -> Best:
        losses = {(c, seed): 0.0 if c.is_baseline else generator.gauss(0, 1) for c in cells for seed in design.seeds}
        return Best.of(design, CELLS, BASELINES, losses)

    found = [simulated() for _ in range(400)]
    assert mean(v for b in found for v in b.chosen.per_seed) < -0.9
    assert abs(mean(v for b in found for v in b.judged.per_seed)) < 4 / math.sqrt(800)


def made_up(out: Path, config: Config, loss: Callable[[Cell, int], float]) -> Grid:
    """The directory of a finished sweep without its runs."""
    grid = grid_of(config)
    design = Design.of(len(grid.candidates), grid.seeds, config.sweep.keep, config.sweep.selection_seeds)
    found = {
        (c, seed): RunResult(
            seed=seed, bag_size=c.bag_size, ratio=c.ratio, steps=1000, latent_tokens=1000, raw_tokens=2000, epochs=0.5,
            flops=1e9, train_seconds=60.0, phase_step_seconds=[1.0], val_loss=loss(c, seed), val_bpb=1.0,
            parameters=1000, hardware="none", versions={"torch": "0"},
        )
        for c in (*grid.baselines, *grid.candidates)
        for seed in grid.seeds
    }  # fmt: skip
    out.mkdir()
    save_config(config, out / "config.toml")
    write_sweep(out, grid, design, found, body_parameters=106_000_000)
    return grid


def shown(directory: Path) -> tuple[str, str]:
    console = Console(record=True, width=100, file=(directory / "terminal.txt").open("w"))
    print_table(directory, console)
    return re.sub(r"\s+", " ", console.export_text()), write_report(directory).read_text()


def test_table_and_report_say_what_is_to_be_believed(tmp_path: Path) -> None:
    def loss(cell: Cell, seed: int) -> float:
        gain = 0.0 if cell.is_baseline else 0.01 * cell.bag_size + 0.001 * seed * (cell.bag_size == 4)
        return 3.0 + 0.01 * seed + (0.2 if cell.learning_rate == 2e-3 and cell.is_baseline else 0.0) - gain - (
            0.01 if cell.learning_rate == 2e-3 else 0.0)  # fmt: skip

    config = swept((0, 1, 2, 3), bag_sizes=(2, 4), ratios=(0.1, 0.3), learning_rates=(1e-3, 2e-3))
    made_up(tmp_path / "full", config, loss)
    for text in shown(tmp_path / "full"):
        assert "s = 4, r = 0.1, learning rate 0.002" in text and "0.0525 nats below the baseline" in text
        assert "seeds 2, 3, which took no part in choosing it" in text
        assert "on seeds 0, 1, by which it was chosen out of 8" in text
        assert "its own best learning rate, 0.001 of 0.001, 0.002" in text and "a mistuned baseline as a gain" in text
        assert "s = 4 is the largest that was tried; r = 0.1 is the smallest that was tried" in text
        assert "the difference would be -0.2425 (seeds 2, 3)" in text  # beside the baseline of its own rate
    page = (tmp_path / "full/report.html").read_text()
    assert page.count("<svg") == 2 * 3 and page.count("</html>") == 1 and "<script" not in page
    assert "270M, 20,000 steps, uniform weights" in page and page.count("stroke-dasharray") >= 2 * (2 + 2)
    one = swept((5,), bag_sizes=(2, 4), keep=0.5)
    made_up(tmp_path / "one", one, loss)
    for text in shown(tmp_path / "one"):
        assert "on seed 5, by which it was chosen" in text and "there is no interval" in text
        assert "the only one swept" in text


def test_pictures_show_each_cell_once_and_the_published_curve(tmp_path: Path) -> None:
    config = swept((0, 1, 2, 3), bag_sizes=(2, 4, 8), ratios=(0.1, 0.3), schedules=("switch", "halving"), keep=0.4)

    def loss(cell: Cell, seed: int) -> float:
        return math.nan if cell.bag_size == 8 and cell.ratio == 0.3 else 3.0 - 0.0123 * cell.bag_size * cell.ratio

    grid = made_up(tmp_path / "s", config, loss)
    contents = read_sweep(tmp_path / "s")
    heat, over_s, over_r, *rest = sweep_pictures(contents)
    assert len(rest) == 3 and "(switch)" in heat.title and "(halving)" in rest[0].title
    texts = re.findall(r">([^<>]+)</text>", heat.svg)
    numbers = [t for t in texts if re.fullmatch(r"[+-]0\.0\d\d|diverged", t)]
    expected = ["diverged", *(f"{-0.0123 * s * r:+.3f}" for s in (2, 4, 8) for r in (0.1, 0.3) if (s, r) != (8, 0.3))]
    assert sorted(numbers) == sorted(expected) and len(grid.run_of) == 12
    assert "4 seeds" in "".join(texts) and "1 seed" in texts  # the best, and what was dropped
    table = next(t for t in tables() if (t.model, t.steps, t.weighting) == ("270M", 20000, "uniform"))
    assert contents.published(contents.facets[0]) == table
    assert "r = 0.1" in over_s.svg and "s = 8" in over_r.svg and over_s.svg.count("stroke-dasharray: 3.7") == 2 + 1


def test_text_on_every_colour_is_readable() -> None:
    for i in range(101):
        background = DIVERGING(i / 100)
        colours = [tuple(int(c[k : k + 2], 16) / 255 for k in (1, 3, 5)) for c in (text_colour(background),)]
        assert contrast(background[:3], colours[0]) >= 4.5  # WCAG 2, level AA
    assert colour_limit([-0.1, 0.05, 0.05, 0.05, 5.0]) == 0.1 and colour_limit([math.nan, -0.2]) == 0.2


def contrast(a: Any, b: Any) -> float:
    def luminance(colour: Any) -> float:
        r, g, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour)
        return 0.2126 * r + 0.7152 * g + 0.0722 * blue

    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


def test_many_runs_are_counted_in_one_bar(tmp_path: Path) -> None:
    with (tmp_path / "terminal.txt").open("w") as file, RunProgress(Console(file=file), 9) as progress:
        for i in range(9):
            progress.update(f"run{i}", 10, [])
        for i in range(8):
            progress.finish(f"run{i}")
        assert [(t.description, t.completed, t.total) for t in progress.bars.tasks] == [
            ("all runs", 8, 9),
            ("run8", 0, 10),
        ]


@pytest.fixture(scope="module")
def tiny_sweep(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Path]:
    """A real one: two bag sizes and the baseline with the first seed, the better one with the second."""
    from tests.conftest import CONFIG, TINY, toml

    root = tmp_path_factory.mktemp("sweep")
    options = "\n".join(f"{k} = {toml(v)}" for k, v in TINY["llama"].items())
    content = CONFIG.format(architecture="llama", options=options, data=prepared).replace("steps = 12", "steps = 4")
    (root / "config.toml").write_text(content + "[compare]\nseeds = [3, 4]\n[sweep]\nbag_sizes = [2, 4]\n")
    arguments = ["sweep", str(root / "config.toml"), "--sweep.keep", "0.5", "--out", str(root / "out")]
    assert main(arguments) == 0
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
