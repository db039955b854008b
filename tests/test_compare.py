"""Comparisons of real runs: what is found done, what is refused, what they cost, and where each one runs."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from scipy import stats
from torch.nn.modules.module import register_module_forward_hook
from torch.optim.optimizer import register_optimizer_step_post_hook

from tests.conftest import VOCAB, tiny
from tests.test_accountings import run
from token_superposition import TokenSuperpositionError
from token_superposition.cli import main
from token_superposition.data.store import Meta
from token_superposition.data.tokenizer import load_tokenizer
from token_superposition.experiment import jobs as jobs_module
from token_superposition.experiment.compare import checked_jobs, jobs_of, prompt_of, samples
from token_superposition.experiment.config import CompareConfig, Config, Variant, load_config
from token_superposition.experiment.dry_run import START_SECONDS, cost_of_job, dry_run, makespan
from token_superposition.experiment.jobs import run_jobs, share, slots, unfinished
from token_superposition.experiment.speed import time_steps
from token_superposition.report.contents import duration
from token_superposition.report.dry_run import print_dry_run


def test_the_dry_run_counts_what_is_then_run(two_seeds: tuple[Path, Path, str]) -> None:
    path, out, printed = two_seeds
    config = load_config(path)
    results = {p.parent.name: json.loads(p.read_text()) for p in out.glob("runs/*/run.json")}
    jobs = jobs_of(config)
    assert {j.directory for j in jobs} == results.keys() and all(name in printed for name in results)
    costs = [cost_of_job(j, j.config.train.steps - (j.branch_step if j.trunk else 0), 2.0) for j in jobs]
    for cost in costs:
        if cost.trunk is None:
            result = results[cost.directory]
            counted = (cost.total_steps, cost.latent_tokens, cost.raw_tokens)
            assert counted == (result["steps"], result["latent_tokens"], result["raw_tokens"])
            assert cost.flops == 2.0 * result["latent_tokens"]
        else:  # its decay: 1 of 12 steps
            assert (cost.steps, cost.latent_tokens, cost.raw_tokens) == (1, 64, 64)
    assert sum(c.steps for c in costs) == 2 * (18 + 12 + 1) and "62" in printed and "1 of 12" in printed
    assert "Nothing was written" in printed and "s a step on this machine" in printed


def test_more_seeds_and_variants_find_the_others_done(two_seeds: tuple[Path, Path, str]) -> None:
    path, out, _ = two_seeds
    config = load_config(path)
    half = Variant("half", replace(config.superposition, ratio=0.25))
    more = replace(config.compare, seeds=(5, 4, 3), variants=(half,))
    left = unfinished(checked_jobs(replace(config, compare=more), out), out)
    old = {"half-seed3", "half-seed4"}
    assert {j.directory for j in left} - {j.directory for j in left if j.directory.endswith("-seed5")} == old
    assert len(left) == len(old) + len(jobs_of(config)) // 2 + 1
    lengths = replace(config, compare=replace(config.compare, baseline_lengths=(1.0, 1.25, 1.5, 2.0)))
    left = unfinished(checked_jobs(lengths, out), out)  # the longest of before is now one that branches off
    assert {j.directory for j in left} == {f"baseline-x{x}-seed{s}" for x in ("1.25", "2") for s in (3, 4)}
    longer = replace(config, train=replace(config.train, steps=24))
    with pytest.raises(
        TokenSuperpositionError, match=r"another configuration \(train.steps 18 -> 36\); choose another"
    ):
        checked_jobs(longer, out)
    smaller = replace(config, train=replace(config.train, micro_batch_size=2, timeout_minutes=5.0))
    assert not unfinished(checked_jobs(smaller, out), out)  # neither changes what is learnt


def test_a_file_of_the_users_own_is_not_overwritten(
    two_seeds: tuple[Path, Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also beside runs of its own; what a comparison, or a run of it, has written may be given again."""
    path, finished, _ = two_seeds
    own = tmp_path / "config.toml"
    shutil.copy(path, own)
    (tmp_path / "runs/s8").mkdir(parents=True)
    for typed in (["compare"], ["sweep", "--sweep.bag-sizes", "2", "4"]):
        assert main([typed[0], str(own), *typed[1:], "--out", str(tmp_path)]) == 2
        assert "config.toml would be overwritten, and no comparison" in capsys.readouterr().err
    (tmp_path / "runs/s8").rmdir()
    (tmp_path / "runs").rmdir()
    assert main(["train", str(own), "--out", str(tmp_path)]) == 2
    assert "config.toml would be overwritten, and no run" in capsys.readouterr().err
    assert own.read_bytes() == path.read_bytes() and list(tmp_path.iterdir()) == [own]
    out = shutil.copytree(finished, tmp_path / "copy")
    assert checked_jobs(load_config(out / "config.toml"), out)
    assert checked_jobs(replace(load_config(path), compare=CompareConfig(seeds=(3,))), out)
    run_there = out / "runs/tst-seed3"
    (run_there / "run.json").unlink()
    assert main(["train", str(run_there / "config.toml"), "--out", str(run_there), "--train.keep", "5"]) == 0


def test_runs_on_another_text_are_not_compared(two_seeds: tuple[Path, Path, str], tmp_path: Path) -> None:
    path, finished, _ = two_seeds
    out = shutil.copytree(finished, tmp_path / "copy")
    result = out / "runs/tst-seed3/run.json"
    content = json.loads(result.read_text())
    checked_jobs(load_config(path), out)
    result.write_text(json.dumps(content | {"data_sha256": "0" * 64}))
    with pytest.raises(TokenSuperpositionError, match="tst-seed3 read another text than"):
        checked_jobs(load_config(path), out)


def test_runs_of_another_precision_are_not_gone_on_with(
    two_seeds: tuple[Path, Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """auto is bfloat16 on one machine and float32 on another."""
    path, finished, _ = two_seeds
    out = shutil.copytree(finished, tmp_path / "copy")
    config = load_config(path)
    jobs = jobs_of(replace(config, train=replace(config.train, precision="auto")))
    monkeypatch.setattr("token_superposition.experiment.launch.native_bfloat16", lambda: True)
    run_jobs(jobs, out, 1, Console())  # nothing is left to train
    (out / "runs/tst-seed3/run.json").unlink()
    before = {p: p.read_bytes() for p in out.rglob("*.json*")}
    with pytest.raises(
        TokenSuperpositionError, match=r"was trained in float32, and train.precision 'auto' is bfloat16"
    ):
        run_jobs(jobs, out, 1, Console())
    assert {p: p.read_bytes() for p in out.rglob("*.json*")} == before


@pytest.mark.parametrize(
    ("mask", "expected"), [(None, "01"), ("2,5", "25"), ("2,5,-1", "25"), ("GPU-a,GPU-b", ["GPU-a", "GPU-b"])]
)
def test_each_run_has_one_of_the_gpus_that_are_ours(
    mask: str | None, expected: Sequence[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs_module, "gpus", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if mask is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", mask)
    given = [share(slot, 4)["CUDA_VISIBLE_DEVICES"] for slot in range(4)]
    assert given == [*expected, *expected]


def test_a_run_without_a_gpu_has_its_share_of_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """And huge pages, unless something else is asked of glibc."""
    monkeypatch.setattr(jobs_module, "gpus", lambda: 0)
    monkeypatch.setattr(jobs_module, "cores", lambda: 7)
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    assert [share(0, n)["OMP_NUM_THREADS"] for n in (1, 3, 7, 8)] == ["7", "2", "1", "1"]
    assert share(1, 2) == {"OMP_NUM_THREADS": "3", "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.arena_max=1")
    assert share(1, 2) == {"OMP_NUM_THREADS": "3"}


def test_as_many_runs_go_at_a_time_as_can_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless a number is given, a branch that waits for its trunk takes no core."""
    monkeypatch.setattr("token_superposition.experiment.speed.gpus", lambda: 0)
    monkeypatch.setattr("token_superposition.experiment.speed.cores", lambda: 64)
    jobs = jobs_of(replace(Config(), compare=CompareConfig(baseline_lengths=(1.0, 2.0), seeds=(0, 1))))
    assert [slots(n, jobs, tmp_path) for n in (0, 3, 16)] == [4, 3, 6]


def test_every_branch_has_a_gpu_of_its_own_where_there_are_as_many(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trunk and tst at first, then three branches beside tst; also where the trunk alone is left before them."""
    config = replace(Config(), compare=CompareConfig(baseline_lengths=(0.5, 1.0, 1.5, 2.0)))
    jobs = jobs_of(replace(config, train=replace(config.train, steps=100, warmup_steps=5)))
    left = [j for j in jobs if j.name != "tst"]
    for count, expected in ((8, [4, 3]), (2, [2, 2])):
        monkeypatch.setattr(jobs_module, "gpus", lambda count=count: count)
        monkeypatch.setattr("token_superposition.experiment.speed.gpus", lambda count=count: count)
        assert [slots(0, some, tmp_path) for some in (jobs, left)] == expected
    (tmp_path / "runs/baseline-x2").mkdir(parents=True)
    (tmp_path / "runs/baseline-x2/run.json").touch()
    assert slots(0, unfinished(jobs, tmp_path), tmp_path) == 2
    monkeypatch.setattr(jobs_module, "gpus", lambda: 8)
    monkeypatch.setattr("token_superposition.experiment.speed.gpus", lambda: 8)
    assert slots(0, unfinished(jobs, tmp_path), tmp_path) == 4


def test_a_baseline_that_decays_from_its_start_branches_off_nothing() -> None:
    config = replace(Config(), compare=CompareConfig(baseline_lengths=(1.0, 2.0)))
    config = replace(config, train=replace(config.train, steps=100, warmup_steps=0, decay_ratio=1.0))
    jobs = jobs_of(config)
    assert [j.config.train.save_at for j in jobs] == [()] * 3 and jobs[-1].branch_step == 0
    for job in jobs:
        job.config.check()


def test_a_comparison_of_two_seeds_has_its_intervals(two_seeds: tuple[Path, Path, str]) -> None:
    _, out, _ = two_seeds
    loss = {p.parent.name: json.loads(p.read_text())["val_loss"] for p in out.glob("runs/*/run.json")}
    deltas = [loss[f"tst-seed{s}"] - loss[f"baseline-seed{s}"] for s in (3, 4)]
    result = json.loads((out / "summary.json").read_text())["comparison"]
    expected = stats.ttest_1samp(deltas, 0).confidence_interval(0.95)
    assert result["delta_val_loss_per_seed"] == deltas
    assert result["delta_val_loss_interval"] == pytest.approx([expected.low, expected.high])
    assert [s["seed"] for s in result["speedup_per_seed"]] == [3, 4]
    assert "2 paired seeds" in (out / "report.html").read_text()


def test_the_dry_run_leaves_out_what_is_done(two_seeds: tuple[Path, Path, str], tmp_path: Path) -> None:
    path, finished, _ = two_seeds
    out = shutil.copytree(finished, tmp_path / "copy")
    config = load_config(path)
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    dry = dry_run(config, out)
    assert dry.seconds == dry.step_seconds == 0 and all(j.steps == 0 and j.flops == 0 for j in dry.jobs)
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*")} == before
    with pytest.raises(TokenSuperpositionError, match="is a run of another configuration"):
        dry_run(replace(config, train=replace(config.train, learning_rate=1.0)), out)
    # A branch that has to be trained again after its trunk's checkpoints are gone is trained from the start.
    (out / "runs/baseline-seed3/run.json").unlink()
    again = dry_run(config, out)
    assert {j.directory: j.steps for j in again.jobs if j.steps} == {"baseline-seed3": 12} and again.seconds > 0
    many = dry_run(replace(config, compare=replace(config.compare, parallel=16)), out)
    assert many.parallel == 1  # no more than there are runs to train


def test_a_dry_run_of_what_has_no_room(write_config: Callable[..., Path], tmp_path: Path) -> None:
    huge = load_config(write_config())
    options = huge.model.options | {"hidden_size": 32768, "intermediate_size": 131072, "num_hidden_layers": 96}
    huge = replace(huge, model=replace(huge.model, options=options), compare=CompareConfig(seeds=(0, 1)))
    with pytest.raises(TokenSuperpositionError, match="GB"):
        dry_run(huge, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_time_is_that_of_the_queue() -> None:
    """Slots take the first job that can start; a branch waits for its trunk."""
    config = replace(Config(), compare=CompareConfig(baseline_lengths=(1.0, 2.0), seeds=(0, 1)))
    config = replace(config, train=replace(config.train, steps=100, eval_every=1000, warmup_steps=5))
    config = replace(config, data=replace(config.data, final_eval_tokens=0))
    jobs = jobs_of(config)
    costs = [cost_of_job(j, j.config.train.steps - (j.branch_step if j.trunk else 0), 1.0) for j in jobs]
    assert [c.steps for c in costs] == [200, 100, 200, 100, 10, 10]
    one = makespan(costs, 1, 1.0)
    assert one == pytest.approx(620 + 6 * START_SECONDS)
    # trunk0 | tst0, then trunk1 | tst1 when trunk0 is done, then the branches when trunk1 is running or done
    two = makespan(costs, 2, 1.0)
    trunk, short, branch = 200 + START_SECONDS, 100 + START_SECONDS, 10 + START_SECONDS
    assert two == pytest.approx(max(short + trunk + branch, trunk + short + branch))
    assert makespan(costs, 6, 1.0) == pytest.approx(trunk + branch) and makespan([], 2, 1.0) == 0
    assert makespan(costs[4:], 2, 1.0) == pytest.approx(branch)  # their trunks are done already


def test_a_step_is_timed_in_micro_batches(write_config: Callable[..., Path]) -> None:
    config = load_config(write_config(steps=12))
    times = [
        time_steps(replace(config, train=replace(config.train, batch_size=b, micro_batch_size=m)), VOCAB, 1)
        for b, m in ((8, 8), (1024, 8))
    ]
    assert 0 < times[0] < 10 and times[1] > 20 * times[0]


def test_a_step_is_timed_as_it_is_trained(write_config: Callable[..., Path]) -> None:
    """With the optimizer of the configuration, and computing the layers again where it says so."""
    config = load_config(write_config(steps=12))
    config = replace(config, train=replace(config.train, batch_size=1, micro_batch_size=1))
    layers: list[str] = []
    muons: list[str] = []
    counted = [
        register_module_forward_hook(lambda module, *_: layers.append(type(module).__name__)),
        register_optimizer_step_post_hook(lambda optimizer, *_: muons.append(type(optimizer).__name__)),
    ]

    def times(**train: Any) -> tuple[int, set[str]]:
        layers.clear()
        muons.clear()
        assert time_steps(replace(config, train=replace(config.train, **train)), VOCAB, 1) > 0
        return layers.count("LlamaAttention"), set(muons)

    plain, again, muon = times(), times(activation_checkpointing=True), times(optimizer="muon")
    for handle in counted:
        handle.remove()
    assert again[0] == 2 * plain[0] > 0 and plain[1] == {"AdamW"} and "MuonAdamW" in muon[1]


def test_the_rows_of_a_dry_run_add_up_to_its_total(write_config: Callable[..., Path], tmp_path: Path) -> None:
    """With one run at a time; short runs are mostly the start of their processes."""
    config = load_config(write_config())
    dry = dry_run(replace(config, compare=CompareConfig(parallel=1)), tmp_path / "out")
    assert sum(job.seconds(dry.step_seconds) for job in dry.jobs) == pytest.approx(dry.seconds)
    console = Console(record=True, width=120)
    print_dry_run(dry, console)
    printed = console.export_text()
    for job in dry.jobs:
        (row,) = [line for line in printed.splitlines() if line.split()[:1] == [job.directory]]
        assert row.split()[-2:] == duration(START_SECONDS + job.step_equivalents * dry.step_seconds).split()
    assert "with 1 run at a time" in printed


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is a GPU")
def test_a_step_is_timed_on_the_cpu_by_a_torch_built_for_gpus(
    write_config: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such a torch names its accelerator where there is none, too."""

    def built_for(check_available: bool = False) -> torch.device | None:
        return None if check_available else torch.device("cuda")

    monkeypatch.setattr(torch.accelerator, "current_accelerator", built_for)
    assert time_steps(load_config(write_config(steps=12)), VOCAB, 1) > 0


def test_a_sample_fits_into_the_positions_of_the_model(
    write_config: Callable[..., Path], prepared: Path, tmp_path: Path
) -> None:
    """A table of as many positions as a sequence has."""
    config = load_config(write_config("gpt2"))
    made = run("tst", 0, 1, 3.0)
    directory = tmp_path / "runs" / made.directory / "model"
    tiny("gpt2", max_position_embeddings=config.data.sequence_length).save_pretrained(directory)
    load_tokenizer(str(prepared / "tokenizer")).save_pretrained(directory)
    (sample,) = samples(config, tmp_path, [made])
    assert sample["name"] == "tst" and sample["prompt"] and sample["text"]
    longer = replace(config, data=replace(config.data, sequence_length=256))
    tiny("gpt2", max_position_embeddings=256).save_pretrained(directory)
    (sample,) = samples(longer, tmp_path, [made], prompt_tokens=100)
    assert "<|endoftext|>" in sample["prompt"]  # it reaches over several documents
    assert not sample["text"].startswith(sample["prompt"].partition("<|endoftext|>")[0])


def test_a_sample_of_bytes_that_are_no_text_fits_into_a_sequence(
    write_config: Callable[..., Path], prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is a character of three bytes in the prompt, so that 8 are more than 16 tokens; one seed has samples."""
    config, tokenizer = load_config(write_config("gpt2")), load_tokenizer(str(prepared / "tokenizer"))
    (byte,) = tokenizer.convert_tokens_to_ids(["Ģ"])  # 0x80
    runs = [run("tst", seed, 1, 3.0) for seed in (3, 4)]
    for made in runs:
        directory = tmp_path / "runs" / made.directory / "model"
        tiny("gpt2", max_position_embeddings=config.data.sequence_length).save_pretrained(directory)
        tokenizer.save_pretrained(directory)
    monkeypatch.setattr(
        "token_superposition.experiment.compare.TokenStore", lambda *_: torch.full((100,), byte).numpy()
    )
    (sample,) = samples(config, tmp_path, runs)
    assert sample["prompt"] == "\ufffd" * 4
    assert prompt_of([byte], tokenizer, 2) == ("", 1)  # it begins a document


def test_a_model_that_writes_no_text_loses_no_comparison(
    write_config: Callable[..., Path], prepared: Path, tmp_path: Path
) -> None:
    """A run that diverged has no sample; where a finite loss came of weights that give none, that is told."""
    config, tokenizer = load_config(write_config("gpt2")), load_tokenizer(str(prepared / "tokenizer"))
    runs = [run("baseline", 3, 1, 3.0), run("tst", 3, 1, math.nan), run("shifted", 3, 1, 3.0)]
    for made in runs:
        model = tiny("gpt2", max_position_embeddings=config.data.sequence_length)
        if made.name != "baseline":
            torch.nn.init.constant_(model.get_parameter("transformer.ln_f.weight"), math.nan)
        model.save_pretrained(tmp_path / "runs" / made.directory / "model")
        tokenizer.save_pretrained(tmp_path / "runs" / made.directory / "model")
    with pytest.warns(UserWarning, match="there is no sample of shifted-seed3: no text comes of its model") as told:
        assert [sample["name"] for sample in samples(config, tmp_path, runs)] == ["baseline"]
    assert len(told) == 1


def test_the_dry_run_validates_no_more_than_is_held_out() -> None:
    job = jobs_of(replace(Config(), data=replace(Config().data, eval_tokens=600, final_eval_tokens=10**9)))[0]
    each = (Config().train.steps // Config().train.eval_every) * 500
    few = cost_of_job(job, job.config.train.steps, 1.0, held_out=500).step_equivalents
    none = cost_of_job(job, job.config.train.steps, 1.0, held_out=0).step_equivalents
    step = 3 * Config().train.batch_size * Config().data.sequence_length
    assert few - none == pytest.approx((each + 500) / step) and none == job.config.train.steps


def test_a_held_out_text_shorter_than_a_sequence_is_told_before_the_cost(
    write_config: Callable[..., Path], prepared: Path, tmp_path: Path
) -> None:
    tokens = Meta.load(prepared).validation.tokens
    config = load_config(write_config(sequence_length=tokens))
    with pytest.raises(TokenSuperpositionError, match=f"the validation text has {tokens} tokens, one sequence needs"):
        checked_jobs(config, tmp_path / "out")
    assert not (tmp_path / "out").exists()
