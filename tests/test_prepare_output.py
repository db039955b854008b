"""Where prepared data are written: what is there stays, what breaks off leaves nothing, what is damaged is named."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from tests.conftest import text
from tests.nobody import without_privileges
from tests.processes import call, command_on_a_full_disk
from tests.test_prepare import OPTIONS
from token_superposition import TokenSuperpositionError
from token_superposition.data.prepare import PrepareOptions, prepare
from token_superposition.data.store import TokenStore
from token_superposition.data.verify import verify_store


def test_existing_output_is_never_touched(prepared: Path) -> None:
    before = (prepared / "meta.json").read_bytes()
    with pytest.raises(TokenSuperpositionError, match="exists already"):
        prepare([str(prepared.parent / "text")], prepared, OPTIONS)
    assert (prepared / "meta.json").read_bytes() == before


@pytest.mark.parametrize("kind", ["empty folder", "link to an empty folder", "link to nothing yet", "under a link"])
def test_output_through_links(prepared: Path, tmp_path: Path, kind: str) -> None:
    """Also to another disk: what is written aside lies beside the folder that the link leads to."""
    real = tmp_path / "other disk/real"
    real.parent.mkdir()
    out = tmp_path / "data"
    if kind == "empty folder":
        out.mkdir()
    elif kind == "under a link":
        (tmp_path / "link").symlink_to(real.parent)
        out = tmp_path / "link/real"
    else:
        out.symlink_to("other disk/real")
        if kind == "link to an empty folder":
            real.mkdir()
    prepare([str(prepared.parent / "text")], out, OPTIONS)
    assert verify_store(out) == [] and out.is_symlink() == kind.startswith("link")
    if kind != "empty folder":
        assert verify_store(real) == [] and list(real.parent.iterdir()) == [real]


def test_output_that_cannot_be_replaced_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    Path("../loop").symlink_to("loop")
    Path("../cwd").symlink_to("here")
    cases = {".": "the current folder", "../cwd": "the current folder", "../loop": "a link that leads in a circle"}
    for out, what in cases.items():
        read: list[int] = []
        with pytest.raises(TokenSuperpositionError, match=f"{out} is {what}.*--out"):
            prepare((), out, OPTIONS, documents=lambda _, read=read: iter(read.append(1) or text()))
        assert not read
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cwd", "here", "loop"] and not list(here.iterdir())


def test_what_could_only_fail_later_is_refused_before_any_work(tmp_path: Path) -> None:
    read: list[int] = []
    cases = (
        (tmp_path / "data", 10**15, "shard_tokens is 1,000,000,000,000,000; give at most 2,147,483,648"),
        (tmp_path / os.fsdecode(b"caf\xe9"), 99, r"--out leads to b'.*caf\\xe9', a name that is not UTF-8"),
    )
    for out, shard_tokens, what in cases:
        with pytest.raises(TokenSuperpositionError, match=what):
            options = PrepareOptions(shard_tokens=shard_tokens)
            prepare((), out, options, documents=lambda _: iter(read.append(1) or text()))
    assert not read and not list(tmp_path.iterdir())


def test_a_store_has_two_splits(prepared: Path) -> None:
    with pytest.raises(TokenSuperpositionError, match="split is 'val'; choose one of train, validation"):
        TokenStore(prepared, cast(Any, "val"))


def test_mount_points_are_refused_before_any_work(tmp_path: Path) -> None:
    """Of another file system, and of a folder of the same one, which only shows when it is to be replaced."""
    (tmp_path / "a.txt").write_text("some text")
    for name in ("real", "work/other", "work/same"):
        (tmp_path / name).mkdir(parents=True)
    mount = 'mount -t tmpfs none other && mount --bind ../real same && exec "$@"'
    mounted = ["unshare", "--mount", "sh", "-c", mount, "sh"]
    try:
        subprocess.run([*mounted, "true"], check=True, cwd=tmp_path / "work", capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("mounting is not allowed here")
    command = "from token_superposition.cli import main; "
    command += "raise SystemExit([main(['prepare', '..', '--out', o]) for o in ('other', 'same')] != [2, 2])"
    done = subprocess.run([*mounted, sys.executable, "-c", command], cwd=tmp_path / "work", capture_output=True)
    other, same = done.stderr.decode().splitlines()
    assert done.returncode == 0 and "error: other is a mount point, which cannot be replaced" in other
    assert "error: cannot write" in same and "same (Device or resource busy); " in same
    assert sorted(p.name for p in (tmp_path / "work").iterdir()) == ["other", "same"]


@pytest.mark.skipif(os.geteuid() != 0, reason="the super-user can become another one")
def test_an_empty_folder_of_another_user_is_refused_before_any_work(tmp_path: Path) -> None:
    """In a folder like /tmp, where one may add to and not take away from what others own."""
    shared = tmp_path / "shared"
    (shared / "data").mkdir(parents=True)
    shared.chmod(0o1777)
    read: list[int] = []
    with (
        without_privileges(tmp_path),
        pytest.raises(TokenSuperpositionError, match=r"cannot write .*data \(Operation not permitted\)"),
    ):
        prepare((), shared / "data", OPTIONS, documents=lambda _: iter(read.append(1) or text()))
    assert not read and [p.name for p in shared.iterdir()] == ["data"]


def test_a_killed_run_leaves_nothing_that_looks_finished_and_can_be_repeated(tmp_path: Path) -> None:
    (tmp_path / "big.jsonl").write_text("".join(json.dumps({"text": f"{i} " * 40}) + "\n" for i in range(60_000)))
    command = [sys.executable, "-m", "token_superposition", "prepare", str(tmp_path / "big.jsonl")]
    command += ["--out", str(tmp_path / "data"), "--vocab-size", "300", "--shard-tokens", "10000"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while not list(tmp_path.glob(".data.partial/train-*.npy")):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not (tmp_path / "data").exists()
    with pytest.raises(TokenSuperpositionError, match="no prepared data"):
        TokenStore(tmp_path / "data")
    options = PrepareOptions(vocab_size=300, max_bytes=500_000)
    prepare([str(tmp_path / "big.jsonl")], tmp_path / "data", options)
    assert not (tmp_path / ".data.partial").exists()


def test_a_full_disk_has_one_line_and_exit_code_2(prepared: Path, tmp_path: Path) -> None:
    arguments = ("prepare", str(prepared.parent / "text"), "--out", str(tmp_path / "data"))
    done = call(command_on_a_full_disk, 4096, *arguments)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("tst: error: cannot write") and done.stderr.count("\n") == 1
    assert not (tmp_path / "data").exists() and not (tmp_path / ".data.partial").exists()


def _prepare_on_a_full_disk(source: str, out: str) -> None:
    """Its tokenizer does not fit: a library writes it that has no OSError."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    try:
        prepare(source, out, PrepareOptions(vocab_size=2_000, validation_share=0.2))
    except TokenSuperpositionError as e:
        assert str(e) == f"cannot write {out} (File too large); free the disk or choose another --out"
        raise SystemExit(7) from None


def test_a_disk_that_is_full_with_the_tokenizer_is_told_of_to_a_caller(prepared: Path, tmp_path: Path) -> None:
    done = call(_prepare_on_a_full_disk, str(prepared.parent / "text"), str(tmp_path / "data"))
    assert done.returncode == 7 and not list(tmp_path.iterdir()), done.stderr


@pytest.mark.parametrize("damage", ["truncated", "foreign", "changed"])
def test_a_damaged_store_is_named(prepared: Path, tmp_path: Path, damage: str) -> None:
    import shutil

    shutil.copytree(prepared, tmp_path / "data")
    shard = tmp_path / "data" / "train-00000.npy"
    content = shard.read_bytes()
    if damage == "truncated":
        shard.write_bytes(content[:-100])
        with pytest.raises(TokenSuperpositionError, match=r"train-00000\.npy has .* bytes"):
            TokenStore(tmp_path / "data")
    elif damage == "foreign":
        np.save(shard, np.zeros(len(TokenStore(prepared)) * 2, np.uint8))
        with pytest.raises(TokenSuperpositionError, match=r"train-00000\.npy does not begin with the header of"):
            TokenStore(tmp_path / "data")
    else:
        shard.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(TokenSuperpositionError, match=r"train-00000\.npy differs from its checksum"):
            store = TokenStore(tmp_path / "data")
            store[len(store) - 1 : len(store)]
