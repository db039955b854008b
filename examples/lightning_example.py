"""Lightning: a ``LightningModule``, a data module and the ``Trainer``.

python -m examples.text README.md docs/*.md --out data
python -m examples.lightning_example --data data --steps 200
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Sampler
from transformers import LlamaConfig, LlamaForCausalLM

from token_superposition import Schedule, multi_hot_cross_entropy, superpose
from token_superposition.data.plan import PlannedDataset


class Blocks(Dataset[dict[str, Tensor]]):
    """Consecutive sequences of a stream of tokens."""

    def __init__(self, tokens: np.ndarray, length: int):
        self.tokens, self.length = tokens, length

    def __len__(self) -> int:
        return (len(self.tokens) - 1) // self.length

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        block = torch.from_numpy(self.tokens[i * self.length : (i + 1) * self.length + 1].astype(np.int64))
        return {"input_ids": block[:-1], "shift_labels": block[1:]}


class InOrder(Sampler[int]):
    """One process's samples of a plan in their order; of a run that goes on, those that are left."""

    def __init__(self, samples: int, first: int, rank: int, processes: int):
        self.samples, self.first, self.rank, self.processes = samples, first, rank, processes

    def __len__(self) -> int:  # of the whole run, whose batches Lightning counts
        return self.samples // self.processes

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.first + self.rank, self.samples, self.processes))


class Superposition(lightning.Callback):
    """Lets the model read bags; logs bag size and raw tokens; keeps a run to its plan."""

    def on_fit_start(self, trainer: lightning.Trainer, module: Any) -> None:
        superpose(module.model)

    def on_train_batch_start(self, trainer: lightning.Trainer, module: Any, batch: Any, i: int) -> None:
        plan, step = trainer.datamodule.plan, i // trainer.accumulate_grad_batches
        raw_tokens = float(plan.schedule.raw_tokens(plan.batch_size, plan.sequence_length, step))
        module.log_dict({"bag": float(plan.schedule.at(step).input_bag), "raw_tokens": raw_tokens})

    def on_save_checkpoint(self, trainer: lightning.Trainer, module: Any, checkpoint: dict[str, Any]) -> None:
        checkpoint["plan"] = trainer.datamodule.plan.fingerprint()

    def on_load_checkpoint(self, trainer: lightning.Trainer, module: Any, checkpoint: dict[str, Any]) -> None:
        trainer.datamodule.plan.check_fingerprint(checkpoint["plan"], "begin again without --resume")


class Text(lightning.LightningDataModule):
    def __init__(self, folder: Path, length: int, batch_size: int, schedule: Schedule):
        super().__init__()
        self.folder, self.length, self.batch_size, self.schedule = folder, length, batch_size, schedule

    @cached_property
    def plan(self) -> PlannedDataset:
        sequences = self.batch_size * self.trainer.world_size * self.trainer.accumulate_grad_batches  # of a step
        return PlannedDataset(self.tokens("train"), self.schedule, self.length, sequences)

    def tokens(self, split: str) -> np.ndarray:
        return np.memmap(self.folder / f"{split}.bin", dtype=np.uint16, mode="r")

    def train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        done = self.trainer.fit_loop.epoch_loop.batch_progress.current.ready  # batches, also inside a step
        first = done * self.batch_size * self.trainer.world_size
        order = InOrder(len(self.plan), first, self.trainer.global_rank, self.trainer.world_size)
        return DataLoader(self.plan, self.batch_size, sampler=order)

    def val_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        blocks = Blocks(self.tokens("val"), self.length)
        share = DistributedSampler(blocks, self.trainer.world_size, self.trainer.global_rank, shuffle=False)
        return DataLoader(blocks, self.batch_size, sampler=share)


class CausalLM(lightning.LightningModule):
    def __init__(self, shape: LlamaConfig):
        super().__init__()
        self.model = LlamaForCausalLM(shape)
        self.losses: list[float] = []

    def training_step(self, batch: dict[str, Tensor], i: int) -> Tensor:
        logits = self.model(batch["input_ids"]).logits
        loss = multi_hot_cross_entropy(logits, batch["shift_labels"])
        self.losses.append(loss.item())
        self.log("loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: dict[str, Tensor], i: int) -> None:
        logits = self.model(batch["input_ids"]).logits
        loss = F.cross_entropy(logits.flatten(0, 1), batch["shift_labels"].flatten())
        self.log("val_loss", loss, prog_bar=True, sync_dist=True)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=2e-3, betas=(0.9, 0.95))


def main(argv: Sequence[str] | None = None) -> list[float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--out", type=Path, default=Path("out"))
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--accumulate", type=int, default=1, help="batches of an optimizer step")
    parser.add_argument("--devices", default="auto")
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--save-every", type=int, default=100)
    parser.add_argument("--val-every", type=int, default=100)
    parser.add_argument("--resume", type=Path, help="a checkpoint")
    parser.add_argument("--bag-size", type=int, default=4)
    parser.add_argument("--ratio", type=float, default=0.3)
    args = parser.parse_args(argv)
    lightning.seed_everything(0, verbose=False)
    shape = LlamaConfig(
        vocab_size=256,
        hidden_size=args.width,
        intermediate_size=2 * args.width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=args.length,
        use_cache=False,
    )
    schedule = Schedule.two_phase(args.steps, args.bag_size, args.ratio)
    module, data = CausalLM(shape), Text(args.data, args.length, args.batch_size, schedule)
    checkpoints = lightning.pytorch.callbacks.ModelCheckpoint(
        args.out, "{step}", every_n_train_steps=args.save_every, save_top_k=-1
    )
    trainer = lightning.Trainer(
        max_steps=args.steps,
        devices=args.devices,
        callbacks=[checkpoints, Superposition()],
        gradient_clip_val=1.0,
        accumulate_grad_batches=args.accumulate,
        use_distributed_sampler=False,  # InOrder shares out the plan's steps
        check_val_every_n_epoch=None,  # an epoch is the whole run
        val_check_interval=args.val_every * args.accumulate,
        logger=False,
        default_root_dir=args.out,
    )
    trainer.fit(module, data, ckpt_path=args.resume)
    trainer.validate(module, data)
    module.model.save_pretrained(args.out / "model")
    return module.losses


if __name__ == "__main__":
    main()
