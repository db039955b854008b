"""The accountings of a comparison, of made-up runs: intervals against scipy, bounds, lengths, and how they are told."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
from matplotlib.figure import Figure
from rich.console import Console
from scipy import stats

from token_superposition import TokenSuperpositionError
from token_superposition.experiment.compare import jobs_of
from token_superposition.experiment.config import CompareConfig, Config, Variant
from token_superposition.experiment.files import METRICS, write_metrics
from token_superposition.experiment.intervals import seed_speedup, t_interval
from token_superposition.experiment.result import StepTimes
from token_superposition.experiment.summary import EqualLoss, Run, comparison, equal_loss
from token_superposition.report import print_table, write_report
from token_superposition.report.contents import interval_table, read
from token_superposition.report.figures import draw
from token_superposition.report.verdicts import bottom_line, in_short, missing

DELTAS = [-0.2766, -0.1645, -0.1132]


def run(name: str, seed: int, steps: int, loss: float, seconds: float = 1.0) -> Run:
    return Run(
        seed=seed, bag_size=4, ratio=0.3, steps=steps, latent_tokens=steps, raw_tokens=steps * (1 + (name == "tst")),
        epochs=0.1, flops=1e9 * steps, train_seconds=seconds + 60, steady_seconds=seconds, phase_step_seconds=[1.0],
        val_loss=loss, val_bpb=loss, parameters=1000, hardware="none", versions={"torch": "0"}, data_sha256="",
        precision="float32", name=name, directory=f"{name}-seed{seed}",
    )  # fmt: skip


def experiment(longest: float = 2.0) -> list[Run]:
    """Three seeds: deltas as in DELTAS; the baseline falls by 0.2 with twice the steps."""
    runs: list[Run] = []
    for seed, delta in enumerate(DELTAS):
        runs.append(run("baseline", seed, 1000, 3.0, seconds=100.0 + 50 * seed))
        runs.append(run("tst", seed, 1000, 3.0 + delta, seconds=[110.0, 190.0, 180.0][seed]))
        end = 3.0 - 0.2 * math.log2(longest)
        runs.append(run(f"baseline-x{longest:g}", seed, round(1000 * longest), end, seconds=400.0))
    return runs


def test_a_comparison_over_seeds() -> None:
    result = comparison(experiment(longest=4))
    assert result["delta_val_loss"] == pytest.approx(mean(DELTAS))
    assert result["delta_val_loss_interval"] == pytest.approx(t_interval(DELTAS))
    assert result["confidence"] == 0.95
    per_seed = [2 ** (-d / 0.2) for d in DELTAS]
    assert [s["speedup"] for s in result["speedup_per_seed"]] == pytest.approx(per_seed)
    assert result["speedup"]["geometric_mean"] == pytest.approx(stats.gmean(per_seed))
    assert result["speedup"]["bound"] == "measured" and result["variants"]["tst"]["speedup"] == result["speedup"]
    equal_time = result["equal_time"]
    assert (equal_time["seconds"], equal_time["baseline_seconds"]) == (180.0, 150.0)
    assert equal_time["ratio_per_seed"] == [1.1, 190 / 150, 0.9]
    assert equal_time["ratio"] == 1.1 and equal_time["baseline_steps"] == 1100
    assert equal_time["baseline_val_loss"] == pytest.approx(3.0 - 0.2 * math.log2(1.1))
    assert equal_time["how"] == "interpolated"
    (longer,) = result["longer_baselines"]
    at_four = [d + 0.4 for d in DELTAS]
    assert (longer["baseline_steps"], longer["ratio"], longer["seeds"]) == (4000, 4.0, 3)
    assert longer["delta_val_loss"] == pytest.approx(mean(at_four))
    assert longer["interval"] == pytest.approx(t_interval(at_four))
    cut = comparison(experiment(longest=2))["speedup"]
    assert (cut["bound"], cut["measured"], cut["high"]) == ("at least", 2, None)
    assert cut["geometric_mean"] < result["speedup"]["geometric_mean"]


def test_a_superposed_step_is_timed_against_an_ordinary_one() -> None:
    """The mean over the seeds of which both phases were timed."""
    times: list[list[float | None]] = [[3.0, 2.0], [5.0, 2.0], [None, 2.0], [7.0, None], [9.0]]
    runs = [run(name, seed, 1000, 3.0) for name in ("baseline", "tst") for seed in range(len(times))]
    runs = [replace(r, phase_step_seconds=times[r.seed]) if r.name == "tst" else r for r in runs]
    assert comparison(runs)["phase_step_time_ratio"] == 2.0
    assert comparison([r for r in runs if r.seed == 4])["phase_step_time_ratio"] is None


def test_what_is_done_once_is_in_no_pace(tmp_path: Path) -> None:
    """The first run compiles for all, a branch is loaded midway: neither says what a step costs."""
    seconds = {10: 30.0, 20: 50.0, 30: 70.0, 40: 91.0, 50: 101.0, 60: 140.0, 70: 150.0, 80: 160.0}
    lines = [{"step": n, "seconds": s, "loss": 3.0} for n, s in seconds.items()]
    lines.insert(3, {"step": 30, "seconds": 70.0, "val_loss": 3.0})
    write_metrics(tmp_path / METRICS, lines)
    times = StepTimes.of(tmp_path, [0, 30], 85)
    assert times == StepTimes(by_phase=[2.0, 1.0], steady=30 * 2.0 + 55 * 1.0)
    assert StepTimes.of(tmp_path, [0, 70], 85) == StepTimes(by_phase=[2.0, None], steady=None)


def test_runs_too_short_to_be_timed_have_no_equal_time(tmp_path: Path) -> None:
    """Where one phase has no pace, its run's seconds have compiling in them, the other's have not."""
    for short in (
        [replace(r, steady_seconds=0.0) for r in experiment()],
        [replace(r, steady_seconds=None) if r.name == "tst" else r for r in experiment()],
        [replace(r, steady_seconds=None) if r.name == "baseline" else r for r in experiment()],
        [replace(r, phase_step_seconds=[1.0, None]) if r.name == "tst" else r for r in experiment()],  # of before
    ):
        found = comparison(short)["equal_time"]
        assert math.isnan(found["ratio"]) and found["baseline_val_loss"] is None and found["how"] == "not run"
    one = [replace(r, steady_seconds=None) if r.directory == "tst-seed1" else r for r in experiment()]
    assert comparison(one)["equal_time"]["ratio_per_seed"] == [1.1, 0.9]
    for text in shown(directory_of(short, tmp_path / "short")):
        assert "not measured" in " ".join(text.split()) and "without compiling" not in text


def test_a_loss_beyond_the_baselines_or_on_a_flat_line() -> None:
    """The line through the two longest is followed up to 4 x the steps; a flat one never comes down further."""
    assert equal_loss([(500, 3.4), (1000, 3.2)], 2.0, 1000) == EqualLoss(4000, 4.0, "at least, extrapolated")
    assert equal_loss([(500, 3.2), (1000, 3.2)], 3.1, 1000) is None
    assert equal_loss([(500, 3.2), (1000, 3.2)], 3.2, 1000) == EqualLoss(500, 0.5, "interpolated")


def test_longer_baselines_that_end_higher_again_are_no_second_answer() -> None:
    """Where the text is repeated too often: the shortest is below already, as it is seed by seed."""
    curve = [(400, 3.0), (1000, 3.5), (1600, 3.8)]
    assert equal_loss(curve, 3.3, 1000) == EqualLoss(400, 0.4, "at most")
    seed = seed_speedup(0, curve, 3.3, 1000)
    assert seed is not None and (seed.speedup, seed.bound) == (0.4, "at most")
    assert equal_loss([(400, 3.6), *curve[1:]], 3.55, 1000) == EqualLoss(
        632, pytest.approx(math.sqrt(0.4)), "interpolated"
    )  # pyright: ignore


def test_with_bounds_alone_the_longest_baseline_that_is_beaten_is_the_lower_end() -> None:
    """Three seeds of which at most one is measured."""

    def found(*deltas: float) -> dict[str, Any]:
        runs = [run("tst", seed, 1000, 2.9 + delta) for seed, delta in enumerate(deltas)]
        for name, steps, loss in (("baseline", 1000, 3.0), ("baseline-x1.5", 1500, 2.95), ("baseline-x2", 2000, 2.9)):
            runs += [run(name, seed, steps, loss) for seed in range(len(deltas))]
        return comparison(runs)["speedup"]

    assert (found(-0.03, -0.02, -0.04)["low"], found(-0.03, -0.02, -0.04)["high"]) == (2.0, None)
    ends = t_interval([-0.03, 0.005, -0.01])
    assert ends is not None and 0 < ends[1] < 0.05  # one is measured, and the length of 2 is not beaten beyond chance
    between = 2 * 0.75 ** (ends[1] / 0.05)  # by so much the baseline is higher there
    assert found(-0.03, 0.005, -0.01)["low"] == pytest.approx(between) and 1.5 < between < 2
    assert found(-0.01, 0.1, -0.4)["low"] is None  # no length is
    assert found(-0.03)["low"] is None  # one seed


def test_a_longer_baseline_that_diverged_is_told_and_used_by_no_accounting(tmp_path: Path) -> None:
    """Of three lengths the one of as much text is lost with one seed; what the others beat is told of all seeds."""
    runs = [replace(r, val_loss=r.val_loss - 0.2 * (r.name == "tst")) for r in experiment(longest=2)]
    runs += [run("baseline-x1.5", seed, 1500, 2.9) for seed in range(3)]
    lost = [replace(r, val_loss=math.nan) if r.directory == "baseline-x2-seed1" else r for r in runs]
    found = comparison(lost)
    assert (found["equal_data"]["how"], found["equal_data"]["interval"]) == ("diverged", None)
    assert found["speedup"]["low"] == 1.5 and found["speedup"]["seeds"] == 3
    only = [r for r in lost if r.name != "baseline-x1.5"]
    assert comparison(only)["speedup"] is None
    for text in shown(directory_of(only, tmp_path / "out")):
        words = " ".join(text.split())
        assert "a baseline of another length diverged" in words and "steps, with which it diverged" in words


def test_beyond_the_lengths_that_were_run_nothing_is_told_of_a_baseline(tmp_path: Path) -> None:
    runs = experiment(longest=1.5)
    assert comparison(runs)["equal_data"]["baseline_val_loss"] is None
    for text in shown(directory_of(runs, tmp_path / "out")):
        assert "a length that was not run (to measure it, add 2 to --compare.baseline-lengths)" in " ".join(
            text.split()
        )


def directory_of(runs: list[Run], out: Path) -> Path:
    """What tst compare leaves for the report."""
    for r in runs:
        (out / "runs" / r.directory).mkdir(parents=True)
        line = {"step": r.steps, "seconds": r.train_seconds, "flops": r.flops, "raw_tokens": r.raw_tokens}
        lines = [line | {"step": 1, "val_loss": 5.0}, line | {"val_loss": r.val_loss}]
        (out / "runs" / r.directory / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    data = {"train": {"tokens": 1, "documents": 1}, "validation": {"bytes_per_token": 3.0}, "vocab_size": 8}
    summary: dict[str, Any] = {"format": 1, "runs": [asdict(r) for r in runs], "comparison": comparison(runs)}
    summary |= {"data": data, "config": asdict(Config()), "samples": [], "note": None}
    (out / "summary.json").write_text(json.dumps(summary))
    return out


def shown(directory: Path) -> tuple[str, str]:
    console = Console(record=True, width=100, file=(directory / "terminal.txt").open("w"))
    print_table(directory, console)
    return console.export_text(), write_report(directory).read_text()


def test_a_curve_is_of_one_text_and_its_line_is_the_last_switch(tmp_path: Path) -> None:
    """The last validation, which the figures are of, reads more of the held-out text than the ones before."""
    directory = directory_of([run("baseline", 0, 40, 3.0), run("tst", 0, 40, 2.9)], tmp_path)
    for name, bags in (("baseline", [1, 1, 1, 1]), ("tst", [4, 2, 1, 1])):
        lines: list[dict[str, float]] = []
        for i, bag in enumerate(bags, start=1):
            line = {"step": 10 * i, "seconds": 1.0 * i, "flops": 1e9 * i, "raw_tokens": 100.0 * i}
            lines += [line | {"loss": 4.0, "input_bag": bag, "output_bag": bag}]
            if i == 4:
                lines += [line | {"val_loss": 2.5}, line | {"val_loss": 3.0}]
            elif i > 1:
                lines += [line | {"val_loss": 5.0 - i}]
        write_metrics(directory / f"runs/{name}-seed0" / METRICS, lines)
    axes = Figure().subplots()
    assert draw(axes, read(directory), "flops", "FLOPs") == "baseline ends at 3.000; tst ends at 2.900"
    *curves, switch = sorted(axes.get_lines(), key=lambda line: line.get_linestyle() == ":")
    assert [list(c.get_ydata()) for c in curves] == [[3.0, 2.0, 2.5]] * 2  # pyright: ignore
    assert list(switch.get_xdata()) == [2e9, 2e9]  # pyright: ignore


def test_a_narrow_terminal_loses_no_figure(tmp_path: Path) -> None:
    directory = directory_of(experiment(longest=4), tmp_path)
    console = Console(record=True, width=50, file=(tmp_path / "terminal.txt").open("w"))
    print_table(directory, console)
    assert "\u2026" not in console.export_text()


def test_table_and_report_show_the_intervals(tmp_path: Path) -> None:
    low, high = t_interval(DELTAS)  # pyright: ignore
    for text in shown(directory_of(experiment(longest=4), tmp_path / "measured")):
        for expected in ("-0.185", f"{low:+.3f} to {high:+.3f}", f"{low:+.4f} to {high:+.4f}", "3 paired seeds",
                         "contains 0", "1.90 x", "1.10 x the time", "own ratios, 0.90 to 1.27, which do not agree",
                         "geometric mean of 3 seeds", "4 x the steps", "above a baseline of 4,000"):  # fmt: skip
            assert expected in text, expected
        assert "at least" not in text
    for text in shown(directory_of(experiment(longest=2), tmp_path / "cut")):
        assert "the baseline needs about 1.7" in text and "no interval" in text  # the difference contains 0
        assert "1 of 3 seeds only known to be at least 2.00 x" in text
    lower = [replace(r, val_loss=r.val_loss - 0.2 * (r.name == "tst")) for r in experiment(longest=2)]
    for text in shown(directory_of(lower, tmp_path / "beaten")):
        words = " ".join(text.split())
        assert "the baseline needs at least 1.85 x the steps (95% lower bound; geometric mean of 3 seeds" in words
        assert " or more" in text and "3 of 3 seeds only known to be at least 2.00 x, as which they count" in words


def test_in_short_it_says_no_more_than_is_sure(tmp_path: Path) -> None:
    """Who is ahead at equal FLOPs, what that is worth, and who is ahead at equal text."""
    lower = [replace(r, val_loss=r.val_loss - 0.2 * (r.name == "tst")) for r in experiment(longest=2)]
    one = [r for r in lower if r.seed == 0]
    two = [r for r in lower if r.seed < 2]
    even = [replace(r, val_loss=r.val_loss if r.name != "tst" else 2.0 + 0.001 * r.seed) for r in two]

    def in_short(runs: list[Run], of: str) -> str:
        ((name, sentence),) = bottom_line(read(directory_of(runs, tmp_path / of)))
        assert name == "tst in short"
        return sentence

    low, high = t_interval([d - 0.2 for d in DELTAS])  # pyright: ignore
    beaten = in_short(lower, "beaten")
    assert beaten.startswith(
        f"0.385 nats below the baseline at equal FLOPs (95% interval {low:+.3f} to {high:+.3f} over"
    )
    assert "at least 1.85 x the FLOPs (95% lower bound); at equal text 0.185 nats below it" in beaten
    assert "3 seeds: no clear difference)" in (unclear := in_short(experiment(longest=2), "unclear"))
    assert "needs" not in unclear
    assert "one seed: a lead" in in_short(one, "one")
    assert "2 seeds; a lead)" in in_short(even, "even") and "2 seeds: no clear difference)" in in_short(two, "two")
    lost = [replace(r, val_loss=math.nan) if r.name == "tst" else r for r in lower]
    assert in_short(lost, "lost") == "diverged, or its baseline did"


def test_an_interval_of_two_seeds_is_called_a_lead(tmp_path: Path) -> None:
    runs = [
        run(name, seed, 1000, loss + seed / 1000) for name, loss in (("baseline", 3.0), ("tst", 2.9)) for seed in (0, 1)
    ]
    runs[-1] = replace(runs[-1], val_loss=2.9005)
    for two, seeds in ((True, runs), (False, [*runs, run("baseline", 2, 1000, 3.0), run("tst", 2, 1000, 2.9)])):
        for text in shown(directory_of(seeds, tmp_path / f"{two}")):
            words = " ".join(text.split())
            assert "which excludes 0" in words and ("of two seeds, which may be close by luck, a lead" in words) == two


def test_a_variant_is_judged_against_plain_tst_too(tmp_path: Path) -> None:
    """By 0.02 and 0.04 below TST with two of the seeds; the third was run without it."""
    runs = experiment()
    runs += [run("shifted", seed, 1000, 3.0 + DELTAS[seed] - 0.02 * (1 + seed)) for seed in (0, 1)]
    variants = comparison(runs)["variants"]
    found = variants["shifted"]["against_tst"]
    assert found["delta_val_loss"] == pytest.approx(-0.03) and found["seeds"] == 2
    assert found["interval"] == pytest.approx(t_interval([-0.02, -0.04]))
    assert variants["tst"]["against_tst"] is None
    for text in shown(directory_of(runs, tmp_path / "variant")):
        assert "shifted ends 0.0300 nats below tst" in " ".join(text.split()) and "tst ends 0.0000" not in text


def test_a_variant_of_its_own_length_shows_what_steps_another_is_worth(tmp_path: Path) -> None:
    """TST is 0.01 to 0.03 below a variant that takes 1.2 x the steps."""
    runs = experiment(longest=4)
    runs += [run("plain", seed, 1200, 3.0 + delta + 0.01 * (1 + seed)) for seed, delta in enumerate(DELTAS)]
    found = comparison(runs)["variants"]["plain"]
    assert (found["steps_ratio"], found["flops_ratio"]) == (1.2, 1.2)
    assert found["equal_flops"]["baseline_steps"] == found["equal_data"]["baseline_steps"] == 1200
    assert found["equal_flops"]["baseline_val_loss"] == pytest.approx(3.0 - 0.2 * math.log2(1.2))
    at_equal = [delta + 0.01 * (1 + seed) + 0.2 * math.log2(1.2) for seed, delta in enumerate(DELTAS)]
    assert found["equal_flops"]["delta_val_loss"] == pytest.approx(mean(at_equal))
    assert found["equal_flops"]["interval"] == pytest.approx(t_interval(at_equal))
    assert found["against_tst"]["interval"] == pytest.approx(t_interval([0.01, 0.02, 0.03]))
    steps = [1000 * 2 ** (-(delta + 0.01 * (1 + seed)) / 0.2) for seed, delta in enumerate(DELTAS)]
    assert [s["speedup"] for s in found["speedup_per_seed"]] == pytest.approx([n / 1200 for n in steps])
    for text in shown(directory_of(runs, tmp_path / "longer")):
        words = " ".join(text.split())
        assert "plain: in 1.2 x the steps" in words and "plain: equal FLOPs" in words and "tst: equal FLOPs" in words
        assert "its steps take 1.20 x the FLOPs" in words and "plain ends 0.0200 nats above tst" in words

    assert [row[-1] for row in interval_table(read(tmp_path / "longer"))] == ["FLOPs", "1.00", "1.20"]


def test_the_table_counts_flops_where_steps_cost_more(tmp_path: Path) -> None:
    """As with a head for further tokens: as many steps as the baseline, each of 1.25 x the FLOPs."""
    even = [replace(r, val_loss=2.75 + 0.01 * r.seed) if r.name == "tst" else r for r in experiment(longest=8)]
    runs = [replace(r, flops=1.25 * r.flops) if r.name == "tst" else r for r in even]
    in_steps = comparison(even)["speedup"]
    (_, row) = interval_table(read(directory_of(runs, tmp_path / "out")))
    low, high = in_steps["low"] / 1.25, in_steps["high"] / 1.25
    assert row[4:] == (f"{in_steps['geometric_mean'] / 1.25:.2f}", f"{low:.2f} to {high:.2f}", row[6], "1.25")


@pytest.mark.parametrize("runs", [experiment(), [r for r in experiment() if "-x" not in r.name]])
def test_the_table_fits_into_80_columns(runs: list[Run], tmp_path: Path) -> None:
    out = directory_of(runs, tmp_path / "out")
    console = Console(record=True, width=80, file=(tmp_path / "terminal.txt").open("w"))
    print_table(out, console)
    assert interval_table(read(out))[0][-1] == "time" and "…" not in console.export_text()


def test_a_length_counts_the_steps_of_a_variant_and_1_is_the_plain_one() -> None:
    longer = Variant("longer", Config().superposition, length=1.25)
    same = Variant("same", Config().superposition)
    config = replace(Config(), compare=CompareConfig(seeds=(7,), variants=(longer, same)))
    config = replace(config, train=replace(config.train, steps=1000, warmup_steps=10))
    jobs = {j.name: j.config for j in jobs_of(config)}
    assert {name: c.train.steps for name, c in jobs.items()} == {
        "baseline": 1000, "tst": 1000, "longer": 1250, "same": 1000
    }  # fmt: skip
    assert jobs["same"] == jobs["tst"]
    assert jobs["longer"].schedule.switches == [round(1250 * config.superposition.ratio)]
    assert replace(jobs["longer"], train=jobs["tst"].train) == jobs["tst"]
    for length in (0.0, -1.0, math.inf, math.nan, 1e-9):
        wrong = replace(config, compare=CompareConfig(variants=(replace(longer, length=length),)))
        with pytest.raises(TokenSuperpositionError, match=r"the length of longer is .* of 1000 steps; give a"):
            wrong.check()


def test_one_seed_has_no_interval_and_says_so(tmp_path: Path) -> None:
    runs = [r for r in experiment() if r.seed == 1]
    for text in shown(directory_of(runs, tmp_path / "one")):
        assert "one seed: there is no interval" in text and "none" in text and "standard deviation" not in text
        assert "the baseline would need about" in text


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (3.1, "at most 1,000 steps, 1.00 x the 1,000 (the shortest that was run, which is below already)"),
        (2.9, "about 1,414 steps, 1.41 x the 1,000 (between baselines that were run)"),
        (2.7, "at least 2,000 steps, 2.00 x the 1,000 (the longest that was run, which is still above)"),
    ],
)
def test_one_seed_has_a_bound_where_it_is_not_between_baselines(loss: float, expected: str, tmp_path: Path) -> None:
    runs = [run("baseline", 0, 1000, 3.0), run("tst", 0, 1000, loss), run("baseline-x2", 0, 2000, 2.8)]
    assert all(expected in text for text in shown(directory_of(runs, tmp_path / "out")))


def test_one_seed_of_a_variant_of_its_own_length_is_counted_in_its_steps(tmp_path: Path) -> None:
    runs = [run("baseline", 0, 1000, 3.0), run("tst", 0, 1000, 2.9), run("longer", 0, 1250, 2.9)]
    runs.append(run("baseline-x2", 0, 2000, 2.8))
    for text in shown(directory_of(runs, tmp_path / "out")):
        assert "about 1,414 steps, 1.41 x the 1,000 (" in text and "about 1,414 steps, 1.13 x the 1,250 (" in text


def test_text_that_is_read_again_is_told(tmp_path: Path) -> None:
    once_each, again = experiment(), [replace(r, epochs=1 + (r.name == "tst")) for r in experiment()]
    for text in shown(directory_of(again, tmp_path / "again")):
        assert "tst reads its text 2.0 times, the baseline 1.0 times" in text
    assert all("reads its text" not in text for text in shown(directory_of(once_each, tmp_path / "once")))


def test_in_short_an_unclear_difference_at_equal_text_is_called_so() -> None:
    (c,) = comparison(experiment(longest=2))["variants"].values()
    assert c["equal_data"]["interval"][0] < 0 < c["equal_data"]["interval"][1]
    assert in_short(c).endswith("at equal text 0.015 nats above it (no clear difference)")


def test_in_short_what_is_behind_saves_no_flops() -> None:
    runs = [replace(r, val_loss=3.05 + 0.001 * r.seed) if r.name == "tst" else r for r in experiment(longest=2)]
    runs += [run("baseline-x0.5", seed, 500, 3.2) for seed in range(3)]
    (c,) = comparison(runs)["variants"].values()
    assert "0.051 nats above the baseline" in in_short(c) and "for its loss" not in in_short(c)


def test_the_length_that_is_advised_is_not_below_the_one_that_is_missing() -> None:
    runs = [replace(r, raw_tokens=1234) if r.name == "tst" else r for r in experiment(longest=1.1)]
    equal = comparison(runs)["equal_data"]
    assert equal["baseline_steps"] == 1234 and "add 1.24 to --compare.baseline-lengths" in missing(equal)
