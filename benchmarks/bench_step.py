"""A whole training step (forward, backward, AdamW) at s = 16 and at s = 1, with the same latent length, side by side.

    python -m benchmarks.bench_step [--rounds 10]

The demo's model, and the 135M shape of SmolLM2 cut to 4 layers; on a GPU the whole shape in bfloat16, its layers
compiled.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.measure import append_rows, side_by_side
from benchmarks.plot import plot
from token_superposition import fold, linear_multi_hot_cross_entropy, span, superpose
from token_superposition.experiment.demo import DEMO, VOCAB_SIZE

BAG = 16
SMOLLM2_135M: dict[str, Any] = {  # untied, as in arXiv 2605.06546: 270M parameters with the vocabulary of Llama 3
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
}


def step_of(model: Any, optimizer: torch.optim.Optimizer, batch: int, length: int, s: int) -> Callable[[], None]:
    device = next(model.parameters()).device
    tokens = torch.randint(model.config.vocab_size, (batch, span(length, s, s)), device=device)
    ids, targets = fold(tokens, s, s)
    decoder, head = model.get_decoder(), model.get_output_embeddings().weight

    def call() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            hidden = decoder(ids, use_cache=False).last_hidden_state
            loss = linear_multi_hot_cross_entropy(hidden, head, targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return call


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    gpu = torch.cuda.is_available()
    parser.add_argument("--rounds", type=int, default=20 if gpu else 10)
    rounds = parser.parse_args().rounds
    demo: dict[str, Any] = {"vocab_size": VOCAB_SIZE, **DEMO.model.options}
    cases: dict[str, tuple[str, dict[str, Any], int, int]] = {
        "demo model, 64 x 128": (DEMO.model.architecture, demo, 64, 128)
    }
    if gpu:
        cases["270M shape, 16 x 2048"] = ("llama", {**SMOLLM2_135M, "vocab_size": 128_256}, 16, 2048)
    else:
        cut = {**SMOLLM2_135M, "vocab_size": 49_152, "num_hidden_layers": 4}
        cases["135M shape of 4 layers, 4 x 256"] = ("llama", cut, 4, 256)
    rows: list[dict[str, Any]] = []
    for title, (architecture, options, batch, length) in cases.items():
        torch.manual_seed(0)
        config = AutoConfig.for_model(architecture, **{**options, "tie_word_embeddings": False})
        model: Any = superpose(AutoModelForCausalLM.from_config(config)).to("cuda" if gpu else "cpu")
        if gpu:
            for layer in model.get_decoder().layers:
                layer.compile()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        calls = {f"s = {s}": step_of(model, optimizer, batch, length, s) for s in (1, BAG)}
        title += ", compiled" if gpu else ""
        print(title)
        for name, timing in side_by_side(calls, rounds).items():
            row = {"benchmark": "step", "case": title, "contender": name, **timing.row(), "rounds": rounds}
            rows.append(row)
            print(f"  {name:8} {row['median_ms']:8.1f} ms")
    append_rows(rows)
    plot("step")


if __name__ == "__main__":
    main()
