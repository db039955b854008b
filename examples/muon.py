"""Muon for the hidden matrices and AdamW for the rest, both torch's own, on a Llama.

python -m examples.text README.md docs/*.md --out data
python -m examples.muon --data data --steps 200
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from examples.nanogpt import get_batch
from token_superposition import Schedule, linear_multi_hot_cross_entropy, superpose


def main(argv: Sequence[str] | None = None) -> list[float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--out", type=Path, default=Path("out"))
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--bag-size", type=int, default=4)
    parser.add_argument("--ratio", type=float, default=0.3)
    args = parser.parse_args(argv)
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
    model = LlamaForCausalLM(shape)
    superpose(model)
    schedule = Schedule.two_phase(args.steps, args.bag_size, args.ratio)
    hidden = [p for p in model.model.layers.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if all(p is not q for q in hidden)]
    optimizers = (
        torch.optim.Muon(hidden, lr=2e-3, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=2e-3),
    )
    losses: list[float] = []
    for step in range(args.steps):
        bags = schedule.at(step).input_bag, schedule.at(step).output_bag
        ids, targets = get_batch(args.data / "train.bin", args.length, args.batch_size, step, *bags)
        hidden = model.get_decoder()(ids).last_hidden_state
        loss = linear_multi_hot_cross_entropy(hidden, model.get_output_embeddings().weight, targets)
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
        if step % 10 == 0:
            print(f"step {step}: bag {bags[0]}, loss {loss.item():.4f}")
    model.save_pretrained(args.out)
    return losses


if __name__ == "__main__":
    main()
