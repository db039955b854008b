"""Which rows of a vocabulary-sharded DTensor (an embedding, an output head) this process holds."""

from __future__ import annotations

from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

from token_superposition.errors import TokenSuperpositionError


def local_rows(weight: DTensor) -> tuple[Tensor, int, bool]:  # (V_local, d), id of the first row, whether sharded
    """Raises ``TokenSuperpositionError`` for a DTensor that is sharded otherwise than by rows over one mesh axis."""
    mesh, placements = weight.device_mesh, tuple(weight.placements)
    if all(isinstance(p, Replicate) for p in placements):
        return weight.to_local(), 0, False
    if mesh.ndim != 1 or placements != (Shard(0),):
        raise TokenSuperpositionError(
            f"a weight of shape {tuple(weight.shape)} is a DTensor with placements {placements} on a mesh of "
            f"{mesh.ndim} dimensions; give it Shard(0) on a mesh of one dimension, or full_tensor()"
        )
    rows = -(-weight.shape[0] // mesh.size())  # as DTensor shards: ceil(V / processes) on all but the last ones
    return weight.to_local(), min(rows * mesh.get_local_rank(), weight.shape[0]), True
