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


def refuse_bag_size(loaded: Config, config: Config) -> None:
    """The same for --superposition.bag-size beside superposition.anneal, in whose place the latter are."""
    if sizes := config.superposition.anneal:
        why = f"but the bag sizes are those of superposition.anneal, {list(sizes)}; give others there, or leave it out"
        refuse_ignored(loaded, config, "superposition", why, ["bag_size"])


SWEPT = {
    "bag_sizes": ("superposition", "bag_size"),
    "ratios": ("superposition", "ratio"),
    "weightings": ("superposition", "weighting"),
    "learning_rates": ("train", "learning_rate"),
}


def refuse_swept(loaded: Config, config: Config) -> None:
    """The same for an option of which a sweep has a list of values."""
    for name, (section, key) in SWEPT.items():
        if values := getattr(config.sweep, name):
            why = f"but the sweep has sweep.{name}, {list(values)}; give it among them, or leave it out"
            refuse_ignored(loaded, config, section, why, [key])
