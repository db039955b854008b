"""A plan that is read out of a stream of documents."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, cast

import datasets
import numpy as np
import pytest
import torch
from datasets.distributed import split_dataset_by_node

from token_superposition import Phase, Schedule, TokenSuperpositionError
from token_superposition.data.stream import StreamedPlan


def test_processes_of_a_loop_stream_their_parts_of_the_documents() -> None:
    """As the docstring says: every process has the run's steps, and no token is read by two."""
    documents = datasets.Dataset.from_dict({"input_ids": [[*range(i, i + 7)] for i in range(0, 1400, 7)]})
    read: list[set[int]] = []
    for rank in (0, 1):
        mine = split_dataset_by_node(documents.to_iterable_dataset(num_shards=4), rank, 2)
        samples = list(StreamedPlan(mine, Schedule.two_phase(4, 3, 0.5), 4, batch_size=6 // 2))
        assert [s["input_ids"].shape for s in samples] == [(4, 3)] * 6 + [(4,)] * 6
        read.append({int(t) for s in samples for t in s["input_ids"].flatten()})
    assert not read[0] & read[1] and len(read[0]) == len(read[1]) == 4 * 3 * 6 + 4 * 6


@pytest.mark.parametrize("kind", [list, np.array, lambda ids: np.array(ids, np.uint16), torch.tensor])
def test_a_streamed_plan_reads_every_token_once(kind: Callable[[list[int]], Any]) -> None:
    documents = [{"input_ids": kind(list(range(first, first + 7)))} for first in range(0, 700, 7)]
    schedule = Schedule.two_phase(4, 3, 0.5)
    samples = list(StreamedPlan(documents, schedule, sequence_length=4, batch_size=2))
    assert len(samples) == len(StreamedPlan(documents, schedule, 4, 2)) == 8
    read = [sample["input_ids"].flatten().tolist() for sample in samples]
    assert [t for tokens in read for t in tokens] == list(range(4 * 12 + 4 * 4))
    for sample in samples:
        ids, targets = sample["input_ids"], sample["shift_labels"]
        assert torch.equal(targets, ids + (3 if ids.dim() == 2 else 1)) and targets.dtype == torch.int64


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor])
def test_a_padded_document_of_a_stream_is_refused(kind: Callable[[list[int]], Any]) -> None:
    """By its mask, of whatever type; none is no padding."""
    for mask in (kind([1] * 50), None):
        documents = [{"input_ids": kind(list(range(50))), "attention_mask": mask}]
        assert len(list(StreamedPlan(documents, Schedule([Phase(2)]), 4, 2))) == 4
    documents = [{"input_ids": kind([1] * 50), "attention_mask": kind([1] * 49 + [0])}]
    with pytest.raises(TokenSuperpositionError, match="is padded"):
        next(iter(StreamedPlan(documents, Schedule([Phase(2)]), 4, 2)))


def test_a_streamed_plan_takes_documents_of_any_length() -> None:
    """The time is that of the tokens: what is left of a long document is not moved for every sample."""

    def seconds(lengths: list[int], samples: int) -> float:
        documents = [{"input_ids": np.zeros(n, np.int64)} for n in lengths]
        plan = StreamedPlan(documents, Schedule([Phase(samples, 2, 2)]), 64, 1)
        begin = time.process_time()
        assert sum(1 for _ in plan) == samples
        return time.process_time() - begin

    seconds([1000], 4)  # whatever is done once
    assert seconds([10_000_000], 1000) < 5 * seconds([100] * 1300, 1000) + 0.5


def test_a_streamed_plan_skips_empty_documents_and_keeps_no_long_one() -> None:
    documents = [{"input_ids": ids} for ids in ([], list(range(500)), np.empty(0, np.uint16))]
    with pytest.warns(UserWarning, match="ended after 500 tokens"):
        samples = list(StreamedPlan(documents, Schedule([Phase(130, 1, 1)]), 4, 1))
    assert [int(t) for s in samples for t in s["input_ids"]] == [i % 500 for i in range(520)]
    assert all(s["input_ids"].untyped_storage().nbytes() <= 5 * 8 for s in samples)  # what a worker would send


def test_a_streamed_plan_says_when_it_cannot() -> None:
    schedule = Schedule.two_phase(4, 3, 0.5)
    for ids, what in (
        ([[1, 2]], r"shape \(1, 2\) and type int64"),
        ([1.5] * 20, "float64"),
        ("text", r"shape \(\)"),
        (None, "are None; give the ids"),
    ):
        with pytest.raises(TokenSuperpositionError, match=f"{what}.*whole numbers in one axis"):
            next(iter(StreamedPlan([{"input_ids": ids}], schedule, 4, 2)))
    with pytest.raises(TokenSuperpositionError, match="no tokens"):
        next(iter(StreamedPlan([], schedule, 4, 2)))
    for document, keys in (({"text": "a", "id": 3}, "text, id"), ({}, "none"), ([1, 2], "none, being no mapping")):
        with pytest.raises(TokenSuperpositionError, match=rf"no input_ids \(its keys: {keys}\); tokenise the text"):
            next(iter(StreamedPlan([document], schedule, 4, 2)))  # pyright: ignore[reportArgumentType]
    once = ({"input_ids": [i]} for i in range(20))
    with (
        pytest.warns(UserWarning, match="ended after 20 tokens"),
        pytest.raises(TokenSuperpositionError, match="can be read only once and is too short for the plan"),
    ):
        list(StreamedPlan(once, schedule, 4, 2))
    with pytest.warns(UserWarning, match="ended after 9 tokens"):
        samples = list(StreamedPlan([{"input_ids": list(range(9))}], schedule, 4, 2))
    assert samples[-1]["input_ids"].tolist() == [(60 + i) % 9 for i in range(4)]
    loader = torch.utils.data.DataLoader(StreamedPlan([{"input_ids": [1]}], schedule, 4, 2), num_workers=2)
    with pytest.raises(TokenSuperpositionError, match="2 loader workers"):
        next(iter(loader))


def test_a_stream_that_is_read_again_is_shuffled_anew() -> None:
    documents = datasets.Dataset.from_dict({"input_ids": [[i] for i in range(100)]}).to_iterable_dataset()
    plan = StreamedPlan(documents.shuffle(seed=0, buffer_size=100), Schedule([Phase(10)]), 20, 1)
    with pytest.warns(UserWarning, match="is read again"):
        read = [t for sample in plan for t in sample["input_ids"].tolist()]
    first, second = read[:100], read[100:]
    assert sorted(first) == sorted(second) == list(range(100)) and first != second


def test_a_schedule_that_is_none_is_told_at_once() -> None:
    with pytest.raises(TokenSuperpositionError, match="the schedule is a int; give a Schedule"):
        StreamedPlan([], cast(Any, 5), 20, 1)
