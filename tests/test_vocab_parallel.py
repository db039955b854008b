"""Embedding and output head sharded over the vocabulary, on two real processes, against one process."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.profiler import ProfilerActivity, profile

from tests.processes import spawn
from token_superposition import TokenSuperpositionError, bag_embedding, reference, superpose, unsuperpose
from token_superposition import linear_multi_hot_cross_entropy as linear
from token_superposition.loss.vocab_parallel import VocabParallel
from token_superposition.places import place_factors
from token_superposition.weights import place_weights

V, D, N, S = 11, 4, 9, 3  # 11 rows on two processes: 6 and 5


def example() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    hidden, head, bias = (torch.randn(*shape, generator=g).double() for shape in ((N, D), (V, D), (V,)))
    targets = torch.randint(V, (N, S), generator=g)
    targets[1], targets[2, 0], targets[3] = -100, -100, 10
    return hidden.requires_grad_(), head.requires_grad_(), bias.requires_grad_(), targets


def all_reduces(call: Callable[[], Any]) -> int:
    with profile(activities=[ProfilerActivity.CPU]) as p:
        call()
    return sum(e.name == "_c10d_functional::all_reduce" for e in p.events())


def close(got: Any, want: Any) -> None:
    torch.testing.assert_close(got.full_tensor() if isinstance(got, DTensor) else got, want)


def check_loss_on_local_rows(rank: int) -> None:
    hidden, head, bias, targets = example()
    options: dict[str, Any] = {"softcap": 2.0, "logit_scale": 0.7, "z_loss": 0.1}
    expected = linear(hidden, head, targets, bias=bias, impl="reference", **options)
    want = torch.autograd.grad(expected, (hidden, head, bias))
    mine = slice(0, 6) if rank == 0 else slice(6, V)
    rows, part = head.detach()[mine].requires_grad_(), bias.detach()[mine].requires_grad_()
    place = VocabParallel(dist.group.WORLD, mine.start)  # pyright: ignore
    for chunk_rows in (4, N):
        got = linear(hidden, rows, targets, bias=part, vocab_parallel=place, chunk_rows=chunk_rows, **options)
        close(got, expected)
        gradients = torch.autograd.grad(got, (hidden, rows, part))
        for g, w in zip(gradients, (want[0], want[1][mine], want[2][mine]), strict=True):
            close(g, w)


def check_number_of_collectives(rank: int) -> None:
    hidden, head, _, _ = example()
    mine = slice(0, 6) if rank == 0 else slice(6, V)
    place = VocabParallel(dist.group.WORLD, mine.start)  # pyright: ignore
    for s in (1, 8):
        targets, rows = torch.randint(V, (N, s)), head.detach()[mine].requires_grad_()
        loss = partial(linear, hidden, rows, targets, vocab_parallel=place)
        with torch.no_grad():
            assert all_reduces(loss) == 3
        assert all_reduces(partial(backward, loss)) == 4


def backward(loss: Callable[[], Tensor]) -> None:
    loss().backward()


def check_dtensors(rank: int) -> None:
    """The plan of a tensor-parallel model: embedding by rows, head by columns of its product."""
    mesh = init_device_mesh("cpu", (2,))
    g = torch.Generator().manual_seed(1)
    table, out = nn.Embedding(V, D).double(), nn.Linear(D, V).double()
    for p in (*table.parameters(), *out.parameters()):
        p.data.copy_(torch.randn(p.shape, generator=g))
    ids, targets = torch.randint(V, (2, 5, S), generator=g), torch.randint(V, (2, 5, S), generator=g)
    weights = place_weights("power", S).flip(0).unsqueeze(1)
    marked = (table.weight[ids] * place_factors(S, D, 0.5, table.weight) * weights).sum(2)
    (want_marked,) = torch.autograd.grad(marked.square().sum(), table.weight)
    ragged = ids.clone()
    ragged[0, 1, 1:] = -1
    hidden = torch.tanh(reference.bag_embedding(table.weight, ragged))
    expected = linear(hidden, out.weight, targets, bias=out.bias, impl="reference")
    want = torch.autograd.grad(expected, (table.weight, out.weight, out.bias))  # pyright: ignore

    model = nn.ModuleDict({"table": table, "out": out})
    plan = {
        "table": RowwiseParallel(input_layouts=Replicate(), output_layouts=Replicate(), use_local_output=True),
        "out": ColwiseParallel(output_layouts=Shard(-1)),
    }
    parallelize_module(model, mesh, plan)
    superpose(model, table)
    hidden = torch.tanh(table(ragged))
    weight, bias = out.weight, out.bias
    assert isinstance(weight, DTensor) and weight.placements == (Shard(0),)
    state = DTensor.from_local(hidden, mesh)
    got = linear(state, weight, targets, bias=bias)
    close(got, expected)
    for g_, w in zip(torch.autograd.grad(got, (table.weight, weight, bias)), want, strict=True):
        close(g_, w)
    whole = weight.full_tensor().detach()
    close(linear(hidden, distribute_tensor(whole, mesh, [Replicate()]), targets, bias=bias), expected)
    with pytest.raises(TokenSuperpositionError, match=r"Shard\(0\) on a mesh of one dimension"):
        linear(hidden, distribute_tensor(whole, mesh, [Shard(1)]), targets)
    with pytest.raises(TokenSuperpositionError, match="choose 'chunked'"):
        linear(state, weight, targets, impl="triton")
    with pytest.raises(TokenSuperpositionError, match=r"hidden is a plain tensor; under FSDP2 call unshard\(\)"):
        linear(hidden, weight, targets)
    replicated = distribute_tensor(table.weight.full_tensor().detach(), (grid := init_device_mesh("cpu", (2, 1))))
    everywhere: Any = bag_embedding(nn.Embedding(V, D, _weight=replicated), ids)
    assert everywhere.device_mesh == grid and everywhere.placements == (Replicate(), Replicate())
    close(everywhere, reference.bag_embedding(replicated.to_local(), ids))
    with pytest.raises(TokenSuperpositionError, match=r"bias has shape \(12,\) beside a head of shape \(11, 4\)"):
        linear(state, weight, targets, bias=torch.zeros(V + 1))  # on both processes, though 6 of them fit the first
    superpose(unsuperpose(model), table, place_signal=0.5, input_weighting="power")
    got = table(ids)
    close(got, marked)
    close(torch.autograd.grad(got.square().sum(), table.weight)[0], want_marked)


def check_sequence_parallel(rank: int) -> None:
    """Hidden states that are sharded by rows; the mesh of the head must have one dimension."""
    hidden, head, bias, targets = example()
    mesh = init_device_mesh("cpu", (2,))
    expected = linear(hidden, head, targets, bias=bias)
    state, weight = (distribute_tensor(t.detach(), mesh, [Shard(0)]).requires_grad_() for t in (hidden, head))
    got = linear(state, weight, targets, bias=bias.detach())
    close(got, expected)
    want = torch.autograd.grad(expected, (hidden, head))
    for g, w in zip(torch.autograd.grad(got, (state, weight)), want, strict=True):
        close(g, w)
    grid = init_device_mesh("cpu", (2, 1))
    with pytest.raises(TokenSuperpositionError, match=r"Shard\(0\) on a mesh of one dimension"):
        linear(hidden, distribute_tensor(head.detach(), grid, [Shard(0), Replicate()]), targets)


def check_sharded_ids_and_targets(rank: int) -> None:
    """DTensors of which a process has some sequences: means and gradients are the whole batch's, placed as by torch."""
    mesh = init_device_mesh("cpu", (2,))
    g = torch.Generator().manual_seed(2)
    whole, ids = torch.randn(V, D, generator=g).double(), torch.randint(V, (4, 5, S), generator=g)
    exact = whole.clone().requires_grad_()
    expected = reference.bag_embedding(exact, ids)
    (want,) = torch.autograd.grad(expected.square().sum(), exact)
    for of_weight in (Replicate(), Shard(0)):
        weight: Any = nn.Parameter(distribute_tensor(whole, mesh, [of_weight]))
        table = nn.Embedding(V, D, _weight=weight)
        table.weight = weight
        for of_ids in (Replicate(), Shard(0), Shard(1), Shard(2)):  # the last one: parts of bags
            placed: Any = distribute_tensor(ids, mesh, [of_ids])
            out: Any = bag_embedding(table, placed)
            assert out.shape == expected.shape
            if of_weight == Replicate() and of_ids != Shard(2):
                assert out.placements == (of_ids,) == table(placed[..., 0]).placements
            close(out, expected)
            close(torch.autograd.grad(out.redistribute(mesh, [of_ids]).square().sum(), weight)[0], want)
    hidden, head, _, targets = example()
    expected = linear(hidden, head, targets)
    rows, part = (distribute_tensor(t.detach(), mesh, [Shard(0)]) for t in (hidden, head))
    for labels in (distribute_tensor(targets, mesh, [Shard(0)]), distribute_tensor(targets, mesh, [Replicate()])):
        close(linear(rows, part, labels), expected)


def check_fsdp(rank: int) -> None:
    """Processes with rows of their own: a head that FSDP2 sharded is refused, and gathered it gives each its loss."""
    hidden, whole, bias, targets = example()
    mine = slice(0, 4) if rank == 0 else slice(5, N)
    rows, labels = hidden.detach()[mine], targets[mine]
    expected = linear(rows, whole, labels, bias=bias)
    head = nn.Linear(D, V, dtype=torch.float64)
    head.weight.data.copy_(whole.detach())
    head.bias.data.copy_(bias.detach())
    sharded: Any = fully_shard(head, mesh=init_device_mesh("cpu", (2,)))
    with pytest.raises(TokenSuperpositionError, match=r"hidden is a plain tensor; under FSDP2 call unshard\(\)"):
        linear(rows, head.weight, labels, bias=head.bias)
    sharded.unshard()
    close(linear(rows, head.weight, labels, bias=head.bias), expected)
    table = nn.Embedding(V, D)
    fully_shard(superpose(table, table), mesh=init_device_mesh("cpu", (2,)))
    with pytest.raises(TokenSuperpositionError, match="was made a FSDPBagEmbedding after superpose"):
        unsuperpose(table)
    assert isinstance(table, FSDPModule)


def check_extreme_logits(rank: int) -> None:
    """As a run that diverges has them: exp of what the largest of all is not taken off would be infinite."""
    hidden, head, bias, targets = example()
    hidden, mine = hidden.detach() * 1e4, slice(0, 6) if rank == 0 else slice(6, V)
    place = VocabParallel(dist.group.WORLD, mine.start)  # pyright: ignore
    got = linear(hidden, head[mine], targets, bias=bias[mine], vocab_parallel=place)
    close(got, linear(hidden, head, targets, bias=bias))


def check_a_plain_bias_of_a_whole_head(rank: int) -> None:
    hidden, head, bias, targets = example()
    whole = distribute_tensor(head.detach(), init_device_mesh("cpu", (2,)), [Replicate()])
    close(linear(hidden, whole, targets, bias=bias), linear(hidden, head, targets, bias=bias))


def check_a_process_without_rows(rank: int) -> None:
    """Each process says it: one alone would leave the other waiting for its sum."""
    mesh = init_device_mesh("cpu", (2,))
    head: Any = distribute_tensor(torch.ones(1, D), mesh, [Shard(0)])
    hidden: Any = DTensor.from_local(torch.ones(3, D), mesh, [Replicate()])
    with pytest.raises(TokenSuperpositionError, match=r"sharded over 2 processes, 1 rows on each, which leaves none"):
        linear(hidden, head, torch.zeros(3, S, dtype=torch.long))


CHECKS = (
    check_extreme_logits,
    check_a_plain_bias_of_a_whole_head,
    check_a_process_without_rows,
    check_loss_on_local_rows,
    check_number_of_collectives,
    check_dtensors,
    check_sequence_parallel,
    check_sharded_ids_and_targets,
    check_fsdp,
)


def worker(rank: int, rendezvous: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    try:
        for check in CHECKS:
            check(rank)
    finally:
        dist.destroy_process_group()


def test_two_processes(tmp_path: Path) -> None:
    """All checks in the same two processes, which take longer to start than to run; a trace names the check."""
    spawn(worker, str(tmp_path / "rendezvous"))
