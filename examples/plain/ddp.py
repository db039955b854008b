"""A plain PyTorch loop on several processes: DistributedDataParallel, memory-mapped data, accumulation.

python -m examples.text README.md docs/*.md --out data
torchrun --nproc-per-node 2 -m examples.plain.ddp --data data --steps 200
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
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from transformers import LlamaConfig, LlamaForCausalLM


class Blocks(Dataset[dict[str, Tensor]]):
    """Consecutive sequences of a stream of tokens."""

    def __init__(self, tokens: np.ndarray, length: int):
        self.tokens, self.length = tokens, length

    def __len__(self) -> int:
        return (len(self.tokens) - 1) // self.length

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        block = torch.from_numpy(self.tokens[i * self.length : (i + 1) * self.length + 1].astype(np.int64))
        return {"input_ids": block[:-1], "shift_labels": block[1:]}


class WithLoss(nn.Module):
    """What DDP wraps: gradients are averaged of what its ``forward`` computes."""

    def __init__(self, model: LlamaForCausalLM):
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(self.model(ids).logits.flatten(0, 1), targets.flatten())


def main(argv: Sequence[str] | None = None) -> list[float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--out", type=Path, default=Path("out"))
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--micro-batch-size", type=int, default=8)
    parser.add_argument("--accumulate", type=int, default=2)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--width", type=int, default=64)
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
    blocks = Blocks(tokens, args.length)
    share = DistributedSampler(blocks, world_size, rank, seed=0, drop_last=True)
    loader = DataLoader(blocks, args.micro_batch_size, sampler=share, drop_last=True)

    losses: list[float] = []
    while len(losses) < args.steps * args.accumulate:
        for batch in loader:
            last = (len(losses) + 1) % args.accumulate == 0
            with nullcontext() if last else model.no_sync():
                loss = model(batch["input_ids"], batch["shift_labels"])
                (loss / args.accumulate).backward()
            losses.append(loss.item())
            if last:
                optimizer.step()
                optimizer.zero_grad()
            if len(losses) == args.steps * args.accumulate:
                break
            if rank == 0 and len(losses) % 10 == 0:
                print(f"batch {len(losses)}: loss {loss.item():.4f}")
        share.set_epoch(share.epoch + 1)
    if rank == 0:
        model.module.model.save_pretrained(args.out / "model")
    dist.barrier()
    del model, optimizer  # what holds the process group would wait for ever if it went after it
    dist.destroy_process_group()
    return losses


if __name__ == "__main__":
    main()
