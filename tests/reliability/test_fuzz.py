"""Anything that is passed in is a result or a ``TokenSuperpositionError`` of one line."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.conftest import VOCAB, tiny
from token_superposition import (
    WSD,
    Phase,
    Schedule,
    TokenSuperpositionError,
    fold,
    linear_multi_hot_cross_entropy,
    multi_hot_cross_entropy,
    place_weights,
    span,
    superpose,
)
from token_superposition.bags import ragged_fold
from token_superposition.cli.arguments import parse
from token_superposition.cli.compare import CompareCommand
from token_superposition.data.plan import PlannedDataset, ValidationSet
from token_superposition.data.sources import read_documents
from token_superposition.data.store import Meta, TokenStore
from token_superposition.experiment.config import Config, load_config, save_config

fuzz = settings(
    max_examples=150, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
)
few = settings(fuzz, max_examples=40)
NUMBERS = st.integers(-3, 40) | st.sampled_from([2**31, 2**63, -(2**63), 10**30]) | st.floats() | st.booleans()
ANY = NUMBERS | st.none() | st.text(max_size=4)


def outcome(call: Callable[[], Any]) -> Any:
    """The result, or None where an error of one line says why there is none."""
    try:
        return call()
    except TokenSuperpositionError as e:
        assert str(e) and "\n" not in str(e), repr(str(e))
        return None


def fields(kind: Any) -> list[str]:
    """Names of all settings, such as train.steps."""
    found: list[str] = []
    for f in dataclasses.fields(kind):
        default = getattr(kind(), f.name)
        inner = fields(type(default)) if dataclasses.is_dataclass(default) else []
        found += [f"{f.name}.{name}" for name in inner] or [f.name]
    return found


NAMES = fields(Config)
VALUES = st.recursive(ANY, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner))


def toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(str(k))} = {toml(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(toml, value)) + "]"
    return "nan" if value is None else str(value) if isinstance(value, float) else json.dumps(value)


@fuzz
@given(st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=4), st.text(max_size=6))
def test_a_file_of_settings(tmp_path_factory: pytest.TempPathFactory, content: dict[str, Any], end: str) -> None:
    """Also one that is no TOML; what is accepted is a schedule, and comes back from the file that a run keeps."""
    path = tmp_path_factory.getbasetemp() / "fuzz.toml"
    path.write_text("".join(f"{k} = {toml(v)}\n" for k, v in content.items()) + end, "utf-8", "surrogatepass")
    config = outcome(lambda: load_config(path))
    if config is not None and outcome(lambda: config.check() or True):
        assert config.schedule.total_steps == config.train.steps and 0 <= config.wsd(0) <= 1
        save_config(config, path)
        assert load_config(path) == config


@few
@given(st.binary(max_size=40))
def test_any_bytes_as_a_configuration(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz.toml"
    path.write_bytes(content)
    outcome(lambda: load_config(path))


@settings(few, max_examples=25)
@given(st.lists(st.sampled_from([f"--{n.replace('_', '-')}" for n in NAMES] + ["-x", "--"]) | ANY.map(str), max_size=4))
def test_flags(arguments: list[str]) -> None:
    config = outcome(lambda: parse(CompareCommand, "compare", [a for a in arguments if "\0" not in a]))
    if config is not None:
        outcome(config.config.check)


SMALL = st.integers(-2, 9) | ANY.filter(lambda x: type(x) is not int or abs(x) < 2**31)


@fuzz
@given(st.integers(0, 30), SMALL, SMALL, st.integers(1, 3))
def test_fold(n: int, a: Any, b: Any, rows: int) -> None:
    tokens = torch.arange(rows * n).view(rows, n)
    found = outcome(lambda: fold(tokens, a, b))
    begins = tokens % 3 == 0
    ragged = outcome(lambda: ragged_fold(tokens, begins, a, b))
    assert (found is None) == (ragged is None)
    if found is not None:
        length = found[0].shape[1]
        assert span(length, a, b) == n and found[0].shape == ((rows, length, a) if a > 1 else (rows, length))


@fuzz
@given(st.lists(st.tuples(SMALL, SMALL, SMALL), max_size=4), NUMBERS)
def test_schedule(phases: list[tuple[Any, Any, Any]], step: Any) -> None:
    schedule = outcome(lambda: Schedule(Phase(*p) for p in phases))
    if schedule is not None:
        assert schedule.total_steps == sum(p[0] for p in phases)
        outcome(lambda: schedule.at(step))


@fuzz
@given(SMALL, SMALL, NUMBERS, st.lists(SMALL, max_size=3), NUMBERS)
def test_schedules_by_ratio(steps: Any, bag: Any, ratio: Any, sizes: list[Any], mixture: Any) -> None:
    for schedule in (
        outcome(lambda: Schedule.two_phase(steps, bag, ratio)),
        outcome(lambda: Schedule.annealed(steps, sizes, ratio).mixed(mixture)),
    ):
        if schedule is not None:
            assert (schedule.total_steps == steps and not schedule.at(steps - 1).is_superposed) or bag == 1
    wsd = outcome(lambda: WSD(steps, bag, ratio))
    if wsd is not None:
        assert all(0 < wsd(i) <= 1 for i in range(min(steps, 50)))


@fuzz
@given(st.sampled_from(["uniform", "power", "exponential", "first", "fitted", "x", ""]), SMALL)
def test_weights(weighting: Any, bag: Any) -> None:
    w = outcome(lambda: place_weights(weighting, bag))
    assert w is None or (w.shape == (bag,) and abs(w.sum().item() - 1) < 1e-5)


SHAPES = st.lists(st.integers(0, 3), max_size=3).map(tuple)
LOSS = {
    "softcap": st.sampled_from([None, 1.0, 0.0, -1.0]),
    "z_loss": st.sampled_from([0.0, 0.1]),
    "loss": st.sampled_from(["multi-hot", "sum-to-one", "x"]),
    "reduction": st.sampled_from(["mean", "sum", "none"]),
    "impl": st.sampled_from(["auto", "reference", "chunked", "native", "x"]),
    "chunk_rows": st.sampled_from([None, 0, 2]),
}


@fuzz
@given(SHAPES, SHAPES, SHAPES, st.none() | SHAPES, st.fixed_dictionaries(LOSS))
def test_losses(hidden: Any, weight: Any, targets: Any, places: Any, options: dict[str, Any]) -> None:
    x, w, y = torch.ones(hidden), torch.ones(weight), torch.zeros(targets, dtype=torch.long)
    p = None if places is None else torch.ones(places)
    found = outcome(lambda: linear_multi_hot_cross_entropy(x, w, y, p, **options))
    assert found is None or (found.shape == () and found.isfinite())
    kept = {k: options[k] for k in ("z_loss", "loss", "reduction")}
    found = outcome(lambda: multi_hot_cross_entropy(x, y, p, **kept))
    assert found is None or found.shape == ()


@fuzz
@given(st.integers(0, 400), SMALL, SMALL, SMALL, st.booleans(), st.sampled_from([1, 2, 4]))
def test_plan(n: int, length: Any, batch: Any, seed: Any, shift: bool, bag: int) -> None:
    tokens, schedule = np.arange(n, dtype=np.uint16), Schedule.two_phase(4, bag, 0.5)
    plan = outcome(lambda: PlannedDataset(tokens, schedule, length, batch, seed, shift=shift))
    if plan is not None and len(plan) < 1000:
        for i in range(len(plan)):
            ids = plan[i]["input_ids"].flatten()
            assert torch.equal(ids, torch.arange(len(ids)) + plan.start_of(i))
    held_out = outcome(lambda: ValidationSet(tokens, length))
    assert held_out is None or len(held_out[len(held_out) - 1]["input_ids"]) == length


@few
@given(SHAPES, st.sampled_from([torch.long, torch.int32, torch.float32]), st.integers(-2, VOCAB + 1))
def test_a_superposed_model(shape: Any, kind: torch.dtype, token: int) -> None:
    """Ids of the wrong type or range are torch's to refuse, as in an ordinary model."""
    ids = torch.full(shape, token, dtype=kind)
    with contextlib.suppress(IndexError, RuntimeError):
        out = outcome(lambda: MODEL.get_input_embeddings()(ids))
        assert out is None or out.shape == (*(shape[:2] if len(shape) == 3 else shape), 32)


MODEL = superpose(tiny("llama"))


DATA = st.data()


@few
@given(
    st.sampled_from(["a.txt", "a.jsonl", "a.jsonl.gz", "a.txt.zst", "a.parquet"]),
    st.binary(max_size=60) | st.recursive(ANY, lambda x: st.lists(x) | st.dictionaries(st.text(max_size=4), x)).map(
        lambda x: json.dumps({"text": x}).encode()
    ),
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:.* breaks off")
def test_files_of_text(tmp_path_factory: pytest.TempPathFactory, name: str, content: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / name
    path.write_bytes(content)
    dropped: Counter[str] = Counter()
    found = outcome(lambda: list(read_documents([path], "text", dropped)))
    if found is not None:
        assert found or dropped  # never silent
        assert all(t.strip() and t.encode() for t in found)


@fuzz
@given(
    st.sampled_from(["train-00000.npy", "train-00000.crc32.npy", "train-00000.documents.npy", "meta.json"]), st.data()
)
def test_a_changed_byte_anywhere_in_a_store(prepared: Path, tmp_path_factory: Any, name: str, data: Any) -> None:
    """Every byte of every file: what is read is what was written, or an error."""
    copy = tmp_path_factory.getbasetemp() / "fuzzed store"
    if not copy.exists():
        import shutil

        shutil.copytree(prepared, copy)
    content = bytearray((prepared / name).read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    content[place] ^= data.draw(st.integers(1, 255))
    (copy / name).write_bytes(content)
    try:
        store = outcome(lambda: TokenStore(copy))
        tokens = store and outcome(lambda: store[0 : len(store)])
        starts = store and outcome(store.document_starts)
        whole = TokenStore(prepared)
        if tokens is not None and starts is not None:
            assert np.array_equal(tokens, whole[0 : len(whole)]) and np.array_equal(starts, whole.document_starts())
            assert Meta.load(copy) == whole.meta and name == "meta.json"  # a space in it, no more
    finally:
        (copy / name).write_bytes((prepared / name).read_bytes())
