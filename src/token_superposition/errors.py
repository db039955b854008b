"""The one exception type of this package."""


class TokenSuperpositionError(ValueError):
    """An input that cannot be used. Its message is one line: the value, the limit and the remedy."""


def require_int(name: str, value: object, minimum: int) -> int:
    """Return ``value`` if it is an int of at least ``minimum``, else raise ``TokenSuperpositionError``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise TokenSuperpositionError(f"{name} is {value!r}; give a whole number of at least {minimum}")
    return value
