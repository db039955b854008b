"""Refuse the options of other commands, which a command would ignore."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields

from token_superposition.errors import TokenSuperpositionError
from token_superposition.experiment.config import Config


def refuse_ignored(loaded: Config, config: Config, section: str, why: str, names: Sequence[str] = ()) -> None:
    """Raise ``TokenSuperpositionError`` where an option of ``section``, or one of its ``names``, was typed.

    A file may hold every section, for every command: what differs from ``loaded`` was typed. ``why`` has the remedy.
    """
    before, now = getattr(loaded, section), getattr(config, section)
    for name in names or [f.name for f in fields(now)]:
        if (value := getattr(now, name)) != getattr(before, name):
            shown = list(value) if isinstance(value, tuple) else value
            raise TokenSuperpositionError(f"--{section}.{name.replace('_', '-')} is {shown}, {why}")


def refuse_seed(loaded: Config, config: Config) -> None:
    """The same for --train.seed beside compare.seeds, which are the seeds of all runs."""
    if seeds := config.compare.seeds:
        why = f"but the runs have compare.seeds, {list(seeds)}; give it among --compare.seeds, or leave it out"
        refuse_ignored(loaded, config, "train", why, ["seed"])
