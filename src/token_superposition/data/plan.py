"""The planned dataset: sample i is a fixed function of (tokens, schedule, seed, i).

The stream is cut into blocks of ``sequence_length * lcm(bag sizes)`` tokens. Every epoch visits the blocks in another
seeded order, each once. A step of bag size ``a`` reads samples of ``sequence_length * a`` contiguous tokens out of a
window of consecutive blocks of that order, and the samples of a window are shuffled. Where a block holds one sample, a
window has ``batch_size`` blocks; where it holds several, ``MIXED_BATCHES`` times as many, so that pieces of one block
are as far from each other, in batches and in steps, as the rest of the text: an ordinary run must not learn worse than
from shuffled sequences only because its blocks are long enough for bags. A switch starts a new window; steps that come
back to an input bag size go on in the window that it left unfinished, so bag sizes may also change with every step.
Resuming needs the step and nothing else.
"""

from __future__ import annotations

import operator
import reprlib
import warnings
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil, lcm
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from token_superposition.bags import fold, ragged_fold, span
from token_superposition.data.boundaries import Boundaries
from token_superposition.errors import TokenSuperpositionError, require_int
from token_superposition.permutation import draw, permute
from token_superposition.schedule import Phase, Schedule

Sample = dict[str, Tensor]
MIXED_BATCHES = 32
"""Blocks of a window for each sequence of a batch; fewer where that would be more than an eighth of the text."""


@dataclass(frozen=True)
class _PhasePlan:
    phase: Phase
    first_step: int
    done: int
    """Earlier steps with the same input bag."""
    unfinished: int
    """First block of the window in which those steps stopped, if they stopped inside one."""
    first_block: int
    """First block of the windows that this phase opens."""
    per_block: int
    """Samples in a block."""
    window_blocks: int

    def window_steps(self, batch_size: int) -> int:
        return self.window_blocks * self.per_block // batch_size


def _one_axis(tokens: Any) -> Any:
    shape: tuple[int, ...] = tuple(getattr(tokens, "shape", ())) or (len(tokens),)
    if len(tokens) and len(shape) == 1 and np.ndim(tokens[0]):  # a list of documents
        shape = (len(tokens), len(tokens[0]))
    if len(shape) > 1:
        raise TokenSuperpositionError(
            f"the tokens have shape {shape}; give one stream of ids, such as np.concatenate(tokens), whose documents "
            "end with a token of their own"
        )
    return tokens


def _ids_at(tokens: Any, start: int, stop: int) -> np.ndarray:
    raw = np.asarray(tokens[start:stop])
    if raw.size and raw.min() < 0:
        raise TokenSuperpositionError(
            f"the text has the id {raw.min()} at token {start + int(raw.argmin())}; give ids from 0 up: a plan has no "
            "padding and no masked tokens"
        )
    return raw


def check_fingerprint(here: Mapping[str, Any], saved: Mapping[str, Any], remedy: str) -> None:
    """Raise ``TokenSuperpositionError`` if ``saved`` is the fingerprint of other samples; it says what differs."""
    if differ := [k for k in here if saved.get(k) != here[k]]:
        values = ", ".join(f"{k} {reprlib.repr(saved.get(k))} there, {reprlib.repr(here[k])} here" for k in differ)
        raise TokenSuperpositionError(
            f"the checkpoint is of another plan of the samples: {values}; give the checkpoint's values, or {remedy}"
        )


class PlannedDataset(Dataset[Sample]):
    """Map-style dataset of a whole run: ``total_steps * batch_size`` samples, to be read in order.

    ``tokens`` is a ``TokenStore`` or any 1-D array of token ids (``np.memmap``, tensor). ``batch_size`` is the number
    of sequences of one optimizer step over all processes and accumulated micro-batches. A sample is

        input_ids     (L,) or (L, input_bag)  int64
        shift_labels  (L,) or (L, output_bag) int64, already shifted: position j's targets are at index j

    ``common_bag`` (a multiple of every bag size) widens the blocks: give runs that are compared the same one and they
    cut the stream at the same places. ``shift`` starts every sample 0 to a - 1 tokens later, drawn for its index, so
    that the boundaries of bags fall anywhere: neighbours then overlap or leave out up to a - 1 tokens. The text ends
    where it ends: its last sample starts no later than fits in. For bags of one token it changes nothing.

    ``boundaries`` ends bags early, so that none reaches over a boundary (``ragged_fold``: empty places are -1 in
    input_ids, -100 in shift_labels). A sample begins where it would begin without them and has the same tokens at its
    disposal; those that its L ragged bags do not come to are passed over. For bags of one token it changes nothing.

    The ``Trainer`` and accelerate share out a step among processes. In a loop of your own, this gives every process its
    samples of every step, from ``first_step`` on (``shuffle=False``: another order mixes the phases)::

        left = Subset(plan, range(first_step * plan.batch_size, len(plan)))
        sampler = DistributedSampler(left, world_size, rank, shuffle=False)
        loader = DataLoader(left, plan.batch_size // (world_size * accumulate), sampler=sampler)

    Raises ``TokenSuperpositionError`` if the stream is shorter than one block or has several axes, and for a sample
    with an id below 0; warns if it is read more than once, or part of it is: a phase that ends inside a window leaves
    some of its blocks unread.
    """

    def __init__(
        self,
        tokens: Any,
        schedule: Schedule,
        sequence_length: int,
        batch_size: int,
        seed: int = 0,
        common_bag: int = 1,
        shift: bool = False,
        boundaries: Boundaries | None = None,
    ):
        self.boundaries = boundaries
        self.shift = shift
        self.tokens = _one_axis(tokens)
        self.schedule = schedule
        self.sequence_length = sequence_length = require_int("sequence_length", sequence_length, 1)
        self.batch_size = batch_size = require_int("batch_size", batch_size, 1)
        self.seed = require_int("seed", seed, 0)
        self.block_bags = lcm(schedule.common_bag, require_int("common_bag", common_bag, 1))
        self.block_tokens = sequence_length * self.block_bags
        # Of runs that have the same common bag the same, whatever they do with it: then they have the same blocks.
        lookahead = max(self.block_bags, *(p.output_bag for p in schedule.phases))
        self.blocks = (len(tokens) - lookahead) // self.block_tokens
        if self.blocks < 1:
            raise TokenSuperpositionError(
                f"the text has {len(tokens)} tokens, one block needs {self.block_tokens + lookahead} "
                f"(sequence length {sequence_length} x bag {self.block_bags}); prepare more text or a shorter sequence"
            )
        mixed = batch_size * max(1, min(MIXED_BATCHES, self.blocks // (8 * batch_size)))
        self._phases: list[_PhasePlan] = []
        done: dict[int, int] = {}  # steps so far, by input bag
        unfinished: dict[int, int] = {}
        block = 0
        for first_step, phase in zip(schedule.starts, schedule.phases, strict=True):
            bag, per_block = phase.input_bag, self.block_bags // phase.input_bag
            before = done.get(bag, 0)
            size = mixed if per_block > 1 else batch_size
            plan = _PhasePlan(phase, first_step, before, unfinished.get(bag, 0), block, per_block, size)
            self._phases.append(plan)
            done[bag] = before + phase.steps
            steps = plan.window_steps(batch_size)
            if opened := ceil(done[bag] / steps) - ceil(before / steps):
                block += opened * size
                unfinished[bag] = block - size
        self.epochs = schedule.raw_tokens(batch_size, sequence_length) / (self.blocks * self.block_tokens)
        """How often the run reads the text; above 1, text is repeated."""
        if self.epochs > 1:
            warnings.warn(
                f"the run reads its text {self.epochs:.2f} times; TST pays for speed with fresh text, "
                "so prepare more, or use a smaller bag or ratio",
                stacklevel=2,
            )
        elif (missing := block - self.blocks) > 0:
            warnings.warn(
                f"the run opens {block} blocks of text and leaves some unfinished, but there are {self.blocks}: up to "
                f"{missing / self.blocks:.1%} of the text may be read twice while other is not read; prepare about "
                f"{missing * self.block_tokens:,} tokens more",
                stacklevel=2,
            )

    def __len__(self) -> int:
        return self.schedule.total_steps * self.batch_size

    def fingerprint(self) -> dict[str, Any]:
        """What decides the samples, as JSON values: for the state that a loader saves in a checkpoint.

        A phase is its first step, input bag and output bag. The last one may become longer: a longer plan begins like a
        shorter one. Of the text it has the length, not the content.
        """
        tables = self.boundaries and self.boundaries.before.tobytes() + self.boundaries.after.tobytes()
        return {
            "phases": self.schedule.changes,
            "sequence_length": self.sequence_length,
            "batch_size": self.batch_size,
            "seed": self.seed,
            "common_bag": self.block_bags,
            "tokens": len(self.tokens),
            "shift": self.shift,
            "boundaries": zlib.crc32(tables) if tables else None,
        }

    def check_fingerprint(self, saved: Mapping[str, Any], remedy: str) -> None:
        """Raise ``TokenSuperpositionError`` if ``saved`` is the fingerprint of other samples; it says what differs."""
        check_fingerprint(self.fingerprint(), saved, remedy)

    def __getitem__(self, index: int) -> Sample:
        plan, start = self._locate(index)
        a, b = plan.phase.input_bag, plan.phase.output_bag
        raw = _ids_at(self.tokens, start, start + span(self.sequence_length, a, b))
        tokens = torch.from_numpy(raw.astype(np.int64))
        if self.boundaries is None or not plan.phase.is_superposed:
            ids, targets = fold(tokens, a, b)
        else:
            ids, targets = ragged_fold(tokens, torch.from_numpy(self.boundaries.begins(raw)), a, b)
        return {"input_ids": ids, "shift_labels": targets}

    def tokens_per_bag(self, step: int) -> float:
        """Mean number of tokens in an input bag of a step (0-based), less than the bag size where bags are ragged.

        Taken over at most the first 64 samples of the step.
        """
        bag = self.schedule.at(step).input_bag
        if self.boundaries is None or bag == 1:
            return bag
        first = step * self.batch_size
        samples = range(first, first + min(self.batch_size, 64))
        tokens = sum(int((self[i]["input_ids"] >= 0).sum()) for i in samples)
        return tokens / (len(samples) * self.sequence_length)

    def start_of(self, index: int) -> int:
        """Index in the token stream of the first token of a sample."""
        return self._locate(index)[1]

    def _locate(self, index: int) -> tuple[_PhasePlan, int]:
        index = operator.index(index)  # numpy's are too short for what is computed with them
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        step, place = divmod(index, self.batch_size)
        plan = self._phases[self.schedule.phase_index(step)]
        steps = plan.window_steps(self.batch_size)
        window, step_in_window = divmod(plan.done + step - plan.first_step, steps)
        window -= ceil(plan.done / steps)
        first_block = plan.unfinished if window < 0 else plan.first_block + window * plan.window_blocks
        place += step_in_window * self.batch_size
        slot = permute(place, steps * self.batch_size, (self.seed, first_block))
        block_in_window, place_in_block = slot % plan.window_blocks, slot // plan.window_blocks
        epoch, block = divmod(first_block + block_in_window, self.blocks)
        block = permute(block, self.blocks, (self.seed, ~epoch))
        start = block * self.block_tokens + place_in_block * self.sequence_length * plan.phase.input_bag
        if not self.shift:
            return plan, start
        room = len(self.tokens) - start - span(self.sequence_length, plan.phase.input_bag, plan.phase.output_bag)
        return plan, start + min(draw(plan.phase.input_bag, (self.seed, index, 1)), room)


class ValidationSet(Dataset[Sample]):
    """Ordinary next-token samples of held-out text: always bag size 1, whatever the phase.

    ``tokens`` is a ``TokenStore`` or any 1-D array of token ids. A sample is

        input_ids     (L,) int64
        shift_labels  (L,) int64, already shifted: position j's target is at index j

    There are as many as the text has room for, or as ``max_tokens`` targets make, but at least one. Fewer than there is
    room for are spread evenly over the text, which may lie in an order (of its files' names, say). Sample i begins at a
    multiple of L, at token ``i * L`` where all are read.

    Raises ``TokenSuperpositionError`` for a ``sequence_length`` that is no whole number of at least 1, and if the text
    is shorter than one sequence and the token after it.
    """

    def __init__(self, tokens: Any, sequence_length: int, max_tokens: int | None = None):
        self.tokens = _one_axis(tokens)
        self.sequence_length = sequence_length = require_int("sequence_length", sequence_length, 1)
        self.available = self.samples = (len(tokens) - 1) // sequence_length
        if max_tokens is not None:
            self.samples = min(self.available, max(max_tokens // sequence_length, 1))
        if self.samples < 1:
            raise TokenSuperpositionError(
                f"the validation text has {len(tokens)} tokens, one sequence needs {sequence_length + 1}; "
                "prepare more text, hold out a larger share, or shorten the sequence"
            )

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> Sample:
        index = operator.index(index)
        if not 0 <= index < self.samples:
            raise IndexError(f"sample {index} of {self.samples}")
        start = index * self.available // self.samples * self.sequence_length
        raw = _ids_at(self.tokens, start, start + self.sequence_length + 1)
        ids, targets = fold(torch.from_numpy(raw.astype(np.int64)))
        return {"input_ids": ids, "shift_labels": targets}
