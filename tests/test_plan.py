from __future__ import annotations

import json
import pickle
import re
import warnings
from collections import Counter
from math import ceil, lcm
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.processes import server
from token_superposition import Phase, Schedule, TokenSuperpositionError
from token_superposition.data.boundaries import Boundaries
from token_superposition.data.plan import PlannedDataset, ValidationSet
from token_superposition.data.store import TokenStore

PHASES = st.lists(
    st.builds(Phase, st.integers(1, 6), st.sampled_from([1, 2, 3, 4]), st.sampled_from([1, 2, 4])),
    min_size=1,
    max_size=3,
)


def starts(plan: PlannedDataset) -> list[int]:
    return [plan.start_of(i) for i in range(len(plan))]


@given(PHASES, st.integers(1, 5), st.integers(1, 4), st.integers(0, 3))
def test_every_sample_is_contiguous_and_every_token_is_read_once(
    phases: list[Phase], length: int, batch: int, seed: int
) -> None:
    schedule = Schedule(phases)
    tokens = np.arange(20_000)
    plan = PlannedDataset(tokens, schedule, length, batch, seed)
    read: Counter[int] = Counter()
    for i in range(len(plan)):
        phase = schedule.at(i // batch)
        sample = plan[i]
        ids = sample["input_ids"].flatten()
        assert ids.tolist() == list(range(int(ids[0]), int(ids[0]) + length * phase.input_bag))
        first_target = sample["shift_labels"].reshape(length, -1)[:, 0]
        assert first_target.tolist() == [int(ids[0]) + (j + 1) * phase.input_bag for j in range(length)]
        assert plan.start_of(i) == ids[0]
        read.update(ids.tolist())
    assert len(plan) == schedule.total_steps * batch
    assert sum(read.values()) == schedule.raw_tokens(batch, length)
    assert plan.epochs <= 1 and max(read.values()) == 1


@pytest.mark.parametrize("spare", [0.0, 0.02, 0.1, 0.6])
@pytest.mark.parametrize("bags", [(8, 4, 2, 1), (7, 5, 3, 1), (4, 1), (1, 4), (1,)])
def test_text_that_is_read_twice_while_other_is_not_is_told(bags: tuple[int, ...], spare: float) -> None:
    """What the shorter stretches leave of their blocks may be missing at the end."""
    length, batch = 4, 4
    schedule = Schedule([Phase(n, s, s) for n, s in zip((67, 40, 31, 90), bags, strict=False)])
    block = length * lcm(*bags)
    size = ceil((1 + spare) * schedule.raw_tokens(batch, length) / block) * block
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        plan = PlannedDataset(np.arange(size + max(bags)), schedule, length, batch)
    read = Counter(int(t) for i in range(len(plan)) for t in plan[i]["input_ids"].flatten())
    twice = sum(n - 1 for n in read.values()) / size
    assert plan.epochs <= 1 and bool(told) == (twice > 0) and (twice == 0 or spare < 0.5)
    if told:
        most = re.search(r"up to (.*)% of the text may be read twice while other is not read; prepare", str(told[0]))
        assert most is not None and twice <= float(most[1]) / 100 + 0.0005


def test_text_that_is_read_more_than_once_is_told() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        PlannedDataset(np.arange(4 * 400 + 1), Schedule([Phase(100)]), 4, 4)
    with pytest.warns(UserWarning, match=r"reads its text 1\.01 times"):
        PlannedDataset(np.arange(4 * 400 + 1), Schedule([Phase(101)]), 4, 4)


def test_a_longer_plan_begins_like_a_shorter_one() -> None:
    """So that runs can branch off a longer one."""
    for first in ([], [Phase(5, 4, 4)], [Phase(20, 4, 4)], [Phase(3, 2, 2), Phase(2), Phase(2, 4, 4)]):
        tokens = np.arange(3_000)
        short, long = (PlannedDataset(tokens, Schedule([*first, Phase(n)]), 8, 4, seed=3) for n in (20, 99))
        assert starts(short) == starts(long)[: len(short)] and starts(short)[-1] != starts(long)[-1]


def test_seed_changes_the_order_and_nothing_else_does() -> None:
    tokens, schedule = np.arange(50_000), Schedule.two_phase(20, 4, 0.5)
    a, b, c = (PlannedDataset(tokens, schedule, 16, 4, seed) for seed in (1, 1, 2))
    assert [a.start_of(i) for i in range(80)] == [b.start_of(i) for i in range(80)]
    assert [a.start_of(i) for i in range(80)] != [c.start_of(i) for i in range(80)]
    order = np.random.default_rng(0).permutation(80).tolist()
    assert {i: a.start_of(i) for i in order} == {i: b.start_of(i) for i in range(80)}


def test_seed_changes_the_blocks_of_a_stretch_and_the_shifts_too() -> None:
    tokens, few, schedule = np.arange(50_000), Schedule([Phase(1, 4, 4)]), Schedule([Phase(20, 4, 4)])
    read, offsets = [], []
    for seed in (1, 2):
        read.append({*starts(PlannedDataset(tokens, few, 16, 4, seed))})
        plain, shifted = (PlannedDataset(tokens, schedule, 16, 4, seed, shift=shift) for shift in (False, True))
        offsets.append(np.subtract(starts(shifted), starts(plain)).tolist())
    assert read[0] != read[1] and offsets[0] != offsets[1]


def test_fingerprint_tells_plans_apart() -> None:
    def plan(phases: tuple[Phase, ...], **options: Any) -> PlannedDataset:
        values = {"tokens": np.arange(5000), "sequence_length": 8, "batch_size": 4} | options
        return PlannedDataset(schedule=Schedule(phases), **values)

    phases = (Phase(3, 4, 4), Phase(9))
    saved = json.loads(json.dumps(plan(phases).fingerprint()))
    boundaries = Boundaries(np.zeros(5000, bool), np.arange(5000) % 7 == 0)
    others: dict[str, tuple[tuple[Phase, ...], dict[str, Any]]] = {
        "phases [[0, 4, 4], [3, 1, 1]] there, [[0, 4, 2], [3, 1, 1]] here": ((Phase(3, 4, 2), Phase(9)), {}),
        "phases [[0, 4, 4], [3, 1, 1]] there, [[0, 4, 4], [4, 1, 1]] here": ((Phase(4, 4, 4), Phase(8)), {}),
        "sequence_length 8 there, 16 here": (phases, {"sequence_length": 16}),
        "batch_size 4 there, 8 here": (phases, {"batch_size": 8}),
        "seed 0 there, 1 here": (phases, {"seed": 1}),
        "tokens 5000 there, 4000 here": (phases, {"tokens": np.arange(4000)}),
        "shift False there, True here": (phases, {"shift": True}),
        "boundaries None there, ": (phases, {"boundaries": boundaries}),
    }
    for message, (schedule, options) in others.items():
        with pytest.raises(TokenSuperpositionError, match=f"samples: {re.escape(message)}.*, or begin again$"):
            plan(schedule, **options).check_fingerprint(saved, "begin again")
    for same in (plan(phases), plan((Phase(3, 4, 4), Phase(20)))):
        same.check_fingerprint(saved, "begin again")
    del saved["order"]
    with pytest.raises(TokenSuperpositionError, match="samples: order None there, 2 here"):
        plan(phases).check_fingerprint(saved, "begin again")


def test_fingerprint_tells_both_tables_of_boundaries_apart() -> None:
    def plan(before: int, after: int) -> PlannedDataset:
        boundaries = Boundaries(*(np.arange(5000) % n == 0 for n in (before, after)))
        return PlannedDataset(np.arange(5000), Schedule([Phase(3, 4, 4)]), 8, 4, boundaries=boundaries)

    saved = plan(5, 7).fingerprint()
    plan(5, 7).check_fingerprint(saved, "begin again")
    for other in (plan(5, 8), plan(6, 7)):
        with pytest.raises(TokenSuperpositionError, match="samples: boundaries"):
            other.check_fingerprint(saved, "begin again")


def test_a_label_that_is_masked_in_place_is_still_read() -> None:
    tokens = np.arange(200)
    plans = [PlannedDataset(tokens, Schedule([Phase(2, a, a), Phase(2)]), 8, 2) for a in (1, 4)]
    for sample in (plans[0][0], plans[1][0], ValidationSet(tokens, 8)[0]):
        read = sample["input_ids"].clone()
        sample["shift_labels"][:] = -100
        assert torch.equal(sample["input_ids"], read)


@pytest.mark.parametrize(("processes", "accumulate", "first_step"), [(1, 1, 0), (2, 2, 0), (2, 1, 7), (4, 2, 13)])
def test_processes_of_a_loop_share_out_each_step(processes: int, accumulate: int, first_step: int) -> None:
    plan = PlannedDataset(np.arange(20_000), Schedule.two_phase(20, 4, 0.5), 8, 16)
    micro = 16 // (processes * accumulate)
    share = {"first_batch": first_step * accumulate, "world_size": processes}
    ranks = [plan.loader(micro, rank=r, **share) for r in range(processes)]
    assert {len(loader) for loader in ranks} == {(20 - first_step) * accumulate}
    loaders = [iter(loader) for loader in ranks]
    for step in range(first_step, 20):
        batches = [next(loader)["input_ids"] for loader in loaders for _ in range(accumulate)]
        wanted = [plan[i]["input_ids"].tolist() for i in range(step * 16, (step + 1) * 16)]
        assert sorted(torch.cat(batches).tolist()) == sorted(wanted)
    assert not any(list(loader) for loader in loaders)


def test_a_loader_goes_on_inside_a_step() -> None:
    plan = PlannedDataset(np.arange(20_000), Schedule.two_phase(4, 4, 0.5), 8, 16)
    whole, rest = (list(plan.loader(4, rank=1, world_size=2, first_batch=n)) for n in (0, 3))
    assert len(whole) == 8 and all(
        torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(whole[3:], rest, strict=True)
    )
    assert list(plan.loader(4, first_batch=99)) == []
    loader = plan.loader(4, rank=1, world_size=2, first_batch=3)
    assert len(loader) == len(list(loader)) == 5
    with pytest.warns(UserWarning, match="read again from its first step"):
        again = list(loader)
    assert len(loader) == 8 and all(
        torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(whole, again, strict=True)
    )


def test_a_loader_tells_what_would_mix_the_phases() -> None:
    plan = PlannedDataset(np.arange(20_000), Schedule.two_phase(4, 4, 0.5), 8, 10)
    with pytest.raises(
        TokenSuperpositionError, match="10 sequences a step, of which 4 processes cannot read equally many"
    ):
        plan.loader(1, world_size=4)
    with pytest.raises(
        TokenSuperpositionError, match="a multiple of 12, of all processes and accumulated micro-batches"
    ):
        plan.loader(3, world_size=4)
    with pytest.raises(TokenSuperpositionError, match="rank is 2 of 2 processes"):
        plan.loader(5, rank=2, world_size=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loader = plan.loader(5, world_size=2)
        next(iter(loader))
        first = [batch["input_ids"] for batch in loader]  # it had not ended
    with pytest.warns(UserWarning, match="the plan has ended and is read again from its first step, with its bags"):
        again = [batch["input_ids"] for batch in loader]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_numbers_of_numpy_do_as_well() -> None:
    schedule, tokens = Schedule.two_phase(30, 4, 0.5), np.arange(20_000)
    plan = PlannedDataset(tokens, schedule, 32, 4)
    other = PlannedDataset(tokens, schedule, np.int64(32), np.int32(4))  # pyright: ignore
    for i in np.arange(0, len(plan), 7):
        assert torch.equal(plan[i]["input_ids"], other[int(i)]["input_ids"])
    assert other.fingerprint() == plan.fingerprint() and type(other.fingerprint()["batch_size"]) is int


def test_text_of_several_axes_is_refused() -> None:
    rows = np.arange(4000).reshape(40, 100)
    with pytest.raises(TokenSuperpositionError, match=r"have shape \(40, 100\); give one stream of ids"):
        PlannedDataset(rows, Schedule.two_phase(3, 2, 0.5), 8, 2)
    with pytest.raises(TokenSuperpositionError, match=r"have shape \(40, 100\); give one stream of ids"):
        ValidationSet(torch.from_numpy(rows), 8)


@pytest.mark.filterwarnings("ignore:the run leaves parts")
def test_waste_of_a_stretch_is_less_than_an_eighth_of_the_text() -> None:
    length, batch = 16, 4
    for steps in range(1, 20):
        schedule = Schedule([Phase(steps, 3, 3), Phase(steps, 4, 4), Phase(steps)])
        used = ceil(schedule.raw_tokens(batch, length) / (lcm(3, 4) * length))
        tokens = np.arange(ceil(used * 4 / 3 + 3) * lcm(3, 4) * length)
        tight = PlannedDataset(tokens, schedule, length, batch)
        assert tight.block_tokens == lcm(3, 4) * length
        samples = [(tight.start_of(i), schedule.at(i // batch).input_bag) for i in range(len(tight))]
        read = Counter(start + j for start, bag in samples for j in range(0, bag * length, length))
        assert max(read.values()) == 1


def test_too_little_text() -> None:
    with pytest.raises(TokenSuperpositionError, match="has 20 tokens, one block needs 68"):
        PlannedDataset(np.arange(20), Schedule.two_phase(10, 4, 0.5), 16, 2)
    with pytest.raises(TokenSuperpositionError, match="has 16 tokens, one sequence needs 17"):
        ValidationSet(np.arange(16), 16)


def test_text_that_is_just_long_enough_for_wide_targets() -> None:
    for more in range(5):
        plan = PlannedDataset(np.arange(10 * 8 + more), Schedule([Phase(9, 1, 4)]), 8, 1)
        assert all(plan[i]["shift_labels"].shape == (8, 4) for i in range(9))


def test_there_are_no_samples_outside_a_plan() -> None:
    plan = PlannedDataset(np.arange(5000), Schedule.two_phase(6, 4, 0.5), 8, 4)
    for i in (-1, len(plan)):
        with pytest.raises(IndexError, match=f"sample {i} of 24"):
            plan[i]


@given(length=st.integers(1, 9), tokens=st.integers(10, 300), wanted=st.none() | st.integers(1, 400))
def test_validation_is_ordinary_and_spread_over_the_text(length: int, tokens: int, wanted: int | None) -> None:
    held_out = ValidationSet(torch.arange(tokens), length, wanted)
    room = (tokens - 1) // length
    assert len(held_out) == (room if wanted is None else min(room, max(wanted // length, 1)))
    starts: list[int] = []
    for i in np.arange(len(held_out)):
        start = int(held_out[i]["input_ids"][0])
        assert held_out[i]["input_ids"].tolist() == list(range(start, start + length))
        assert held_out[i]["shift_labels"].tolist() == list(range(start + 1, start + length + 1))
        starts.append(start)
    places = np.array([*starts, room * length]) // length
    gaps = np.diff(places)
    assert starts[0] == 0 and all(start % length == 0 for start in starts)
    assert gaps.min() >= 1 and gaps.max() - gaps.min() <= 1  # each part of the text counts as much


def test_reads_a_store_across_workers(prepared: Path) -> None:
    plan = PlannedDataset(TokenStore(prepared), Schedule.two_phase(6, 4, 0.5), 16, 4)
    plan[0]  # opens a memory map, which must not be copied into the pickle
    assert len(pickle.dumps(plan)) < 20_000
    loader = torch.utils.data.DataLoader(plan, batch_size=4, num_workers=2, multiprocessing_context=server)
    for step, batch in enumerate(loader):
        assert batch["input_ids"].shape == ((4, 16, 4) if step < 3 else (4, 16))
        assert torch.equal(batch["input_ids"][1], plan[step * 4 + 1]["input_ids"])


@given(PHASES, st.integers(1, 5), st.integers(1, 4), st.integers(0, 3))
def test_shifted_samples_start_inside_the_first_bag(phases: list[Phase], length: int, batch: int, seed: int) -> None:
    """Each sample is that of the plain plan moved by 0 to a - 1 tokens, as far into the text as its targets reach."""
    schedule, tokens = Schedule(phases), np.arange(20_000)
    plain = PlannedDataset(tokens, schedule, length, batch, seed)
    lookahead = max(plain.block_bags, *(p.output_bag for p in phases))
    tokens = tokens[: plain.blocks * plain.block_tokens + lookahead]  # as many blocks, and not a token more
    shifted = PlannedDataset(tokens, schedule, length, batch, seed, shift=True)
    for i in range(len(plain)):
        phase, offset = schedule.at(i // batch), shifted.start_of(i) - plain.start_of(i)
        assert 0 <= offset < phase.input_bag
        for key, value in plain[i].items():
            assert torch.equal(shifted[i][key], value + offset)


def test_shifts_are_even_and_without_bags_there_are_none() -> None:
    tokens, bags = np.arange(100_000), Schedule([Phase(500, 4, 4)])
    plain, shifted = (PlannedDataset(tokens, bags, 8, 4, shift=shift) for shift in (False, True))
    offsets = Counter(shifted.start_of(i) - plain.start_of(i) for i in range(2000))
    assert sorted(offsets) == [0, 1, 2, 3] and all(430 < n < 570 for n in offsets.values())
    ordinary = Schedule([Phase(500)])
    plain, shifted = (PlannedDataset(tokens, ordinary, 8, 4, shift=shift) for shift in (False, True))
    assert [plain.start_of(i) for i in range(2000)] == [shifted.start_of(i) for i in range(2000)]
