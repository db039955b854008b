"""torchtitan's token embedding, which also reads bags."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torchtitan.models.common.embedding import Embedding

from token_superposition.embedding import bag_mean


class BagEmbedding(Embedding):
    """Ids (B, L) take the stock path; of ids (B, L, s) the s rows are averaged, summed in float32.

    Under tensor parallelism a process sums the rows that it holds, as the stock forward does, and torchtitan's own
    sharding of the output adds the parts up. No (B, L, s, d) exists, forward or backward.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(Embedding.Config):
        pass

    def forward(self, input: Tensor) -> Tensor:  # (B, L) or (B, L, s) -> (B, L, d)
        if input.dim() == 2:
            return super().forward(input)
        weight = self.weight.to_local() if isinstance(self.weight, DTensor) else self.weight
        start = None
        if self.tp_group is not None:
            processes = dist.get_world_size(self.tp_group)
            start = dist.get_rank(self.tp_group) * -(-self.num_embeddings // processes)
        out = bag_mean(weight, input.reshape(-1, input.shape[-1]), start, -1)
        return out.unflatten(0, input.shape[:-1]).clone()  # FSDP2 warns of modules that return a view
