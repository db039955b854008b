"""The samples of a run out of a stream of documents, for text that is not on this disk."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from token_superposition.bags import fold, span
from token_superposition.data.plan import Sample, check_fingerprint, require_schedule
from token_superposition.errors import TokenSuperpositionError, require_int
from token_superposition.schedule import Schedule


class StreamedPlan(IterableDataset[Sample]):
    """Iterable dataset of a whole run: ``total_steps * batch_size`` samples, each from the tokens after the last one's.

    ``documents`` yields mappings with ``input_ids`` (a tokenised ``datasets.IterableDataset``, or anything that can be
    iterated over again); they are joined end to end, so let the tokenizer end each with its EOS token (one that
    begins a text with BOS, as Llama 3's does, puts no EOS by itself: keep the one and add the other). A sample of bag
    size ``a`` takes the next ``sequence_length * a`` tokens and looks as far ahead as its last targets; samples are
    those of ``PlannedDataset``: input_ids (L,) or (L, a), shift_labels (L,) or (L, b), int64. ``batch_size`` is the
    number of sequences of one optimizer step over all processes and accumulated micro-batches.

    ``Trainer`` and accelerate deal the samples out to their processes. In a loop of your own every process would read
    the same ones: give each its part of the documents, and its part of the step as ``batch_size``::

        mine = datasets.distributed.split_dataset_by_node(documents, rank, world_size)
        plan = StreamedPlan(mine, schedule, sequence_length, batch_size // world_size)

    The order is the stream's: shuffle ``documents`` (``shuffle(seed=..., buffer_size=...)``). A stream has no index, so
    going on at a step means reading up to it again, which is what ``Trainer`` and accelerate do; go on with as many
    loader workers (none or one), for ``datasets`` shuffles otherwise in a worker. One epoch is the whole run: what
    iterates again begins again with the bags.

    Raises ``TokenSuperpositionError`` while iterating for an empty stream, for a document without ``input_ids``, with
    padding or with ids below 0, and for more than one loader worker, which would each read the whole of it; warns where
    the stream ends and is read again.
    """

    def __init__(
        self,
        documents: Iterable[Mapping[str, Any]],
        schedule: Schedule,
        sequence_length: int,
        batch_size: int,
    ):
        self.documents = documents
        self.schedule = require_schedule(schedule)
        self.sequence_length = require_int("sequence_length", sequence_length, 1)
        self.batch_size = require_int("batch_size", batch_size, 1)

    def __len__(self) -> int:
        return self.schedule.total_steps * self.batch_size

    def fingerprint(self) -> dict[str, Any]:
        """What decides which tokens a sample has, as JSON values; of the documents it has nothing."""
        return {
            "phases": self.schedule.changes,
            "sequence_length": self.sequence_length,
            "batch_size": self.batch_size,
        }

    def check_fingerprint(self, saved: Mapping[str, Any], remedy: str) -> None:
        """Raise ``TokenSuperpositionError`` if ``saved`` is the fingerprint of other samples; it says what differs."""
        check_fingerprint(self.fingerprint(), saved, remedy)

    def __iter__(self) -> Iterator[Sample]:
        workers = get_worker_info()
        if workers is not None and workers.num_workers > 1:
            raise TokenSuperpositionError(
                f"{workers.num_workers} loader workers would each read the whole stream; use one, or none; if it "
                "cannot keep up, tokenise beforehand (tst prepare) and read a PlannedDataset"
            )
        waiting = np.empty(0, np.int64)  # tokens that were read and not used up
        documents = self._forever()
        for phase in self.schedule.phases:
            a, b = phase.input_bag, phase.output_bag
            wanted = span(self.sequence_length, a, b)
            for _ in range(phase.steps * self.batch_size):
                if (missing := wanted - len(waiting)) > 0:  # joined once a sample, however long the documents are
                    waiting = np.concatenate((waiting, *_take(documents, missing)))
                ids, targets = fold(torch.tensor(waiting[:wanted]), a, b)
                waiting = waiting[self.sequence_length * a :]
                yield {"input_ids": ids, "shift_labels": targets}

    def _forever(self) -> Iterator[Sequence[int]]:
        epoch = 0
        while True:
            read = 0
            if hasattr(self.documents, "set_epoch"):  # shuffles anew
                cast(Any, self.documents).set_epoch(epoch)
            for document in self.documents:
                try:
                    ids = document["input_ids"]
                except (KeyError, IndexError, TypeError):
                    keys = ", ".join(map(str, document)) if isinstance(document, Mapping) else "none, being no mapping"
                    raise TokenSuperpositionError(
                        f"a document of the stream has no input_ids (its keys: {keys or 'none'}); tokenise the text "
                        'first and give {"input_ids": ids}'
                    ) from None
                mask = document.get("attention_mask")  # a list, an array or a tensor
                if mask is not None and not np.asarray(mask).all():
                    raise TokenSuperpositionError(
                        "a document of the stream is padded (its attention_mask has 0), which would be trained on; "
                        "tokenise without padding: documents of any length are joined"
                    )
                if not hasattr(ids, "__len__"):
                    raise TokenSuperpositionError(
                        f"input_ids of a document are {ids!r}; give the ids of one document, whole numbers in one axis"
                    )
                read += len(ids)
                yield ids
            if not read:
                raise TokenSuperpositionError(
                    "the stream can be read only once and is too short for the plan; give a list or a dataset, or more "
                    "text"
                    if epoch
                    else "the stream has no tokens; give documents with input_ids"
                )
            epoch += 1
            if epoch == 1:
                warnings.warn(
                    f"the stream ended after {read} tokens and is read again; TST pays for speed with fresh text",
                    stacklevel=2,
                )


def _take(documents: Iterator[Any], wanted: int) -> Iterator[np.ndarray]:  # of int64
    """Documents of together ``wanted`` tokens or more."""
    while wanted > 0:
        ids = np.asarray(next(documents))  # a list, an array or a tensor
        if ids.size and ids.dtype.kind == "i" and ids.min() < 0:
            raise TokenSuperpositionError(
                f"input_ids of a document have {ids.min()}; give ids from 0 up: a plan has no padding and no masked "
                "tokens"
            )
        if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
            raise TokenSuperpositionError(
                f"input_ids of a document have shape {ids.shape} and type {ids.dtype}; give the ids of one document, "
                "whole numbers in one axis"
            )
        wanted -= len(ids)
        yield ids.astype(np.int64, copy=False)
