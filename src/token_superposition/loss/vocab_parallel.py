"""An output head whose rows are spread over processes (tensor parallelism over the vocabulary)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor

from token_superposition.errors import TokenSuperpositionError


@dataclass(frozen=True)
class VocabParallel:
    """This process's place in a head sharded over the vocabulary, for heads that are not DTensors.

    The loss then takes the process's own rows of the head (and of the bias), and the same hidden states and targets on
    every process. It costs one all-reduce each of the maximum, the sum of exponentials and the gathered logits of a
    chunk's rows, for any bag size, and one of the gradient by the hidden states, which comes out whole everywhere.
    """

    group: dist.ProcessGroup
    start: int
    """Id of the first token whose row this process holds."""


def local_head(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, place: VocabParallel | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor, int, str]:
    """Plain tensors of this process (hidden, weight, bias, targets), weight's first id, the group's name ('' if none).

    Raises ``TokenSuperpositionError`` for a DTensor that is sharded otherwise than over V, and for one beside plain
    hidden states: FSDP2 shards parameters like that, and its processes hold different rows.
    """
    if place is not None:
        return hidden, weight, bias, targets, place.start, place.group.group_name
    if not hasattr(weight, "device_mesh"):
        return hidden, weight, bias, targets, 0, ""
    from torch.distributed.tensor import DTensor, Replicate, Shard

    from token_superposition.sharding import local_rows

    head: Any = weight
    mesh = head.device_mesh
    rows, start, sharded = local_rows(head)
    each = -(-head.shape[0] // mesh.size())
    if sharded and each * (mesh.size() - 1) >= head.shape[0]:  # said by every process, so that none waits for another
        raise TokenSuperpositionError(
            f"the head of shape {tuple(head.shape)} is sharded over {mesh.size()} processes, {each} rows on each, "
            "which leaves none to the last; shard it over fewer, or give the vocabulary more rows"
        )
    if sharded and not isinstance(hidden, DTensor):
        raise TokenSuperpositionError(
            "the head is a DTensor with a part of the vocabulary, hidden is a plain tensor; under FSDP2 call unshard() "
            "of its module first, under tensor parallelism give DTensor.from_local(hidden, weight.device_mesh)"
        )
    if isinstance(hidden, DTensor):
        hidden = hidden.redistribute(mesh, [Replicate()] * mesh.ndim).to_local()
    if isinstance(targets, DTensor):
        targets = targets.redistribute(mesh, [Replicate()] * mesh.ndim).to_local()
    if isinstance(bias, DTensor):
        bias = bias.redistribute(mesh, head.placements).to_local()
    elif bias is not None and sharded:
        bias = DTensor.from_local(bias, mesh, [Replicate()], run_check=False).redistribute(mesh, [Shard(0)]).to_local()
    return hidden, rows, bias, targets, start, mesh.get_group().group_name if sharded else ""
