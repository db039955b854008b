"""A tree of dataclasses from plain values, as TOML and JSON have them, and back."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from typing import Any, Literal, TypeVar, cast

from token_superposition.errors import TokenSuperpositionError

T = TypeVar("T")


def from_dict(cls: type[T], content: Any, where: str) -> T:
    """Build a dataclass tree from parsed TOML; the type of every value is checked.

    Raises ``TokenSuperpositionError`` for a key that does not exist, with the nearest name, or a wrong type.
    """
    if not isinstance(content, dict):
        raise TokenSuperpositionError(f"{where} is {content!r}; give a table")
    fields = typing.get_type_hints(cls)
    values: dict[str, Any] = {}
    for key, value in cast(dict[str, Any], content).items():
        if key not in fields:
            near = difflib.get_close_matches(key, fields, 1)
            hint = f"did you mean {near[0]}?" if near else f"the keys are {', '.join(fields)}"
            raise TokenSuperpositionError(f"{where}: unknown key {key}; {hint}")
        values[key] = _convert(fields[key], value, f"{where}: {key}")
    return cls(**values)


def _convert(kind: Any, value: Any, where: str) -> Any:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        return from_dict(cast(type[Any], kind), value, where)
    if origin is tuple and isinstance(value, (list, tuple)):
        return tuple(_convert(args[0], v, f"{where}[{i}]") for i, v in enumerate(cast(list[Any], value)))
    if origin is dict and isinstance(value, dict):
        return {k: _convert(args[1], v, f"{where}.{k}") for k, v in cast(dict[str, Any], value).items()}
    if origin is Literal and value in args:
        return value
    if origin in (types.UnionType, typing.Union):
        for option in args:
            if option is not type(None):
                try:
                    return _convert(option, value, where)
                except TokenSuperpositionError:
                    continue
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(kind, type) and type(value) is kind:
        return value
    wanted = f"one of {', '.join(map(str, args))}" if origin is Literal else getattr(kind, "__name__", str(kind))
    wanted = "a list, in brackets" if origin is tuple else wanted
    if {int, str} <= set(args) and isinstance(value, (list, dict)):  # of model.options
        wanted += "; a model that needs more, save with transformers and name in model.path"
    raise TokenSuperpositionError(f"{where} is {value!r}; give {wanted}")


def without_none(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {k: without_none(v) for k, v in cast(dict[str, Any], tree).items() if v is not None}
    if isinstance(tree, (list, tuple)):
        return [without_none(v) for v in cast(list[Any], tree)]
    return tree
