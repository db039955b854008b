"""What is kept of a comparison, the page that is made of it, and the texts that are made for it."""

from __future__ import annotations

import csv
import json
import re
import shutil
import tomllib
import xml.etree.ElementTree as ElementTree
from collections import Counter
from itertools import pairwise
from pathlib import Path
from statistics import mean

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

import results
from results.collect import collect
from results.copying import losses as copying_losses
from results.copying import main as copying
from results.copying import repeated_pairs
from results.corpora import Language, invented, random_strings, with_strings, write
from results.figures import ahead
from results.findings import cut_short, memorised
from results.findings import write as write_findings
from results.kept import Result, first_shown, load
from results.memorisation import losses
from results.memorisation import main as memorisation
from results.short_answers import memory
from tests.sweep.settings import swept
from tests.sweep.test_report import made_up
from token_superposition.data.plan import ValidationSet
from token_superposition.data.store import TokenStore
from token_superposition.experiment.config import load_config
from token_superposition.experiment.generate import load_model

REPOSITORY = Path(results.__file__).parent.parent


@pytest.fixture(scope="module")
def kept(two_seeds: tuple[Path, Path, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("results")
    larger = shutil.copytree(two_seeds[1], root.parent / f"{root.name}-larger")  # of more seeds, and interrupted
    (larger / "config.toml").write_text((larger / "config.toml").read_text().replace("    4,\n", "    4,\n    5,\n"))
    assert load_config(larger / "config.toml").compare.seeds == (3, 4, 5)
    for directory in (two_seeds[1], larger):  # the second takes the place of the first
        collect(directory, "tiny", "Does it win?", "a few sentences", root)
    memorisation(two_seeds[1], root / "tiny")
    copying(two_seeds[1], Path(load_config(two_seeds[0]).data.path), root / "tiny")
    return root


def test_a_comparison_is_kept_whole(kept: Path, two_seeds: tuple[Path, Path, str]) -> None:
    path, out, _ = two_seeds
    names = {p.name for p in kept.iterdir()}
    assert names == {"tiny"}
    assert load_config(kept / "tiny" / "config.toml") == load_config(path)
    original = json.loads((out / "summary.json").read_text())
    original.pop("samples")
    assert json.loads((kept / "tiny" / "summary.json").read_text()) == original
    with (kept / "tiny" / "curves.csv").open() as f:
        rows = list(csv.DictReader(f))
    lines = sum(len(p.read_text().splitlines()) for p in out.glob("runs/*/metrics.jsonl"))
    assert len(rows) == lines and {r["seed"] for r in rows} == {"3", "4"}


def test_what_is_to_be_mistrusted_outlives_a_second_collection(
    kept: Path, two_seeds: tuple[Path, Path, str], tmp_path: Path
) -> None:
    root = tmp_path / "results"
    shutil.copytree(kept, root)
    path = root / "tiny/about.toml"
    path.write_text(path.read_text() + 'chose = [3]\nnote = "Seed 3 chose it."\n')
    collect(two_seeds[1], "tiny", "Another question?", "a few sentences", root)
    about = tomllib.loads(path.read_text())
    assert (about["question"], about["chose"], about["note"]) == ("Another question?", [3], "Seed 3 chose it.")
    assert not (root / "tiny/copying.csv").exists()  # of the runs before
    write_findings(root, tmp_path)
    rows = [
        row for row in (tmp_path / "findings.md").read_text().splitlines() if "seed 3 had a part in choosing" in row
    ]
    assert rows and all(row.startswith("| tst |") for row in rows)


def test_the_page_says_what_was_measured(kept: Path, tmp_path: Path) -> None:
    write_findings(kept, tmp_path)
    page = (tmp_path / "findings.md").read_text()
    summary = json.loads((kept / "tiny" / "summary.json").read_text())
    tst = summary["comparison"]["variants"]["tst"]
    low, high = tst["delta_val_loss_interval"]
    assert f"| tst | {tst['delta_val_loss']:+.3f} ({low:+.3f} to {high:+.3f}) |" in page
    baselines = mean(r["val_loss"] for r in summary["runs"] if r["name"] == "baseline")
    assert f"Baseline {baselines:.4f}" in page
    assert "Does it win?" in page and "seeds 3, 4" in page and summary["runs"][0]["hardware"] in page
    assert "tst compare results/tiny/config.toml --out tiny" in page
    for name in ("findings_forest.svg", "findings_switch.svg", "findings_ahead.svg"):
        assert name in page and ElementTree.fromstring((tmp_path / name).read_text()).tag.endswith("svg")


def test_where_tst_passes_the_baseline() -> None:
    """Of 100 steps, superposed for 30, decaying from 90 on; after 60 steps the seeds do not agree yet."""
    differences = {
        20: (1.0, 1.1, 1.0),
        40: (0.2, 0.4, 0.3),
        60: (-0.3, 0.1, 0.0),
        80: (-0.3, -0.31, -0.3),
        90: (-0.4, -0.41, -0.4),
        100: (0.5, 0.6, 0.5),
    }
    curves = [
        {"name": name, "seed": str(seed), "step": str(step), "val_loss": str(3 + (name == "tst") * by_seed[seed])}
        for step, by_seed in differences.items()
        for seed in (0, 1, 2)
        for name in ("baseline", "tst", "baseline-x2")
    ]
    settings = {"data": {}, "train": {"steps": 100, "decay_ratio": 0.1}, "superposition": {"ratio": 0.3}}
    _, table = ahead([Result("made-up", {}, {"config": settings}, curves, [], [])])
    assert "| made-up | 30 | 40 | 80 |" in table
    alone = [x for x in curves if x["seed"] == "0"]
    _, table = ahead([Result("alone", {}, {"config": settings}, alone, [], [])])
    assert "| alone | 30 | 40 | one seed |" in table
    _, table = ahead([Result("pair", {}, {"config": settings}, [x for x in curves if x["seed"] != "2"], [], [])])
    assert "| pair | 30 | 40 | two seeds |" in table  # by chance they may agree


def test_of_a_comparison_cut_short_nothing_is_shown_beside_a_run_that_decays_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "about.toml").write_text('question = "?"\ntext = "t"\ncommand = "c"\nnote = "n"\n')
    (tmp_path / "config.toml").write_text("[train]\nsteps = 100\ndecay_ratio = 0.1\n")
    lines = ["name,seed,step,loss,val_loss"]
    lines += [f"{name},0,{step},,{loss}" for name, loss in (("baseline-x2", 3), ("tst", 2)) for step in (50, 90, 100)]
    (tmp_path / "curves.csv").write_text("\n".join(lines))
    page = cut_short(tmp_path)
    assert "| 90 | 3.0000 | 2.0000 |" in page and "| 100 |" not in page


def test_runs_that_stand_in_two_comparisons_are_shown_once(kept: Path, tmp_path: Path) -> None:
    root = tmp_path / "results"
    shutil.copytree(kept, root)
    shutil.copytree(kept / "tiny", root / "tiny-again")
    found = load(root)
    assert first_shown(found) == {("tiny-again", name): "tiny" for name in found[0].variants}
    write_findings(root, tmp_path)
    assert "the runs of tiny |" in (tmp_path / "findings.md").read_text()
    assert "tiny-again" not in (tmp_path / "findings_forest.svg").read_text()


def test_a_variant_of_another_length_is_judged_by_a_baseline_of_as_many_flops(kept: Path, tmp_path: Path) -> None:
    """The baseline of 1.5 x the steps, taken for a variant: it is level with itself, not ahead of the one of 1 x."""
    root = tmp_path / "results"
    shutil.copytree(kept, root)
    path = root / "tiny" / "summary.json"
    summary = json.loads(path.read_text())
    longer = [x for x in summary["runs"] if x["name"] == "baseline-x1.5"]
    summary["runs"] += [x | {"name": "longer", "directory": x["directory"] + "-again"} for x in longer]
    path.write_text(json.dumps(summary))
    write_findings(root, tmp_path)
    page = (tmp_path / "findings.md").read_text()
    assert "| longer (a baseline of 1.5 x the steps) | +0.000 (+0.000 to +0.000) |" in page


def test_the_intervals_of_the_readme_are_those_of_the_findings() -> None:
    findings = (REPOSITORY / "docs" / "findings.md").read_text()
    found = re.findall(r"[+-]\d\.\d{3} \([^)]*\)", (REPOSITORY / "README.md").read_text())
    assert len(found) > 5 and not [x for x in found if x not in findings]


def test_the_intervals_of_the_pages_are_those_of_the_findings_or_the_log() -> None:
    """Of a page that turns a difference round, the ends change places and signs."""

    def intervals(page: Path) -> set[tuple[str, ...]]:
        words = " ".join(page.read_text().split())
        return {tuple(sorted(ends)) for ends in re.findall(r"[+-]?(\d\.\d{3}) to [+-]?(\d\.\d{3})", words)}

    docs = REPOSITORY / "docs"
    known = intervals(docs / "findings.md") | intervals(REPOSITORY / "LOG.md")
    found = {page.name: intervals(page) for page in docs.rglob("*.md") if page.name != "findings.md"}
    assert len(found["faq.md"]) > 5
    assert not {name: ends - known for name, ends in found.items() if ends - known}


def test_a_sweep_is_on_the_page_with_its_pictures(kept: Path, tmp_path: Path) -> None:
    config = swept((0, 1, 2, 3), bag_sizes=(2, 4), ratios=(0.1, 0.3))
    made_up(tmp_path / "sweep", config, lambda cell, seed: 3.0 + 0.01 * seed - 0.1 * cell.ratio * cell.bag_size)
    root = tmp_path / "results"
    shutil.copytree(kept, root)
    collect(tmp_path / "sweep", "bags", "Which bags?", "none", root)
    assert {p.name for p in (root / "bags").iterdir()} == {"config.toml", "sweep.json", "sweep.csv", "about.toml"}
    write_findings(root, tmp_path)
    page = (tmp_path / "findings.md").read_text()
    assert "### bags: Which bags?" in page and ": Does it win?" in page
    assert "- best setting: s = 4, r = 0.3" in page and "| best | 4 | 0.3 |" in page
    assert "`tst sweep results/bags/config.toml --out bags`" in page
    for number in (1, 2, 3):
        name = f"findings_bags_{number}.svg"
        assert f"({name})" in page and ElementTree.fromstring((tmp_path / name).read_text()).tag.endswith("svg")


def test_the_page_of_the_project_is_that_of_its_results(tmp_path: Path) -> None:
    write_findings(REPOSITORY / "results", tmp_path)
    assert (tmp_path / "findings.md").read_text() == (REPOSITORY / "docs" / "findings.md").read_text()


def test_a_loss_on_a_string_is_that_of_what_follows_its_beginning(two_seeds: tuple[Path, Path, str]) -> None:
    directory = two_seeds[1] / "runs" / "tst-seed3" / "model"
    model, tokenizer = load_model(directory)
    known, rest = (tokenizer(x, add_special_tokens=False)["input_ids"] for x in ("01234567", "89abcdef0123"))
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([known + rest])).logits[0]
    expected = F.cross_entropy(logits[len(known) - 1 : -1], torch.tensor(rest))
    assert losses(directory, {"0123456789abcdef0123": 4}) == {4: pytest.approx(float(expected), rel=1e-5)}


def test_what_is_memorised_is_told_on_the_page() -> None:
    """Two runs of two seeds; the baseline knows strings of 4 repetitions by 1 nat, tst by 0.8 on average."""
    by_run = {"baseline": ((5.0, 4.0), (5.2, 4.2)), "tst": ((5.1, 4.2), (5.3, 4.6))}
    strings = [
        {"name": name, "seed": str(seed), "repetitions": str(n), "loss": str(loss)}
        for name, by_seed in by_run.items()
        for seed, pair in enumerate(by_seed)
        for n, loss in zip((0, 4), pair, strict=True)
    ]
    runs = [{"seed": 0}, {"seed": 1}]
    result = Result("made-up", {}, {"runs": runs, "config": {"data": {}}}, [], strings, [])
    table = memorised(result)
    assert "| baseline | -1.00 |" in table and "| tst | -0.80 |" in table
    assert "| tst | +0.100 (+0.100 to +0.100) | +0.300 (-0.971 to +1.571) |" in table
    (line,) = memory([result])
    assert line.endswith("in made-up: +0.100 (+0.100 to +0.100) with 0, +0.300 (-0.971 to +1.571) with 4.")


@given(st.lists(st.lists(st.integers(0, 3), min_size=9, max_size=9), min_size=1, max_size=4))
def test_a_pair_is_repeated_if_it_is_in_the_window_already(rows: list[list[int]]) -> None:
    raw = torch.tensor(rows)
    expected = [[(row[i], row[i + 1]) in {*pairwise(row[: i + 1])} for i in range(8)] for row in rows]
    assert repeated_pairs(raw[:, :-1], raw[:, 1:]).tolist() == expected


def test_the_two_kinds_of_tokens_make_up_the_loss_of_the_run(kept: Path, two_seeds: tuple[Path, Path, str]) -> None:
    path, out, _ = two_seeds
    config = load_config(path).data
    data = ValidationSet(TokenStore(Path(config.path), "validation"), config.sequence_length, config.final_eval_tokens)
    (n_new, new), (n_repeated, repeated) = copying_losses(out / "runs" / "tst-seed3" / "model", data).values()
    assert n_new > 0 < n_repeated and n_new + n_repeated == len(data) * config.sequence_length
    runs = json.loads((out / "summary.json").read_text())["runs"]
    (loss,) = [r["val_loss"] for r in runs if r["directory"] == "tst-seed3"]
    assert (n_new * new + n_repeated * repeated) / (n_new + n_repeated) == pytest.approx(loss, rel=1e-5)


def test_the_page_says_where_the_difference_is(kept: Path, tmp_path: Path) -> None:
    write_findings(kept, tmp_path)
    page = (tmp_path / "findings.md").read_text()
    with (kept / "tiny" / "copying.csv").open() as f:
        by = {(x["name"], x["seed"], x["kind"]): float(x["loss"]) for x in csv.DictReader(f)}
    differences = [by["tst", seed, "repeated"] - by["baseline", seed, "repeated"] for seed in "34"]
    section = page.partition("## Where the difference is")[2].partition("\n## ")[0]
    (row,) = [line.split(" | ") for line in section.splitlines() if " | tst | " in line]
    assert row[0] == "| tiny" and row[-1].startswith(f"{mean(differences):+.3f} (")


def test_strings_are_in_the_text_as_often_as_they_should_be() -> None:
    found = random_strings()
    assert Counter(found.values()) == dict.fromkeys((0, 1, 4, 16, 64, 256), 32)
    documents = with_strings([f"document {i}\n" for i in range(50)], found)
    text = "".join(documents)
    assert all(text.count(f"{string}\n") == times for string, times in found.items())
    assert [d.splitlines()[0] for d in documents] == [f"document {i}" for i in range(50)]


def test_an_invented_text_is_the_same_each_time_and_written_whole(tmp_path: Path) -> None:
    documents = list(invented(seed=3, documents=1203))
    assert documents == list(invented(seed=3, documents=1203)) != list(invented(seed=4, documents=1203))
    language = Language(3)
    assert len({*language.nouns, *language.verbs, *language.adjectives}) == 7000
    write(documents, tmp_path / "text")
    files = sorted((tmp_path / "text").iterdir())
    assert [p.name for p in files] == ["0000.jsonl", "0001.jsonl"] and len(list(tmp_path.iterdir())) == 1
    assert [json.loads(line)["text"] for p in files for line in p.read_text().splitlines()] == documents
    shutil.rmtree(tmp_path / "text")
