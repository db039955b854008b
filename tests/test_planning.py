"""Planning: what the published tables say, and every remedy against the warning that it is for."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import VOCAB, tst
from tests.test_budget import SIZES
from token_superposition.cli import main
from token_superposition.cli.arguments import parse, split_config
from token_superposition.cli.plan import PlanCommand
from token_superposition.experiment.config import load_preset
from token_superposition.experiment.planning import Plan, plan
from token_superposition.experiment.published import (
    baseline_hours,
    nearest_runs,
    nearest_table,
    outside,
    published_runs,
    tables,
)

DOCUMENT = Path(__file__).parent.parent / "docs/plan.md"
DENSE = ("270m", "600m", "3b")


@pytest.fixture(autouse=True)
def _no_data_here(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Presets read ``data``: a folder of that name would change their vocabulary."""
    monkeypatch.chdir(tmp_path_factory.mktemp("empty"))
    monkeypatch.setenv("COLUMNS", "80")


def test_tables_are_the_papers() -> None:
    """The best cells, as the paper's tables give them; 502 models of which the ones without recovery are left out."""
    best = {(t.model, t.steps, t.weighting): (t.baseline, t.best()) for t in tables()}
    found = {k: (base, c.loss, c.bag_size, c.ratio, c.gain) for k, (base, c) in best.items() if c is not None}
    assert found == {
        ("270M", 20_000, "uniform"): (3.2124, 3.1392, 7, 0.3, 0.0732),
        ("270M", 100_000, "uniform"): (3.0921, 3.0459, 5, 0.3, 0.0462),
        ("600M", 20_000, "uniform"): (3.0186, 2.9434, 8, 0.2, 0.0752),
        ("600M", 20_000, "power_law"): (3.0186, 2.9434, 10, 0.2, 0.0752),
    }
    files = Path(__file__).parent.parent / "src/token_superposition/published/final_loss.csv"
    assert sum(line[:1].isdigit() for line in files.read_text().splitlines()) == 502


def test_what_a_table_says() -> None:
    table = nearest_table(SIZES["600m"][1], 20_000)
    assert table.gain(0.3, 6) == 0.0747 and table.gain(0, 6) == table.gain(0.3, 1) == 0
    assert table.gain(0.25, 6) == pytest.approx((table.gain(0.2, 6) + table.gain(0.3, 6)) / 2)  # pyright: ignore
    assert table.gain(0.05, 6) == pytest.approx(table.gain(0.1, 6) / 2)  # pyright: ignore
    assert table.gain(0.3, 16) is table.gain(0.95, 6) is None
    frugal, within = table.frugal(), table.best(1.2)
    assert (frugal.bag_size, frugal.ratio) == (5, 0.2)
    assert within is not None and (within.bag_size, within.ratio) == (3, 0.1) and within.raw_per_latent == 1.2
    assert table.best(1.0) is None


def test_the_nearest_table_and_runs() -> None:
    sizes = {r.model: r.body_parameters for r in published_runs()}
    assert sizes == {name.upper(): active for name, (_, active, _) in SIZES.items()}
    assert (
        nearest_table(sizes["270M"], 50_000).steps == 100_000 and nearest_table(sizes["270M"], 40_000).steps == 20_000
    )
    assert nearest_table(sizes["600M"], 20_000, "power").weighting == "power_law"
    assert nearest_table(sizes["270M"], 20_000, "power").weighting == "uniform"  # there is no other
    assert {r.model for r in nearest_runs(sizes["3B"] * 2, mixture=False)} == {"3B"}
    assert {r.model for r in nearest_runs(sizes["270M"], mixture=True)} == {"10B-A1B"}
    table = nearest_table(sizes["600M"], 20_000)
    assert outside(table, sizes["600M"], 20_000, 2**21) == outside(table, 200_000_000, 20_000, 2**21) == {}
    far = outside(table, 4 * sizes["600M"], 5_000, 2**20)
    assert far == {"parameters without embedding and head": 4, "steps": 0.25, "latent tokens a step": 0.5}


def test_the_baseline_comes_down_to_a_published_loss_between_two_of_its_lengths() -> None:
    found = {name: plan(load_preset(name)).published.baseline_hours for name in (*DENSE, "10b-a1b")}
    assert found["3b"] == [None, None, None, (443, 622)] and found["600m"] == [None, (61, None)]
    assert found["270m"] == [None, (34, 170), None, (170, None)] and found["10b-a1b"] == [None, (12_311, None)]
    *baselines, ours = nearest_runs(2_812_430_336, mixture=False)
    assert baseline_hours(replace(ours, final_loss=2.677), baselines) == (247, 443)  # level is reached
    assert baseline_hours(replace(ours, final_loss=2.9), baselines) is None


@pytest.mark.parametrize("name", DENSE)
def test_a_papers_run_is_inside_its_own_tables(name: str) -> None:
    result = plan(load_preset(name), mfu=0.2)
    assert (result.published.outside == {}) == (name != "3b") and not result.advice
    assert max(filter(None, result.published.run_gains)) == {"270m": 0.07, "600m": 0.076, "3b": 0.132}[name]
    assert result.published.runs[0].model == name.upper() and None not in result.published.mfu
    assert all("outside the published tables" in w for w in result.warnings)
    assert {r.raw_tokens for r in result.published.runs if r.bag_size == 6 and r.steps == 20_000} == {
        result.run.raw_tokens
    }


def test_the_papers_utilisation_is_of_its_own_model() -> None:
    """A small tokenizer and short sequences, of which it knows nothing, change nothing in it."""
    config = load_preset("600m")
    short = replace(config, data=replace(config.data, sequence_length=512))
    few = plan(short, vocab_size=8_000, mfu=0.4)
    assert few.published.mfu == plan(config).published.mfu
    assert not [w for w in few.warnings if "B200-hours" in w]


def follow(remedy: str, preset: str, **options: Any) -> Plan:
    """The plan with the flags of a warning's or an advice's text."""
    flags = re.search(r"--\S+ [\d.]+\w*(?: --\S+ [\d.]+)*|--superposition.sides \w+", remedy)
    assert flags is not None, remedy
    config, rest = split_config([preset, *flags[0].split()])
    return plan(parse(PlanCommand, "plan", rest, PlanCommand(config)).config, **options)


def test_a_batch_that_does_not_divide() -> None:
    (warning,) = [w for w in plan(load_preset("600m"), gpus=48).warnings if "not a multiple" in w]
    assert warning.startswith("train.batch_size 1024 is not a multiple of 48 GPUs x micro-batch 8; use 32 or 64 GPUs")
    for gpus in (32, 64):
        assert not plan(load_preset("600m"), gpus=gpus).warnings
    assert follow(warning, "600m", gpus=48).warnings == [
        "outside the published tables: latent tokens a step, 1.12 x the largest"
    ]
    (warning,) = plan(load_preset("600m"), gpus=256).warnings
    assert "use 128 GPUs, or --train.micro-batch-size 4, or --train.batch-size 2048" in warning
    assert not follow(warning, "600m", gpus=256).warnings


def test_more_gpus_than_sequences() -> None:
    config = load_preset("600m")
    result = plan(replace(config, train=replace(config.train, batch_size=16, micro_batch_size=None)), gpus=64)
    assert result.micro_batch == 1
    assert any("not a multiple of 64 GPUs x micro-batch 1; use 16 GPUs" in w for w in result.warnings)


def test_checkpoints_are_counted_without_going_through_them() -> None:
    """Of ten, every second step and the kept ones, 1 and 3; a run of any length is answered at once."""
    config = load_preset("600m")
    train = replace(config.train, steps=10, warmup_steps=1, save_every=2, keep=0, save_at=(1, 3))
    config = replace(config, train=train, superposition=replace(config.superposition, ratio=0.2))
    assert plan(config).checkpoints == len({1, 3, 2, 4, 6, 8, 10})
    long = replace(config, train=replace(train, steps=10**20, save_every=1))
    assert plan(long).checkpoints == 10**20
    for kept in ((), (14,)):  # one is written at the end in any case; the switch is after step 3
        at_the_end = replace(config, train=replace(train, steps=14, save_every=5, save_at=kept))
        assert at_the_end.kept_steps == (*kept, 3) and plan(at_the_end).checkpoints == len({3, 5, 10, 14})


def test_memory_with_activation_checkpointing_is_what_is_needed() -> None:
    config = load_preset("3b")
    config = replace(config, train=replace(config.train, micro_batch_size=8))
    (warning,) = [w for w in plan(config, gpus=2, gpu_type="A100").warnings if "needed" in w]
    assert "activation checkpointing" in warning
    config = replace(config, train=replace(config.train, activation_checkpointing=True))
    assert not [w for w in plan(config, gpus=2, gpu_type="A100").warnings if "needed" in w]


def test_too_little_memory() -> None:
    (warning,) = [w for w in plan(load_preset("3b"), gpus=1).warnings if "needed" in w]
    assert warning.startswith(
        "82 GB are needed on each GPU, 72 GB can be used (90% of the H100's); use --train.micro-batch-size 1"
    )
    assert "activation checkpointing" in warning and "H200 GPUs" in warning
    assert not [w for w in follow(warning, "3b", gpus=1).warnings if "needed" in w]
    fewest = re.search(r"or (\d+) GPUs", warning)
    assert fewest is not None
    enough = plan(load_preset("3b"), gpus=int(fewest[1]))
    assert not [w for w in enough.warnings if "needed" in w] and enough.memory.total <= enough.memory_limit
    (hopeless,) = [w for w in plan(load_preset("10b-a1b"), gpus=1, gpu_type="A100").warnings if "needed" in w]
    assert "micro-batch-size" not in hopeless and "checkpointing" not in hopeless and "GPUs" in hopeless
    assert plan(load_preset("10b-a1b"), gpus=1).memory.total > 16 * 10.09e9


def test_data_that_repeats_and_what_then() -> None:
    available = 52_000_000_000
    result = plan(load_preset("600m"), tokens_available=available)
    (warning,) = result.warnings
    assert warning.startswith(
        "data repeats: the run reads 104,857,600,000 raw tokens, 2.02 x the 52,000,000,000 available"
    )
    smaller, output, shorter = result.advice
    assert (
        "gain 0.0489" in smaller
        and "--superposition.sides output" in output
        and "at equal data the baseline" in shorter
    )
    for advice in result.advice:
        followed = follow(advice, "600m", tokens_available=available)
        assert followed.run.raw_tokens <= available and not followed.advice, advice
    assert follow(smaller, "600m").published.gain == 0.0489
    for few in range(50_291_608_580, 52_000_000_000, 170_839_142):  # also where the switch is rounded up
        *_, shorter = plan(load_preset("600m"), tokens_available=few).advice
        assert follow(shorter, "600m", tokens_available=few).run.raw_tokens <= few, few
    base = load_preset("600m")
    shifted = replace(base, superposition=replace(base.superposition, shift=True, place_signal=0.5))
    (*_, output, _) = plan(shifted, tokens_available=available).advice
    assert "--superposition.sides output, without place_signal, shift, reads" in output
    least = plan(load_preset("600m"), tokens_available=30_000_000_000)
    assert [a[:9] for a in least.advice] == ["read once"] and least.published.within_data is None
    step = least.latent_tokens_per_step
    assert plan(load_preset("600m"), tokens_available=step - 1).advice == [
        f"the data is not enough for one step, of {step:,} tokens or more; prepare more text"
    ]
    (only,) = plan(load_preset("600m"), tokens_available=2 * step).advice
    assert only.startswith("read once, the data is enough for no step of this run, or for 2 steps of the baseline")
    enough = plan(load_preset("600m"), tokens_available=104_857_600_000)
    assert enough.warnings == enough.advice == []


def test_what_the_tables_do_not_say() -> None:
    config = load_preset("600m")
    output = plan(replace(config, superposition=replace(config.superposition, sides="output")))
    assert output.published.gain is None and "bags of one size, on both sides" in output.warnings[-1]
    beyond = plan(replace(config, superposition=replace(config.superposition, bag_size=16)))
    assert beyond.published.gain is None and "no s = 16 with r = 0.3" in beyond.warnings[-1]
    worse = plan(replace(config, superposition=replace(config.superposition, ratio=0.9)))
    assert worse.published.gain == -0.036 and "above the baseline" in worse.warnings[-1]
    moe = plan(load_preset("10b-a1b"))
    assert sum("outside the published tables" in w for w in moe.warnings) == 3
    assert any("4.3 x what the paper's B200-hours" in w for w in moe.warnings)


@pytest.mark.parametrize("example", re.findall(r"```console\n\$ tst (.*)\n([^`]*)```", DOCUMENT.read_text()))
def test_the_documents_examples_are_what_is_printed(
    example: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    command, expected = example
    assert main(command.split()) == 0
    printed = "\n".join(line.rstrip() for line in capsys.readouterr().out.splitlines())
    assert printed.strip() == expected.strip()


def test_the_command_is_the_function() -> None:
    content = json.loads(tst("plan", "600m", "--gpus", "64", "--tokens-available", "50e9", "--json").stdout)
    expected = plan(load_preset("600m"), gpus=64, tokens_available=50_000_000_000)
    assert content == json.loads(json.dumps(asdict(expected)))


def test_prepared_data_decide_vocabulary_and_tokens(prepared: Path) -> None:
    demo = load_preset("demo")
    result = plan(replace(demo, data=replace(demo.data, path=str(prepared))))
    meta = json.loads((prepared / "meta.json").read_text())
    assert (result.vocab_size, result.tokens_available) == (VOCAB, meta["train"]["tokens"])
    assert result.shape.embedding_parameters == 2 * VOCAB * 96 and "data repeats" in result.warnings[0]


def test_what_is_given_outranks_the_prepared_data(prepared: Path) -> None:
    demo = load_preset("demo")
    demo = replace(demo, data=replace(demo.data, path=str(prepared)))
    given = plan(demo, tokens_available=10**12, vocab_size=1000)
    assert (given.tokens_available, given.vocab_size, given.vocab_source) == (10**12, 1000, "given")
    assert given.shape.embedding_parameters == 2 * 1000 * 96 and not given.advice


def test_the_command_takes_its_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "600m", "--gpu-type", "B200", "--mfu", "0.2", "--vocab-size", "65536", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["gpu_type"], found["mfu"], found["vocab_size"]) == ("B200", 0.2, 65_536)
    assert found["memory_limit"] == 162_000_000_000  # of 180 GB


def test_the_largest_micro_batch_that_fits_is_told() -> None:
    config = load_preset("3b")
    config = replace(config, train=replace(config.train, micro_batch_size=8))
    (warning,) = [w for w in plan(config, gpus=2, gpu_type="H100").warnings if "needed" in w]
    assert re.findall(r"--train.micro-batch-size (\d+)", warning) == ["4"]


def test_gpus_are_counted_with_activation_checkpointing_where_it_is_on() -> None:
    config = load_preset("3b")
    config = replace(config, train=replace(config.train, activation_checkpointing=True, micro_batch_size=32))
    (warning,) = [w for w in plan(config, gpus=1).warnings if "needed" in w]
    fewest = int(warning.split(" GPUs")[0].split()[-1])
    enough = plan(config, gpus=fewest)
    assert not [w for w in enough.warnings if "needed" in w]
    assert enough.memory.total > enough.memory_limit  # without it


def test_bags_on_one_side_and_annealed_bags_are_told_by_their_largest_size() -> None:
    config = load_preset("600m")
    bags = config.superposition
    output = plan(replace(config, superposition=replace(bags, sides="output"))).published
    assert output is not None and output.bag_size == bags.bag_size
    annealed = plan(replace(config, superposition=replace(bags, bag_size=8, anneal=(8, 4, 2, 1))))
    assert annealed.published is not None and annealed.published.gain is None
    assert "bags of one size, on both sides" in annealed.warnings[-1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["7b"], "7b does not exist; give a TOML file, or one of the presets 10b-a1b, 270m"),
        (["600m", "--gpus", "0"], "gpus is 0; give a whole number of at least 1"),
        (["600m", "--mfu", "40"], "mfu is 40.0; give the share of the GPU's peak"),
        (["600m", "--tokens-available", "0"], "tokens-available is 0.0; give a number of tokens"),
        (["600m", "--tokens-available", "inf"], "tokens-available is inf; give a number of tokens"),
        (["600m", "--vocab-size", "0"], "vocab-size is 0"),
        (["600m", "--train.steps", "2000"], "do not fit in 2000 steps"),
        (["600m", "--model.architecture", "lama"], "model.architecture is 'lama'; did you mean llama?"),
        (["--model.architecture", "blt"], "the sizes of the model blt cannot be read ('BltConfig' object has no"),
    ],
)
def test_a_wrong_plan_has_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("tst: error: ") and error.count("\n") == 1
