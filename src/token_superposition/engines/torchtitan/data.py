"""A loader for torchtitan that reads the planned samples of our token store."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from typing import Annotated, Any

import torch
import tyro
from torch import Tensor
from torch.utils.data import DataLoader
from torchtitan.components.dataloader import BaseDataLoader

from token_superposition.data.plan import PlannedDataset, ValidationSet
from token_superposition.data.store import TokenStore
from token_superposition.engines.torchtitan.loss import IGNORED
from token_superposition.schedule import Schedule

START_ANEW = (
    "start at step 0 with its weights alone (--checkpoint.enable, --checkpoint.initial_load_path with the absolute "
    "path of its step-N, --checkpoint.no-initial_load_in_hf, another --dump_folder)"
)
Batch = tuple[dict[str, Tensor], Tensor]


class PlannedLoader(BaseDataLoader):
    """Micro-batches of step t: its samples ``t*B .. (t+1)*B``, dealt over micro-batches and data-parallel processes.

    A batch is ``({"input": ids, "positions": positions}, targets)``: ids (b, L) or (b, L, input_bag), targets (b, L) or
    (b, L, output_bag), positions (b, L) = 0..L-1, which number latent positions in both phases. The state is the
    number of finished steps and the plan's fingerprint: a run may go on with another number of processes.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(BaseDataLoader.Config):
        dataset: Annotated[str, tyro.conf.Suppress] = ""
        """Not read: the text is that of ``dataset_path``."""
        seed: int = 0
        """Decides the order of the data."""
        num_workers: int = 0
        """Processes that read data ahead."""
        pin_memory: bool = False
        """Copy batches to pinned memory."""
        schedule: Annotated[Schedule | None, tyro.conf.Suppress] = None
        """Set by the trainer."""
        global_batch_size: Annotated[int, tyro.conf.Suppress] = 0
        """Set by the trainer."""

        def plan(self, sequence_length: int) -> PlannedDataset:
            """Raises ``TokenSuperpositionError`` if there is no text, or too little."""
            assert self.dataset_path is not None and self.schedule is not None
            store, batch = TokenStore(self.dataset_path), self.global_batch_size
            return PlannedDataset(store, self.schedule, sequence_length, batch, self.seed)

    def __init__(
        self, config: Config, *, dp_world_size: int, dp_rank: int, seq_len: int, local_batch_size: int, **kwargs: Any
    ):
        self.config = config
        self.plan = config.plan(seq_len)
        self.dp_world_size, self.dp_rank, self.micro_batch = dp_world_size, dp_rank, local_batch_size
        self.per_step = config.global_batch_size // (local_batch_size * dp_world_size)
        self.micro_batches = 0
        """Micro-batches given out so far."""

    def __iter__(self) -> Iterator[Batch]:
        loader: DataLoader[dict[str, Tensor]] = DataLoader(
            self.plan,
            batch_sampler=self._indices(),  # pyright: ignore
            num_workers=self.config.num_workers,
            pin_memory=self.config.pin_memory,
        )
        for batch in loader:
            ids, targets = batch["input_ids"], batch["shift_labels"]
            self.micro_batches += 1
            yield _with_positions(ids), targets

    def _indices(self) -> Iterator[list[int]]:
        b = self.micro_batch
        for k in range(self.micro_batches, self.plan.schedule.total_steps * self.per_step):
            first = (k * self.dp_world_size + self.dp_rank) * b
            yield list(range(first, first + b))

    def begin_at(self, step: int) -> None:
        self.micro_batches = step * self.per_step

    def state_dict(self) -> dict[str, Any]:
        # As one value: torchtitan ends with a traceback where a checkpoint lacks a key of a dictionary.
        return {"step": self.micro_batches // self.per_step, "plan": json.dumps(self.plan.fingerprint())}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Raises ``TokenSuperpositionError`` for the state of another plan."""
        self.plan.check_fingerprint(json.loads(state_dict["plan"]), START_ANEW)
        self.begin_at(state_dict["step"])


class HeldOutLoader(BaseDataLoader):
    """Ordinary next-token batches of held-out text for torchtitan's validator: bag size 1, whatever the phase."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseDataLoader.Config):
        tokens: int = 65_536
        """Held-out tokens of each validation during training."""
        final_tokens: int = 524_288
        """Held-out tokens of the validation after the last step."""
        infinite: Annotated[bool, tyro.conf.Suppress] = True
        """Set by torchtitan's validator, which asks for the number of batches that the trainer has counted; those of
        the micro-batches of a pipeline may be more than the text has."""

        def steps(self, sequence_length: int, batch_size: int) -> int:
            """Steps of ``batch_size`` sequences, on all processes, in which all of the text is read."""
            return -(-len(self.samples(sequence_length)) // batch_size)

        def samples(self, sequence_length: int) -> ValidationSet:
            assert self.dataset_path is not None
            return ValidationSet(TokenStore(self.dataset_path, "validation"), sequence_length, self.tokens)

    def __init__(
        self, config: Config, *, dp_world_size: int, dp_rank: int, seq_len: int, local_batch_size: int, **kwargs: Any
    ):
        self.samples, self.infinite = config.samples(seq_len), config.infinite
        self.first, self.batch = dp_rank * local_batch_size, local_batch_size
        self.stride = dp_world_size * local_batch_size

    def __iter__(self) -> Iterator[Batch]:
        for start in count(self.first, self.stride):
            if not self.infinite and start >= len(self.samples) + self.first:
                return
            inside = [self.samples[min(start + i, len(self.samples) - 1)] for i in range(self.batch)]
            targets = torch.stack([s["shift_labels"] for s in inside])
            targets[max(len(self.samples) - start, 0) :] = IGNORED  # the last batches are filled up
            yield _with_positions(torch.stack([s["input_ids"] for s in inside])), targets

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        pass


def _with_positions(ids: Tensor) -> dict[str, Tensor]:
    return {"input": ids, "positions": torch.arange(ids.shape[1]).expand(ids.shape[:2]).contiguous()}
