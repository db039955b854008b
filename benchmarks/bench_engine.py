"""The default engine with and without this package: time of a step, tokens a second, peak memory, side by side.

    python -m benchmarks.bench_engine [--presets 270m 600m 3b] [--micro-batch 8] [--rounds 2] [--steps 20]

Three runs of one shape, in turn, each as `tst train` would run it: the stock Trainer of transformers on ordinary
batches, ours on ordinary batches (recovery phase), ours on bags (superposition). A step is one micro-batch: forward,
backward, clipping and AdamW; the first steps of a run are left out. On a GPU: the presets, compiled, in bfloat16, with
the largest micro-batch (a power of two) with which all three fit, the 3B one with activation checkpointing. On a CPU:
the demo's model with its whole batch. MFU is over the peak that `tst plan` knows of this GPU.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    default_data_collator,
)
from transformers.trainer_utils import IntervalStrategy

from benchmarks.measure import Timing, append_rows, synchronize
from benchmarks.plot import plot
from token_superposition import Phase, Schedule
from token_superposition.data.plan import PlannedDataset
from token_superposition.engines.transformers import TSTTrainer
from token_superposition.experiment.budget import GPUS, shape_of
from token_superposition.experiment.config import Config, load_config
from token_superposition.experiment.launch import Launch
from token_superposition.experiment.run import training_arguments

LEFT_OUT = 5
VOCABULARY = {"demo": 2048}  # elsewhere Llama 3's, as in the paper
CHECKPOINTED = ("3b",)


class Ordinary(Dataset[dict[str, torch.Tensor]]):
    """What users of the stock Trainer give it: ids and labels, not shifted."""

    def __init__(self, tokens: np.ndarray[Any, Any], length: int, samples: int):
        self.tokens, self.length, self.samples = tokens, length, samples

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = torch.from_numpy(self.tokens[index * self.length : (index + 1) * self.length].astype(np.int64))
        return {"input_ids": ids, "labels": ids}


class StepTimes(TrainerCallback):
    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        synchronize()
        self.start = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        synchronize()
        self.seconds.append(time.perf_counter() - self.start)


def run(config: Config, contender: str, vocabulary: int, tokens: Any, folder: Path) -> tuple[list[float], int]:
    """Seconds of the counted steps, and peak bytes (0 on a CPU)."""
    torch.manual_seed(0)
    options = {"vocab_size": vocabulary, "max_position_embeddings": config.data.sequence_length, **config.model.options}
    model: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(config.model.architecture, **options))
    args = training_arguments(config, folder, Launch())
    args.eval_strategy = IntervalStrategy.NO
    times = StepTimes()
    t, length = config.train, config.data.sequence_length
    if contender == "Trainer alone":
        data: Any = Ordinary(tokens, length, t.steps * t.batch_size)
        trainer: Any = Trainer(model, args, train_dataset=data, data_collator=default_data_collator, callbacks=[times])
    else:
        s = config.superposition.bag_size if contender.startswith("ours, superposed") else 1
        plan = PlannedDataset(tokens, Schedule([Phase(t.steps, s, s)]), length, t.batch_size)
        trainer = TSTTrainer(model, args, train_dataset=plan, callbacks=[times])
    trainer.remove_callback(PrinterCallback)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    trainer.train()
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    return times.seconds[LEFT_OUT:], peak


def peak_flops() -> float | None:
    """By the data sheet of this GPU; None where ``tst plan`` does not know it."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return next((gpu.flops for kind, gpu in GPUS.items() if kind in name), None)


def largest_micro_batch(config: Config, contenders: list[str], vocabulary: int, tokens: Any, folder: Path) -> int:
    """The largest power of two with which two steps of each contender fit."""
    micro = 1
    while micro < 128:
        tried = replace(
            config, train=replace(config.train, steps=2, batch_size=2 * micro, micro_batch_size=None, compile=False)
        )
        try:
            for contender in contenders:
                run(tried, contender, vocabulary, tokens, folder)
        except torch.OutOfMemoryError:
            break
        finally:
            torch.cuda.empty_cache()
        micro *= 2
    return micro


def main() -> None:
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", default=["270m", "600m", "3b"] if gpu else ["demo"])
    parser.add_argument("--micro-batch", type=int, help="sequences of a step; by default the most that fit")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=20, help=f"of each run; the first {LEFT_OUT} are left out")
    options = parser.parse_args()
    for preset in options.presets:
        config = load_config(preset)
        checkpointed = gpu and preset in CHECKPOINTED
        config = replace(config, train=replace(config.train, activation_checkpointing=checkpointed))
        s = config.superposition.bag_size
        contenders = ["Trainer alone", "ours, recovery", f"ours, superposed, s = {s}"]
        vocabulary = VOCABULARY.get(preset, 128_256)
        with tempfile.TemporaryDirectory(suffix=preset) as name:
            folder, tokens = Path(name), np.random.default_rng(0).integers(0, vocabulary, 2**26, dtype=np.uint32)
            micro = options.micro_batch
            if micro is None:
                whole = config.train.batch_size
                micro = largest_micro_batch(config, contenders, vocabulary, tokens, folder) if gpu else whole
            train = replace(config.train, steps=options.steps, batch_size=micro, micro_batch_size=None, warmup_steps=0)
            config = replace(config, train=replace(train, compile=gpu, loader_workers=0))
            seconds: dict[str, list[float]] = {c: [] for c in contenders}
            peaks = dict.fromkeys(contenders, 0)
            for r in range(options.rounds):
                for contender in contenders[r % 3 :] + contenders[: r % 3]:
                    measured, peaks[contender] = run(config, contender, vocabulary, tokens, folder)
                    seconds[contender] += measured
        length = config.data.sequence_length
        flops = float(shape_of(config, vocabulary).flops_per_token(length)) * micro * length
        title = f"{preset}, {micro} x {length:,}" + (", compiled" if gpu else "")
        title += ", activation checkpointing" if checkpointed else ""
        print(title)
        rows: list[dict[str, Any]] = []
        for contender in contenders:
            timing = Timing(tuple(seconds[contender]))
            latent = micro * length / timing.median
            row = {"benchmark": "engine", "case": title, "contender": contender, **timing.row()}
            row |= {"latent_tokens_per_second": round(latent), "rounds": options.rounds}
            row["raw_tokens_per_second"] = round(latent * (s if "superposed" in contender else 1))
            if gpu:
                row |= {"peak_mb": round(peaks[contender] / 1e6)}
            row["tflops"] = round(flops / timing.median / 1e12, 3)
            if (most := peak_flops()) is not None:
                row["mfu"] = round(flops / timing.median / most, 3)
            rows.append(row)
            print("  " + ", ".join(f"{k} {v}" for k, v in row.items() if k not in ("benchmark", "case", "rounds")))
        append_rows(rows)
    plot("engine")


if __name__ == "__main__":
    main()
