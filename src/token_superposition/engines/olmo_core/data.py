"""The plan as an OLMo-core data loader: the batch carries the phase, the state is the step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from olmo_core.data import DataCollator, DataLoaderBase, TextDataLoaderBase
from olmo_core.train import Duration, DurationUnit
from torch import Tensor
from torch.utils.data import DataLoader

from token_superposition.data.plan import PlannedDataset, Sample
from token_superposition.errors import TokenSuperpositionError

START_ANEW = (
    "start at step 0 with its weights alone (load_path, load_trainer_state=False and load_optim_state=False, another "
    "save_folder)"
)


class PlannedDataLoader(TextDataLoaderBase):
    """Reads a ``PlannedDataset`` in its order: step t is samples ``t * B`` to ``(t + 1) * B``, split over the ranks.

    A batch of a rank is ``input_ids`` (B / ranks, L) or (B / ranks, L, a) and ``labels`` (B / ranks, L) or
    (B / ranks, L, b), already shifted. OLMo-core's tokens are latent positions here: ``global_batch_size`` is ``B * L``
    in both phases, so that its token and FLOP counts follow the compute. One epoch is the whole run.

    Raises ``TokenSuperpositionError`` if B is not a multiple of the data-parallel ranks.
    """

    def __init__(
        self, plan: PlannedDataset, work_dir: str | Path, dp_world_size: int = 1, dp_rank: int = 0, workers: int = 0
    ):
        if plan.batch_size % dp_world_size:
            raise TokenSuperpositionError(
                f"the plan has {plan.batch_size} sequences a step, not a multiple of {dp_world_size} data-parallel "
                "processes; change train.batch_size or the number of processes"
            )
        super().__init__(
            collator=DataCollator(pad_token_id=0),  # of stock evaluators, which pad on the right and mask what they pad
            work_dir=work_dir,
            global_batch_size=plan.batch_size * plan.sequence_length,
            dp_world_size=dp_world_size,
            dp_rank=dp_rank,
        )
        self.plan = plan
        self.workers = workers

    @property
    def global_batch_size(self) -> int:
        return self._global_batch_size

    @global_batch_size.setter
    def global_batch_size(self, new_global_batch_size: int) -> None:
        """Raises ``TokenSuperpositionError`` for another one than the plan's, which every sample depends on."""
        if new_global_batch_size != self.global_batch_size:
            raise TokenSuperpositionError(
                f"the batch size is to become {new_global_batch_size} tokens, but every step of the plan has "
                f"{self.global_batch_size} ({self.plan.batch_size} sequences of {self.plan.sequence_length}); "
                "leave BatchSizeSchedulerCallback out"
            )

    @property
    def total_batches(self) -> int:
        return self.plan.schedule.total_steps

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.batches_processed, "plan": self.plan.fingerprint()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Raises ``TokenSuperpositionError`` for the state of another plan or of another kind of loader."""
        if not {"step", "plan"} <= state_dict.keys():
            raise TokenSuperpositionError(
                f"the checkpoint's data loader is no PlannedDataLoader: its state has no step of a plan; {START_ANEW}"
            )
        self.plan.check_fingerprint(state_dict["plan"], START_ANEW)
        self.batches_processed = state_dict["step"]
        self.tokens_processed = self.batches_processed * self.global_batch_size

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for batch in DataLoaderBase.__iter__(self):  # that of texts counts every token of a bag, and refuses it
            self.tokens_processed += self.global_batch_size
            yield batch

    def reshuffle(self, epoch: int | None = None, **kwargs: Any) -> None:
        """Nothing to shuffle: the plan has shuffled the whole run, which is one epoch.

        Raises ``TokenSuperpositionError`` for another one, which would begin with bags again.
        """
        if epoch is not None and epoch > 1:
            raise TokenSuperpositionError(f"epoch {epoch} begins, but {self._one_epoch()}")
        self._epoch = 1

    def check_duration(self, duration: Duration, steps: int | None) -> None:
        """Raise ``TokenSuperpositionError`` if it is not the plan's, at the start of a run and not at its end.

        A run that ends sooner may have seen nothing but bags. An epoch that is over is so for a longer plan, too.
        """
        if duration.unit == DurationUnit.epochs or steps not in (None, self.total_batches):
            told = f"{duration.value} epochs" if duration.unit == DurationUnit.epochs else f"{steps} steps"
            raise TokenSuperpositionError(
                f"the trainer's max_duration is {told}, but {self._one_epoch()} (hard_stop ends a run before that)"
            )

    def _one_epoch(self) -> str:
        n = self.total_batches
        return f"the plan of the samples has {n} steps, in one epoch; set max_duration to Duration.steps({n})"

    def _iter_batches(self) -> Iterable[dict[str, Any]]:
        steps = range(self.batches_processed, self.total_batches)
        return DataLoader(
            self.plan,
            batch_sampler=(self._samples(step) for step in steps),  # pyright: ignore[reportArgumentType]
            num_workers=self.workers,
            collate_fn=collate,
            pin_memory=torch.cuda.is_available(),
        )

    def _samples(self, step: int) -> range:
        """The samples that this rank reads in a step."""
        here = self.plan.batch_size // self.dp_world_size
        first = step * self.plan.batch_size + self.dp_rank * here
        return range(first, first + here)

    def get_mock_batch(self) -> dict[str, Any]:
        """The run's first batch, whose bags are the widest, for the trainer's dry run."""
        return collate([self.plan[i] for i in self._samples(0)])

    def global_num_tokens_in_batch(self, batch: dict[str, Any]) -> int:
        """Latent tokens; raw ones are ``plan.schedule.raw_tokens``."""
        return self.global_batch_size


def collate(samples: list[Sample]) -> dict[str, Tensor]:
    return {
        "input_ids": torch.stack([s["input_ids"] for s in samples]),
        "labels": torch.stack([s["shift_labels"] for s in samples]),
    }


def held_out_batches(
    dataset: Any, rows: int, dp_world_size: int, dp_rank: int, ignore_index: int
) -> Iterator[dict[str, Tensor]]:
    """All samples of a ``ValidationSet`` in as many batches of ``rows`` on every rank, filled up with ignored ones."""
    for start in range(0, len(dataset), rows * dp_world_size):
        mine = range(start + dp_rank * rows, start + (dp_rank + 1) * rows)
        batch = collate([dataset[min(i, len(dataset) - 1)] for i in mine])
        batch["labels"][[i >= len(dataset) for i in mine]] = ignore_index
        yield batch
