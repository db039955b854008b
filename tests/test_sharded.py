"""``TSTTrainer`` on two CPU processes over gloo, sharded by FSDP2 or compiled: losses and gradients of one process."""

from __future__ import annotations

import gc
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate.commands.config.config_args import load_config_from_file
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainerCallback, TrainingArguments

from tests.conftest import VOCAB, once, tiny
from tests.fsdp_on_cpu import shard_on_cpu
from tests.processes import spawn
from tests.test_accelerate import LAUNCH
from token_superposition import Schedule, fold, linear_multi_hot_cross_entropy, span, superpose
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
