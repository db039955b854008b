"""Mean of the embeddings of a bag, forward and backward: ours and the usual ways, side by side.

    python -m benchmarks.bench_embedding [--rounds 20]

Vocabulary 32,768, width 512, 2,048 bags of 8. Memory is what torch held at its peak beyond inputs and gradient.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.measure import append_rows, peak_bytes, side_by_side
from benchmarks.plot import plot
from token_superposition import bag_embedding

Way = Callable[[nn.Embedding, Tensor], Tensor]
V, D, N, S = 32_768, 512, 2048, 8


def loop(table: nn.Embedding, ids: Tensor) -> Tensor:
    """The paper's published form: a lookup for every place in the bag, added up."""
    total = torch.zeros(*ids.shape[:-1], D, device=ids.device)
    for i in range(ids.shape[-1]):
        total = total + table(ids[..., i])
    return (total / ids.shape[-1]).to(table.weight.dtype)


def gather_then_mean(table: nn.Embedding, ids: Tensor) -> Tensor:
    return table(ids).float().mean(-2).to(table.weight.dtype)


def embedding_bag(table: nn.Embedding, ids: Tensor) -> Tensor:
    return F.embedding_bag(ids.reshape(-1, S), table.weight).unflatten(0, ids.shape[:-1])


def step(way: Way, table: nn.Embedding, ids: Tensor, grad: Tensor) -> None:
    table.weight.grad = None
    way(table, ids).backward(grad)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    rounds = parser.parse_args().rounds
    device = "cuda" if torch.cuda.is_available() else "cpu"
    ways: dict[str, Way] = {
        "ours": bag_embedding,
        "F.embedding_bag": embedding_bag,
        "gather then mean": gather_then_mean,
        "loop of lookups": loop,
    }
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        table = nn.Embedding(V, D, dtype=dtype, device=device)
        ids = torch.randint(V, (16, N // 16, S), device=device)
        grad = torch.randn(16, N // 16, D, device=device).to(dtype)

        calls = {name: partial(step, way, table, ids, grad) for name, way in ways.items()}
        timings = side_by_side(calls, rounds)
        title = f"V {V:,}, d {D}, {N:,} bags of {S}, {str(dtype).removeprefix('torch.')}"
        print(title)
        rows: list[dict[str, Any]] = []
        for name, call in calls.items():
            table.weight.grad = None
            extra = peak_bytes(call) - table.weight.nbytes
            row = {"benchmark": "embedding", "case": title, "contender": name, **timings[name].row()}
            row |= {"extra_mb": round(extra / 1e6, 1), "rounds": rounds}
            rows.append(row)
            print(f"  {name:20} {row['median_ms']:8.1f} ms  {row['extra_mb']:8.1f} MB")
        append_rows(rows)
    plot("embedding")


if __name__ == "__main__":
    main()
