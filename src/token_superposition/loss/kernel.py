"""The Triton kernel: loss of a row and gradient of its logits, in place, in two passes over the row.

One program takes one row. The first pass finds the logsumexp online, tile by tile, in float32; the second writes the
gradient over the logits. The s targets are read at once as one vector before the logits are overwritten. So the cost is
that of a single target. Runs on the CPU, slowly, with ``TRITON_INTERPRET=1``.
"""

# pyright: basic
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# A tile is held in registers: as wide as they allow. Read and written at 3.8 of 4.2 TB/s on an H200.
MAX_TILE = 32_768
MAX_TILE_WITH_MORE_REGISTERS = 8192  # with a soft cap, or in float64


@triton.jit
def _loss_and_gradient(
    z_ptr,
    z_stride,
    y_ptr,
    w_ptr,
    loss_ptr,
    v,
    s,
    z_loss,
    softcap,
    HAS_SOFTCAP: tl.constexpr,
    ACC: tl.constexpr,  # float32, or float64 for float64 logits
    S: tl.constexpr,  # next power of two of s
    TILE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    z_ptr += row * z_stride
    place = tl.arange(0, S)
    y = tl.load(y_ptr + row * s + place, mask=place < s, other=-1)
    w = tl.load(w_ptr + row * s + place, mask=place < s, other=0.0)
    target = tl.load(z_ptr + y, mask=y >= 0, other=0.0).to(ACC)
    slope = tl.full((S,), 1.0, ACC)
    if HAS_SOFTCAP:
        tanh = 2 * tl.sigmoid(2 * target / softcap) - 1
        target = softcap * tanh
        slope = 1 - tanh * tanh

    top = tl.full((), -float("inf"), ACC)
    total = tl.full((), 0.0, ACC)
    for start in range(0, v, TILE):
        column = start + tl.arange(0, TILE)
        z = tl.load(z_ptr + column, mask=column < v, other=-float("inf")).to(ACC)
        if HAS_SOFTCAP:
            z = tl.where(column < v, softcap * (2 * tl.sigmoid(2 * z / softcap) - 1), -float("inf"))
        new_top = tl.maximum(top, tl.max(z, 0))
        finite = tl.where(new_top == -float("inf"), 0.0, new_top)  # no token so far may be one that can be predicted
        total = total * tl.exp(top - finite) + tl.sum(tl.exp(z - finite), 0)
        top = new_top
    lse = top + tl.log(total)
    loss = tl.log(total) - tl.sum(w * tl.where(w > 0, target - top, 0.0), 0) + z_loss * lse * lse
    tl.store(loss_ptr + row, loss)

    scale = 1 + 2 * z_loss * lse
    for start in range(0, v, TILE):
        column = start + tl.arange(0, TILE)
        z = tl.load(z_ptr + column, mask=column < v, other=0.0).to(ACC)
        g = scale * tl.exp(z - lse)
        if HAS_SOFTCAP:
            capped = 2 * tl.sigmoid(2 * z / softcap) - 1
            g = scale * tl.exp(softcap * capped - lse) * (1 - capped * capped)
        tl.store(z_ptr + column, g, mask=column < v)
    tl.debug_barrier()  # the targets are written after their tiles
    # A token that fills several places gets the sum of their weights, written alike from each of them.
    same = (y[:, None] == y[None, :]).to(ACC)
    summed = tl.sum(same * w[None, :], 1)
    tl.store(z_ptr + y, (scale * tl.exp(target - lse) - summed) * slope, mask=y >= 0)


def loss_and_gradient(
    z: Tensor,  # (n, V) logits, overwritten by the gradient
    y: Tensor,  # (n, s) int64 in [0, V); 0 where the weight is 0
    w: Tensor,  # (n, s) float32, or float64 for float64 logits
    softcap: float,
    z_loss: float,
) -> Tensor:  # (n,)
    n, v = z.shape
    z.gather(1, y)  # fails, without waiting for the device, where a target is beyond the row; the kernel would not
    losses = torch.empty(n, dtype=w.dtype, device=z.device)
    tile = tile_of(v, softcap != 0, w.dtype)
    launch: Any = _loss_and_gradient[(n,)]
    launch(
        z,
        z.stride(0),
        y.contiguous(),
        w.contiguous(),
        losses,
        v,
        y.shape[1],
        z_loss,
        softcap or 1.0,
        HAS_SOFTCAP=softcap != 0,
        ACC=tl.float64 if w.dtype == torch.float64 else tl.float32,
        S=triton.next_power_of_2(y.shape[1]),
        TILE=tile,
        num_warps=warps_of(tile),
    )
    return losses


def tile_of(v: int, softcap: bool, dtype: torch.dtype) -> int:
    most = MAX_TILE_WITH_MORE_REGISTERS if softcap or dtype == torch.float64 else MAX_TILE
    return min(1 << (v - 1).bit_length(), most)  # the next power of 2


def warps_of(tile: int) -> int:
    return max(min(tile // 1024, 32), 4)
