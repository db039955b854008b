"""A whole training step in bfloat16 (autocast) and in float32, side by side: what ``precision = "auto"`` goes by.

    python -m benchmarks.bench_precision [--rounds 10]

The demo's model, and the 135M shape of SmolLM2 cut to 4 layers, each also with compiled layers.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.bench_step import SMOLLM2_135M, step_of
from benchmarks.measure import append_rows, side_by_side
from token_superposition import superpose
from token_superposition.experiment.demo import DEMO, VOCAB_SIZE


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    rounds = parser.parse_args().rounds
    demo: dict[str, Any] = {"vocab_size": VOCAB_SIZE, **DEMO.model.options}
    cut = {**SMOLLM2_135M, "vocab_size": 49_152, "num_hidden_layers": 4}
    cases: list[tuple[str, str, dict[str, Any], int, int]] = [
        ("demo model, 64 x 128", DEMO.model.architecture, demo, 64, 128),
        ("135M shape of 4 layers, 4 x 256", "llama", cut, 4, 256),
    ]
    rows: list[dict[str, Any]] = []
    for title, architecture, options, batch, length in cases:
        for compiled in (False, True):
            torch.manual_seed(0)
            config = AutoConfig.for_model(architecture, **{**options, "tie_word_embeddings": False})
            model: Any = superpose(AutoModelForCausalLM.from_config(config))
            model.to("cuda" if torch.cuda.is_available() else "cpu")
            if compiled:
                for layer in model.get_decoder().layers:
                    layer.compile()
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
            calls = {p: step_of(model, optimizer, batch, length, 1, p == "bfloat16") for p in ("float32", "bfloat16")}
            case = title + (", compiled" if compiled else "")
            print(case)
            for name, timing in side_by_side(calls, rounds).items():
                row = {"benchmark": "precision", "case": case, "contender": name, **timing.row(), "rounds": rounds}
                rows.append(row)
                print(f"  {name:8} {row['median_ms']:8.1f} ms")
    append_rows(rows)


if __name__ == "__main__":
    main()
