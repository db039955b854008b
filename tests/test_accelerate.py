"""``accelerate launch`` with the package's launch files, on two CPU processes over gloo: DDP and FSDP2."""

from __future__ import annotations

import gc
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
import torch.distributed as dist
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from safetensors.torch import load_file
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, TrainerCallback, TrainingArguments

from tests.conftest import CONFIG, TINY, VOCAB, once, tiny, tst
from tests.fsdp_on_cpu import shard_on_cpu, train_sharded
from tests.processes import command, launch, spawn
from token_superposition import Schedule, TokenSuperpositionError, fold, linear_multi_hot_cross_entropy, span, superpose
from token_superposition.data.plan import PlannedDataset
from token_superposition.data.store import TokenStore
from token_superposition.engines.transformers import TSTTrainer
from token_superposition.engines.transformers.head import (
    Head,
    HiddenStates,
    check_causal,
    ids_used_elsewhere,
    read_head,
    whole_head,
)
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
    """20 of 24 steps on bags, a checkpoint every 4."""
    options = "\n".join(f"{key} = {value}" for key, value in TINY["llama"].items())
    content = CONFIG.format(architecture="llama", options=options, data=prepared)
    for old, new in {
        "steps = 12": "steps = 24",
        "ratio = 0.5": "ratio = 0.84",
        "save_every = 0": "save_every = 4",
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


CASES: dict[str, tuple[str, dict[str, object], dict[str, object]]] = {
    "untied": ("llama", {"tie_word_embeddings": False}, {}),
    "tied": ("llama", {"tie_word_embeddings": True}, {"gradient_accumulation_steps": 2}),
    "experts": ("qwen3_moe", {"output_router_logits": False}, {}),
    "scaled": ("cohere", {}, {}),
    "bfloat16": ("llama", {"tie_word_embeddings": False}, {"bf16": True}),
}


class Watch(TrainerCallback):
    """What the optimizer is about to use, whole, and whether it came in shards."""

    def __init__(self) -> None:
        self.gradients: dict[str, torch.Tensor] = {}
        self.sharded: set[str] = set()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        for name, p in model.named_parameters():
            g = p.grad
            if isinstance(g, DTensor):
                self.sharded.add(name)
                g = g.full_tensor()
            if g is not None:
                self.gradients[f"{state.global_step} {name}"] = g.clone()


def trainer_of(case: str, prepared: Path, out: Path, processes: int, **more: Any) -> tuple[TSTTrainer, Watch]:
    """Of three steps on bags and three without, of the same batches for any number of processes."""
    architecture, options, arguments = CASES[case]
    accumulated = int(str(arguments.get("gradient_accumulation_steps", 1)))
    settings: dict[str, Any] = {
        "per_device_train_batch_size": 4 // processes // accumulated, "learning_rate": 3e-3, "logging_steps": 1,
        "report_to": "none", "save_strategy": "no", "use_cpu": True, "disable_tqdm": True, "seed": 1,
        "dataloader_pin_memory": False, "max_grad_norm": 1.0,
    }  # fmt: skip
    plan = PlannedDataset(TokenStore(prepared), Schedule.two_phase(6, 4, 0.5), 16, 4, seed=1)
    watch = Watch()
    trainer = TSTTrainer(
        tiny(architecture, **options), TrainingArguments(str(out), **settings | arguments | more), train_dataset=plan,
        callbacks=[watch],
    )  # fmt: skip
    return trainer, watch


def losses_of(trainer: TSTTrainer) -> list[float]:
    return [m["loss"] for m in trainer.state.log_history if "loss" in m]


def train_case(case: str, prepared: Path, out: Path, processes: int) -> tuple[list[float], Watch]:
    trainer, watch = trainer_of(case, prepared, out, processes)
    trainer.train()
    if processes > 1:
        assert isinstance(trainer.model, FSDPModule)
        policy = trainer.accelerator.state.fsdp_plugin.mixed_precision_policy
        assert policy is None or (policy.param_dtype, policy.reduce_dtype) == (torch.bfloat16, torch.float32)
    return losses_of(trainer), watch


def join(rank: int, out: Path) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{out}/rendezvous", rank=rank, world_size=2)


def use_fsdp() -> None:
    fsdp: dict[str, Any] = load_config_from_file(str(LAUNCH / "fsdp2.yaml")).fsdp_config  # pyright: ignore
    os.environ |= {key.upper(): str(value).lower() for key, value in fsdp.items()}
    os.environ["FSDP_STATE_DICT_TYPE"] = fsdp["fsdp_state_dict_type"]
    shard_on_cpu()


def compiled_worker(rank: int, prepared: Path, out: Path, how: str, layer_by_layer: str, want: list[float]) -> None:
    join(rank, out)
    os.environ["ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION"] = layer_by_layer
    if how == "FSDP2":
        use_fsdp()
    train_compiled(prepared, out, how, layer_by_layer, want)
    gc.collect()  # a DDP that is freed later may wait for the group's thread, which waits for it
    dist.destroy_process_group()


def train_compiled(prepared: Path, out: Path, how: str, layer_by_layer: str, want: list[float]) -> None:
    trainer, _ = trainer_of("tied", prepared, out, 2, torch_compile=True, torch_compile_backend="eager")
    trainer.train()
    assert losses_of(trainer) == pytest.approx(want, rel=2e-5)
    wrapped: Any = trainer.model_wrapped
    if how == "DDP":  # else its no_sync would be lost, and every micro-batch's gradients averaged
        assert isinstance(wrapped if layer_by_layer == "true" else wrapped._orig_mod, DistributedDataParallel)
    else:
        assert isinstance(wrapped, FSDPModule)


@pytest.mark.parametrize(("how", "layer_by_layer"), [("DDP", "false"), ("DDP", "true"), ("FSDP2", "true")])
def test_what_is_compiled_trains_alike_and_stays_wrapped(
    how: str, layer_by_layer: str, prepared: Path, tmp_path: Path
) -> None:
    want = train_case("tied", prepared, tmp_path, 1)[0]
    spawn(compiled_worker, prepared, tmp_path, how, layer_by_layer, want)


def sharded_worker(rank: int, prepared: Path, out: Path) -> None:
    join(rank, out)
    use_fsdp()
    for case in CASES:
        losses, watch = train_case(case, prepared, out, 2)
        if rank == 0:
            torch.save((losses, watch.gradients, sorted(watch.sharded)), out / f"{case}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def sharded(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every case trained by two processes that shard the model."""
    return once(tmp_path_factory, "accelerate-sharded", lambda out: spawn(sharded_worker, prepared, out))


@pytest.mark.parametrize("case", CASES)
def test_sharded_training_is_training(case: str, sharded: Path, prepared: Path, tmp_path: Path) -> None:
    """Losses and gradients of both phases are one process's; every parameter is sharded, none got no gradient."""
    losses, gradients, names = torch.load(sharded / f"{case}.pt", weights_only=True)
    want_losses, want = train_case(case, prepared, tmp_path, 1)
    tolerance = 1e-2 if case == "bfloat16" else 2e-5
    assert losses == pytest.approx(want_losses, rel=tolerance)
    assert gradients.keys() == want.gradients.keys()
    assert set(names) == {name.split(" ")[1] for name in want.gradients}
    for name, g in want.gradients.items():
        error = (gradients[name] - g).norm() / g.norm()
        assert error < (5e-2 if case == "bfloat16" else 1e-3), (name, error)


def whole_head_worker(rank: int, rendezvous: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    probed = tiny("llama")
    for module in (*probed.model.layers, probed):
        fully_shard(module)
    check_causal(probed)
    assert ids_used_elsewhere(probed) is None and isinstance(read_head(probed), Head)
    assert all(
        isinstance(p, DTensor) for p in probed.parameters()
    )  # what an optimizer takes, of the outermost group too
    g = torch.Generator().manual_seed(0)
    for tied in (False, True):
        for s in (4, 1):
            models = [superpose(tiny("llama", tie_word_embeddings=tied)) for _ in range(2)]
            ids, targets = fold(torch.randint(VOCAB, (4, span(8, s, s)), generator=g), s, s)
            plain, split = models
            for module in (*split.model.layers, split):
                fully_shard(module, reshard_after_forward=True)
            results = []
            for model, mine in ((plain, slice(None)), (split, slice(2 * rank, 2 * rank + 2))):
                with HiddenStates.of(model.model) as states:
                    model(input_ids=ids[mine], logits_to_keep=1)
                    hidden = states.take()
                assert isinstance(model.lm_head.weight, DTensor) == (model is split)  # it was freed
                loss = linear_multi_hot_cross_entropy(hidden, whole_head(model).weight, targets[mine])
                loss.backward()
                results.append(loss.detach())
            dist.all_reduce(results[1])
            torch.testing.assert_close(results[1] / 2, results[0])
            for (name, p), (_, q) in zip(plain.named_parameters(), split.named_parameters(), strict=True):
                assert isinstance(q.grad, DTensor), name
                torch.testing.assert_close(q.grad.full_tensor(), p.grad, rtol=1e-4, atol=1e-6, msg=name)
    dist.destroy_process_group()


def test_a_head_that_was_freed_after_the_forward_pass_is_gathered(tmp_path: Path) -> None:
    spawn(whole_head_worker, str(tmp_path / "rendezvous"))


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
