"""Compiles the Triton kernel for GPUs that need not be here: python -m tests.compile_kernel (without TRITON_INTERPRET).

One line of JSON a case: bytes of machine code, and what ptxas says of registers and of spilled bytes.
"""

from __future__ import annotations

import itertools
import json
import re
from contextlib import redirect_stdout
from io import StringIO
from typing import Any

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from token_superposition.loss.kernel import _loss_and_gradient, tile_of, warps_of  # pyright: ignore

CAPABILITIES = (80, 90, 100)  # A100, H100, B200
LOGITS = {"bf16": "fp32", "fp16": "fp32", "fp32": "fp32", "fp64": "fp64"}
SHAPES = ((16, 128_256), (1, 128_256), (4, 64))  # S, vocabulary


def compile_for(capability: int, logits: str, softcap: bool, s: int, v: int) -> dict[str, Any]:
    acc = LOGITS[logits]
    tile = tile_of(v, softcap, torch.float64 if acc == "fp64" else torch.float32)
    kinds = {"z_ptr": f"*{logits}", "z_stride": "i32", "y_ptr": "*i64", "w_ptr": f"*{acc}", "loss_ptr": f"*{acc}"}
    kinds |= {"v": "i32", "s": "i32", "z_loss": "fp32", "softcap": "fp32"}
    fixed = {"HAS_SOFTCAP": softcap, "ACC": tl.float64 if acc == "fp64" else tl.float32, "S": s, "TILE": tile}
    source = ASTSource(_loss_and_gradient, kinds | dict.fromkeys(fixed, "constexpr"), fixed)
    with redirect_stdout(StringIO()) as told:
        made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps_of(tile)})
    registers, spilled = (re.search(p, told.getvalue()) for p in (r"Used (\d+) registers", r"(\d+) bytes spill stores"))
    assert registers is not None and spilled is not None, told.getvalue()
    return {
        "case": f"sm_{capability} {logits} softcap={softcap} S={s} TILE={tile}",
        "bytes": len(made.asm["cubin"]),
        "registers": int(registers[1]),
        "spilled": int(spilled[1]),
    }


if __name__ == "__main__":
    triton.knobs.nvidia.dump_ptxas_log = True
    for capability, logits, softcap, shape in itertools.product(CAPABILITIES, LOGITS, (False, True), SHAPES):
        # The usual form for every GPU; for one of them every type and every shape, not all pairs of them.
        if (logits, shape) == ("bf16", SHAPES[0]) or (capability == 90 and (logits == "bf16" or shape == SHAPES[0])):
            print(json.dumps(compile_for(capability, logits, softcap, *shape)), flush=True)
