"""The form of a JSON file, looked at when it is read: what comes after may rely on it."""

from __future__ import annotations

import dataclasses
import math
import reprlib
import types
import typing
from typing import Any, Literal, cast


def misfit(content: Any, form: Any, where: str) -> str | None:
    """Where ``content`` has another form, and what is there; None if it fits.

    A form is a type hint, ``{key: form}`` for an object that has at least these keys, or ``[form]`` for a list of such
    values. A dataclass stands for an object with its fields and no other; a float may be a whole number.

    >>> misfit({"runs": [{"seed": 0}, {"seed": "1"}]}, {"runs": [{"seed": int}]}, "summary.json")
    "summary.json: runs[1]: seed is '1'"
    """
    origin, args = typing.get_origin(form), typing.get_args(form)
    if isinstance(form, dict) and isinstance(content, dict):
        return _of_keys(cast(dict[str, Any], content), cast(dict[str, Any], form), where)
    if dataclasses.is_dataclass(form) and isinstance(content, dict):
        hints, found = typing.get_type_hints(form), cast(dict[str, Any], content)
        unknown = next((f"{where} has {key}, which is unknown" for key in found if key not in hints), None)
        return unknown or _of_keys(found, hints, where)
    if (isinstance(form, list) or origin in (list, tuple)) and isinstance(content, list):
        inner = cast(list[Any], form)[0] if isinstance(form, list) else args[0]
        items = enumerate(cast(list[Any], content))
        return next((bad for i, x in items if (bad := misfit(x, inner, f"{where}[{i}]"))), None)
    if origin is dict and isinstance(content, dict):
        values = cast(dict[str, Any], content).items()
        return next((bad for key, x in values if (bad := misfit(x, args[1], f"{where}: {key}"))), None)
    if origin in (types.UnionType, typing.Union):
        fits = any(misfit(content, option, where) is None for option in args)
    elif origin is Literal:
        fits = content in args
    elif form is float:
        fits = isinstance(content, int | float) and not isinstance(content, bool)
    else:
        fits = form is Any or (isinstance(form, type) and type(content) is form)
    return None if fits else f"{where} is {reprlib.repr(content)}"


def restored(content: Any, form: Any) -> Any:
    """``content`` with nan in place of null where the form has a float: JSON has no such number.

    >>> restored({"loss": None, "ends": None}, {"loss": float, "ends": float | None})
    {'loss': nan, 'ends': None}
    """
    if form is float and content is None:
        return math.nan
    forms = typing.get_type_hints(form) if dataclasses.is_dataclass(form) else form
    if isinstance(forms, dict) and isinstance(content, dict):
        inner = cast(dict[str, Any], forms)
        return {k: restored(v, inner.get(k)) for k, v in cast(dict[str, Any], content).items()}
    if isinstance(content, list) and (isinstance(form, list) or typing.get_origin(form) in (list, tuple)):
        of = cast(list[Any], form)[0] if isinstance(form, list) else typing.get_args(form)[0]
        return [restored(x, of) for x in cast(list[Any], content)]
    return content


def _of_keys(content: dict[str, Any], forms: dict[str, Any], where: str) -> str | None:
    for key, form in forms.items():
        if key not in content:
            return f"{where} has no {key}"
        if bad := misfit(content[key], form, f"{where}: {key}"):
            return bad
    return None
