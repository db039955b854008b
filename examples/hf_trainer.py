"""The usual script for a causal language model with the transformers ``Trainer`` and streaming ``datasets``.

python -m examples.hf_trainer --train 'text/*.txt' --validation held-out.txt --tokenizer gpt2 --max-steps 1000
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from datasets import load_dataset
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

from token_superposition import Schedule
from token_superposition.data.stream import StreamedPlan
from token_superposition.engines.transformers import TSTTrainer


def main(argv: Sequence[str] | None = None) -> list[float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", required=True)
    parser.add_argument("--validation", required=True)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--out", type=Path, default=Path("out"))
    parser.add_argument("--max-steps", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--accumulate", type=int, default=1)
    parser.add_argument("--block-size", type=int, default=128)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--save-steps", type=int, default=500)
    parser.add_argument("--resume", help="a checkpoint")
    parser.add_argument("--bag-size", type=int, default=4)
    parser.add_argument("--ratio", type=float, default=0.3)
    args = parser.parse_args(argv)
    set_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    files = {"train": args.train, "validation": args.validation}
    raw = load_dataset("text", data_files=files, sample_by="document", streaming=True)

    def tokenize(rows: dict[str, list[str]]) -> dict[str, Any]:
        return {"input_ids": [[*ids, tokenizer.eos_token_id] for ids in tokenizer(rows["text"])["input_ids"]]}

    def group_texts(rows: dict[str, list[list[int]]]) -> dict[str, Any]:
        ids = list(chain(*rows["input_ids"]))
        blocks = [ids[i : i + args.block_size] for i in range(0, len(ids) - args.block_size + 1, args.block_size)]
        return {"input_ids": blocks, "labels": blocks}

    tokenized = raw.map(tokenize, batched=True, remove_columns="text")
    grouped = tokenized.map(group_texts, batched=True)
    shape = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=args.width,
        intermediate_size=2 * args.width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=args.block_size,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        use_cache=False,
    )
    training_arguments = TrainingArguments(
        output_dir=str(args.out),
        max_steps=args.max_steps,
        per_device_train_batch_size=args.batch_size,
        gradient_accumulation_steps=args.accumulate,
        learning_rate=2e-3,
        warmup_steps=args.max_steps // 20,
        logging_steps=1,
        save_steps=args.save_steps,
        report_to="none",
    )
    schedule = Schedule.two_phase(args.max_steps, args.bag_size, args.ratio)
    batch_size = args.batch_size * args.accumulate * training_arguments.world_size
    trainer = TSTTrainer(
        model=LlamaForCausalLM(shape),
        args=training_arguments,
        train_dataset=StreamedPlan(tokenized["train"], schedule, args.block_size, batch_size),
        eval_dataset=grouped["validation"],
        data_collator=default_data_collator,
    )
    trainer.train(resume_from_checkpoint=args.resume)
    print(trainer.evaluate())
    trainer.save_model(str(args.out / "model"))
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


if __name__ == "__main__":
    main()
