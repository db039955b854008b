"""In which order a plan reads its text."""

from __future__ import annotations

import warnings
from collections import Counter
from zlib import crc32

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from token_superposition import Phase, Schedule
from token_superposition.data.plan import PlannedDataset
from token_superposition.permutation import permute, place_of


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


def test_an_epoch_visits_every_block_and_the_next_one_in_another_order() -> None:
    tokens = np.arange(10 * 4 + 1)
    with pytest.warns(UserWarning, match=r"reads its text 2\.00 times"):
        plan = PlannedDataset(tokens, Schedule([Phase(20)]), 4, 1)
    starts = [plan.start_of(i) for i in range(20)]
    assert sorted(starts[:10]) == sorted(starts[10:]) == list(range(0, 40, 4))
    assert starts[:10] != starts[10:]


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
