"""A terminal, or a pipe, that is gone while something is still printed."""

from __future__ import annotations

import os
import select
import stat
from typing import TextIO


def is_closed(stream: TextIO | int) -> bool:
    """Whether it is a pipe whose reader has gone, or a terminal that was closed."""
    poll = select.poll()
    poll.register(stream, 0)
    return bool(poll.poll(0))


def leave_terminal() -> None:
    """After SIGHUP, print nowhere in place of to a terminal that was closed, or a pipe, whose reader ends as well."""
    for stream in (1, 2):
        if is_closed(stream) or stat.S_ISFIFO(os.fstat(stream).st_mode):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
