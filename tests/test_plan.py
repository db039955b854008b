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
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, DistributedSampler, Subset

from tests.processes import server
from token_superposition import Phase, Schedule, TokenSuperpositionError
from token_superposition.data.boundaries import Boundaries
from token_superposition.data.plan import MIXED_BATCHES, PlannedDataset, ValidationSet
from token_superposition.data.store import TokenStore
from token_superposition.permutation import permute

PHASES = st.lists(
    st.builds(Phase, st.integers(1, 6), st.sampled_from([1, 2, 3, 4]), st.sampled_from([1, 2, 4])),
    min_size=1,
    max_size=3,
)


def starts(plan: PlannedDataset) -> list[int]:
    return [plan.start_of(i) for i in range(len(plan))]


@given(st.integers(1, 400), st.integers(0, 2**40), st.integers(-3, 3))
def test_permute_is_a_permutation(n: int, a: int, b: int) -> None:
    assert sorted(permute(i, n, (a, b)) for i in range(n)) == list(range(n))


def test_permute_mixes() -> None:
    """Neighbours end far apart, and two keys give unrelated orders."""
    order = np.array([permute(i, 5000, (1, 2)) for i in range(5000)])
    other = np.array([permute(i, 5000, (1, 3)) for i in range(5000)])
    assert abs(np.corrcoef(order, np.arange(5000))[0, 1]) < 0.05
    assert abs(np.corrcoef(order, other)[0, 1]) < 0.05
    assert np.abs(np.diff(order)).mean() > 1000


def test_the_order_is_that_of_every_version() -> None:
    """A checkpoint goes on with the same samples in a later version: these numbers may not change."""
    assert [permute(i, 10, (1, 2)) for i in range(10)] == [1, 0, 7, 9, 5, 4, 3, 2, 6, 8]
    plan = PlannedDataset(np.arange(2000), Schedule([Phase(3, 4, 4), Phase(9)]), 4, 2, seed=3, shift=True)
    assert starts(plan) == [
        625, 1969, 1200, 1634, 1090, 1522, 1732, 288, 300, 1772, 1412, 1808,
        364, 1416, 276, 404, 712, 1816, 360, 1120, 1168, 412, 1740, 408,
    ]  # fmt: skip


@settings(deadline=None)
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


def test_an_epoch_visits_every_block_and_the_next_one_in_another_order() -> None:
    tokens = np.arange(10 * 4 + 1)
    with pytest.warns(UserWarning, match=r"reads its text 2\.00 times"):
        plan = PlannedDataset(tokens, Schedule([Phase(20)]), 4, 1)
    starts = [plan.start_of(i) for i in range(20)]
    assert sorted(starts[:10]) == sorted(starts[10:]) == list(range(0, 40, 4))
    assert starts[:10] != starts[10:]


@pytest.mark.parametrize("spare", [0.0, 0.02, 0.1, 0.3])
@pytest.mark.parametrize(("bags", "common"), [((8, 4, 2, 1), 1), ((4, 1), 1), ((4, 1), 8), ((1,), 16)])
def test_text_that_is_read_twice_while_other_is_not_is_told(bags: tuple[int, ...], common: int, spare: float) -> None:
    """Windows that a switch leaves unfinished may use up the text before all of it is read."""
    length, batch = 4, 4
    schedule = Schedule.annealed(200, bags, 0.4)
    block = length * lcm(*bags, common)
    size = ceil((1 + spare) * schedule.raw_tokens(batch, length) / block) * block
    with warnings.catch_warnings(record=True) as told:
        plan = PlannedDataset(np.arange(size + max(*bags, common)), schedule, length, batch, common_bag=common)
    read = Counter(int(t) for i in range(len(plan)) for t in plan[i]["input_ids"].flatten())
    twice = sum(n > 1 for n in read.values()) / size
    assert plan.epochs <= 1 and (bool(told) or twice == 0) and (twice == 0 or spare < 0.3)
    if told:
        most = re.search(r"up to (.*)% of the text may be read twice while other is not read; prepare", str(told[0]))
        assert most is not None and twice <= float(most[1]) / 100 + 0.0005


def test_a_longer_plan_begins_like_a_shorter_one() -> None:
    """So that runs can branch off a longer one."""
    tokens = np.arange(100_000)
    short, long = (PlannedDataset(tokens, Schedule([Phase(n)]), 8, 4, seed=3, common_bag=4) for n in (20, 40))
    assert [short.start_of(i) for i in range(80)] == [long.start_of(i) for i in range(80)]


def test_a_batch_mixes_far_apart_text_in_both_phases() -> None:
    plan = PlannedDataset(np.arange(2**20), Schedule.two_phase(64, 8, 0.5), 32, 16)
    for step in (3, 50):
        starts = sorted(plan.start_of(i) for i in range(step * 16, step * 16 + 16))
        assert np.median(np.diff(starts)) > 2**20 / 16 / 20


def test_long_blocks_do_not_bring_neighbours_into_a_batch() -> None:
    """An ordinary run whose blocks are 16 sequences long, as beside bags of 16, reads like a shuffled one.

    Two sequences of one batch, and of 32 batches in a row, are hardly more often from one block than by chance.
    """
    length, batch, steps = 4, 8, 2048
    plan = PlannedDataset(np.arange(length * 16 * 10_000 + 1), Schedule([Phase(steps)]), length, batch, common_bag=16)
    blocks = np.array([plan.start_of(i) for i in range(len(plan))]) // plan.block_tokens
    for near in (1, 32):
        groups = blocks.reshape(-1, near * batch)
        pairs = sum(int((n * (n - 1) // 2).sum()) for n in (np.unique(g, return_counts=True)[1] for g in groups))
        possible = len(groups) * near * batch * (near * batch - 1) / 2
        assert pairs / possible < 1.5 / MIXED_BATCHES / batch


def test_seed_changes_the_order_and_nothing_else_does() -> None:
    tokens, schedule = np.arange(50_000), Schedule.two_phase(20, 4, 0.5)
    a, b, c = (PlannedDataset(tokens, schedule, 16, 4, seed) for seed in (1, 1, 2))
    assert [a.start_of(i) for i in range(80)] == [b.start_of(i) for i in range(80)]
    assert [a.start_of(i) for i in range(80)] != [c.start_of(i) for i in range(80)]
    order = np.random.default_rng(0).permutation(80).tolist()
    assert {i: a.start_of(i) for i in order} == {i: b.start_of(i) for i in range(80)}


def test_seed_changes_the_blocks_of_a_window_and_the_shifts_too() -> None:
    tokens, first_window, schedule = np.arange(50_000), Schedule([Phase(1, 4, 4)]), Schedule([Phase(20, 4, 4)])
    read, offsets = [], []
    for seed in (1, 2):
        read.append({*starts(PlannedDataset(tokens, first_window, 16, 4, seed))})
        plain, shifted = (PlannedDataset(tokens, schedule, 16, 4, seed, shift=shift) for shift in (False, True))
        offsets.append(np.subtract(starts(shifted), starts(plain)).tolist())
    assert read[0] != read[1] and offsets[0] != offsets[1]


def test_windows_are_shuffled_each_in_its_own_way() -> None:
    plan = PlannedDataset(np.arange(2**18), Schedule([Phase(1024)]), 4, 4, common_bag=16)
    window = MIXED_BATCHES * 4 * 16  # samples; a block has 16
    places = [start // 4 % 16 for start in starts(plan)[: 2 * window]]
    assert places[:window] != places[window:]


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
        "common_bag 4 there, 8 here": (phases, {"common_bag": 8}),
        "tokens 5000 there, 4000 here": (phases, {"tokens": np.arange(4000)}),
        "shift False there, True here": (phases, {"shift": True}),
        "boundaries None there, ": (phases, {"boundaries": boundaries}),
    }
    for message, (schedule, options) in others.items():
        with pytest.raises(TokenSuperpositionError, match=f"samples: {re.escape(message)}.*, or begin again$"):
            plan(schedule, **options).check_fingerprint(saved, "begin again")
    for same in (plan(phases), plan(phases, common_bag=2), plan((Phase(3, 4, 4), Phase(20)))):
        same.check_fingerprint(saved, "begin again")


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
    """As the docstring of the plan says."""
    plan = PlannedDataset(np.arange(20_000), Schedule.two_phase(20, 4, 0.5), 8, 16)
    left = Subset(plan, range(first_step * plan.batch_size, len(plan)))
    loaders = [
        iter(DataLoader(left, 16 // (processes * accumulate), sampler=DistributedSampler(left, processes, r, False)))
        for r in range(processes)
    ]
    for step in range(first_step, 20):
        batches = [next(loader)["input_ids"] for loader in loaders for _ in range(accumulate)]
        wanted = [plan[i]["input_ids"].tolist() for i in range(step * 16, (step + 1) * 16)]
        assert sorted(torch.cat(batches).tolist()) == sorted(wanted)
    assert not any(list(loader) for loader in loaders)


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


def test_waste_at_a_switch_is_less_than_one_window() -> None:
    length, batch = 16, 4
    for steps in range(1, 20):
        schedule = Schedule([Phase(steps, 3, 3), Phase(steps, 4, 4), Phase(steps)])
        plan = PlannedDataset(np.arange(10**6), schedule, length, batch)
        used = ceil(schedule.raw_tokens(batch, length) / plan.block_tokens)
        blocks = used + MIXED_BATCHES * batch * len(schedule.phases)
        assert plan.block_tokens == lcm(3, 4) * length
        tight = PlannedDataset(np.arange((blocks + 1) * plan.block_tokens), schedule, length, batch)
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


@settings(deadline=None)
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


@pytest.mark.parametrize("more", range(9))
def test_runs_of_one_common_bag_read_the_same_blocks(more: int) -> None:
    tokens, bags = np.arange(100 * 64 * 4 + more), Schedule.two_phase(10, 4)
    plans = [PlannedDataset(tokens, s, 64, 4, common_bag=4) for s in (Schedule([Phase(10)]), bags)]
    plans.append(PlannedDataset(tokens, bags, 64, 4, shift=True))
    assert {p.blocks for p in plans} == {100 - (more < 4)}


def test_shifts_are_even_and_without_bags_there_are_none() -> None:
    tokens, bags = np.arange(100_000), Schedule([Phase(500, 4, 4)])
    plain, shifted = (PlannedDataset(tokens, bags, 8, 4, shift=shift) for shift in (False, True))
    offsets = Counter(shifted.start_of(i) - plain.start_of(i) for i in range(2000))
    assert sorted(offsets) == [0, 1, 2, 3] and all(430 < n < 570 for n in offsets.values())
    ordinary = Schedule([Phase(500)])
    plain, shifted = (PlannedDataset(tokens, ordinary, 8, 4, shift=shift) for shift in (False, True))
    assert [plain.start_of(i) for i in range(2000)] == [shifted.start_of(i) for i in range(2000)]


def test_steps_that_come_back_to_a_bag_size_finish_its_window() -> None:
    """Bag sizes in turn, step by step: the text is read once, and no more blocks are used than by one phase each."""
    length, batch = 4, 3
    turns = Schedule([Phase(1, s, s) for _ in range(24) for s in (4, 2, 1)])
    phases = Schedule([Phase(24, s, s) for s in (4, 2, 1)])
    assert len(turns.phases) == 72
    most: set[tuple[int, int]] = set()
    for blocks in range(127, 250, 9):  # 126 are read
        plans = (PlannedDataset(np.arange(blocks * 16 + 4), s, length, batch) for s in (turns, phases))
        read = [Counter(int(t) for i in range(len(p)) for t in p[i]["input_ids"].flatten()) for p in plans]
        assert {sum(r.values()) for r in read} == {turns.raw_tokens(batch, length)}
        most.add((max(read[0].values()), max(read[1].values())))
    assert most == {(2, 2), (1, 1)}
    plan = PlannedDataset(np.arange(40_000), turns, length, batch)
    order = np.random.default_rng(0).permutation(len(plan)).tolist()
    again = PlannedDataset(plan.tokens, turns, length, batch)
    assert {i: again.start_of(i) for i in order} == {i: plan.start_of(i) for i in range(len(plan))}
