"""Heads that predict further tokens while the model is trained, and are no part of it afterwards."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from token_superposition.errors import TokenSuperpositionError

FILE = "mtp_heads.safetensors"


class MTPHeads(nn.Module):
    """Head k predicts the token (or, in a superposed phase, the bag) k positions after the one that the model predicts.

    The heads stand side by side on the last hidden state and share the model's unembedding (Gloeckle et al. 2024,
    arXiv 2404.19737). In place of their transformer layer each has one matrix: ``h + SiLU(W h)``, with ``W`` zero at
    first, so that it begins as the model's own prediction (Medusa, arXiv 2401.10774). ``weight`` is what the mean of
    their losses counts beside the model's own.

    They are added to ``model`` as its submodule ``mtp_heads``, so that optimizer, gradient clipping and DDP find their
    matrices, but they are in no state dict: what is saved of the model is the stock model. A checkpoint has them in a
    file of their own. ``del model.mtp_heads`` leaves the model as it was.
    """

    def __init__(self, model: nn.Module, heads: int, weight: float):
        super().__init__()
        end: Tensor = cast(Any, model).get_output_embeddings().weight
        vocab, width = end.shape
        for k in range(1, heads + 1):
            self.register_parameter(f"head{k}_weight", nn.Parameter(end.new_zeros(width, width)))
        self.heads, self.weight = heads, weight
        self.flops_per_token = 6.0 * heads * width * (width + vocab)  # forward and backward, as for any matrix
        model.add_module("mtp_heads", self)

    def forward(self, hidden: Tensor) -> Tensor:  # (B, L, d) -> (heads, B, L, d)
        return torch.stack([hidden + F.silu(F.linear(hidden, matrix)) for matrix in self.parameters()])

    def targets(self, targets: Tensor, ignore_index: int = -100) -> Tensor:  # (B, L[, s]) -> (heads, B, L[, s])
        """Those of each head: the model's own, k positions on; the last k positions have none."""
        further = targets.new_full((self.heads, *targets.shape), ignore_index)
        for k in range(1, self.heads + 1):
            further[k - 1, :, : targets.shape[1] - k] = targets[:, k:]
        return further

    def save(self, directory: Path) -> None:
        save_file({name: p.detach().contiguous() for name, p in self.named_parameters()}, directory / FILE)

    @torch.no_grad()
    def load(self, directory: Path) -> None:
        saved = load_file(directory / FILE)
        for name, p in self.named_parameters():
            p.copy_(saved[name])

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """Nothing: the state dict stays the model's."""

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """Nothing is missing in it."""


def check_checkpoint(checkpoint: Path, heads: int) -> None:
    """Raises ``TokenSuperpositionError`` for a checkpoint of a run with another number of heads."""
    saved = 0
    if (checkpoint / FILE).exists():
        with safe_open(checkpoint / FILE, "pt") as file:
            saved = len(file.keys())
    if saved != heads:
        raise TokenSuperpositionError(
            f"{checkpoint} was written with {saved} heads for further tokens and this run has {heads}; set "
            f"superposition.mtp_heads to {saved} (and mtp_weight as it was), or choose another --out"
        )
