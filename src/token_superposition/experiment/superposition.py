"""The section [superposition] of a configuration: which steps train on which bags, and every variant of that."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from token_superposition.data.boundaries import BoundaryKind
from token_superposition.errors import TokenSuperpositionError, require_int
from token_superposition.loss.targets import BagLoss
from token_superposition.places import check_signal
from token_superposition.schedule import Phase, Schedule
from token_superposition.weights import Weighting


@dataclass(frozen=True)
class SuperpositionConfig:
    """The first phase. Bag size 1 or ratio 0 is ordinary training."""

    bag_size: int = 4
    """Contiguous tokens in a bag (s)."""
    ratio: float = 0.3
    """Share of the steps that train on bags (r), in [0, 1)."""
    sides: Literal["both", "input", "output"] = "both"
    """Where bags are used: both is TST; input predicts one token; output reads one token and needs no more data."""
    weighting: Weighting = "uniform"
    """Weights of the places i = 1..s in a target bag: all the same (TST as in the paper), power 1/i, exponential e^-i,
    first: the nearest token only, fitted: the paper's fit to how much tokens i apart tell of each other."""
    input_weighting: Weighting = "uniform"
    """Weights of the places in a bag that is read, from its end on: the last token has the first weight."""
    loss: BagLoss = "multi-hot"
    """multi-hot is the mean of the targets' cross-entropies; sum-to-one takes the bag as one label, without weights."""
    anneal: tuple[int, ...] = ()
    """Bag sizes taken in turn instead of bag_size, such as 16, 8, 4, 2; they share the ratio evenly."""

    mixture: float = 0.0
    """How far the steps of the sizes in anneal are mixed: 0 in turn, 1 at random; between, each fades into the next."""
    shift: bool = False
    """Start each sample 0 to s - 1 tokens later, drawn for it, so that the boundaries of bags fall anywhere."""
    boundaries: BoundaryKind = "none"
    """What no bag reaches over: documents; lines (and documents); words. Bags end early there and hold less text."""
    place_signal: float = 0.0
    """How strongly a bag that is read tells the places of its tokens, in [0, 1]; it leaves nothing in the model."""
    mtp_heads: int = 0
    """Heads for further tokens (or bags) while training, in all phases; the finished model has none. They add FLOPs."""
    mtp_weight: float = 0.3
    """What the mean of their losses counts beside the model's own."""
    reset_optimizer: bool = False
    """Forget the optimizer's state at the switch to bag size 1 and warm up again. Expected to hurt."""
    reset_embeddings: bool = False
    """Initialise embedding and head again at the switch to bag size 1. Expected to hurt."""

    def check(self) -> None:
        """Raise ``TokenSuperpositionError`` for settings that contradict each other."""
        if self.loss != "multi-hot" and self.weighting != "uniform":
            raise TokenSuperpositionError(
                f"superposition.loss {self.loss} has no place weights; leave superposition.weighting "
                f"{self.weighting!r} out, or use the multi-hot loss"
            )
        for name in UNREAD.get(self.sides, ()):
            if (value := getattr(self, name)) != (plain := getattr(BASELINE, name)):
                raise TokenSuperpositionError(
                    f"superposition.{name} is {value!r}, but superposition.sides {self.sides!r} has no such bags; set "
                    f"it to {plain!r}"
                )
        if self.mixture and not self.anneal:
            raise TokenSuperpositionError(
                f"superposition.mixture is {self.mixture}, but there are no bag sizes to mix; set superposition.anneal"
            )
        check_signal("superposition.place_signal", self.place_signal)
        require_int("superposition.mtp_heads", self.mtp_heads, 0)
        if not 0 <= self.mtp_weight < math.inf:
            raise TokenSuperpositionError(f"superposition.mtp_weight is {self.mtp_weight}; give a number from 0 up")

    def as_read(self) -> SuperpositionConfig:
        """The same without the settings of bags that ``sides`` has not, which ``check`` refuses today."""
        return replace(self, **{name: getattr(BASELINE, name) for name in UNREAD.get(self.sides, ())})

    def refuse_variants(self, engine: str) -> None:
        """Raise ``TokenSuperpositionError`` for a variant that only tst train has."""
        for name in VARIANTS:
            if (value := getattr(self, name)) != getattr(SuperpositionConfig(), name):
                raise TokenSuperpositionError(
                    f"superposition.{name} is {value!r}; the {engine} engine does not have it, so use tst train"
                )

    @property
    def trained_heads(self) -> int:
        """Heads for further tokens whose loss counts."""
        return self.mtp_heads if self.mtp_weight else 0

    def schedule(self, steps: int) -> Schedule:
        """Of a run of so many steps.

        Raises ``TokenSuperpositionError`` for ``steps`` or a bag size that is no whole number of at least 1, a ratio
        outside [0, 1) and, with ``anneal``, a mixture outside [0, 1] or over more than 10 million steps.
        """
        if self.anneal:
            annealed = Schedule.annealed(steps, self.anneal, self.ratio).mixed(self.mixture)
            return Schedule(Phase(p.steps, *self._bags(p.input_bag)) for p in annealed.phases)
        a, b = self._bags(require_int("bag_size", self.bag_size, 1))
        return Schedule.two_phase(steps, ratio=self.ratio, input_bag=a, output_bag=b)

    def _bags(self, s: int) -> tuple[int, int]:
        return (s if self.sides != "output" else 1, s if self.sides != "input" else 1)


VARIANTS = (
    "input_weighting",
    "loss",
    "shift",
    "boundaries",
    "mixture",
    "place_signal",
    "mtp_heads",
    "reset_optimizer",
    "reset_embeddings",
)
"""Settings that change more than the bag sizes and their weights; the transformers engine has all of them."""
UNREAD = {"input": ("weighting", "loss"), "output": ("input_weighting", "place_signal", "shift")}
"""Settings of the bags that one of the sides has not."""
BASELINE = SuperpositionConfig(bag_size=1, ratio=0.0)
