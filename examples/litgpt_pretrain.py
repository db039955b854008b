"""LitGPT pre-training: its GPT and the loop of its ``pretrain.py`` over Lightning Fabric, without logging.

LitGPT 0.5.13 asks for a huggingface-hub that transformers 5 cannot use; what is needed here works beside it:

pip install lightning && pip install --no-deps litgpt==0.5.13
python -m examples.text README.md docs/*.md --out data
python -m examples.litgpt_pretrain --data data --steps 200
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from litgpt.model import GPT, Config
from litgpt.pretrain import get_lr, initialize_weights
from litgpt.utils import CycleIterator, chunked_cross_entropy
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from token_superposition import Schedule, multi_hot_cross_entropy, superpose
from token_superposition.data.plan import PlannedDataset


class Blocks(Dataset[Tensor]):
    """Consecutive sequences of a stream of tokens, one token longer than the model reads."""

    def __init__(self, tokens: np.ndarray, length: int):
        self.tokens, self.length = tokens, length

    def __len__(self) -> int:
        return (len(self.tokens) - 1) // self.length

    def __getitem__(self, i: int) -> Tensor:
        return torch.from_numpy(self.tokens[i * self.length : (i + 1) * self.length + 1].astype(np.int64))


@torch.no_grad()
def validate(model: nn.Module, loader: Any) -> float:
    model.eval()
    losses = [chunked_cross_entropy(model(batch[:, :-1]), batch[:, 1:]) for batch in loader]
    model.train()
    return torch.stack(losses).mean().item()


def main(argv: Sequence[str] | None = None) -> list[float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--out", type=Path, default=Path("out"))
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--micro-batch-size", type=int, default=8)
    parser.add_argument("--accumulate", type=int, default=2)
    parser.add_argument("--devices", default="1")
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--bag-size", type=int, default=4)
    parser.add_argument("--ratio", type=float, default=0.3)
    args = parser.parse_args(argv)
    fabric = L.Fabric(devices=args.devices)
    fabric.launch()
    fabric.seed_everything(0, verbose=False)
    config = Config.from_name(
        "pythia-14m", block_size=args.length, n_layer=2, n_head=2, n_embd=args.width, intermediate_size=4 * args.width,
        vocab_size=256, padded_vocab_size=256,
    )  # fmt: skip
    with fabric.init_module(empty_init=True):
        model = GPT(config)
    initialize_weights(fabric, model, n_layer=config.n_layer, n_embd=config.n_embd)
    superpose(model)
    model = fabric.setup(model)
    optimizer = fabric.setup_optimizers(torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95)))
    tokens = {split: np.memmap(args.data / f"{split}.bin", dtype=np.uint16, mode="r") for split in ("train", "val")}
    schedule = Schedule.two_phase(args.steps, args.bag_size, args.ratio)
    batch_size = args.micro_batch_size * args.accumulate * fabric.world_size
    plan = PlannedDataset(tokens["train"], schedule, args.length, batch_size)
    train_loader = plan.loader(args.micro_batch_size, rank=fabric.global_rank, world_size=fabric.world_size)
    val_loader = DataLoader(Blocks(tokens["val"], args.length), args.micro_batch_size)
    train_loader = fabric.setup_dataloaders(train_loader, use_distributed_sampler=False)
    val_loader = fabric.setup_dataloaders(val_loader)

    losses: list[float] = []
    max_iters = args.steps * args.accumulate
    for iteration, batch in enumerate(CycleIterator(train_loader)):
        if iteration == max_iters:
            break
        for group in optimizer.param_groups:
            group["lr"] = get_lr(2e-3, iteration, max_iters // 20, max_iters, 2e-4)
        input_ids, targets = batch["input_ids"], batch["shift_labels"]
        is_accumulating = (iteration + 1) % args.accumulate != 0
        with fabric.no_backward_sync(model, enabled=is_accumulating):
            logits = model(input_ids)
            loss = multi_hot_cross_entropy(logits, targets)
            fabric.backward(loss / args.accumulate)
        losses.append(loss.item())
        if not is_accumulating:
            fabric.clip_gradients(model, optimizer, max_norm=1.0)
            optimizer.step()
            optimizer.zero_grad()
        if iteration % 10 == 0:
            fabric.print(f"iteration {iteration}: loss {loss.item():.4f}")
    fabric.print(f"validation loss {validate(model, val_loader):.4f}")
    fabric.save(args.out / "lit_model.pth", {"model": model})
    return losses


if __name__ == "__main__":
    main()
