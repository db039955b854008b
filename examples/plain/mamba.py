"""A model that is not a transformer: Mamba of transformers in a plain loop.

python -m examples.text README.md docs/*.md --out data
python -m examples.mamba --data data --steps 200
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.nn import functional as F
from transformers import MambaConfig, MambaForCausalLM

from examples.plain.nanogpt import get_batch


def main(argv: Sequence[str] | None = None) -> list[float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--out", type=Path, default=Path("out"))
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--width", type=int, default=64)
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    shape = MambaConfig(vocab_size=256, hidden_size=args.width, num_hidden_layers=2, state_size=8, use_cache=False)
    model = MambaForCausalLM(shape)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses: list[float] = []
    for step in range(args.steps):
        ids, targets = get_batch(args.data / "train.bin", args.length, args.batch_size, step)
        logits = model(ids).logits
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % 10 == 0:
            print(f"step {step}: loss {loss.item():.4f}")
    model.save_pretrained(args.out)
    return losses


if __name__ == "__main__":
    main()
