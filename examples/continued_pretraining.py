"""Continued pre-training: an existing checkpoint, new text, a new optimizer and a warm-up once more.

python -m examples.text README.md docs/*.md --out data
python -m examples.muon --data data --out out
python -m examples.continued_pretraining --model out --data data --out further
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from examples.nanogpt import get_batch
from token_superposition import Schedule, linear_multi_hot_cross_entropy, superpose


@torch.no_grad()
def validate(model: nn.Module, file: Path, length: int, batch_size: int) -> float:
    batches = [get_batch(file, length, batch_size, i) for i in range(4)]
    losses = [F.cross_entropy(model(ids).logits.flatten(0, 1), targets.flatten()).item() for ids, targets in batches]
    return sum(losses) / len(losses)


def main(argv: Sequence[str] | None = None) -> list[float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--out", type=Path, default=Path("further"))
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--warmup-steps", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--bag-size", type=int, default=4)
    parser.add_argument("--ratio", type=float, default=0.3)
    args = parser.parse_args(argv)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    superpose(model)
    schedule = Schedule.two_phase(args.steps, args.bag_size, args.ratio)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
    warmup = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / args.warmup_steps))
    losses: list[float] = []
    print(f"before: validation loss {validate(model, args.data / 'val.bin', args.length, args.batch_size):.4f}")
    model.train()
    for step in range(args.steps):
        bags = schedule.at(step).input_bag, schedule.at(step).output_bag
        ids, targets = get_batch(args.data / "train.bin", args.length, args.batch_size, step, *bags)
        hidden = model.get_decoder()(ids).last_hidden_state
        loss = linear_multi_hot_cross_entropy(hidden, model.get_output_embeddings().weight, targets)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        warmup.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % 10 == 0:
            print(f"step {step}: bag {bags[0]}, loss {loss.item():.4f}")
    model.eval()
    print(f"after: validation loss {validate(model, args.data / 'val.bin', args.length, args.batch_size):.4f}")
    model.save_pretrained(args.out)
    return losses


if __name__ == "__main__":
    main()
