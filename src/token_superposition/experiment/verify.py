"""Read the files of runs and models again, as far as they say of themselves what they should be."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable
from pathlib import Path

from token_superposition.errors import TokenSuperpositionError, first_line
from token_superposition.experiment.checkpoints import MANIFEST, damage


def verify_run(directory: Path) -> tuple[int, list[str]]:
    """How many files of a run, a comparison or a model were read, and a line for each damaged one.

    Every file of a checkpoint is compared with its checksum in the manifest. Other JSON, JSON lines and TOML are
    parsed; a safetensors file must have the length that its header adds up to: what is changed inside these and still
    has their form is not found.

    Raises ``TokenSuperpositionError`` if the directory holds no such file.
    """
    files = [p for p in sorted(directory.rglob("*")) if p.suffix in CHECKS and p.is_file()]
    if not files:
        raise TokenSuperpositionError(
            f"{directory} holds neither data (no meta.json) nor a run or a model; "
            "name what tst prepare or tst train wrote"
        )
    checkpoints = [p.parent for p in files if p.name == MANIFEST]
    damaged = [problem for checkpoint in checkpoints if (problem := damage(checkpoint))]
    for path in files:
        if any(checkpoint in path.parents for checkpoint in checkpoints):
            continue
        try:
            CHECKS[path.suffix](path)
        except Exception as e:  # each reader has its own kinds
            damaged.append(f"{path} cannot be read ({first_line(e)})")
    return len(files), damaged


def _json_lines(path: Path) -> None:
    with path.open("rb") as f:
        for line in f:
            json.loads(line)


def _safetensors(path: Path) -> None:
    from safetensors import safe_open

    with safe_open(path, "numpy"):  # maps the file, compares its length with its header
        pass


CHECKS: dict[str, Callable[[Path], object]] = {
    ".json": lambda path: json.loads(path.read_bytes()),
    ".jsonl": _json_lines,
    ".toml": lambda path: tomllib.loads(path.read_text(encoding="utf-8")),
    ".safetensors": _safetensors,
}
