"""Parse a command's arguments into a dataclass."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, TypeVar

import tyro

from token_superposition.errors import TokenSuperpositionError
from token_superposition.experiment.config import Config, load_config

T = TypeVar("T")


def parse(options: type[T], command: str, args: Sequence[str], default: T | None = None) -> T:
    """Flags and positional arguments of ``options``, whose docstring is the help text.

    Raises ``TokenSuperpositionError``, in one line, for arguments that do not fit.
    """
    settings = (tyro.conf.AvoidSubcommands,)
    given: dict[str, Any] = {} if default is None else {"default": default}
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            return tyro.cli(options, prog=f"tst {command}", args=list(args), config=settings, **given)
    except SystemExit as e:
        if not e.code:  # --help
            raise
        message = _one_line(errors.getvalue())
        late = [a for a in args if a.endswith(".toml") and f"options: {a}" in message]
        if late and args[0].startswith("-"):
            message += f", which comes first: tst {command} {late[0]} [OPTIONS]"
        words = [word for a in args for word in (a.split("=", 1) if a.startswith("--") else [a])]
        for switch, value in pairwise(words):
            given_to_it = switch.startswith("--") and value.lower() in ("true", "false")
            if given_to_it and message == f"Unrecognized options: {value}":
                section, dot, name = switch.removeprefix("--").rpartition(".")
                message += f"; {switch} takes no value, --{section}{dot}no-{name} turns it off"
        raise TokenSuperpositionError(f"{message}; see tst {command} --help") from None


def _one_line(box: str) -> str:
    """What tyro says in a box of many lines: its first part, and the first option that it proposes.

    The box is drawn in ASCII where nothing else can be shown. Where there is no such box, all that tyro says.
    """
    parts: list[list[str]] = [[]]
    for line in box.splitlines()[1:]:  # below the title
        line = line.strip("│|╰╯+ ")
        if set(line) <= {"─", "-"}:
            parts.append([])
        else:
            parts[-1].append(line)
    first, *others = [part for part in parts if part] or [box.split() or ["the arguments do not fit"]]
    message = " ".join(first).rstrip(".")
    for pattern, words in PLAINER.items():
        message = re.sub(pattern, words, message)
    near = next((line.split()[0] for part in others for line in part if line.startswith("--")), None)
    return message + (f"; did you mean {near}" if near and "Unrecognized" in message else "")


PLAINER = {
    r"Error parsing ([^:]*): invalid literal for int\(\) with base 10: (.*)": r"\1 is \2; give a whole number",
    r"Error parsing ([^:]*): could not convert string to float: (.*)": r"\1 is \2; give a number",
    r"Error parsing ([^:]*): Could not find valid parse for arguments: \[(.*)\]": r"\1 is \2; give values of its kind "
    "with spaces between them",
    r"invalid choice (.*) for argument '(.*)'. Expected one of \((.*)\)": r"\2 is \1; give one of \3",
}


def split_config(args: Sequence[str]) -> tuple[Config, list[str]]:
    """The configuration, a file or the name of a preset, which comes first, and the arguments after it."""
    if args and not args[0].startswith("-"):
        return load_config(args[0]), list(args[1:])
    return Config(), list(args)
