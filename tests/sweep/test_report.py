"""Table and pictures of made-up sweeps."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
from rich.console import Console

from tests.conftest import TINY
from tests.sweep.settings import swept
from token_superposition.cli import main
from token_superposition.errors import TokenSuperpositionError
from token_superposition.experiment.config import Config, ModelConfig, save_config
from token_superposition.experiment.grid import Cell, Grid, grid_of
from token_superposition.experiment.halving import Design
from token_superposition.experiment.progress import RunProgress
from token_superposition.experiment.published import tables
from token_superposition.experiment.result import RunResult
from token_superposition.experiment.sweep import checked, chosen_by, write_sweep
from token_superposition.report import print_table, write_report
from token_superposition.report.sweep import read_sweep, sweep_rows
from token_superposition.report.sweep_figures import DIVERGING, colour_limit, sweep_pictures, text_colour


def made_up(out: Path, config: Config, loss: Callable[[Cell, int], float]) -> Grid:
    """The directory of a finished sweep without its runs."""
    grid = grid_of(config)
    design = Design.of(len(grid.candidates), grid.seeds, config.sweep.keep, config.sweep.selection_seeds)
    found = {
        (c, seed): RunResult(
            seed=seed, bag_size=c.bag_size, ratio=c.ratio, steps=1000, latent_tokens=1000,
            raw_tokens=round(1000 * (1 + c.ratio * (c.bag_size - 1))), epochs=0.5,
            flops=1e9, train_seconds=60.0, steady_seconds=60.0, phase_step_seconds=[1.0],
            val_loss=loss(c, seed), val_bpb=1.0, parameters=1000, hardware="none",
            versions={"torch": "0"}, data_sha256="", precision="float32",
        )
        for c in (*grid.baselines, *grid.candidates)
        for seed in grid.seeds
    }  # fmt: skip
    out.mkdir(exist_ok=True)
    save_config(config, out / "config.toml")
    write_sweep(out, grid, design, found, body_parameters=106_000_000)
    return grid


def shown(directory: Path) -> tuple[str, str]:
    console = Console(record=True, width=100, file=(directory / "terminal.txt").open("w"))
    print_table(directory, console)
    return re.sub(r"\s+", " ", console.export_text()), write_report(directory).read_text()


def test_a_setting_about_as_good_that_reads_less_text_is_named(tmp_path: Path) -> None:
    """Judged by the seed that compared all: the larger bag wins there by a hair, and reads 1.63 times the text."""

    def loss(cell: Cell, seed: int, by: float) -> float:
        return 3.0 - {1: 0.0, 2: 0.02, 4: 0.1, 8: 0.1 + by}[cell.bag_size] - 0.03 * (seed > 0 and cell.bag_size == 8)

    config = swept((0, 1, 2, 3), bag_sizes=(2, 4, 8), ratios=(0.3,), keep=0.4, selection_seeds=1)
    made_up(tmp_path / "near", config, lambda cell, seed: loss(cell, seed, 0.0004))
    for text in shown(tmp_path / "near"):
        assert "s = 4, r = 0.3 ended 0.0004 nats behind it on seed 0 and reads 0.61 x its text" in text
    made_up(tmp_path / "far", config, lambda cell, seed: loss(cell, seed, 0.04))
    for text in shown(tmp_path / "far"):
        assert "about as good" not in text


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
        assert "its learning rate = 0.002 is the largest" in text
        assert "the baseline's learning rate = 0.001 is the smallest" in html.unescape(text)
        assert "the difference would be -0.2425 (seeds 2, 3)" in text  # beside the baseline of its own rate
        assert "among many some exclude 0 by chance" in text
    best, *others = sweep_rows(read_sweep(tmp_path / "full"))  # the seeds that chose it flatter an interval
    assert best[0] == "best" and best[-1] == "see its difference"
    assert all(" to " in row[-1] for row in others if not row[0])
    page = (tmp_path / "full/report.html").read_text()
    assert page.count("<svg") == 2 * 3 + 1 and page.count("</html>") == 1 and "<script" not in page
    assert "270M, 20,000 steps, uniform weights" in page and page.count("stroke-dasharray") >= 2 * (2 + 2)
    one = swept((5,), bag_sizes=(2, 4), keep=0.5)
    made_up(tmp_path / "one", one, loss)
    for text in shown(tmp_path / "one"):
        assert "on seed 5, by which it was chosen" in text and "there is no interval" in text
        assert "the only one swept" in text


def test_what_chose_a_setting_is_not_forgotten_by_sweeping_it_alone(tmp_path: Path) -> None:
    out = tmp_path / "sweep"
    made_up(out, swept((0, 1), bag_sizes=(4,)), lambda cell, seed: 3.0 - 0.01 * cell.bag_size)
    assert all("one setting: nothing was chosen" in text and "not shown" not in text for text in shown(out))
    for name in ("other-seed0", "other-seed1"):
        (out / "runs" / name).mkdir(parents=True)
        (out / "runs" / name / "run.json").touch()
    for text in shown(out):
        assert "nothing was chosen" not in text and "2 more finished runs in" in " ".join(text.split())


def test_while_a_sweep_is_enlarged_its_report_is_that_of_the_finished_one(tmp_path: Path) -> None:
    """Table, best setting and configuration; with the runs that have come to it since."""
    out, config = tmp_path / "sweep", swept((0, 1, 2, 3), bag_sizes=(2, 4))
    made_up(out, config, lambda cell, seed: 3.0 - 0.01 * cell.bag_size)
    before = shown(out)
    save_config(swept((0, 1, 2, 3), bag_sizes=(2, 4, 8)), out / "config.toml")
    assert shown(out) == before


def test_seeds_that_chose_do_not_judge_in_another_order(prepared: Path, tmp_path: Path) -> None:
    out = tmp_path / "sweep"

    def of(*seeds: int, **values: Any) -> Config:
        config = swept(seeds, {"steps": 12, "batch_size": 4, "warmup_steps": 2}, **values)
        data = replace(config.data, path=str(prepared), sequence_length=16)
        return replace(config, data=data, model=ModelConfig("llama", cast(Any, TINY["llama"])))

    made_up(out, of(0, 1, 2, 3, bag_sizes=(2, 4)), lambda cell, seed: 3.0 - 0.01 * cell.bag_size)
    (out / "runs/s4").mkdir(parents=True)
    (out / "runs/s4/log.txt").touch()
    assert chosen_by(out) == {0, 1}
    checked(of(0, 1, 2, 3, 4, 5, bag_sizes=(2, 4, 8)), out)
    checked(of(2, 1, bag_sizes=(4,)), out)  # there is nothing to choose, and the report names the other runs
    for seeds, chosen in (((2, 3, 0, 1), "0, 1"), ((4, 0, 1, 2), "1"), ((0, 1), "1")):
        with pytest.raises(TokenSuperpositionError, match=rf"seeds \[{chosen}\] have chosen the best setting of a sw"):
            checked(of(*seeds, bag_sizes=(2, 4)), out)
    made_up(out, of(4, 5, 6, 7, bag_sizes=(2, 4)), lambda cell, seed: 3.0 - 0.01 * cell.bag_size)
    assert chosen_by(out) == {0, 1, 4, 5}


def test_settings_that_share_their_runs_are_one(tmp_path: Path) -> None:
    """Two ratios of 1,000 steps that are the same number of steps."""
    config = swept((0, 1, 2, 3), bag_sizes=(2, 4), ratios=(0.3, 0.3004))
    made_up(tmp_path / "sweep", config, lambda cell, seed: 3.0 - 0.01 * cell.bag_size)
    assert len(read_sweep(tmp_path / "sweep").cells) == 4
    for text in shown(tmp_path / "sweep"):
        assert "by which it was chosen out of 2" in text and "s = 4 is the largest that was tried:" in text


@pytest.mark.parametrize("baseline", [False, True])
def test_it_is_told_what_diverged(baseline: bool, tmp_path: Path) -> None:
    """The setting at a rate of its own, on the judging seed; or the baseline of that rate."""

    def loss(cell: Cell, seed: int) -> float:
        if cell.learning_rate == 1e-2 and seed == 1 and cell.is_baseline == baseline:
            return math.nan
        return 3.0 + 0.1 * (cell.is_baseline and cell.learning_rate == 1e-2) - cell.learning_rate * cell.bag_size

    made_up(tmp_path / "sweep", swept((0, 1), bag_sizes=(4,), learning_rates=(1e-3, 1e-2)), loss)
    for text in shown(tmp_path / "sweep"):
        assert ("the baseline at the setting" in html.unescape(text)) == baseline
        assert ("a run diverged (seed 1" in text) != baseline


def test_a_setting_that_diverged_is_not_the_lowest(tmp_path: Path) -> None:
    """Nor is it a number."""
    made_up(
        tmp_path / "sweep",
        swept((0, 1), bag_sizes=(2, 4)),
        lambda cell, seed: math.nan if cell.bag_size == 2 else 3.0 - 0.01 * cell.bag_size,
    )
    contents = read_sweep(tmp_path / "sweep")
    assert all("The lowest of 2 is -0.030 at s = 4" in p.alt for p in sweep_pictures(contents))
    (row,) = [row for row in sweep_rows(contents) if row[1] == "2"]
    assert row[-3:] == ("diverged", "", "none")
    made_up(tmp_path / "all", swept((0, 1), bag_sizes=(2, 4)), lambda cell, seed: math.nan)
    for text in shown(tmp_path / "all"):
        assert "a run diverged" in text and "the best may lie beyond" not in " ".join(text.split())


def test_a_setting_at_whose_rate_the_baseline_diverged(tmp_path: Path) -> None:
    made_up(
        tmp_path / "sweep",
        swept((0, 1), bag_sizes=(2, 4), learning_rates=(1e-3, 2e-3)),
        lambda cell, seed: math.nan if cell.is_baseline and cell.learning_rate > 1e-3 else 3 - cell.learning_rate,
    )
    for text in shown(tmp_path / "sweep"):
        text = html.unescape(text)
        assert "the baseline at the setting's own 0.002 diverged" in text
        assert "its learning rate = 0.002 is the largest that was tried" in text
    contents = read_sweep(tmp_path / "sweep")
    assert not any(map(contents.diverged, contents.cells))
    *pictures, rates = sweep_pictures(contents)
    assert rates.alt == (
        "Loss over the learning rate. baseline: lowest at 0.001, 2.9990; best of 2 settings: lowest at 0.002, 2.9980."
    )
    for picture in pictures:
        without = "learning rate 0.002" in picture.title
        assert ("no baseline" in picture.svg) == (without and "dashed" not in picture.title)
        assert ("The baseline of their learning rate diverged" in picture.alt) == without
        assert "diverged" not in picture.svg


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "has not the form that tst sweep writes (sweep.json is [])"),
        ('{"best": 3}', "sweep.json has no format"),
        ('"rounds"', "sweep.json has no rounds"),
        ('"chosen"', "sweep.json: best has other, which is unknown"),
    ],
)
def test_a_report_of_files_of_another_form_has_one_line(
    content: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made_up(tmp_path / "s", swept((0, 1), bag_sizes=(2, 4)), lambda cell, seed: 3.0)
    path = tmp_path / "s/sweep.json"
    path.write_text(path.read_text().replace(content, '"other"') if content.startswith('"') else content)
    assert main(["report", str(tmp_path / "s")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("tst: error: ") and error.count("\n") == 1, error
    assert message in error and "sweep.json" in error and "tst sweep" in error, error


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


def test_a_sweep_over_the_rate_alone_is_one_picture(tmp_path: Path) -> None:
    """Of one bag size and ratio there is no map to draw."""
    rates = (1e-3, 2e-3, 4e-3)
    made_up(
        tmp_path / "s",
        swept((0, 1), bag_sizes=(4,), learning_rates=rates),
        lambda cell, seed: 3 + 0.5 * seed + abs(math.log2(cell.learning_rate / (4e-3 if cell.is_baseline else 1e-3))),
    )
    (picture,) = sweep_pictures(read_sweep(tmp_path / "s"))
    told = "baseline: lowest at 0.004, 3.2500; s = 4, r = 0.3: lowest at 0.001, 3.2500."
    assert picture.alt == f"Loss over the learning rate. {told}"
    texts = re.findall(r">([^<>]+)</text>", picture.svg)
    assert {"0.001", "0.002", "0.004", "baseline", "s = 4, r = 0.3", "learning rate"} <= set(texts)
    contents = read_sweep(tmp_path / "s")  # without what a halving would not have trained: seed 1 is the harder one
    dropped = [r for r in contents.rows if r.seed == 0 or (r.cell.learning_rate < 4e-3 and not r.cell.is_baseline)]
    (picture,) = sweep_pictures(replace(contents, rows=dropped))
    told = "baseline: lowest at 0.004, 3.0000; s = 4, r = 0.3: lowest at 0.001, 3.0000."
    assert picture.alt == f"Loss over the learning rate, seed 0, which all have. {told}"
    assert sweep_pictures(replace(contents, rows=[r for r in dropped if r.seed or r.cell.is_baseline])) == []
    made_up(tmp_path / "all", swept((0, 1), bag_sizes=(4,), learning_rates=rates), lambda cell, seed: math.nan)
    assert sweep_pictures(read_sweep(tmp_path / "all")) == []


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


def test_settings_that_were_dropped_before_the_last_choosing_seed_are_reported(tmp_path: Path) -> None:
    config = swept((0, 1, 2, 3), bag_sizes=(2, 4, 8), ratios=(0.3,), keep=0.7)
    made_up(tmp_path / "sweep", config, lambda c, seed: 3.0 - {1: 0.0, 2: 0.02, 4: 0.1, 8: 0.101}[c.bag_size])
    for text in shown(tmp_path / "sweep"):
        assert "s = 4, r = 0.3 ended 0.0010 nats behind it on seeds 0, 1" in text


def test_a_row_is_beside_the_baseline_of_its_own_rate(tmp_path: Path) -> None:
    config = swept((0, 1), bag_sizes=(4,), learning_rates=(1e-3, 2e-3))
    made_up(tmp_path / "sweep", config, lambda c, seed: 3.0 - 0.1 * (not c.is_baseline) + 100 * c.learning_rate)
    rows = read_sweep(tmp_path / "sweep").rows
    assert {(r.learning_rate, r.baseline_loss) for r in rows} == {(1e-3, 3.1), (2e-3, 3.2)}
    assert all(r.difference == pytest.approx(0 if r.cell.is_baseline else -0.1) for r in rows)


def test_with_one_seed_the_baseline_of_its_own_rate_is_compared(tmp_path: Path) -> None:
    config = swept((5,), bag_sizes=(4, 8), learning_rates=(1e-3, 2e-3))
    made_up(tmp_path / "sweep", config, lambda c, seed: 3.0 + (1 if c.is_baseline else -1) * 100 * c.learning_rate)
    for text in shown(tmp_path / "sweep"):
        assert "the difference would be -0.4000 (seed 5)" in text
