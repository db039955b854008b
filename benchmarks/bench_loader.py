"""Raw tokens a second that the planned dataset delivers, against what a training step of the demo's model takes.

    python -m benchmarks.bench_loader

Prints one line a bag size and appends rows to benchmarks/results.csv. Loader and model run in turn in this process.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, Qwen3Config, default_data_collator

from benchmarks.measure import append_rows
from token_superposition import Phase, Schedule, linear_multi_hot_cross_entropy, superpose
from token_superposition.data.plan import PlannedDataset
from token_superposition.experiment.demo import DEMO, VOCAB_SIZE

BATCH, LENGTH, ROUNDS = DEMO.train.batch_size, DEMO.data.sequence_length, 5


def main() -> None:
    torch.set_num_threads(1)
    model = superpose(AutoModelForCausalLM.from_config(Qwen3Config(vocab_size=VOCAB_SIZE, **DEMO.model.options)))
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tokens.npy"
        np.save(path, np.random.default_rng(0).integers(0, VOCAB_SIZE, 2**26).astype(np.uint16))
        tokens = np.load(path, mmap_mode="r")
        for bag in (1, 4, 16):
            plan = PlannedDataset(tokens, Schedule([Phase(20, bag, bag)]), LENGTH, BATCH)
            load: list[float] = []
            step: list[float] = []
            for r in range(ROUNDS):
                start = time.perf_counter()
                batch = default_data_collator([plan[i] for i in range(r * BATCH, (r + 1) * BATCH)])
                load.append(time.perf_counter() - start)
                start = time.perf_counter()
                hidden = model.get_decoder()(batch["input_ids"], use_cache=False).last_hidden_state
                linear_multi_hot_cross_entropy(hidden, model.lm_head.weight, batch["shift_labels"]).backward()
                step.append(time.perf_counter() - start)
            raw = BATCH * LENGTH * bag
            rows.append(
                {
                    "benchmark": "loader",
                    "bag_size": bag,
                    "raw_tokens_per_second": round(raw / statistics.median(load)),
                    "load_over_step": round(statistics.median(load) / statistics.median(step), 4),
                }
            )
            print(", ".join(f"{k} {v}" for k, v in rows[-1].items()))
    append_rows(rows)


if __name__ == "__main__":
    main()
