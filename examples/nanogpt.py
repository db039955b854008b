"""A plain PyTorch loop in the style of nanoGPT: a small GPT of its own, memory-mapped data, AdamW, cosine decay.

python -m examples.text README.md docs/*.md --out data
python -m examples.nanogpt --data data --steps 300
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from token_superposition import Schedule, fold, linear_multi_hot_cross_entropy, span, superpose


class Block(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention, self.projection = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        b, t, d = x.shape
        q, k, v = self.attention(self.ln_1(x)).view(b, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.projection(y.transpose(1, 2).reshape(b, t, d))
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    def __init__(self, vocab: int, block_size: int, layers: int, heads: int, width: int):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(vocab, width), nn.Embedding(block_size, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.ln_f = nn.LayerNorm(width)
        self.lm_head = nn.Linear(width, vocab, bias=False)
        self.apply(self._initialise)
        self.wte.weight = self.lm_head.weight

    def _initialise(self, module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        position = torch.arange(ids.shape[1], device=ids.device)
        x = self.ln_f(self.blocks(self.wte(ids) + self.wpe(position)))
        return linear_multi_hot_cross_entropy(x, self.lm_head.weight, targets)


def get_batch(file: Path, block_size: int, batch_size: int, seed: int, a: int = 1, b: int = 1) -> tuple[Tensor, Tensor]:
    data = np.memmap(file, dtype=np.uint16, mode="r")
    generator = torch.Generator().manual_seed(seed)
    n = span(block_size, a, b)
    starts = torch.randint(len(data) - n + 1, (batch_size,), generator=generator).tolist()
    tokens = torch.stack([torch.from_numpy(data[i : i + n].astype(np.int64)) for i in starts])
    return fold(tokens, a, b)


def learning_rate(step: int, steps: int, warmup: int, peak: float) -> float:
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (0.1 + 0.45 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))))


@torch.no_grad()
def validate(model: nn.Module, file: Path, block_size: int, batch_size: int) -> float:
    model.eval()
    losses = [model(*get_batch(file, block_size, batch_size, i)).item() for i in range(4)]
    model.train()
    return sum(losses) / len(losses)


def main(argv: Sequence[str] | None = None) -> list[float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--out", type=Path, default=Path("out"))
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--block-size", type=int, default=64)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--save-every", type=int, default=100)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--bag-size", type=int, default=4)
    parser.add_argument("--ratio", type=float, default=0.3)
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    model = GPT(256, args.block_size, args.layers, 2, args.width)
    superpose(model, model.wte)
    schedule = Schedule.two_phase(args.steps, args.bag_size, args.ratio)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, betas=(0.9, 0.95), weight_decay=0.1)
    first = 0
    if args.resume:
        checkpoint = torch.load(args.out / "ckpt.pt", weights_only=True)
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        first = checkpoint["step"]
        if checkpoint.get("phases") != schedule.changes:
            raise SystemExit(f"the checkpoint has phases {checkpoint.get('phases')}, these are {schedule.changes}")

    losses: list[float] = []
    for step in range(first, args.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.steps, args.steps // 20, args.learning_rate)
        bags = schedule.at(step).input_bag, schedule.at(step).output_bag
        ids, targets = get_batch(args.data / "train.bin", args.block_size, args.batch_size, step, *bags)
        loss = model(ids, targets)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        if step % 10 == 0:
            print(f"step {step}: bag {bags[0]}, loss {loss.item():.4f}")
        if (step + 1) % args.save_every == 0 or step + 1 == args.steps:
            args.out.mkdir(parents=True, exist_ok=True)
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
            torch.save(state | {"phases": schedule.changes}, args.out / "ckpt.pt")
    print(f"validation loss {validate(model, args.data / 'val.bin', args.block_size, args.batch_size):.4f}")
    return losses


if __name__ == "__main__":
    main()
