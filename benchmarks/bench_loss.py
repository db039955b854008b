"""Loss from hidden states and head, forward and backward: every implementation and the usual ways, side by side.

    python -m benchmarks.bench_loss [--shapes 0 1] [--rounds 5] [--only chunked]

On a CPU in float32: the demo's shape, and 2,048 rows of width 512 with vocabularies of 32k and 128k. On a GPU in
bfloat16: 16,384 rows of widths 576, 2,048 and 4,096 with the vocabulary of Llama 3. A contender that cannot run here is
named and left out. "products" are the three matrix products alone; on a GPU "peak" is a product of 8,192 x 8,192
matrices, and every row has its TFLOP/s, counting these three products. Memory is what torch held at its peak beyond the
inputs and the two gradients.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.measure import append_rows, free_bytes, peak_bytes, side_by_side
from benchmarks.plot import plot
from token_superposition import linear_multi_hot_cross_entropy

BAG = 16
ROWS = {"cpu": 228, "cuda": 4096}  # those of a chunk of ours
SQUARE = 8192


@dataclass
class Case:
    n: int
    d: int
    v: int
    dtype: torch.dtype
    device: str

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        like: dict[str, Any] = {"dtype": self.dtype, "device": self.device}
        self.hidden = torch.randn(self.n, self.d, **like).requires_grad_()
        self.head = (torch.randn(self.v, self.d, **like) * self.d**-0.5).requires_grad_()
        self.targets = torch.randint(self.v, (self.n, BAG), device=self.device)

    def step(self, loss: Callable[[Tensor, Tensor, Tensor], Tensor], s: int) -> Callable[[], None]:
        def call() -> None:
            self.hidden.grad = self.head.grad = None
            loss(self.hidden, self.head, self.targets[:, :s]).backward()

        return call

    def products(self) -> None:
        """Logits and both gradients in the chunks of ours, nothing else."""
        with torch.no_grad():
            total = torch.zeros_like(self.head)
            rows = ROWS[self.device]
            logits = torch.empty(rows, self.v, dtype=self.dtype, device=self.device)
            out = torch.empty_like(self.hidden)
            for i in range(0, self.n, rows):
                h = self.hidden[i : i + rows]
                z = torch.mm(h, self.head.T, out=logits[: len(h)])
                torch.mm(z, self.head, out=out[i : i + rows])
                total.addmm_(z.T, h)


def loop(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    """The paper's published form: a cross-entropy on float32 logits for every place in the bag."""
    logits = (hidden @ head.T).float()
    terms = [F.cross_entropy(logits, targets[:, i]) for i in range(targets.shape[1])]
    return torch.stack(terms).mean()


def native(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    options = torch.nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(hidden, head, targets[:, 0], options=options)


def native_in_our_chunks(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    options = torch.nn.LinearCrossEntropyOptions(chunking_method=None, batch_chunk_size=ROWS[hidden.device.type])
    return F.linear_cross_entropy(hidden, head, targets[:, 0], options=options)


def cut_cross_entropy(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy  # pyright: ignore

    return linear_cross_entropy(hidden, head, targets[:, 0])


def liger(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    return LigerFusedLinearCrossEntropyLoss()(head, hidden, targets[:, 0])


def liger_in_float32(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    """With the head's gradient summed as ours is."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    return LigerFusedLinearCrossEntropyLoss(accum_dtype=torch.float32)(head, hidden, targets[:, 0])


def ours(impl: Any) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    return lambda hidden, head, targets: linear_multi_hot_cross_entropy(hidden, head, targets, impl=impl)


def contenders(case: Case) -> dict[str, Callable[[], None]]:
    known: dict[str, tuple[Callable[[Tensor, Tensor, Tensor], Tensor], tuple[int, ...]]] = {
        "ours chunked": (ours("chunked"), (1, BAG)),
        "ours native": (ours("native"), (BAG,)),
        "F.linear_cross_entropy": (native, (1,)),
        f"F.linear_cross_entropy, {ROWS[case.device]} rows": (native_in_our_chunks, (1,)),
        "F.cross_entropy": (loop, (1,)),
        "loop of cross-entropies": (loop, (BAG,)),
    }
    if case.device != "cpu":
        known |= {
            "ours triton": (ours("triton"), (1, BAG)),
            "ours liger": (ours("liger"), (BAG,)),
            "Liger": (liger, (1,)),
            "Liger, float32 sums": (liger_in_float32, (1,)),
            "cut-cross-entropy": (cut_cross_entropy, (1,)),
        }
    able: dict[str, Callable[[], None]] = {"products": case.products}
    if case.device != "cpu":
        left, right = torch.randn(2, SQUARE, SQUARE, dtype=case.dtype, device=case.device)
        able["peak"] = lambda: left @ right
    for name, (loss, sizes) in known.items():
        for s in sizes:
            needed = (4 + s) * case.n * case.v * 4 if loss is loop else 0
            if needed > free_bytes():
                print(f"left out: {name}, s = {s}: needs {needed / 1e9:.0f} GB")
                continue
            call = case.step(loss, s)
            if loss is not loop:
                try:
                    call()
                except Exception as e:  # whatever another library or another version of torch says
                    print(f"left out: {name}, s = {s}: {str(e).splitlines()[0]}")
                    continue
            able[f"{name}, s = {s}"] = call
    return able


CPU_SHAPES = ((8192, 96, 2048), (2048, 512, 32_768), (2048, 512, 131_072))  # rows, width, vocabulary
GPU_SHAPES = tuple((16_384, d, 128_256) for d in (576, 2048, 4096))


def main() -> None:
    gpu = torch.cuda.is_available()
    shapes = GPU_SHAPES if gpu else CPU_SHAPES
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", type=int, nargs="+", default=range(len(shapes)), help="which of the shapes, from 0")
    parser.add_argument("--rounds", type=int, default=20 if gpu else 5)
    parser.add_argument("--only", default="", help="regular expression: contenders whose name it is found in")
    options = parser.parse_args()
    device, dtype = ("cuda", torch.bfloat16) if gpu else ("cpu", torch.float32)
    for n, d, v in (shapes[i] for i in options.shapes):
        case = Case(n, d, v, dtype, device)
        title = f"N {n:,}, d {d:,}, V {v:,}, {str(dtype).removeprefix('torch.')}"
        print(title)
        calls = {name: call for name, call in contenders(case).items() if re.search(options.only, name)}
        timings = side_by_side(calls, options.rounds)
        gradients = (case.hidden.numel() + case.head.numel()) * dtype.itemsize
        rows: list[dict[str, Any]] = []
        for name, call in calls.items():
            case.hidden.grad = case.head.grad = None
            extra = 0 if name in ("products", "peak") else peak_bytes(call) - gradients
            row = {"benchmark": "loss", "case": title, "contender": name, **timings[name].row()}
            row |= {"extra_mb": round(extra / 1e6, 1), "rounds": options.rounds}
            if gpu:
                products = 2 * SQUARE**3 if name == "peak" else 6 * n * d * v
                row["tflops"] = round(products / timings[name].median / 1e12, 1)
            rows.append(row)
            rate = f"  {row['tflops']:6.1f} TFLOP/s" if gpu else ""
            print(f"  {name:30} {row['median_ms']:10.1f} ms  {row['extra_mb']:10.1f} MB{rate}")
        append_rows(rows)
    plot("loss")


if __name__ == "__main__":
    main()
