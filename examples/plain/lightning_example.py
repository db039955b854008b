"""Lightning: a ``LightningModule``, a data module and the ``Trainer``.

python -m examples.text README.md docs/*.md --out data
python -m examples.lightning_example --data data --steps 200
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from transformers import LlamaConfig, LlamaForCausalLM


class Blocks(Dataset[dict[str, Tensor]]):
    """Consecutive sequences of a stream of tokens."""

    def __init__(self, tokens: np.ndarray, length: int):
        self.tokens, self.length = tokens, length

    def __len__(self) -> int:
        return (len(self.tokens) - 1) // self.length

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        block = torch.from_numpy(self.tokens[i * self.length : (i + 1) * self.length + 1].astype(np.int64))
        return {"input_ids": block[:-1], "shift_labels": block[1:]}


class Text(lightning.LightningDataModule):
    def __init__(self, folder: Path, length: int, batch_size: int):
        super().__init__()
        self.folder, self.length, self.batch_size = folder, length, batch_size

    def tokens(self, split: str) -> np.ndarray:
        return np.memmap(self.folder / f"{split}.bin", dtype=np.uint16, mode="r")

    def train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        return DataLoader(Blocks(self.tokens("train"), self.length), self.batch_size, shuffle=True, drop_last=True)

    def val_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        return DataLoader(Blocks(self.tokens("val"), self.length), self.batch_size)


class CausalLM(lightning.LightningModule):
    def __init__(self, shape: LlamaConfig):
        super().__init__()
        self.model = LlamaForCausalLM(shape)
        self.losses: list[float] = []

    def training_step(self, batch: dict[str, Tensor], i: int) -> Tensor:
        logits = self.model(batch["input_ids"]).logits
        loss = F.cross_entropy(logits.flatten(0, 1), batch["shift_labels"].flatten())
        self.losses.append(loss.item())
        self.log("loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: dict[str, Tensor], i: int) -> None:
        logits = self.model(batch["input_ids"]).logits
        self.log("val_loss", F.cross_entropy(logits.flatten(0, 1), batch["shift_labels"].flatten()), prog_bar=True)

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
    parser.add_argument("--resume", type=Path, help="a checkpoint")
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
    module, data = CausalLM(shape), Text(args.data, args.length, args.batch_size)
    checkpoints = lightning.pytorch.callbacks.ModelCheckpoint(
        args.out, "{step}", every_n_train_steps=args.save_every, save_top_k=-1
    )
    trainer = lightning.Trainer(
        max_steps=args.steps,
        devices=args.devices,
        callbacks=[checkpoints],
        gradient_clip_val=1.0,
        accumulate_grad_batches=args.accumulate,
        logger=False,
        default_root_dir=args.out,
    )
    trainer.fit(module, data, ckpt_path=args.resume)
    trainer.validate(module, data)
    module.model.save_pretrained(args.out / "model")
    return module.losses


if __name__ == "__main__":
    main()
