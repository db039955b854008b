from __future__ import annotations

from fractions import Fraction
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from token_superposition import WSD, Phase, Schedule, TokenSuperpositionError
from token_superposition.data.plan import PlannedDataset


def test_the_papers_270m_run() -> None:
    """20,000 steps, s = 6, r = 0.3, 2M latent tokens a step: switch at 6,000, 105B raw tokens (arXiv 2605.06546)."""
    schedule = Schedule.two_phase(20_000, 6, 0.3)
    assert schedule.switches == [6_000]
    assert schedule.raw_tokens(1024, 2048) == pytest.approx(105e9, rel=0.01)
    assert schedule.latent_tokens(1024, 2048) == pytest.approx(42e9, rel=0.01)


@given(st.integers(1, 500), st.integers(1, 16), st.floats(0, 0.99))
def test_two_phases(steps: int, bag: int, ratio: float) -> None:
    schedule = Schedule.two_phase(steps, bag, ratio)
    assert schedule.total_steps == steps
    assert schedule.at(steps - 1) == schedule.phases[-1]
    assert (schedule.phases[-1].input_bag, schedule.phases[-1].output_bag) == (1, 1)
    superposed = sum(schedule.at(i).is_superposed for i in range(steps))
    assert superposed == (min(round(ratio * steps), steps - 1) if bag > 1 else 0)
    by_step = sum(schedule.at(i).input_bag for i in range(steps)) * 3 * 5
    assert schedule.raw_tokens(3, 5) == by_step
    assert schedule.raw_tokens(3, 5, steps // 2) == sum(schedule.at(i).input_bag for i in range(steps // 2)) * 15


@pytest.mark.parametrize(("steps", "ratio"), [(1, 0.9), (10, 0.99), (500, 0.999)])
def test_the_last_step_is_ordinary_whatever_the_ratio(steps: int, ratio: float) -> None:
    assert Schedule.two_phase(steps, 4, ratio).phases[-1] == Phase(1)


def test_there_are_no_tokens_past_the_last_step() -> None:
    schedule = Schedule.two_phase(10, 4, 0.5)
    assert schedule.latent_tokens(3, 5, 99) == schedule.latent_tokens(3, 5) == 150
    assert schedule.raw_tokens(3, 5, 99) == schedule.raw_tokens(3, 5)


def test_annealed_and_one_sided() -> None:
    with pytest.raises(TokenSuperpositionError, match="bag_sizes is 8; give several"):
        Schedule.annealed(100, cast(Any, 8))
    annealed = Schedule.annealed(100, (16, 8, 4, 2, 1), 0.4)
    assert [(p.steps, p.input_bag) for p in annealed.phases] == [(10, 16), (10, 8), (10, 4), (10, 2), (60, 1)]
    assert Schedule.two_phase(10, input_bag=4, ratio=0.5).at(0) == Phase(5, 4, 1)
    assert Schedule.two_phase(10, output_bag=4, ratio=0.5).raw_tokens(1, 1) == 10


@pytest.mark.parametrize("ratio", [1, 1.0, -0.1, "0.3", True, float("nan")])
def test_ratio_outside_the_limits(ratio: object) -> None:
    with pytest.raises(TokenSuperpositionError, match=r"ratio is .*\[0, 1\)"):
        Schedule.two_phase(10, 4, ratio)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64, Fraction])
def test_ratios_of_other_kinds(kind: Any) -> None:
    """Computed with as a float: 0.5 x 300,000 steps is infinite in 16 bits."""
    assert Schedule.two_phase(300_000, 4, kind(0.5)) == Schedule.two_phase(300_000, 4, 0.5)


@pytest.mark.parametrize("bag", [0, 2.5, -3, "4", True])
def test_bag_size_outside_the_limits(bag: object) -> None:
    with pytest.raises(TokenSuperpositionError, match="bag_size is"):
        Schedule.two_phase(10, bag, 0.3)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("kind", [np.int64, np.uint8, torch.tensor])
def test_whole_numbers_of_other_kinds(kind: Any) -> None:
    """They are taken as ints: 200 + 200 steps in eight bits are 400."""
    schedule = Schedule([Phase(kind(200), kind(4), kind(4)), Phase(kind(200))])
    assert schedule == Schedule([Phase(200, 4, 4), Phase(200)]) and schedule.total_steps == 400
    assert schedule.at(kind(199)).input_bag == 4 and schedule.at(kind(200)).input_bag == 1
    assert Schedule.two_phase(kind(200), kind(4)) == Schedule.two_phase(200, 4)
    assert Schedule.annealed(kind(200), [kind(4), kind(2)]) == Schedule.annealed(200, [4, 2])
    assert WSD(kind(200), kind(10)) == WSD(200, 10)


@given(st.integers(1, 300), st.integers(0, 40), st.floats(0, 1))
def test_wsd_is_one_trapezium(total: int, warmup: int, decay: float) -> None:
    if warmup + round(decay * total) > total:
        with pytest.raises(TokenSuperpositionError, match="do not fit"):
            WSD(total, warmup, decay)
        return
    wsd = WSD(total, warmup, decay)
    curve = [wsd(step) for step in range(total)]
    assert all(0 < x <= 1 for x in curve)
    stable = curve[warmup : total - wsd.decay_steps]
    assert set(stable) <= {1.0}
    assert curve[:warmup] == sorted(curve[:warmup]) and curve[warmup:] == sorted(curve[warmup:], reverse=True)
    assert wsd(total) == wsd(total + 7) == (0 if wsd.decay_steps else 1)  # past the end it stays where it is


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Schedule([(10, 4, 4)]), r"a phase is \(10, 4, 4\); give several of Phase"),  # pyright: ignore
        (lambda: WSD(10, 2, "0.1"), r"decay_ratio is '0.1'; give a number in \[0, 1\]"),  # pyright: ignore
        (lambda: WSD(10, 2, 1.5), "decay_ratio is 1.5"),
        (lambda: Schedule.annealed(10).mixed("a"), r"mixture is 'a'; give a number in \[0, 1\]"),  # pyright: ignore
        (lambda: PlannedDataset(range(99), {}, 8, 4), "the schedule is a dict; give a Schedule"),  # pyright: ignore
    ],
)
def test_what_is_no_schedule_has_one_clear_line(call: Any, message: str) -> None:
    with pytest.raises(TokenSuperpositionError, match=message):
        call()


def test_one_phase_is_a_schedule() -> None:
    assert Schedule(Phase(10)) == Schedule([Phase(10)])  # pyright: ignore


def test_wsd_is_what_lambda_lr_takes() -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=2.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, WSD(10, 2, 0.5))
    seen: list[float] = []
    for _ in range(10):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert seen == pytest.approx([1, 2, 2, 2, 2, 2, 1.6, 1.2, 0.8, 0.4])


@given(st.integers(1, 200), st.floats(0, 0.9), st.floats(0, 1), st.integers(0, 9))
def test_mixed_steps_are_the_same_steps(total: int, ratio: float, mixture: float, seed: int) -> None:
    annealed = Schedule.annealed(total, (8, 4, 2), ratio)
    mixed = annealed.mixed(mixture, seed)
    sizes, before = ([s.at(i).input_bag for i in range(total)] for s in (mixed, annealed))
    assert sorted(sizes) == sorted(before) and mixed.raw_tokens(3, 5) == annealed.raw_tokens(3, 5)
    assert mixed.switches[-1:] == annealed.switches[-1:]
    assert annealed.mixed(0.0, seed) == annealed
    assert Schedule.two_phase(total, 4, ratio).mixed(mixture, seed) == Schedule.two_phase(total, 4, ratio)


def test_a_mixture_fades_and_ends_at_random() -> None:
    annealed = Schedule.annealed(4000, (8, 4, 2), 0.75)

    def share(mixture: float, size: int, steps: range, seed: int = 0) -> float:
        schedule = annealed.mixed(mixture, seed)
        return sum(schedule.at(i).input_bag == size for i in steps) / len(steps)

    tenths = [range(i, i + 300) for i in range(0, 3000, 300)]
    fading = [share(0.4, 8, tenth) for tenth in tenths]
    assert fading[0] > 0.95 and fading[-1] == 0 and fading == sorted(fading, reverse=True) and len(set(fading)) > 4
    assert all(abs(share(1.0, size, tenth) - 1 / 3) < 0.1 for size in (8, 4, 2) for tenth in tenths)
    assert annealed.mixed(1.0, 0) != annealed.mixed(1.0, 1)
    for mixture in (-0.1, 1.1, float("nan")):
        with pytest.raises(TokenSuperpositionError, match=r"mixture is .*; give a number in \[0, 1\]"):
            annealed.mixed(mixture)
