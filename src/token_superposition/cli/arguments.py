"""Parse a command's arguments into a dataclass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import tyro

from token_superposition.experiment.config import Config, load_config

T = TypeVar("T")


def parse(options: type[T], command: str, args: Sequence[str], default: T | None = None) -> T:
    """Flags and positional arguments of ``options``, whose docstring is the help text."""
    settings = (tyro.conf.AvoidSubcommands,)
    if default is None:
        return tyro.cli(options, prog=f"tst {command}", args=list(args), config=settings)
    return tyro.cli(options, prog=f"tst {command}", args=list(args), default=default, config=settings)


def split_config(args: Sequence[str]) -> tuple[Config, list[str]]:
    """The configuration, a file or the name of a preset, which comes first, and the arguments after it."""
    if args and not args[0].startswith("-"):
        return load_config(args[0]), list(args[1:])
    return Config(), list(args)
