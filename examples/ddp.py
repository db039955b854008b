"""A plain PyTorch loop on several processes: DistributedDataParallel, memory-mapped data, accumulation.

python -m examples.text README.md docs/*.md --out data
torchrun --nproc-per-node 2 -m examples.ddp --data data --steps 200
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM

from token_superposition import Schedule, linear_multi_hot_cross_entropy, superpose
from token_superposition.data.plan import PlannedDataset


class WithLoss(nn.Module):
    """What DDP wraps: gradients are averaged of what its ``forward`` computes."""

    def __init__(self, model: LlamaForCausalLM):
        super().__init__()
        self.model = superpose(model)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        hidden = self.model.get_decoder()(ids).last_hidden_state
        return linear_multi_hot_cross_entropy(hidden, self.model.lm_head.weight, targets)


def main(argv: Sequence[str] | None = None) -> list[float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--out", type=Path, default=Path("out"))
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--micro-batch-size", type=int, default=8)
    parser.add_argument("--accumulate", type=int, default=2)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--bag-size", type=int, default=4)
    parser.add_argument("--ratio", type=float, default=0.3)
    args = parser.parse_args(argv)
    dist.init_process_group()
    rank, world_size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=256,
        hidden_size=args.width,
        intermediate_size=2 * args.width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=args.length,
        use_cache=False,
    )
    model = DistributedDataParallel(WithLoss(LlamaForCausalLM(shape)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    tokens = np.memmap(args.data / "train.bin", dtype=np.uint16, mode="r")
    schedule = Schedule.two_phase(args.steps, args.bag_size, args.ratio)
    batch_size = args.micro_batch_size * args.accumulate * world_size
    plan = PlannedDataset(tokens, schedule, args.length, batch_size)

    losses: list[float] = []
    for batch in plan.loader(args.micro_batch_size, rank=rank, world_size=world_size):
        last = (len(losses) + 1) % args.accumulate == 0
        with nullcontext() if last else model.no_sync():
            loss = model(batch["input_ids"], batch["shift_labels"])
            (loss / args.accumulate).backward()
        losses.append(loss.item())
        if last:
            optimizer.step()
            optimizer.zero_grad()
        if rank == 0 and len(losses) % 10 == 0:
            print(f"batch {len(losses)}: loss {loss.item():.4f}")
    if rank == 0:
        model.module.model.save_pretrained(args.out / "model")
    dist.barrier()
    del model, optimizer  # what holds the process group would wait for ever if it went after it
    dist.destroy_process_group()
    return losses


if __name__ == "__main__":
    main()
