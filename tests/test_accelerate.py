"""``accelerate launch`` with the package's launch files, on two CPU processes over gloo: DDP and FSDP2."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.conftest import CONFIG, TINY, once, tst
from tests.fsdp_on_cpu import train_sharded
from tests.processes import command, launch
from token_superposition import TokenSuperpositionError
from token_superposition.experiment.checkpoints import newest_whole
from token_superposition.experiment.config import load_config
from token_superposition.experiment.export import export
from token_superposition.experiment.files import read_metrics
from token_superposition.experiment.launch import Launch
from token_superposition.experiment.run import train, training_arguments

LAUNCH = Path(str(files("token_superposition") / "engines/transformers/launch"))
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch"]


def launch_command(file: str, module: str, *args: str | Path, processes: int = 2) -> list[str]:
    options = ["--config_file", str(LAUNCH / file), "--num_processes", str(processes), "--main_process_port", "0"]
    return [*ACCELERATE, *options, "-m", module, *map(str, args)]


def accelerate_launch(file: str, module: str, *args: str | Path, processes: int = 2) -> None:
    start = launch_command(file, module, *args, processes=processes)
    done = subprocess.run(start, capture_output=True, text=True, timeout=300, env=environment())
    assert done.returncode == 0, done.stderr[-5000:]


def launchers_environment(file: str) -> dict[str, str]:
    """What ``accelerate launch`` tells the processes that it starts."""
    parsed: Any = launch_command_parser().parse_args(launch_command(file, "tests.fsdp_on_cpu")[3:])
    return prepare_multi_gpu_env(_validate_launch_command(parsed)[0])


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1"}


def history(run: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in m.items() if k != "seconds"} for m in read_metrics(run / "metrics.jsonl")]


def same_history(got: Path, want: Path, tolerance: float = 2e-5) -> None:
    """The same lines; numbers to what the order of a sum over processes changes."""
    for a, b in zip(history(got), history(want), strict=True):
        assert a == pytest.approx(b, rel=tolerance)


def same_model(got: Path, want: Path, tolerance: float = 1e-4) -> None:
    """Both load in transformers and give the same logits."""
    ids = torch.arange(12)[None]
    a, b = (AutoModelForCausalLM.from_pretrained(run / "model").eval()(ids).logits for run in (got, want))
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance / 10)


def forget_after(run: Path, copy: Path, step: int) -> None:
    """A copy of a finished run as it was just after the checkpoint of ``step``."""
    shutil.copytree(run, copy)
    for checkpoint in (copy / "checkpoints").iterdir():
        if int(checkpoint.name.split("-")[1]) > step:
            shutil.rmtree(checkpoint)
    shutil.rmtree(copy / "model")
    (copy / "run.json").unlink()


@pytest.fixture(scope="module")
def config(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 of 24 steps on bags, a checkpoint every 4; the embeddings have a learning rate of their own."""
    options = "\n".join(f"{key} = {value}" for key, value in TINY["llama"].items())
    content = CONFIG.format(architecture="llama", options=options, data=prepared)
    for old, new in {
        "steps = 12": "steps = 24",
        "ratio = 0.5": "ratio = 0.84",
        "save_every = 0": "save_every = 4\nembedding_lr_factor = 4",
    }.items():
        assert f"\n{old}\n" in content
        content = content.replace(f"\n{old}\n", f"\n{new}\n")
    path = tmp_path_factory.mktemp("config") / "config.toml"
    path.write_text(content)
    return path


@pytest.fixture(scope="module")
def one(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run in one process."""
    return once(tmp_path_factory, "accelerate-one", lambda root: tst("train", config, "--out", root / "run")) / "run"


def test_fsdp2_is_one_process_and_resumes_across_the_switch(config: Path, one: Path, tmp_path: Path) -> None:
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    accelerate_launch("fsdp2.yaml", "tests.fsdp_on_cpu", config, "--out", whole)
    same_history(whole, one)
    same_model(whole, one)
    saved = whole / "checkpoints/checkpoint-16"
    assert {p.name for p in (saved / "pytorch_model_fsdp_0").glob("*.distcp")} == {"__0_0.distcp", "__1_0.distcp"}
    assert not (saved / "model.safetensors").exists()
    export(whole, tmp_path / "exported", checkpoint=24)  # the shards, put together
    exported, trained = (load_file(d / "model.safetensors") for d in (tmp_path / "exported", whole / "model"))
    assert exported.keys() == trained.keys() and all(torch.equal(exported[name], trained[name]) for name in trained)

    forget_after(whole, resumed, 16)
    launch(2, train_sharded, [str(config), "--out", str(resumed)], **launchers_environment("fsdp2.yaml"))
    assert [m["input_bag"] for m in history(resumed) if "loss" in m] == [4] * 20 + [1] * 4
    assert history(resumed) == history(whole)
    weights = "model/model.safetensors"
    assert (resumed / weights).read_bytes() == (whole / weights).read_bytes()


def test_ddp_killed_in_the_first_phase_ends_as_one_process(config: Path, one: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    start = launch_command("ddp.yaml", "token_superposition", "train", config, "--out", run)
    with subprocess.Popen(start, env=environment(), stderr=subprocess.DEVNULL) as process:
        while newest_whole(run / "checkpoints") is None:
            assert process.poll() is None
            time.sleep(0.005)
        tree = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
        for p in tree:
            p.kill()
        psutil.wait_procs(tree[:-1])
    assert not (run / "checkpoints/checkpoint-20").exists() and not (run / "model").exists()
    launch(2, command, "train", str(config), "--out", str(run), **launchers_environment("ddp.yaml"))
    same_history(run, one)
    same_model(run, one)


@pytest.mark.parametrize(("file", "kind"), [("ddp.yaml", "MULTI_GPU"), ("fsdp2.yaml", "FSDP")])
def test_launch_files_are_accelerates(file: str, kind: str) -> None:
    read: Any = load_config_from_file(str(LAUNCH / file))  # refuses keys that it does not know
    assert read.distributed_type == kind and read.mixed_precision == "bf16"


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Launch]:
    """The environment that a launcher leaves."""

    def set_environment(**variables: object) -> Launch:
        for name, value in variables.items():
            monkeypatch.setenv(name, str(value))
        return Launch.from_environment()

    return set_environment


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"WORLD_SIZE": 3}, r"batch_size 4 is not a multiple of 3 \(3 processes x micro-batch 1\); use 3 or 6"),
        ({"WORLD_SIZE": 8}, r"batch_size 4 is not a multiple of 8 \(8 processes x micro-batch 1\); use 8 or 16"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": 1}, "set fsdp_version: 2"),
        ({"ACCELERATE_MIXED_PRECISION": "fp8"}, "mixed_precision fp8; set it to bf16 or no"),
    ],
)
def test_launches_that_cannot_train(
    variables: dict[str, object], message: str, config: Path, tmp_path: Path, launched: Callable[..., Launch]
) -> None:
    with pytest.raises(TokenSuperpositionError, match=message):
        launched(**variables).check(load_config(config))
    with pytest.raises(TokenSuperpositionError, match=message):
        train(load_config(config), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_error_comes_before_any_process_group(config: Path, tmp_path: Path) -> None:
    """One process of three: it would wait for the others, or for a master that is not there."""
    done = tst("train", config, "--out", tmp_path / "run", check=False, RANK="0", LOCAL_RANK="0", WORLD_SIZE="3")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "use 3 or 6" in done.stderr
    assert not (tmp_path / "run").exists()


def test_fsdp_without_an_accelerator_is_refused(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FSDP_VERSION", "2")
    Launch(sharded=True, device_memory=80e9).check(load_config(config))
    with pytest.raises(TokenSuperpositionError, match=r"no accelerator, where .* DDP .* launch with ddp.yaml"):
        Launch(sharded=True).check(load_config(config))


def test_a_model_without_room_is_refused() -> None:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    fits, too_many = memory // 16 - 1, memory // 16 + 1
    Launch().check_memory(fits)
    Launch(64, 1, sharded=True).check_memory(60 * fits)
    for refused, n in ((Launch(), too_many), (Launch(8, 2), too_many // 2 + 1), (Launch(2, 2, sharded=True), too_many)):
        with pytest.raises(TokenSuperpositionError, match=r"need .* GB .* has .* GB; take a smaller model"):
            refused.check_memory(n)
    state = 16 * fits
    Launch(4, 1, sharded=True, device_memory=state // 4 + 1).check_memory(fits)
    for few in (Launch(4, 1, device_memory=state // 4 + 1), Launch(3, 1, sharded=True, device_memory=state // 4 + 1)):
        with pytest.raises(TokenSuperpositionError, match=r"launch with fsdp2.yaml on more than 3 GPUs"):
            few.check_memory(fits)
    with pytest.raises(TokenSuperpositionError, match=r"in 5 processes on this machine"):  # before they are shared out
        Launch(64, 5, sharded=True, device_memory=float(state)).check_memory(fits)


def test_checkpoints_of_the_other_kind_are_refused(tmp_path: Path) -> None:
    (tmp_path / "shards/pytorch_model_fsdp_0").mkdir(parents=True)
    (tmp_path / "whole").mkdir()
    Launch().check_checkpoint(tmp_path / "whole")
    Launch(sharded=True).check_checkpoint(tmp_path / "shards")
    with pytest.raises(TokenSuperpositionError, match=r"written with FSDP .* launched without FSDP"):
        Launch().check_checkpoint(tmp_path / "shards")
    with pytest.raises(TokenSuperpositionError, match=r"written without FSDP .* launched with FSDP"):
        Launch(sharded=True).check_checkpoint(tmp_path / "whole")


def test_a_run_leaves_no_word_for_the_next_one(write_config: Callable[..., Path], tmp_path: Path) -> None:
    """A Trainer that comes after a run in bfloat16 computes in float32: accelerate reads the environment first."""
    before = dict(os.environ)
    train(load_config(write_config(precision="bfloat16", steps=2, warmup_steps=1)), tmp_path / "run")
    assert dict(os.environ) == before


@pytest.mark.parametrize(
    ("precision", "file", "wanted"),
    [("float32", "bf16", False), ("bfloat16", "no", True), ("auto", "bf16", True)],
)
def test_the_configuration_decides_precision_before_the_launch_file(
    precision: str, file: str, wanted: bool, write_config: Callable[..., Path], tmp_path: Path,
    launched: Callable[..., Launch],
) -> None:  # fmt: skip
    given = load_config(write_config(precision=precision, append="activation_checkpointing = true\n"))
    launch = launched(ACCELERATE_MIXED_PRECISION=file)
    args = training_arguments(given, tmp_path, launch)
    assert args.bf16 == wanted and args.activation_checkpointing
    assert launch.variables(given.train)["ACCELERATE_MIXED_PRECISION"] == ("bf16" if wanted else "no")
    sharded = launched(ACCELERATE_USE_FSDP="true")
    assert not training_arguments(given, tmp_path, sharded).activation_checkpointing  # FSDP does it itself
    assert sharded.variables(given.train)["FSDP_ACTIVATION_CHECKPOINTING"] == "true"
