"""The loss on logits whose columns are spread over two processes. Run by ``cpu_shim``, judged by ``test_parts``."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard, init_device_mesh
from torch.profiler import ProfilerActivity, profile
from torchtitan.distributed.spmd_types import set_current_spmd_mesh
from torchtitan.distributed.utils import set_spmd_backend

from token_superposition import place_weights, reference
from token_superposition.engines.torchtitan.loss import BagLoss

V, S = 11, 3  # 11 tokens on two processes: 6 and 5


def example() -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 5, V, generator=g).double() * 3
    targets = torch.randint(V, (2, 5, S), generator=g)
    targets[0, 1], targets[0, 2, 0], targets[1, 3] = -100, -100, 10
    return logits.requires_grad_(), targets


def expected_loss(logits: Tensor, targets: Tensor, weights: Tensor | None) -> Tensor:
    rows = (targets.flatten(0, 1) != -100).any(1).sum()
    return reference.multi_hot_cross_entropy(logits.flatten(0, 1), targets.flatten(0, 1), weights) * rows / 7


def run(out: str) -> None:
    """Writes ``equal``, or what went wrong, to ``out.RANK``."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    try:
        check(rank)
        outcome = "equal"
    except Exception:
        outcome = traceback.format_exc()
    Path(f"{out}.{rank}").write_text(outcome)
    dist.destroy_process_group()


def check(rank: int) -> None:
    """The columns of a process, as a DTensor and as a plain tensor in torchtitan's mesh, give the whole loss."""
    loss = BagLoss.Config(weighting="power", vocab_size=V).build()
    whole, targets = example()
    want = expected_loss(whole, targets, place_weights("power", S).double())
    gradient = torch.autograd.grad(want, whole)[0]
    mine = slice(0, 6) if rank == 0 else slice(6, V)
    columns = whole.detach()[..., mine].clone().requires_grad_()
    mesh = init_device_mesh("cpu", (1, 1, 2), mesh_dim_names=("dp", "cp", "tp"))
    set_spmd_backend("spmd_types")
    with set_current_spmd_mesh(mesh):
        assert all_reduces(partial(compare, loss, columns, columns, targets, want, gradient[..., mine])) == 3
        assert all_reduces(partial(loss, columns, targets[..., :1])) == 3
    set_spmd_backend("partial_dtensor")
    sharded = DTensor.from_local(columns, mesh["tp"], [Shard(2)], shape=whole.shape, stride=whole.stride())
    compare(loss, sharded, columns, targets, want, gradient[..., mine])


def compare(loss: BagLoss, pred: Tensor, columns: Tensor, targets: Tensor, want: Tensor, gradient: Tensor) -> None:
    got, _ = loss(pred, targets, torch.tensor(7))
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, columns)[0], gradient)


def all_reduces(call: Callable[[], Any]) -> int:
    with profile(activities=[ProfilerActivity.CPU]) as p:
        call()
    return sum(e.name == "_c10d_functional::all_reduce" for e in p.events())
