"""Read the files of runs and models again, as far as they say of themselves what they should be."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable
from pathlib import Path

from token_superposition.errors import TokenSuperpositionError, first_line
from token_superposition.experiment.checkpoints import MANIFEST, checkpoints_in, damage
from token_superposition.experiment.files import CONFIG, METRICS, MODEL, RESULT

INDEX = "model.safetensors.index.json"
WEIGHTS = {".safetensors", ".bin", ".gguf", ".h5", ".msgpack", ".onnx", ".pt", ".pth"}


def verify_run(directory: Path) -> tuple[int, list[str]]:
    """How many files of a run, a comparison or a model were read, and a line for each damaged one.

    Every file of a checkpoint is compared with its checksum in the manifest, which must be there; the model of a
    finished run, and one that was exported, must have its weights. Other JSON, JSON lines and TOML are parsed; a
    safetensors file must have the length that its header adds up to: what is changed inside these and still has their
    form is not found. No damage is what a killed process leaves: hidden files and folders, in which something was being
    written, and in metrics the half of a last line.

    Raises ``TokenSuperpositionError`` if the directory holds no such file.
    """
    found = (directory, *sorted(directory.rglob("*")))
    there = [p for p in found if not any(part.startswith(".") for part in p.relative_to(directory).parts)]
    files = [p for p in there if p.suffix in CHECKS and p.is_file()]
    checkpoints = {p.parent for p in files if p.name == MANIFEST}
    checkpoints |= {c for p in there if p.resolve().name == "checkpoints" for c in checkpoints_in(p)}
    if directory.resolve().parent.name == "checkpoints" and directory in checkpoints_in(directory.parent):
        checkpoints.add(directory)
    if not files and not checkpoints:
        raise TokenSuperpositionError(
            f"{directory} holds neither data (no meta.json) nor a run or a model; "
            "name what tst prepare or tst train wrote"
        )
    damaged = [problem for checkpoint in sorted(checkpoints) if (problem := damage(checkpoint))]
    for path in files:
        if not checkpoints.isdisjoint(path.parents):
            continue
        try:
            CHECKS[path.suffix](path)
            if path.name == RESULT and (path.parent / MODEL).exists():  # a sweep keeps no models
                damaged += [
                    f"{file} is missing, and {path} says that the run is finished"
                    for file in _missing(path.parent / MODEL)
                ]
            elif path.name == "config.json" and not _of_a_run(path.parent) and _describes_weights(path):
                damaged += [f"{file} is missing, of the model that {path} describes" for file in _missing(path.parent)]
        except Exception as e:  # each reader has its own kinds
            damaged.append(f"{path} cannot be read ({first_line(e)})")
    return len(files), damaged


def _json_lines(path: Path) -> None:
    unfinished = path.name == METRICS and not (path.parent / RESULT).exists()
    with path.open("rb") as f:
        for line in f:
            if line.endswith(b"\n") or not unfinished:
                json.loads(line)


def _of_a_run(model: Path) -> bool:
    """Of which it is the result that says whether it is whole."""
    return model.name == MODEL and (model.parent / CONFIG).exists()


def _describes_weights(config: Path) -> bool:
    """Of a model whose weights are not under another name or in another form beside it, which are not missed here."""
    beside = {p.suffix for p in config.parent.iterdir()}
    indexed = (config.parent / INDEX).exists()
    return "model_type" in json.loads(config.read_bytes()) and (indexed or beside.isdisjoint(WEIGHTS))


def _missing(model: Path) -> list[Path]:
    """Files of weights that a model lacks."""
    index = model / INDEX
    names = set(json.loads(index.read_bytes())["weight_map"].values()) if index.exists() else {"model.safetensors"}
    return [model / name for name in sorted(names) if not (model / name).is_file()]


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
