"""Which bag size a step has, and which learning rate: pure functions of the step."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from numbers import Real

from token_superposition.errors import TokenSuperpositionError, require_int, require_number
from token_superposition.permutation import permute

MAX_MIXED_STEPS = 10**7  # each is drawn


@dataclass(frozen=True)
class Phase:
    """A run of steps with one input bag size and one output bag size."""

    steps: int
    """Optimizer steps in this phase."""
    input_bag: int = 1
    """Raw tokens averaged into one latent position."""
    output_bag: int = 1
    """Raw tokens predicted by one latent position."""

    def __post_init__(self) -> None:
        for name, minimum in (("steps", 0), ("input_bag", 1), ("output_bag", 1)):
            object.__setattr__(self, name, require_int(name, getattr(self, name), minimum))

    @property
    def is_superposed(self) -> bool:
        return self.input_bag > 1 or self.output_bag > 1


@dataclass(frozen=True)
class Schedule:
    """Maps an optimizer step (0-based, over the whole run) to its phase.

    Neighbouring phases of the same bag sizes become one, those without steps are left out.
    Raises ``TokenSuperpositionError`` if no phase has a step.

    >>> schedule = Schedule.two_phase(20_000, bag_size=6, ratio=0.3)
    >>> schedule.at(5_999).input_bag, schedule.at(6_000).input_bag
    (6, 1)
    >>> schedule.raw_tokens(batch_size=1, sequence_length=1)
    50000
    """

    phases: tuple[Phase, ...]

    def __init__(self, phases: Iterable[Phase]):
        merged: list[Phase] = []
        for p in [phases] if isinstance(phases, Phase) else phases:
            if not isinstance(p, Phase):  # pyright: ignore
                raise TokenSuperpositionError(
                    f"a phase is {p!r}; give several of Phase(steps, input_bag, output_bag), or Schedule.two_phase"
                )
            if merged and (merged[-1].input_bag, merged[-1].output_bag) == (p.input_bag, p.output_bag):
                merged[-1] = Phase(merged[-1].steps + p.steps, p.input_bag, p.output_bag)
            elif p.steps:
                merged.append(p)
        if not merged:
            raise TokenSuperpositionError("the schedule has no steps; give at least one phase of at least one step")
        object.__setattr__(self, "phases", tuple(merged))

    @classmethod
    def two_phase(
        cls,
        total_steps: int,
        bag_size: int | None = None,
        ratio: float = 0.3,
        *,
        input_bag: int | None = None,
        output_bag: int | None = None,
    ) -> Schedule:
        """Superposition for the first ``ratio`` of the steps, then ordinary training (arXiv 2605.06546).

        ``bag_size`` sets both bags; ``input_bag`` or ``output_bag`` alone give the one-sided variants.
        Ratio 0 or bag size 1 is ordinary training. The switch is at step ``round(ratio * total_steps)``,
        or at the last step, which is always an ordinary one.

        Raises ``TokenSuperpositionError`` for a ratio outside [0, 1), for ``total_steps`` or a bag size that is no
        whole number of at least 1, and for no bag size at all.
        """
        total_steps = require_int("total_steps", total_steps, 1)
        if bag_size is input_bag is output_bag is None:
            raise TokenSuperpositionError("bag_size is None; give one, such as 4, or 1 for ordinary training")
        if not isinstance(ratio, Real) or isinstance(ratio, bool) or not 0 <= ratio < 1:
            raise TokenSuperpositionError(
                f"ratio is {ratio!r}; give a share of the steps in [0, 1): the recovery phase must not be empty"
            )
        if bag_size is not None:
            require_int("bag_size", bag_size, 1)
        a = input_bag if input_bag is not None else bag_size or 1
        b = output_bag if output_bag is not None else bag_size or 1
        superposed = min(round(float(ratio) * total_steps), total_steps - 1)
        return cls([Phase(superposed, a, b), Phase(total_steps - superposed)])

    @classmethod
    def annealed(cls, total_steps: int, bag_sizes: Sequence[int] = (16, 8, 4, 2, 1), ratio: float = 0.3) -> Schedule:
        """The bag sizes in turn: those above 1 share the first ``ratio`` of the steps evenly, 1 takes the rest.

        Raises ``TokenSuperpositionError`` for a ratio outside [0, 1), and for ``total_steps`` or a bag size that is no
        whole number of at least 1.

        >>> [(p.steps, p.input_bag) for p in Schedule.annealed(100, (4, 2, 1), 0.3).phases]
        [(15, 4), (15, 2), (70, 1)]
        """
        total_steps = require_int("total_steps", total_steps, 1)
        if not isinstance(bag_sizes, Iterable):
            raise TokenSuperpositionError(f"bag_sizes is {bag_sizes}; give several, such as (8, 4, 2, 1)")
        recovery = cls.two_phase(total_steps, 2, ratio).phases[-1].steps
        sizes = [s for s in bag_sizes if require_int("bag size", s, 1) > 1]
        cuts = [round(k * (total_steps - recovery) / max(len(sizes), 1)) for k in range(len(sizes) + 1)]
        steps = [hi - lo for lo, hi in pairwise(cuts)]
        phases = [Phase(n, s, s) for n, s in zip(steps, sizes, strict=True)]
        return cls([*phases, Phase(total_steps - sum(steps))])

    def mixed(self, mixture: float, seed: int = 0) -> Schedule:
        """The same steps with those before the last switch in another order, drawn for ``seed``: the raw tokens stay.

        The steps are sorted by ``(1 - mixture) * place + mixture * (a random place)``: 0 leaves the phases in turn, 1
        gives every step a bag size at random, and between the two each bag size fades into the next.
        Raises ``TokenSuperpositionError`` for a mixture outside [0, 1].

        >>> [(p.steps, p.input_bag) for p in Schedule.annealed(10, (4, 2, 1), 0.6).mixed(1.0).phases]
        [(2, 2), (1, 4), (1, 2), (2, 4), (4, 1)]
        """
        require_number("mixture", mixture, 0, 1, hint=": 0 in turn, 1 at random")
        *superposed, last = self.phases
        if not mixture:
            return self
        if (n := sum(p.steps for p in superposed)) > MAX_MIXED_STEPS:
            raise TokenSuperpositionError(
                f"mixture is {mixture} over {n} steps; at most {MAX_MIXED_STEPS} can be mixed, so give mixture 0"
            )
        steps = [Phase(1, p.input_bag, p.output_bag) for p in superposed for _ in range(p.steps)]
        n = len(steps)
        places = [(1 - mixture) * i + mixture * permute(i, n, (seed, 2)) for i in range(n)]
        return Schedule([*(steps[i] for i in sorted(range(n), key=places.__getitem__)), last])

    @cached_property
    def total_steps(self) -> int:
        return sum(p.steps for p in self.phases)

    @cached_property
    def starts(self) -> list[int]:
        """First step of each phase."""
        return [0, *accumulate(p.steps for p in self.phases[:-1])]

    @property
    def switches(self) -> list[int]:
        """The steps at which the bag size changes."""
        return self.starts[1:]

    def phase_index(self, step: int) -> int:
        """Index of the phase of a step; steps past the end belong to the last phase.

        Raises ``TokenSuperpositionError`` for a step that is no whole number of at least 0.
        """
        return bisect_right(self.starts, require_int("step", step, 0)) - 1

    def at(self, step: int) -> Phase:
        return self.phases[self.phase_index(step)]

    def raw_tokens(self, batch_size: int, sequence_length: int, steps: int | None = None) -> int:
        """Raw tokens read by the first ``steps`` steps (all of them by default)."""
        left = self.total_steps if steps is None else min(steps, self.total_steps)
        bags = 0
        for p in self.phases:
            n = min(left, p.steps)
            bags, left = bags + n * p.input_bag, left - n
        return bags * batch_size * sequence_length

    def latent_tokens(self, batch_size: int, sequence_length: int, steps: int | None = None) -> int:
        """Latent positions computed by the first ``steps`` steps; compute follows these, not the raw tokens."""
        return min(self.total_steps, self.total_steps if steps is None else steps) * batch_size * sequence_length

    def counts(self, batch_size: int, sequence_length: int, step: int) -> dict[str, int]:
        """Bag sizes of a step, counted from 1, and the latent and raw tokens up to its end: what a log says of it."""
        phase, counted = self.at(max(step - 1, 0)), (batch_size, sequence_length, step)
        return {
            "input_bag": phase.input_bag,
            "output_bag": phase.output_bag,
            "latent_tokens": self.latent_tokens(*counted),
            "raw_tokens": self.raw_tokens(*counted),
        }

    @property
    def changes(self) -> list[list[int]]:
        """First step, input bag and output bag of each phase: a schedule with a longer last phase has the same."""
        return [[first, p.input_bag, p.output_bag] for first, p in zip(self.starts, self.phases, strict=True)]

    @property
    def common_bag(self) -> int:
        """Least common multiple of the input bag sizes."""
        return math.lcm(*(p.input_bag for p in self.phases))


@dataclass(frozen=True)
class WSD:
    """Learning-rate factor in (0, 1]: linear warm-up, stable, linear decay. One curve through every switch.

    Callable as ``factor = wsd(step)`` with a 0-based step, which is what ``torch.optim.lr_scheduler.LambdaLR`` takes.
    accelerate steps a prepared scheduler once for each process: there with ``step_scheduler_with_optimizer=False``.

    Raises ``TokenSuperpositionError`` for ``total_steps`` that are no whole number of at least 1, ``warmup_steps`` that
    are none of at least 0, a ``decay_ratio`` outside [0, 1], and for a warm-up and a decay that together are longer
    than the run.

    >>> wsd = WSD(total_steps=100, warmup_steps=10)
    >>> wsd(0), wsd(9), wsd(89), wsd(99)
    (0.1, 1.0, 1.0, 0.1)
    """

    total_steps: int
    warmup_steps: int = 0
    decay_ratio: float = 0.1
    """Share of the steps, at the end, over which the factor falls linearly to 0."""
    restart: int | None = None
    """Step from which the warm-up comes once more, for an optimizer that was reset there."""

    def __post_init__(self) -> None:
        for name, minimum in (("total_steps", 1), ("warmup_steps", 0)):
            object.__setattr__(self, name, require_int(name, getattr(self, name), minimum))
        if self.restart is not None:
            object.__setattr__(self, "restart", require_int("restart", self.restart, 0))
        require_number("decay_ratio", self.decay_ratio, 0, 1, hint=", a share of the steps")
        if self.warmup_steps + self.decay_steps > self.total_steps:
            raise TokenSuperpositionError(
                f"warm-up of {self.warmup_steps} and decay of {self.decay_steps} steps do not fit in "
                f"{self.total_steps} steps; shorten the warm-up or train longer"
            )

    @property
    def decay_steps(self) -> int:
        return round(self.decay_ratio * self.total_steps)

    def __call__(self, step: int) -> float:
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        again = 1.0
        if self.restart is not None and self.restart <= step < self.restart + self.warmup_steps:
            again = (step - self.restart + 1) / self.warmup_steps
        left = self.total_steps - step
        return again if left >= self.decay_steps or not self.decay_steps else again * max(left, 0) / self.decay_steps
