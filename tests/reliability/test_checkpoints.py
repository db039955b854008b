"""Checkpoints: what is damaged is named, and what is good stays."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.reliability.harness import flip_a_bit
from token_superposition import TokenSuperpositionError
from token_superposition.experiment.checkpoints import (
    ASIDE,
    MANIFEST,
    checkpoints_in,
    checksums,
    commit,
    damage,
    newest_whole,
    rotate,
    step_of,
)


def make(directory: Path, step: int) -> Path:
    """A checkpoint of three files, one of them in a folder."""
    written = directory / ASIDE / f"checkpoint-{step}"
    (written / "shards").mkdir(parents=True)
    for name in ("a.bin", "b.json", "shards/0.distcp"):
        (written / name).write_bytes(f"{name} {step} ".encode() * 50)
    target = directory / written.name
    halves = [checksums(written, part, 2) for part in range(2)]  # as two processes share the work
    assert all(halves)
    commit(written, target, halves[0] | halves[1], {"data": {}, "config": {}})
    return target


def alter_the_manifest(checkpoint: Path) -> None:
    path = checkpoint / MANIFEST
    path.write_text(path.read_text().replace('"step": 8', '"step": 9'))


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (lambda c: os.truncate(c / "shards/0.distcp", 7), "shards/0.distcp has 7 of"),
    "longer": (lambda c: os.truncate(c / "a.bin", 10_000), "a.bin has 10,000 of"),
    "flipped": (lambda c: flip_a_bit(c / "b.json", random.Random(3)), "b.json was altered"),
    "missing": (lambda c: (c / "a.bin").unlink(), "a.bin is missing"),
    "no manifest": (lambda c: (c / MANIFEST).unlink(), "has no manifest.json: it was not finished"),
    "half a manifest": (lambda c: os.truncate(c / MANIFEST, 40), "manifest.json cannot be read"),
    "empty manifest": (lambda c: os.truncate(c / MANIFEST, 0), "manifest.json cannot be read"),
    "altered manifest": (alter_the_manifest, "manifest.json was altered"),
    "a list": (lambda c: (c / MANIFEST).write_text("[]"), "manifest.json cannot be read"),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_damage_is_named_and_the_checkpoint_before_is_taken(kind: str, tmp_path: Path) -> None:
    older, newer = make(tmp_path, 4), make(tmp_path, 8)
    lines: list[str] = []
    assert newest_whole(tmp_path, lines.append) == newer and not lines
    harm, message = DAMAGES[kind]
    harm(newer)
    assert newest_whole(tmp_path, lines.append) == older
    (line,) = lines
    assert line.startswith("checkpoint-8 is damaged and is passed over: ") and message in line
    assert newer.exists()  # it is the user's to remove
    (older / MANIFEST).unlink()
    with pytest.raises(TokenSuperpositionError, match=r"no checkpoint in .* is whole .*remove them to train from"):
        newest_whole(tmp_path)


def test_what_is_no_checkpoint_is_no_checkpoint(tmp_path: Path) -> None:
    assert newest_whole(tmp_path) is None and newest_whole(tmp_path / "nowhere") is None
    (tmp_path / ASIDE / "checkpoint-12").mkdir(parents=True)  # killed while it was written
    (tmp_path / "checkpoint-best").mkdir()
    assert newest_whole(tmp_path) is None
    for step in (12, 4, 100):
        make(tmp_path, step)
    assert [step_of(c) for c in checkpoints_in(tmp_path)] == [4, 12, 100]
    (tmp_path / "checkpoint-100/notes.txt").write_text("a file that the manifest does not name")
    assert newest_whole(tmp_path) == tmp_path / "checkpoint-100"


def test_a_checkpoint_of_another_name_is_of_another_step(tmp_path: Path) -> None:
    make(tmp_path, 8).rename(tmp_path / "checkpoint-12")
    assert "manifest.json was altered" in (damage(tmp_path / "checkpoint-12") or "")


def test_all_of_a_checkpoint_is_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every file as long as it then is, and every directory that names one, the one of the checkpoints as well."""
    synced: dict[int, int] = {}

    def fsync(descriptor: int) -> None:
        synced[os.fstat(descriptor).st_ino] = os.fstat(descriptor).st_size

    monkeypatch.setattr(os, "fsync", fsync)
    written = make(tmp_path, 4)
    for path in (tmp_path, written, *written.rglob("*")):
        assert path.stat().st_ino in synced, path
        assert path.is_dir() or synced[path.stat().st_ino] == path.stat().st_size, path


def test_a_damaged_checkpoint_is_written_again(tmp_path: Path) -> None:
    make(tmp_path, 4)
    os.truncate(tmp_path / "checkpoint-4/a.bin", 1)
    make(tmp_path, 4)
    assert damage(tmp_path / "checkpoint-4") is None and list(tmp_path.iterdir()) == [tmp_path / "checkpoint-4"]


def test_rotation_never_removes_the_last_good_one(tmp_path: Path) -> None:
    for step in (4, 6, 8, 12, 16):
        newest = make(tmp_path, step)

    def steps() -> list[int]:
        return [step_of(c) for c in checkpoints_in(tmp_path)]

    rotate(newest, 0)
    assert steps() == [4, 6, 8, 12, 16]
    for step in (12, 16):
        os.truncate(tmp_path / f"checkpoint-{step}/a.bin", 1)
    rotate(newest, 2, kept_steps=(6,))
    assert steps() == [4, 6, 8, 12, 16]  # of those that would stay, none is whole
    rotate(newest, 3, kept_steps=(6,))
    assert steps() == [6, 8, 12, 16]
    rotate(make(tmp_path, 20), 1, kept_steps=(6,))
    assert steps() == [6, 20] and not (tmp_path / ASIDE).exists()


@pytest.mark.parametrize(("keep", "left"), [(1, [6, 10, 12]), (2, [6, 8, 10, 12])])
def test_rotation_counts_no_damaged_one_that_the_run_passed_over(keep: int, left: list[int], tmp_path: Path) -> None:
    """The run went on from its switch, 6, and was terminated after step 10, before it came by 12 again."""
    make(tmp_path, 6)
    flip_a_bit(make(tmp_path, 12) / "a.bin", random.Random(0))
    for step in (8, 10):
        written = make(tmp_path, step)
        rotate(written, keep, kept_steps=(6,))
    assert newest_whole(tmp_path) == written
    assert [step_of(c) for c in checkpoints_in(tmp_path)] == left
    rotate(make(tmp_path, 12), keep, kept_steps=(6,))
    assert [step_of(c) for c in checkpoints_in(tmp_path)] == [6, *(10, 12)[-keep:]]
