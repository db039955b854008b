"""The one exception type of this package."""

from __future__ import annotations

import math
import operator
import re
import reprlib
from numbers import Real
from typing import SupportsIndex, cast


class TokenSuperpositionError(ValueError):
    """An input that cannot be used. Its message is one line: the value, the limit and the remedy."""


def first_line(e: Exception) -> str:
    """Of its message; the name of its type where it has none."""
    return next(iter(str(e).strip().splitlines()), type(e).__name__)


def require_seed(name: str, value: object) -> int:
    """``require_int`` for what numpy takes as a seed."""
    if (seed := require_int(name, value, 0)) >= 2**32:
        raise TokenSuperpositionError(f"{name} is {seed}; give a whole number below 2**32 ({2**32:,})")
    return seed


def require_int(name: str, value: object, minimum: int) -> int:
    """``value`` as an int if it is a whole number (numpy's, too) of at least ``minimum``.

    Raises ``TokenSuperpositionError`` for anything else, also for a bool.
    """
    try:
        number = minimum - 1 if isinstance(value, bool) else operator.index(cast(SupportsIndex, value))
    except TypeError:
        number = minimum - 1
    if number < minimum:
        shown = " ".join(reprlib.repr(value).split())  # of a tensor that was given in its place: one line
        raise TokenSuperpositionError(f"{name} is {shown}; give a whole number of at least {minimum}")
    return number


def require_number(
    name: str, value: object, low: float, high: float = math.inf, *, strictly: bool = False, hint: str = ""
) -> None:
    """Raises ``TokenSuperpositionError`` unless ``value`` is a finite number in [low, high], or above ``low``."""
    number = float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan
    if low <= number <= high and abs(number) < math.inf and not (strictly and number == low):
        return
    if high < math.inf:
        wanted = f"a number in [{low:g}, {high:g}]"
    else:
        wanted = "a finite number" + (f" {'above' if strictly else 'of at least'} {low:g}" if low > -math.inf else "")
    raise TokenSuperpositionError(f"{name} is {' '.join(reprlib.repr(value).split())}; give {wanted}{hint}")


def errno_in(e: BaseException) -> int | None:
    """The number of an error of the operating system that a library in Rust (tokenizers, safetensors) put in its text.

    >>> errno_in(Exception("No space left on device (os error 28)"))
    28
    """
    found = re.search(r"\(os error (\d+)\)", str(e))
    return int(found[1]) if found else None
