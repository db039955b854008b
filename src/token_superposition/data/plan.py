"""The planned dataset: sample i is a fixed function of (tokens, schedule, seed, i).

The stream is cut into blocks of ``sequence_length * lcm(bag sizes)`` tokens, which every epoch puts in another seeded
order. Each input bag size has a stretch of that order to itself: that of the last phase all that the others leave, the
others as many blocks as their steps read. A step of bag size ``a`` reads samples of ``sequence_length * a`` contiguous
tokens, shuffled over the whole stretch of ``a``. Where a block holds several, a stretch is longer than its steps need,
up to an eighth of the text, so that pieces of one block do not come close to each other even in a short phase.

The last stretch goes through its samples in an order of the whole text, and passes over those of other stretches. So
runs over one text, with one seed and sequence length, that begin with bags and end without read ordinary sequences in
the order in which a run without bags does: after as many raw tokens they are at the same place in it (but for the
rounding of stretches to blocks, and where bags leave less than a sixteenth of the text).

Bag sizes may change with every step, the last phase may become longer, and resuming needs the step and nothing else.
"""

from __future__ import annotations

import operator
import reprlib
import warnings
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import ceil
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from token_superposition.bags import fold, ragged_fold, span
from token_superposition.data.boundaries import Boundaries
from token_superposition.errors import TokenSuperpositionError, require_int
from token_superposition.permutation import draw, permute, place_of
from token_superposition.schedule import Phase, Schedule

Sample = dict[str, Tensor]


@dataclass(frozen=True)
class _Stretch:
    """Blocks for one input bag size, by their places in the order; places go on through the epochs."""

    first: int
    end: int | None
    """None: there is none."""


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
    if raw.size and raw.dtype.kind not in "iu":
        raise TokenSuperpositionError(f"the tokens are {raw.dtype}; give ids, which are whole numbers")
    if raw.size and raw.min() < 0:
        raise TokenSuperpositionError(
            f"the text has the id {raw.min()} at token {start + int(raw.argmin())}; give ids from 0 up: a plan has no "
            "padding and no masked tokens"
        )
    return raw


def require_schedule(schedule: object) -> Schedule:
    """It, or ``TokenSuperpositionError`` if it is none."""
    if not isinstance(schedule, Schedule):
        raise TokenSuperpositionError(
            f"the schedule is a {type(schedule).__name__}; give a Schedule, such as Schedule.two_phase(steps, 4)"
        )
    return schedule


def count_blocks(tokens: int, schedule: Schedule, sequence_length: int) -> int:
    """Blocks that a text of so many tokens has; raises ``TokenSuperpositionError`` if it is shorter than one."""
    lookahead = max(p.output_bag for p in schedule.phases)
    bags = sorted({p.input_bag for p in schedule.phases})
    block = sequence_length * schedule.common_bag
    if tokens < block + lookahead:
        fits = "" if schedule.common_bag in bags else f", into which bags of {', '.join(map(str, bags))} fit"
        raise TokenSuperpositionError(
            f"the text has {tokens} tokens, one block needs {block + lookahead} (sequence length {sequence_length} x "
            f"bag {schedule.common_bag}{fits}); prepare more text or a shorter sequence"
        )
    return (tokens - lookahead) // block


def count_sequences(tokens: int, sequence_length: int) -> int:
    """Of a validation text of so many tokens; raises ``TokenSuperpositionError`` if it is shorter than one."""
    if tokens <= sequence_length:
        raise TokenSuperpositionError(
            f"the validation text has {tokens} tokens, one sequence needs {sequence_length + 1}; "
            "prepare more text, hold out a larger share, or shorten the sequence"
        )
    return (tokens - 1) // sequence_length


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

    ``shift`` starts every sample 0 to a - 1 tokens later, drawn for its index, so that the boundaries of bags fall
    anywhere: neighbours then overlap or leave out up to a - 1 tokens. The text ends where it ends: its last sample
    starts no later than fits in. For bags of one token it changes nothing.

    ``boundaries`` ends bags early, so that none reaches over a boundary (``ragged_fold``: empty places are -1 in
    input_ids, -100 in shift_labels). A sample begins where it would begin without them and has the same tokens at its
    disposal; those that its L ragged bags do not come to are passed over. For bags of one token it changes nothing.

    The ``Trainer`` and accelerate share out a step among processes; ``loader`` does it for a loop of your own. One
    epoch of a plan is the whole run: what reads it again begins again with the bags.

    Raises ``TokenSuperpositionError`` if the stream is shorter than one block or has several axes, and for a sample
    with an id below 0; warns if the text is read more than once, or part of it is.
    """

    def __init__(
        self,
        tokens: Any,
        schedule: Schedule,
        sequence_length: int,
        batch_size: int,
        seed: int = 0,
        *,
        shift: bool = False,
        boundaries: Boundaries | None = None,
    ):
        self.boundaries = boundaries
        self.shift = shift
        self.tokens = _one_axis(tokens)
        self.schedule = require_schedule(schedule)
        self.sequence_length = sequence_length = require_int("sequence_length", sequence_length, 1)
        self.batch_size = batch_size = require_int("batch_size", batch_size, 1)
        self.seed = require_int("seed", seed, 0)
        self.block_bags = schedule.common_bag
        self.block_tokens = sequence_length * self.block_bags
        self.blocks = count_blocks(len(tokens), schedule, sequence_length)
        steps: dict[int, int] = {}  # by input bag
        self._steps_before: list[int] = []
        """Of each phase the earlier steps with its input bag."""
        for phase in schedule.phases:
            self._steps_before.append(steps.setdefault(phase.input_bag, 0))
            steps[phase.input_bag] += phase.steps
        last = schedule.phases[-1].input_bag
        self._stretches: dict[int, _Stretch] = {}
        first = 0
        for bag in steps:
            if bag != last:
                samples = steps[bag] * batch_size
                end = first + max(ceil(samples * bag / self.block_bags), min(samples, self.blocks // 8))
                self._stretches[bag] = _Stretch(first, end)
                first = end
        self._stretches[last] = _Stretch(first, None)
        self.epochs = schedule.raw_tokens(batch_size, sequence_length) / (self.blocks * self.block_tokens)
        """How often the run reads the text; above 1, text is repeated."""
        if self.epochs > 1:
            warnings.warn(
                f"the run reads its text {self.epochs:.2f} times; TST pays for speed with fresh text, "
                "so prepare more, or use a smaller bag or ratio",
                stacklevel=2,
            )
        elif (missing := first + ceil(steps[last] * batch_size * last / self.block_bags) - self.blocks) > 0:
            warnings.warn(
                f"the run leaves parts of blocks of text unread and has {self.blocks} blocks where it needs "
                f"{missing} more: up to {missing / self.blocks:.1%} of the text may be read twice while other is not "
                f"read; prepare about {missing * self.block_tokens:,} tokens more",
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
            "order": 2,  # another one with each version that reads another order
            "phases": self.schedule.changes,
            "sequence_length": self.sequence_length,
            "batch_size": self.batch_size,
            "seed": self.seed,
            "tokens": len(self.tokens),
            "shift": self.shift,
            "boundaries": zlib.crc32(tables) if tables else None,
        }

    def check_fingerprint(self, saved: Mapping[str, Any], remedy: str) -> None:
        """Raise ``TokenSuperpositionError`` if ``saved`` is the fingerprint of other samples; it says what differs."""
        check_fingerprint(self.fingerprint(), saved, remedy)

    def __getitem__(self, index: int) -> Sample:
        phase, start = self._locate(index)
        a, b = phase.input_bag, phase.output_bag
        raw = _ids_at(self.tokens, start, start + span(self.sequence_length, a, b))
        tokens = torch.from_numpy(raw.astype(np.int64))
        if self.boundaries is None or not phase.is_superposed:
            ids, targets = fold(tokens, a, b)
        else:
            ids, targets = ragged_fold(tokens, torch.from_numpy(self.boundaries.begins(raw)), a, b)
        return {"input_ids": ids, "shift_labels": targets}

    def loader(
        self, micro_batch_size: int, *, first_batch: int = 0, rank: int = 0, world_size: int = 1, **options: Any
    ) -> DataLoader[Sample]:
        """Micro-batches of one process, in order: ``batch_size // (world_size * micro_batch_size)`` of them a step.

        ``first_batch`` of them are passed over: where a run goes on, its steps times those of a step. ``options`` are
        those of ``DataLoader`` (``num_workers``, ``pin_memory``). The processes read different samples, together those
        of the plan's step; let no framework put a sampler of its own in the place of this one (Lightning:
        ``use_distributed_sampler=False``). Warns when it is read again after its end, and begins again with the bags.

        Raises ``TokenSuperpositionError`` if the processes cannot share out a step evenly.
        """
        micro = require_int("micro_batch_size", micro_batch_size, 1)
        world_size, rank = require_int("world_size", world_size, 1), require_int("rank", rank, 0)
        if rank >= world_size:
            raise TokenSuperpositionError(f"rank is {rank} of {world_size} processes; they are counted from 0")
        if self.batch_size % (micro * world_size):
            raise TokenSuperpositionError(
                f"the plan has {self.batch_size} sequences a step, of which {world_size} processes cannot read equally "
                f"many in micro-batches of {micro}; give the plan a batch_size that is a multiple of "
                f"{micro * world_size}, of all processes and accumulated micro-batches"
            )
        first = require_int("first_batch", first_batch, 0) * micro * world_size
        share = _Share(range(rank, len(self), world_size), first // world_size)
        return DataLoader(self, micro, sampler=share, **options)

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

    def _locate(self, index: int) -> tuple[Phase, int]:
        index = operator.index(index)  # numpy's are too short for what is computed with them
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        i = self.schedule.phase_index(index // self.batch_size)
        phase, begin = self.schedule.phases[i], self.schedule.starts[i] - self._steps_before[i]
        start = self._sample(phase.input_bag, index - begin * self.batch_size) * self.sequence_length * phase.input_bag
        if not self.shift:
            return phase, start
        room = len(self.tokens) - start - span(self.sequence_length, phase.input_bag, phase.output_bag)
        return phase, start + min(draw(phase.input_bag, (self.seed, index, 1)), room)

    def _sample(self, bag: int, i: int) -> int:
        """Number of the i-th sample of an input bag size, if the text is cut into samples of that size."""
        stretch, per_block = self._stretches[bag], self.block_bags // bag
        samples = self.blocks * per_block
        epoch, place = divmod(stretch.first * per_block + i, samples)
        of_samples, of_blocks = (self.seed, ~epoch, bag), (self.seed, ~epoch, self.block_bags)
        if per_block == 1:
            return permute(place, samples, of_samples)
        # The places of this epoch that the stretch has.
        first = max(stretch.first * per_block - epoch * samples, 0)
        if stretch.end is None and 16 * (samples - first) >= samples:
            whole = (len(self.tokens) - 1) // (self.sequence_length * bag)  # whatever the length of a block
            while True:  # passes over a sample of another stretch: on from its place in the order of the blocks
                place = permute(place, whole, of_samples)
                if place < samples:
                    sample = place
                    place = place_of(sample // per_block, self.blocks, of_blocks) * per_block + sample % per_block
                    if place >= first:
                        return sample
        end = samples if stretch.end is None else min(stretch.end * per_block - epoch * samples, samples)
        place = first + permute(place - first, end - first, of_samples)
        return permute(place // per_block, self.blocks, of_blocks) * per_block + place % per_block


class _Share(Sampler[int]):
    """Samples of one process, in order; the first time from ``first`` of them on."""

    def __init__(self, samples: range, first: int):
        self.samples, self.first, self.ended = samples, first, False

    def __len__(self) -> int:
        return max(len(self.samples) - self.first, 0)

    def __iter__(self) -> Iterator[int]:
        if self.ended:
            warnings.warn(
                "the plan has ended and is read again from its first step, with its bags; one epoch is the whole run: "
                "plan as many steps as are to be trained",
                stacklevel=2,
            )
        yield from self.samples[self.first :]
        self.first, self.ended = 0, True


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
        self.available = self.samples = count_sequences(len(tokens), sequence_length)
        if max_tokens is not None:
            self.samples = min(self.available, max(max_tokens // sequence_length, 1))

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
