"""Checkpoints of runs: what does not fit is refused, what cannot be written is told, and no pickle runs."""

from __future__ import annotations

import ctypes
import json
import os
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from transformers import TrainerCallback

from tests.conftest import once, tst
from tests.processes import call, command
from token_superposition import TokenSuperpositionError
from token_superposition.cli import main
from token_superposition.data.prepare import PrepareOptions, prepare
from token_superposition.data.store import Meta
from token_superposition.experiment.checkpoints import (
    ASIDE,
    MANIFEST,
    checkpoints_in,
    checksums,
    commit,
    damage,
    newest_whole,
    step_of,
)
from token_superposition.experiment.config import Config, load_config
from token_superposition.experiment.export import SHARDS, export
from token_superposition.experiment.resume import Start, changes, check_start, data_digest
from token_superposition.experiment.run import train
from token_superposition.experiment.shards import check_shards

Write = Callable[..., Path]


@pytest.fixture(scope="module")
def finished(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with checkpoints at 4, 8, 12 and at its switch, 6, beside its configuration."""
    from tests.conftest import CONFIG, TINY, toml

    options = "\n".join(f"{k} = {toml(v)}" for k, v in TINY["llama"].items())
    content = CONFIG.format(architecture="llama", options=options, data=prepared).replace("save_every = 0", "")

    def work(root: Path) -> None:
        (root / "config.toml").write_text(content + "save_every = 2\nkeep = 2\n")
        tst("train", root / "config.toml", "--out", root / "run")

    return once(tmp_path_factory, "checkpointed", work) / "run"


def copy_of(run: Path, tmp_path: Path, *without: int) -> Path:
    copy = Path(shutil.copytree(run, tmp_path / "copy"))
    (copy / "run.json").unlink()
    for step in without:
        shutil.rmtree(copy / f"checkpoints/checkpoint-{step}")
    return copy


def refused(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    assert main(["train", *map(str, arguments)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    return error


def test_the_newest_and_the_switch_stay(finished: Path) -> None:
    there = checkpoints_in(finished / "checkpoints")
    assert [step_of(c) for c in there] == [6, 10, 12]  # keep = 2, and the switch
    assert not any(damage(c) for c in there) and not (finished / "checkpoints" / ASIDE).exists()
    manifest = json.loads((there[0] / MANIFEST).read_text())
    written = {str(p.relative_to(there[0])) for p in there[0].rglob("*") if p.is_file()}
    assert manifest["files"].keys() == written - {MANIFEST} and "optimizer.pt" in written
    assert manifest["config"]["train"]["keep"] == 2 and manifest["data"]["vocab_size"] == 320


def test_resume_never_and_resume_path(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = finished.parent / "config.toml"
    copy = copy_of(finished, tmp_path)
    checkpoint = copy / "checkpoints/checkpoint-10"
    assert "holds checkpoint-12 and --resume is never" in refused(capsys, config, "--out", copy, "--resume", "never")
    error = refused(capsys, config, "--out", copy, "--resume", checkpoint)
    assert "holds checkpoint-12 as well" in error and "remove it or choose another --out" in error
    both = ("--resume", checkpoint, "--branch-from", checkpoint)
    assert "exclude each other" in refused(capsys, config, "--out", tmp_path / "new", *both)
    assert "is no checkpoint" in refused(capsys, config, "--out", tmp_path / "new", "--resume", "newest")
    assert not (tmp_path / "new").exists()
    # From a checkpoint of another directory, the metrics before it come along and the end is the same.
    assert main(["train", str(config), "--out", str(tmp_path / "new"), "--resume", str(checkpoint)]) == 0
    weights = "model/model.safetensors"
    assert (tmp_path / "new" / weights).read_bytes() == (finished / weights).read_bytes()
    os.truncate(checkpoint / "optimizer.pt", 5)
    for option in ("--resume", "--branch-from"):
        error = refused(capsys, config, "--out", tmp_path / "other", option, checkpoint)
        assert "checkpoint-10/optimizer.pt has 5 of" in error


def test_older_checkpoints_are_not_in_the_way_of_one_that_is_named(finished: Path) -> None:
    directory = finished / "checkpoints"
    assert len(checkpoints_in(directory)) > 1
    assert Start(directory, directory / "checkpoint-12").find() == directory / "checkpoint-12"


def test_other_data_is_refused_with_the_difference(
    finished: Path, prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same path, another vocabulary behind it."""
    data = tmp_path / "data"
    prepare([str(prepared.parent / "text")], data, PrepareOptions(vocab_size=300, validation_share=0.1))
    config = load_config(finished.parent / "config.toml")
    with pytest.raises(TokenSuperpositionError) as e:
        other = replace(config, data=replace(config.data, path=str(data)))
        train(other, tmp_path / "new", branch_from=finished / "checkpoints/checkpoint-6")
    for part in ("data's vocab_size 320 -> 300", "data's tokenizer_sha256 ", "data's train_sha256 "):
        assert part in str(e.value)
    moved = Path(shutil.copytree(prepared, tmp_path / "moved"))  # the same data elsewhere is the same
    again = replace(config, data=replace(config.data, path=str(moved)))
    assert train(again, tmp_path / "again", branch_from=finished / "checkpoints/checkpoint-10").steps == 12


def test_a_branch_has_the_time_of_all_its_steps(finished: Path, tmp_path: Path) -> None:
    """Also of those after the last line of the metrics: here there is none."""
    config = load_config(finished.parent / "config.toml")
    config = replace(config, train=replace(config.train, log_every=100, eval_every=100, save_at=(8,), save_every=0))
    train(config, tmp_path / "trunk")
    checkpoint = tmp_path / "trunk/checkpoints/checkpoint-8"
    before = json.loads((checkpoint / "pending_loss.json").read_text())["seconds"]
    branch = train(config, tmp_path / "branch", branch_from=checkpoint)
    assert 0 < before < branch.train_seconds


def test_a_checkpoint_later_than_the_run_is_refused(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--train.steps", 8, "--branch-from", finished / "checkpoints/checkpoint-10")
    error = refused(capsys, finished.parent / "config.toml", "--out", tmp_path / "other", *options)
    assert "checkpoint-10 is later than the 8 steps of the run" in error


@pytest.mark.parametrize(
    ("flags", "difference"),
    [
        (["--superposition.bag-size", "2"], "bag sizes of step 1 (4, 4) -> (2, 2)"),
        (["--superposition.ratio", "0.25"], "bag sizes of step 4 (4, 4) -> (1, 1)"),
        (["--superposition.ratio", "0.42"], "bag sizes of step 6 (4, 4) -> (1, 1)"),
        (["--superposition.sides", "input"], "bag sizes of step 1 (4, 4) -> (4, 1)"),
        (["--superposition.shift"], "superposition.shift False -> True"),
        (["--data.sequence-length", "8"], "data.sequence_length 16 -> 8"),
        (["--train.seed", "3"], "train.seed 0 -> 3"),
        (["--train.precision", "bfloat16"], "train.precision 'float32' -> 'bfloat16'"),
    ],
)
def test_another_plan_is_refused_with_the_difference(
    flags: list[str], difference: str, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, checkpoint = finished.parent / "config.toml", finished / "checkpoints/checkpoint-6"
    error = refused(capsys, config, *flags, "--out", tmp_path / "new", "--branch-from", checkpoint)
    assert difference in error and not (tmp_path / "new").exists()


def test_where_a_run_reports_to_may_change() -> None:
    config = Config()
    assert not changes(config, replace(config, train=replace(config.train, report_to=("tensorboard",))))
    assert changes(config, replace(config, train=replace(config.train, weight_decay=0.2)))


def test_the_last_checkpoint_is_of_the_run(finished: Path) -> None:
    config = load_config(finished.parent / "config.toml")
    check_start(finished / "checkpoints/checkpoint-12", config, Meta.load(Path(config.data.path)), "float32")


@pytest.mark.parametrize("changed", ["sha256", "documents_sha256"])
@pytest.mark.parametrize("split", ["train", "validation"])
def test_data_are_the_same_by_their_tokens_and_by_their_documents(changed: str, split: str, prepared: Path) -> None:
    meta = Meta.load(prepared)
    part = getattr(meta, split)
    other = replace(part, shards=[*part.shards[:-1], replace(part.shards[-1], **{changed: "0" * 64})])
    assert data_digest(replace(meta, **{split: other})) != data_digest(meta) == data_digest(Meta.load(prepared))


def test_a_checkpoint_of_another_precision_is_refused(finished: Path, tmp_path: Path) -> None:
    """auto is bfloat16 on one machine and float32 on another."""
    config, checkpoint = load_config(finished.parent / "config.toml"), copy_of(finished, tmp_path) / "checkpoints"
    checkpoint, meta = checkpoint / "checkpoint-6", Meta.load(Path(config.data.path))
    auto = replace(config, train=replace(config.train, precision="auto"))
    check_start(checkpoint, auto, meta, "float32")
    with pytest.raises(TokenSuperpositionError, match=r"train.precision 'float32' -> 'bfloat16'"):
        check_start(checkpoint, auto, meta, "bfloat16")


class Malicious:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def forge(checkpoint: Path) -> None:
    """A manifest that fits what is there now."""
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    aside = checkpoint.parent / ASIDE
    aside.mkdir()
    written = aside / checkpoint.name
    checkpoint.rename(written)
    commit(written, checkpoint, checksums(written), {name: manifest[name] for name in ("data", "config", "precision")})
    assert damage(checkpoint) is None


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"])
def test_no_pickle_of_a_checkpoint_runs(name: str, finished: Path, tmp_path: Path) -> None:
    copy = copy_of(finished, tmp_path, 12)
    path, ran = copy / "checkpoints/checkpoint-10" / name, tmp_path / "ran"
    torch.save(Malicious(ran), path)
    torch.load(path, weights_only=False)
    assert ran.exists()
    ran.unlink()
    lines: list[str] = []
    assert newest_whole(copy / "checkpoints", lines.append) == copy / "checkpoints/checkpoint-6" and name in lines[0]
    forge(path.parent)
    config = load_config(finished.parent / "config.toml")
    if name == "training_args.bin":  # nobody reads it
        assert train(config, copy).steps == 12
    else:
        with pytest.raises(TokenSuperpositionError, match="checkpoint-10 holds more than tensors"):
            train(config, copy)
    assert not ran.exists()


def test_no_pickle_of_a_sharded_checkpoint_runs(tmp_path: Path) -> None:
    shards, ran = tmp_path / "pytorch_model_fsdp_0", tmp_path / "ran"
    state = {"weight": torch.ones(3), "step": 3, "lr": 0.1, "names": ["a"]}
    dcp.save(state, storage_writer=dcp.FileSystemWriter(shards), no_dist=True)
    check_shards(tmp_path)
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        (shards / ".metadata").write_bytes(pickle.dumps(Malicious(ran), protocol))
        with pytest.raises(TokenSuperpositionError, match="is not what torch writes"):
            check_shards(tmp_path)
    forged = b"ctorch.distributed.checkpoint.filesystem\nos.system\n(S'touch " + bytes(ran) + b"'\ntR."
    (shards / ".metadata").write_bytes(forged)
    with pytest.raises(TokenSuperpositionError, match=r"filesystem.os.system"):
        check_shards(tmp_path)
    assert not ran.exists()


def test_no_pickle_runs_when_shards_are_exported(finished: Path, tmp_path: Path) -> None:
    """The weights, as torch's shards; then the same with a description, or an entry, that would run code."""
    checkpoint = copy_of(finished, tmp_path) / "checkpoints/checkpoint-12"
    shards, ran = checkpoint / SHARDS, tmp_path / "ran"
    weights = load_file(checkpoint / "model.safetensors")
    (checkpoint / "model.safetensors").unlink()
    run = checkpoint.parent.parent
    shutil.rmtree(run / "model")

    def save(state: dict[str, Any]) -> None:
        dcp.save(state, storage_writer=dcp.FileSystemWriter(shards), no_dist=True)
        forge(checkpoint)

    save({"model": weights})
    export(run, tmp_path / "whole")
    exported = load_file(tmp_path / "whole/model.safetensors")
    assert all(torch.equal(exported[name], weights[name]) for name in exported)
    save({"model": weights | {"evil": Malicious(ran)}})
    with pytest.raises(TokenSuperpositionError, match="holds more than tensors and plain values"):
        export(run, tmp_path / "entry")
    (shards / ".metadata").write_bytes(pickle.dumps(Malicious(ran)))
    forge(checkpoint)
    with pytest.raises(TokenSuperpositionError, match="is not what torch writes"):
        export(run, tmp_path / "description")
    assert not ran.exists() and not (tmp_path / "entry").exists() and not (tmp_path / "description").exists()


class At(TrainerCallback):
    """Does something to the run's directory after a step."""

    def __init__(self, step: int, what: Callable[[], object]):
        self.step, self.what = step, what

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            self.what()


def train_and_break(config: str, out: str, step: int, how: str) -> None:
    """``tst train`` in which something happens to the directory of checkpoints after a step."""
    from token_superposition.experiment import run

    checkpoints = Path(out) / "checkpoints"

    def withdraw() -> None:
        checkpoints.chmod(0o500)
        libc, header, none = ctypes.CDLL(None), (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
        assert libc.capset(header, none) == 0  # also root has to ask now

    hows = {"vanished": lambda: shutil.rmtree(checkpoints), "forbidden": withdraw}
    trainer = run.RunTrainer

    class Watched(trainer):
        def __init__(self, *args: Any, **kwargs: Any):
            super().__init__(*args, **kwargs)
            self.add_callback(At(step, hows[how]))

    run.RunTrainer = Watched
    command("train", config, "--out", out)


@pytest.mark.parametrize(("how", "reason"), [("vanished", "No such file"), ("forbidden", "Permission denied")])
def test_a_checkpoint_that_cannot_be_written_stops_the_run(
    how: str, reason: str, write_config: Write, tmp_path: Path
) -> None:
    """ENOENT and EACCES; for a full disk see test_resume."""
    out = tmp_path / "run"
    done = call(train_and_break, str(write_config(save_every=4)), str(out), 7, how)
    errors = [line for line in done.stderr.splitlines() if line.startswith("tst: error")]
    assert done.returncode == 2 and len(errors) == 1, done.stderr
    assert "cannot write checkpoint-8 to" in errors[0] and reason in errors[0]
    if how == "forbidden":
        (out / "checkpoints").chmod(0o700)
        assert "the newest is checkpoint-6" in errors[0]  # of the switch
        assert newest_whole(out / "checkpoints") == out / "checkpoints/checkpoint-6"


def test_a_torn_last_line_of_the_metrics_is_dropped(finished: Path, tmp_path: Path) -> None:
    copy = copy_of(finished, tmp_path, 12)
    path = copy / "metrics.jsonl"
    whole = path.read_text()
    path.write_text(whole[:-40])
    train(load_config(finished.parent / "config.toml"), copy)
    assert [without_time(line) for line in path.open()] == [without_time(line) for line in whole.splitlines()]


def without_time(line: str) -> dict[str, Any]:
    return {k: v for k, v in json.loads(line).items() if k != "seconds"}
