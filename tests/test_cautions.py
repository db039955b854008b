"""What a report says is to be mistrusted, of made-up runs."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from tests.test_accountings import directory_of, run, shown
from token_superposition.experiment.intervals import chance, t_interval
from token_superposition.experiment.summary import Run, comparison, same_length
from token_superposition.report.cautions import arms, cautions
from token_superposition.report.contents import read

NOISE = (0.0, 0.01, -0.01, 0.004)


def pairs(*variants: tuple[str, float], seeds: int = 4) -> list[Run]:
    """Baselines of 3, and each variant by so much apart from them, give or take ``NOISE``."""
    return [
        run(name, seed, 1000, 3.0 + delta + NOISE[seed] * (name != "baseline"))
        for name, delta in (("baseline", 0.0), *variants)
        for seed in range(seeds)
    ]


def told(runs: list[Run], directory: Path) -> dict[str, str]:
    return dict(cautions(read(directory_of(runs, directory))))


def test_runs_that_are_alike_have_nothing_to_mistrust(tmp_path: Path) -> None:
    directory = directory_of(pairs(("tst", -0.1)), tmp_path / "c")
    assert cautions(read(directory)) == []
    assert all("What to mistrust" not in text for text in shown(directory))


def test_finished_runs_beside_a_report_are_named(tmp_path: Path) -> None:
    """A seed that lost is not forgotten by leaving it out."""
    directory = directory_of(pairs(("tst", -0.1)), tmp_path / "c")
    for name in ("tst-seed9", "baseline-seed9", "half"):
        (directory / "runs" / name).mkdir()
    (directory / "runs/tst-seed9/run.json").touch()
    (directory / "runs/baseline-seed9/diverged.json").touch()
    for text in shown(directory):
        words = " ".join(text.split())
        assert "not shown" in words and "2 more finished runs in" in words
        assert "(baseline-seed9, tst-seed9)" in words and "half" not in words


def test_of_several_variants_those_are_told_that_stand_the_correction(tmp_path: Path) -> None:
    """The weak one's own interval excludes 0; among three that is no more than chance."""
    weak = next(x / 1e4 for x in range(200) if (t_interval([NOISE[i] - x / 1e4 for i in range(4)]) or (0, 1))[1] < 0)
    runs = pairs(("tst", -0.1), ("weak", -weak), ("none", 0.0))
    assert 0.02 < chance([x - weak for x in NOISE]) < 0.05
    sentence = told(runs, tmp_path / "three")["several variants"]
    assert "with 3 of them tst differs clearly from the baseline" in sentence
    assert "and with 2 of them weak and none differ clearly from tst" in sentence
    runs = pairs(("tst", -0.1), ("by luck", -0.1 - weak), ("none", -0.1))
    runs = [replace(r, val_loss=r.val_loss - NOISE[r.seed] * (r.name == "tst")) for r in runs]
    close = told(runs, tmp_path / "close")["several variants"]
    assert "with 3 of them tst and by luck and none differ clearly from the baseline" in close
    assert "and with 2 of them none differs clearly from tst" in close
    assert "several variants" not in told(pairs(("tst", -0.1)), tmp_path / "one")
    assert "several variants" not in told(pairs(("tst", -0.1), ("weak", -weak), seeds=1), tmp_path / "seed")
    assert (
        "with 2 of them none differs" in told(pairs(("tst", 0.0), ("x", 0.001)), tmp_path / "two")["several variants"]
    )


def test_a_baseline_that_another_rate_would_suit_better_is_told_of(tmp_path: Path) -> None:
    def with_ordinary(delta: float, seeds: int = 4) -> list[Run]:
        runs = pairs(("tst", -0.1), ("at 2e-3", delta), ("at 3e-3", delta + 0.02), seeds=seeds)
        return [replace(r, ratio=0.0) if r.name.startswith("at ") else r for r in runs]

    sentence = told(with_ordinary(-0.05), tmp_path / "better")["the baseline"]
    low, high = t_interval([x - 0.05 for x in NOISE]) or (0, 0)
    assert (
        f"at 2e-3 has no bags either and ends 0.049 nats below it (95% interval {low:+.3f} to {high:+.3f})" in sentence
    )
    assert "better, so part of what the others gain over the baseline is the rate" in sentence
    assert "(one seed): its learning rate may" in told(with_ordinary(-0.05, seeds=1), tmp_path / "one")["the baseline"]
    unclear = told(with_ordinary(-0.003), tmp_path / "unclear")["the baseline"]
    assert ", no clear difference): its learning rate may suit the ordinary run better, so part of" in unclear
    assert "the baseline" not in told(with_ordinary(0.05), tmp_path / "worse")
    heads = [replace(r, flops=2 * r.flops) if r.name.startswith("at ") else r for r in with_ordinary(-0.05)]
    assert "the baseline" not in told(heads, tmp_path / "heads")
    for text in shown(directory_of(with_ordinary(-0.05), tmp_path / "shown")):
        assert "so part of what the others gain over the baseline is the rate" in " ".join(text.split())


def test_a_variant_of_more_steps_is_corrected_for_at_equal_flops(tmp_path: Path) -> None:
    """Twice the steps alone make no variant; where no baseline has as many, nothing is told of it."""
    twice = [run("plain-x2", seed, 2000, 2.8 + NOISE[seed]) for seed in range(4)]
    longer = [run("baseline-x2", seed, 2000, 2.8) for seed in range(4)]
    runs = [*pairs(("tst", 0.0)), *twice]
    assert "several variants" not in told(runs, tmp_path / "unknown")
    sentence = told([*runs, *longer], tmp_path / "known")["several variants"]
    assert "with 2 of them none differs clearly from the baseline at equal FLOPs" in sentence


def test_steps_that_were_left_out_and_other_versions_are_told(tmp_path: Path) -> None:
    runs = pairs(("tst", -0.1))
    runs[-1] = replace(runs[-1], versions={"torch": "1"})
    directory = directory_of(runs, tmp_path / "c")
    line = {"step": 10, "seconds": 1.0, "flops": 1e9, "raw_tokens": 100.0, "loss": 3.0}
    path = directory / "runs/tst-seed1/metrics.jsonl"
    path.write_text("".join(json.dumps(line | {"skipped": skipped}) + "\n" for skipped in ([3, 4], [7])))
    found = dict(cautions(read(directory)))
    assert found["steps left out"].startswith("3 of 1,000 in tst-seed1 (train.on_nonfinite)")
    assert found["not alike"].endswith("torch 0; torch 1")
    assert "torch 0; torch 1" in shown(directory)[1]


def test_a_way_of_training_has_its_mean_over_seeds(tmp_path: Path) -> None:
    runs = pairs(("tst", -0.1))
    assert arms(runs) == [
        ("baseline", "4", "1,000", "3.0000", "0.0000", "3.0000"),
        ("tst", "4", "1,000", "2.9010", "0.0084", "2.9010"),
    ]
    assert arms([r for r in runs if r.seed == 0]) == []
    lost = [replace(r, val_loss=math.nan) if r.directory == "tst-seed2" else r for r in runs]
    assert arms(lost)[1] == ("tst", "4", "1,000", "diverged", "", "")
    assert all("2.9010" in text for text in shown(directory_of(runs, tmp_path / "c")))


def test_runs_on_other_cores_have_no_equal_time(tmp_path: Path) -> None:
    """One that is added later has all cores for itself, and would be twice as fast."""
    runs = [
        replace(r, hardware="2 of 2 cores", steady_seconds=0.5) if r.directory in ("tst-seed0", "tst-seed1") else r
        for r in pairs(("tst", -0.1))
    ]
    found = comparison(runs)["equal_time"]
    assert found["ratio_per_seed"] == [1.0, 1.0] and found["seconds"] == found["baseline_seconds"] == 1.0
    for text in shown(directory_of(runs, tmp_path / "two")):
        assert "with 2 seeds it ran on other hardware" in " ".join(text.split())
    none = [replace(r, hardware="other") if r.name == "tst" else r for r in runs]
    assert math.isnan(comparison(none)["equal_time"]["ratio"])
    for text in shown(directory_of(none, tmp_path / "none")):
        assert "not measured: with 4 seeds it ran on other hardware" in " ".join(text.split())


@pytest.mark.parametrize("steps", [512, 1002, 4096, 8192, 20002])
def test_a_baseline_of_as_much_text_is_found_where_the_switch_is_rounded_apart(steps: int) -> None:
    superposed = round(0.3 * steps)
    raw = steps + 3 * superposed
    longer = round(1.9 * steps)
    assert abs(raw - longer) == 1
    runs = [
        replace(run("baseline", 0, steps, 3.0), raw_tokens=steps),
        replace(run("tst", 0, steps, 2.9), raw_tokens=raw),
        replace(run("baseline-x1.9", 0, longer, 2.8), raw_tokens=longer),
    ]
    found = comparison(runs)["equal_data"]
    assert (found["how"], found["baseline_val_loss"]) == ("measured", 2.8)
    assert not same_length(1900, 1910) and same_length(10, 11)


def test_a_lower_end_is_not_above_the_mean_that_it_belongs_to() -> None:
    """Four seeds beat the longest baseline by far; one is measured below it."""
    losses = (2.40, 2.40, 2.40, 2.40, 2.83)
    runs = [run("tst", seed, 1000, loss) for seed, loss in enumerate(losses)]
    for name, steps, loss in (("baseline", 1000, 3.0), ("baseline-x2", 2000, 2.8)):
        runs += [run(name, seed, steps, loss) for seed in range(5)]
    found = comparison(runs)["speedup"]
    assert found["bound"] == "at least" and found["measured"] == 1
    assert found["low"] == found["geometric_mean"] < 2


def test_a_speed_up_that_no_longer_baseline_measures_is_not_in_the_table(tmp_path: Path) -> None:
    runs = [run("baseline", 0, 1000, 3.2), run("baseline-x0.5", 0, 500, 3.5), run("tst", 0, 1000, 3.03)]
    for text in shown(directory_of(runs, tmp_path / "c")):
        words = " ".join(text.split())
        assert "not measured" in words and ">= 1.00" not in words and "extrapolated" in words
