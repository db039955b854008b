"""What a tokenizer is trained on: texts from everywhere in what is read, as many bytes as were asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from token_superposition.data.held_out import digest
from token_superposition.data.sources import cut_at_lines
from token_superposition.errors import TokenSuperpositionError

SAMPLES = 32  # no text gives more than one part in so many
MIN_SAMPLE = 2**14  # bytes: with fewer, the parts would be too short to be text

Part = tuple[Callable[[], Iterator[str]], int | None]  # reads its texts; their rough bytes, if known


class Sample:
    """Texts chosen by hash, up to ``size`` bytes in all and as many from each part.

    Of a text that would be a large part of the sample, pieces are chosen: the sample comes from everywhere in a part,
    and is not empty or a single text because there are few. Of a part whose size is not known, the first texts are
    taken. A part that turns out to have so much less text than was thought that it gives less than half of what it
    should (most of a file was something else) is read again, and more of it chosen.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        size: int,
        max_bytes: int | None,  # of text, after which no part is read on
        seed: int,
        report: Callable[[int], None],  # is told the bytes read
    ):
        self.parts, self.size, self.max_bytes, self.seed, self.report = parts, size, max_bytes, seed, report
        self.whole = True
        """After the iteration: these were all the texts."""

    def __iter__(self) -> Iterator[str]:
        wanted = max(self.size // len(self.parts), 1)
        length = max(MIN_SAMPLE // SAMPLES, wanted // SAMPLES)
        done = sampled = 0
        for read, size in self.parts:
            chosen, share = 0.0, 1.0 if not size else min(1.0, wanted / size)  # before, and with this reading
            cut = share < 1
            taken, here, ended = 0, 0, False
            while chosen < share:
                here = 0
                for piece in (p for text in read() for p in (cut_at_lines(text, length) if cut else [text])):
                    data = piece.encode()
                    here += len(data)
                    self.report(done + here)
                    if chosen * 2**64 <= int.from_bytes(digest(data, self.seed)[8:]) < share * 2**64:
                        taken += len(data)
                        yield piece
                    if self.max_bytes is not None and done + here >= self.max_bytes:
                        break
                    if ended := taken >= wanted:
                        break
                chosen = share
                if taken < wanted / 2 and here:
                    share = max(share, min(1.0, wanted / here))
            self.whole &= chosen == 1 and not ended
            done, sampled = done + here, sampled + taken
        if done and not sampled:
            raise TokenSuperpositionError(
                f"tokenizer_bytes is {self.size}, too few to choose any of {done} bytes of text; give at least "
                f"{MIN_SAMPLE}"
            )
