"""What the findings page says of plain TST and of its variants, over made-up comparisons."""

from __future__ import annotations

from dataclasses import asdict, replace
from statistics import mean

import pytest

from results.kept import Result
from results.plain import PLAIN, against_plain, ordinary, over_batches, pairs, recipes
from results.short_answers import short_answers
from tests.test_accountings import run

Changed = dict[str, object]


def made_of(
    tst: dict[str, object],
    variants: dict[str, tuple[dict[str, object], float]],
    text: str = "python",
    seeds: int = 2,
    epochs: float = 0.5,
) -> Result:
    """Baseline 3, tst 2.9, each further variant 0.1 below the one before; every seed is 0.01 above the one before."""
    names = ["baseline", "tst", *variants]
    runs = [
        asdict(run(n, s, 100, 3 - 0.1 * i + 0.01 * s)) | {"latent_tokens": 8000, "epochs": epochs}
        for i, n in enumerate(names)
        for s in range(seeds)
    ]
    config = {
        "superposition": PLAIN | tst,
        "train": {"steps": 100, "batch_size": 4},
        "data": {"sequence_length": 20},
        "compare": {
            "variants": [{"name": n, "superposition": PLAIN | c, "length": x} for n, (c, x) in variants.items()]
        },
    }
    return Result("made-up", {"text": text}, {"config": config, "runs": runs}, [], [], [])


def test_plain_tst_is_found_wherever_it_stands() -> None:
    weights: Changed = {"weighting": "exponential"}
    first, second = (
        made_of({}, {"exp": (weights, 1.0)}, seeds=3),
        made_of(weights, {"uniform": ({}, 1.0), "x1.1": ({}, 1.1)}, seeds=3),
    )
    _, table = over_batches([first, second], {})
    assert "| python | 8.0 | 80 | 100 | 1k | -0.100 (-0.100 to -0.100) | 3 | once at most |" in table
    assert "| python | 8.0 | 80 | 100 | 1k | -0.200 (-0.200 to -0.200) | 3 | once at most |" in table
    rows = over_batches([made_of({}, {}, "English (`a command`)"), first], {})[1].splitlines()[2:]
    assert [row.split(" | ")[0] for row in rows] == ["| python", "| English"]
    table = against_plain([first, second], {})
    assert "| `weighting = exponential` | -0.100 (-0.100 to -0.100) | 3 | better | once at most |" in table
    assert "| `weighting = exponential` | +0.100 (+0.100 to +0.100) | 3 | worse | once at most |" in table
    assert "| better | 11 times |" in against_plain([made_of({}, {"exp": (weights, 1.0)}, seeds=3, epochs=11.1)], {})
    assert len(table.splitlines()) == 4  # plain TST itself is not listed, nor the one of another length
    _, _, row, _, conclusion = recipes([first, second]).splitlines()
    assert conclusion == "Comparisons that show it: `weighting = exponential` in 0 of 1."
    shorter = made_of(weights, {"x1.1": ({}, 1.1)}, seeds=3)
    for x in shorter.summary["runs"]:
        x["val_loss"] -= 0.3 * (x["name"] == "tst")
    assert recipes([first, second, shorter]).splitlines()[-1].endswith(" `weighting = exponential` in 1 of 2 (python).")
    assert row == "| made-up | python | `weighting = exponential` | 1.1 x | +0.200 (+0.200 to +0.200) | 3 | worse |"
    longer = made_of(weights, {"x1.11": ({}, 1.1112)}, seeds=3)
    assert "| `weighting = exponential` | 1.11 x | +0.100 (+0.100 to +0.100) | 3 | worse |" in recipes([longer])
    assert against_plain([replace(shorter, about=shorter.about | {"chose": [0, 1, 2]})], {}) == against_plain([], {})


def test_a_variant_stands_beside_plain_tst_of_its_own_bag_size() -> None:
    """Bags of 8 with weights beside bags of 8, which themselves are a variant of bags of 4."""
    eight: Changed = {"bag_size": 8}
    alone = made_of(eight, {"exp": (eight | {"weighting": "exponential"}, 1.0)}, seeds=3)
    assert [(p.name, p.how) for p in pairs([alone], {})] == [("exp", "bag_size = 8, weighting = exponential")]
    both = made_of({}, {"eight": (eight, 1.0), "exp": (eight | {"weighting": "exponential"}, 1.0)}, seeds=3)
    assert [(p.name, mean(p.values)) for p in pairs([both], {})] == [
        ("eight", pytest.approx(-0.1)),
        ("exp", pytest.approx(-0.1)),  # and 0.2 below bags of 4
    ]


def test_a_pair_is_left_out_only_where_both_of_its_runs_stand_before() -> None:
    r = made_of({}, {"exp": ({"weighting": "exponential"}, 1.0)}, seeds=3)
    assert len(pairs([r], {("made-up", "exp"): "before"})) == 1
    assert len(pairs([r], {("made-up", "exp"): "before", ("made-up", "tst"): "elsewhere"})) == 1
    assert not pairs([r], {("made-up", "exp"): "before", ("made-up", "tst"): "before"})


def test_a_seed_that_chose_a_variant_does_not_judge_it() -> None:
    r = made_of({}, {"exp": ({"weighting": "exponential"}, 1.0)}, seeds=3)
    (lucky,) = [x for x in r.summary["runs"] if (x["name"], x["seed"]) == ("exp", 1)]
    lucky["val_loss"] -= 1
    r.about["chose"] = [1]
    assert [p.values for p in pairs([r], {})] == [[pytest.approx(-0.1)] * 2]
    assert "| two seeds: a lead |" in against_plain([r], {})


def test_equal_data_is_among_the_short_answers() -> None:
    """The baseline that reads as much as tst takes 2 x the steps here, and ends 0.1 below it."""
    r = made_of({}, {}, seeds=3)
    longer = [asdict(run("baseline-x2", s, 200, 2.8 + 0.01 * s)) for s in range(3)]
    r.summary["runs"] += longer
    row = short_answers([r], {}).splitlines()[4]
    assert " | +0.100 (+0.100 to +0.100) | -0.100 (-0.100 to -0.100) | made-up |" in row


def test_the_short_answers_are_those_of_comparisons_of_three_seeds() -> None:
    weights: Changed = {"weighting": "exponential"}
    won = made_of({}, {"exp": (weights, 1.0)}, seeds=3)
    found = [won, made_of({}, {}), made_of({}, {}, "other", 3)]
    _, _, _, _, today, _, by_text, below = short_answers(found, {}).splitlines()
    told = "| 3 | -0.100 (-0.100 to -0.100) | not measured | not measured | -0.100 (-0.100 to -0.100) | made-up |"
    assert today == f"| python | 1k | s = 4, r = 0.3, uniform bags, 100 steps {told}"
    assert "at least 3 seeds: python: 1 below the baseline. They share" in by_text
    assert "by their own intervals: `weighting = exponential` -0.100" in below and "in made-up, better" in below
    assert below.endswith("for the 1 variants of at least 3 seeds: `weighting = exponential` (better).")
    assert short_answers([made_of({}, {})], {}) == ""
    blocks = made_of({}, {}, seeds=3)
    blocks.summary["config"]["data"]["common_bag"] = 4
    (by_text,) = short_answers([blocks], {}).splitlines()
    assert "python: 1 below the baseline (†). They share" in by_text
    by_text = short_answers([won, blocks], {}).splitlines()[6]
    assert "python: 2 below the baseline (1 of them †). They share" in by_text
    old = replace(blocks, about=blocks.about | {"superseded": "made-up"})
    assert short_answers([won, old], {}) == short_answers([won], {})  # the same runs in another order are no second win
    again = {("made-up", "exp"): "another", ("made-up", "tst"): "another"}
    assert short_answers([won], again) == ""  # what was told of it already


def test_a_question_is_answered_by_its_comparison() -> None:
    r = made_of({}, {"output-only": ({"sides": "output"}, 1.0)}, seeds=3)
    lines = short_answers([replace(r, name="sides"), made_of({}, {})], {}).splitlines()
    (answer,) = [line for line in lines if line.startswith("| Do bags win that are only predicted? |")]
    assert answer.endswith("| better | -0.200 (-0.200 to -0.200) | `output-only` less `baseline` in sides |")
    assert not any("that are only read" in line for line in lines)  # that run is not there


def test_of_many_variants_one_is_told_apart_by_chance() -> None:
    """One of four has an interval that excludes 0, as one in twenty would without any difference."""
    changed: dict[str, tuple[Changed, float]] = {f"v{s}": ({"bag_size": s}, 1.0) for s in (5, 6, 7, 8)}
    r = made_of({}, changed, seeds=3)
    off = {"v5": (0.0, 0.1, -0.1), "v6": (-0.10, -0.12, -0.155), "v7": (0.1, 0.0, 0.0), "v8": (0.1, -0.1, 0.1)}
    for x in r.summary["runs"]:
        if x["name"] in off:
            x["val_loss"] = 3 + off[x["name"]][x["seed"]]
        elif x["name"] == "tst":
            x["val_loss"] = 3.0
    (line,) = [x for x in short_answers([r], {}).splitlines() if "own intervals" in x]
    assert "`bag_size = 6`" in line and "`bag_size = 5`" not in line
    assert line.endswith("for the 4 variants of at least 3 seeds: none.")


def test_plain_tst_at_another_rate_is_none() -> None:
    """It differs from the baseline by more than its bags."""
    r = made_of({"weighting": "exponential"}, {"uniform": ({}, 1.0)}, seeds=3)
    assert len(pairs([r], {})) == 1 and len(over_batches([r], {})[1].splitlines()) == 3
    config = r.summary["config"]
    config["train"]["learning_rate"] = 1e-3
    config["compare"]["variants"][0]["learning_rate"] = None
    assert len(pairs([r], {})) == 1
    config["compare"]["variants"][0]["learning_rate"] = 2e-3
    assert pairs([r], {}) == [] and len(over_batches([r], {})[1].splitlines()) == 2


@pytest.mark.parametrize("without", [{"ratio": 0.0}, {"bag_size": 1}, {"bag_size": 1, "ratio": 0.0}])
def test_a_run_without_bags_is_the_ordinary_one_however_it_is_written(without: Changed) -> None:
    r = made_of({}, {"ordinary": (without, 1.0)}, seeds=3)
    r.summary["config"]["train"]["embedding_lr_factor"] = 4.0
    r.summary["config"]["compare"]["variants"][0]["embedding_lr_factor"] = 1.0
    assert ordinary(r) == "ordinary" and pairs([r], {}) == []


def test_results_without_plain_tst_or_of_other_texts_are_left_out() -> None:
    other = made_of({"ratio": 0.5}, {})
    assert len(over_batches([other, made_of({}, {}, "369k tokens of Python source")], {})[1].splitlines()) == 2
    assert len(against_plain([other], {}).splitlines()) == 2 and len(recipes([other]).splitlines()) == 2
