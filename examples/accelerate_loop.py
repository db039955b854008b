"""accelerate's own loop: ``prepare``, ``accumulate``, checkpoints by ``save_state``; one process or many.

python -m examples.text README.md docs/*.md --out data
accelerate launch -m examples.accelerate_loop --data data --steps 200
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from token_superposition import Schedule, multi_hot_cross_entropy, superpose
from token_superposition.data.plan import PlannedDataset


def main(argv: Sequence[str] | None = None) -> list[float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--out", type=Path, default=Path("out"))
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--micro-batch-size", type=int, default=8)
    parser.add_argument("--accumulate", type=int, default=2)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--save-at", type=int, default=0)
    parser.add_argument("--resume", type=int, default=0, help="the step of a checkpoint")
    parser.add_argument("--bag-size", type=int, default=4)
    parser.add_argument("--ratio", type=float, default=0.3)
    args = parser.parse_args(argv)
    accelerator = Accelerator(gradient_accumulation_steps=args.accumulate)
    set_seed(0)
    shape = LlamaConfig(
        vocab_size=256,
        hidden_size=args.width,
        intermediate_size=2 * args.width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=args.length,
        use_cache=False,
    )
    model = superpose(LlamaForCausalLM(shape))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    tokens = np.memmap(args.data / "train.bin", dtype=np.uint16, mode="r")
    schedule = Schedule.two_phase(args.steps, args.bag_size, args.ratio)
    batch_size = args.micro_batch_size * args.accumulate * accelerator.num_processes
    plan = PlannedDataset(tokens, schedule, args.length, batch_size)
    loader = DataLoader(plan, args.micro_batch_size)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    step = args.resume
    if step:
        plan.check_fingerprint(json.loads((args.out / f"step-{step}/plan.json").read_text()), "begin again")
        accelerator.load_state(args.out / f"step-{step}")
    losses: list[float] = []
    while step < args.steps:
        skipped = step * args.accumulate % len(loader)
        for batch in accelerator.skip_first_batches(loader, skipped):
            with accelerator.accumulate(model):
                logits = model(batch["input_ids"]).logits
                loss = multi_hot_cross_entropy(logits, batch["shift_labels"])
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
            losses.append(loss.item())
            if accelerator.sync_gradients:
                step += 1
                if step % 10 == 0:
                    accelerator.print(f"step {step}: loss {loss.item():.4f}")
                if step == args.save_at:
                    accelerator.save_state(args.out / f"step-{step}")
                    if accelerator.is_main_process:
                        (args.out / f"step-{step}/plan.json").write_text(json.dumps(plan.fingerprint()))
                if step == args.steps:
                    break
    accelerator.unwrap_model(model).save_pretrained(args.out / "model")
    return losses


if __name__ == "__main__":
    main()
