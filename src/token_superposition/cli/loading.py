"""Import torch and transformers without the garbage collector, which finds none in them."""

from __future__ import annotations

import gc
from collections.abc import Generator
from contextlib import contextmanager


@contextmanager
def loading() -> Generator[None]:
    """What is imported inside makes millions of objects, all to stay: no collection looks at them, now or later.

    A fifth of the time until a run begins; and the collection that accelerate asks for at the end of one is over at
    once. A second call of a process leaves what the first one has set aside as it is.
    """
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()
            if not gc.get_freeze_count():
                gc.freeze()
