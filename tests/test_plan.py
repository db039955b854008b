from __future__ import annotations

import json
import pickle
import re
import warnings
from collections import Counter
from math import ceil, lcm
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.processes import server
from token_superposition import Phase, Schedule, TokenSuperpositionError
from token_superposition.data.boundaries import Boundaries
from token_superposition.data.plan import PlannedDataset, ValidationSet
from token_superposition.data.store import TokenStore
from token_superposition.permutation import permute, place_of

PHASES = st.lists(
    st.builds(Phase, st.integers(1, 6), st.sampled_from([1, 2, 3, 4]), st.sampled_from([1, 2, 4])),
    min_size=1,
    max_size=3,
)


def starts(plan: PlannedDataset) -> list[int]:
    return [plan.start_of(i) for i in range(len(plan))]


@given(st.integers(1, 400), st.integers(0, 2**40), st.integers(-3, 3))
def test_permute_is_a_permutation_and_can_be_undone(n: int, a: int, b: int) -> None:
    order = [permute(i, n, (a, b)) for i in range(n)]
    assert sorted(order) == [*range(n)] == [place_of(i, n, (a, b)) for i in order]


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
        1889, 1265, 1728, 114, 626, 1122, 776, 1224, 1164, 1004, 264, 1468,
        1812, 1844, 92, 972, 1828, 784, 296, 716, 1940, 1544, 324, 1968,
    ]  # fmt: skip
    digests = [
        crc32(repr(starts(PlannedDataset(np.arange(300), Schedule(phases), 2, 4, seed=3))).encode())
        for phases in (
            [Phase(4), Phase(3, 4, 4)],
            [Phase(2, 4, 4), Phase(2, 2, 2), Phase(3)],
            [Phase(9, 4, 4), Phase(2)],  # bags leave less than a sixteenth
            [Phase(3, 4, 4), Phase(3, 2, 2)],
            [Phase(12, 4, 4), Phase(90)],  # and several epochs
            [Phase(60), Phase(12, 4, 4)],
        )
    ]
    assert digests == [3544018816, 2255948240, 3108710630, 4259271571, 1941143061, 2753859069]


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


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("bags", [2, 10, 15, 25, 33])
def test_every_epoch_reads_all_in_an_order_of_its_own(bags: int, turned: bool) -> None:
    """Wherever the switch is, and from whatever to what: 240 sequences, 60 steps an epoch, or 15 of bags of 4."""
    length, batch, blocks = 2, 4, 60
    phases = [Phase(bags, 4, 4), Phase(300 - 4 * bags)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        schedule = Schedule([*reversed(phases)] if turned else phases)
        plan = PlannedDataset(np.arange(blocks * 4 * length + 4), schedule, length, batch, seed=3)
    read = [
        start // length + j for i, start in enumerate(starts(plan)) for j in range(schedule.at(i // batch).input_bag)
    ]
    if turned:  # ordinary sequences of a short phase come from more blocks than they fill
        counts = Counter(read)
        assert len(read) == 1200 and max(counts.values()) <= 6 and min(counts.values()) >= 4
    else:
        epochs = [tuple(read[i : i + 240]) for i in range(0, 1200, 240)]
        assert all(sorted(epoch) == [*range(240)] for epoch in epochs) and len({*epochs}) == 5


def test_a_longer_plan_begins_like_a_shorter_one() -> None:
    """So that runs can branch off a longer one."""
    for first in ([], [Phase(5, 4, 4)], [Phase(20, 4, 4)], [Phase(3, 2, 2), Phase(2), Phase(2, 4, 4)]):
        tokens = np.arange(3_000)
        short, long = (PlannedDataset(tokens, Schedule([*first, Phase(n)]), 8, 4, seed=3) for n in (20, 99))
        assert starts(short) == starts(long)[: len(short)] and starts(short)[-1] != starts(long)[-1]


def test_a_batch_mixes_far_apart_text_in_both_phases() -> None:
    plan = PlannedDataset(np.arange(2**20), Schedule.two_phase(64, 8, 0.5), 32, 16)
    for step in (3, 50):
        starts = sorted(plan.start_of(i) for i in range(step * 16, step * 16 + 16))
        assert np.median(np.diff(starts)) > 2**20 / 16 / 20


@pytest.mark.parametrize(
    ("phases", "of", "share"),
    [
        ((Phase(8, 16, 16), Phase(4096)), 1, 1.0),
        ((Phase(2000, 16, 16), Phase(4096)), 1, 0.36),  # of the text is left
        ((Phase(2400, 16, 16), Phase(100)), 1, 0.04),
        ((Phase(400), Phase(400, 16, 16)), 0, 1 / 8),
        ((Phase(8, 16, 16), Phase(300, 4, 4), Phase(60)), 1, 1 / 8),
    ],
)
def test_long_blocks_do_not_bring_neighbours_into_a_batch(phases: tuple[Phase, ...], of: int, share: float) -> None:
    """Beside bags of 16, whose blocks are 16 sequences long, a phase reads like one of shuffled sequences.

    Two samples of one batch are no more often from one block than by chance in that share of the text.
    """
    length, batch, blocks = 4, 8, 20_000
    plan = PlannedDataset(np.arange(length * 16 * blocks + 16), Schedule(phases), length, batch)
    first, phase = plan.schedule.starts[of], phases[of]
    samples = range(first * batch, (first + phase.steps) * batch)
    of_blocks = np.array([plan.start_of(i) for i in samples]).reshape(-1, batch) // plan.block_tokens
    pairs = sum(int((n * (n - 1) // 2).sum()) for n in (np.unique(b, return_counts=True)[1] for b in of_blocks))
    per_block = 16 // phase.input_bag
    expected = len(of_blocks) * batch * (batch - 1) / 2 * (per_block - 1) / (share * blocks * per_block - 1)
    assert pairs < expected + 4 * expected**0.5 + 2


def in_place(plain: list[int], read: list[int], in_bags: set[int]) -> tuple[int, int]:
    """How many samples of ``read`` are those of ``plain`` at the same place, and how many bags have left there."""
    pairs = list(zip(plain, read, strict=False))
    return sum(a == b for a, b in pairs), sum(a not in in_bags for a, _ in pairs)


@pytest.mark.parametrize(("tokens", "steps"), [(64_000, 60), (8 * 4096 + 9, 60), (64_000, 250), (64_000, 440)])
def test_ordinary_sequences_come_in_one_order_whatever_bags_came_before(tokens: int, steps: int) -> None:
    """At equal raw tokens, but for those that bags have read: where these are few, half of the text and most of it."""
    length, batch = 8, 4
    plain = starts(PlannedDataset(np.arange(tokens), Schedule([Phase(tokens // 32)]), length, batch, seed=5))
    assert len({*plain}) > 0.99 * len(plain)
    for bag in (2, 4):
        plan = PlannedDataset(np.arange(tokens), Schedule([Phase(steps, bag, bag), Phase(200)]), length, batch, seed=5)
        read, before = starts(plan), steps * batch
        in_bags = {start + i * length for start in read[:before] for i in range(bag)}
        same, left = in_place(plain[before * bag :], read[before:], in_bags)
        assert left - 2 <= same <= left and left > 0.1 * 4 * min(200, tokens // 32 - steps * bag)
        assert not in_bags & {*read[before:]}


def test_smaller_bags_come_in_the_order_of_a_run_of_them() -> None:
    tokens = np.arange(64 * 500 * 4 + 4)
    plain = starts(PlannedDataset(tokens, Schedule([Phase(900, 2, 2)]), 4, 4))
    plan = starts(PlannedDataset(tokens, Schedule([Phase(50, 4, 4), Phase(200, 2, 2)]), 4, 4))
    same, left = in_place(plain[400:], plan[200:], {start + i * 8 for start in plan[:200] for i in range(2)})
    assert left - 2 <= same <= left > 700


def test_runs_of_several_epochs_keep_to_one_order() -> None:
    tokens = np.arange(4 * 4 * 250 + 1)
    with pytest.warns(UserWarning, match="reads its text"):
        plain = starts(PlannedDataset(tokens, Schedule([Phase(600)]), 4, 4))
        plan = starts(PlannedDataset(np.arange(4004), Schedule([Phase(20, 4, 4), Phase(520)]), 4, 4))
    assert plain[1000:] == plan[80 + 1000 - 320 :][: len(plain) - 1000] and plain[1000:2000] != plain[:1000]


@pytest.mark.parametrize(("steps", "bag"), [(20, 4), (70, 4), (20, 3)])
def test_the_last_stretch_reads_all_that_the_others_leave(steps: int, bag: int) -> None:
    length, batch, blocks = 2, 4, 300
    left = (blocks - steps * batch) * bag  # sequences
    schedule = Schedule([Phase(steps, bag, bag), Phase(left // batch)])
    plan = PlannedDataset(np.arange(blocks * bag * length + bag), schedule, length, batch)
    read = sorted(t for i in range(len(plan)) for t in plan[i]["input_ids"].flatten().tolist())
    assert read == [*range(blocks * bag * length)]


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


def test_shifts_are_even_and_without_bags_there_are_none() -> None:
    tokens, bags = np.arange(100_000), Schedule([Phase(500, 4, 4)])
    plain, shifted = (PlannedDataset(tokens, bags, 8, 4, shift=shift) for shift in (False, True))
    offsets = Counter(shifted.start_of(i) - plain.start_of(i) for i in range(2000))
    assert sorted(offsets) == [0, 1, 2, 3] and all(430 < n < 570 for n in offsets.values())
    ordinary = Schedule([Phase(500)])
    plain, shifted = (PlannedDataset(tokens, ordinary, 8, 4, shift=shift) for shift in (False, True))
    assert [plain.start_of(i) for i in range(2000)] == [shifted.start_of(i) for i in range(2000)]


def test_steps_that_come_back_to_a_bag_size_go_on_in_its_stretch() -> None:
    """Bag sizes in turn, step by step: the text is read once, and in the order of one phase each."""
    length, batch = 4, 3
    turns = Schedule([Phase(1, s, s) for _ in range(24) for s in (4, 2, 1)])
    phases = Schedule([Phase(24, s, s) for s in (4, 2, 1)])
    assert len(turns.phases) == 72
    for blocks in (126, 127, 250):  # 126 are read
        plans = [PlannedDataset(np.arange(blocks * 16 + 4), s, length, batch) for s in (turns, phases)]
        read = [[(p.schedule.at(i // batch).input_bag, p.start_of(i)) for i in range(len(p))] for p in plans]
        for s in (4, 2, 1):
            assert [r for r in read[0] if r[0] == s] == [r for r in read[1] if r[0] == s]
        tokens = Counter(start + i for s, start in read[0] for i in range(s * length))
        assert sum(tokens.values()) == turns.raw_tokens(batch, length) and max(tokens.values()) == 1
    plan = PlannedDataset(np.arange(40_000), turns, length, batch)
    order = np.random.default_rng(0).permutation(len(plan)).tolist()
    again = PlannedDataset(plan.tokens, turns, length, batch)
    assert {i: again.start_of(i) for i in order} == {i: plan.start_of(i) for i in range(len(plan))}
