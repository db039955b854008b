"""A damaged file of prepared data is named, never trained on."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest

from tests.conftest import tst
from tests.processes import call, command
from tests.reliability.stores import sparse_store
from token_superposition import Schedule, TokenSuperpositionError
from token_superposition.cli import main
from token_superposition.data.plan import PlannedDataset
from token_superposition.data.prepare import PrepareOptions, prepare
from token_superposition.data.store import (
    BLOCK_TOKENS,
    HEADER_BYTES,
    Meta,
    Shard,
    TokenStore,
    file_sha256,
    json_sha256,
)
from token_superposition.data.verify import verify_store


@pytest.fixture
def data(prepared: Path, tmp_path: Path) -> Path:
    return shutil.copytree(prepared, tmp_path / "data")


@pytest.fixture(scope="module")
def long_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store whose shards have several blocks."""
    root = tmp_path_factory.mktemp("long")
    (root / "a.jsonl").write_text("".join(json.dumps({"text": f"{i} and so on. " * 30}) + "\n" for i in range(1000)))
    options = PrepareOptions(vocab_size=300, shard_tokens=3 * BLOCK_TOKENS + 5)
    prepare([str(root / "a.jsonl")], root / "data", options)
    return root / "data"


def flip(path: Path, place: int) -> None:
    with path.open("r+b") as f:
        f.seek(place, 2 if place < 0 else 0)
        byte = f.read(1)[0]
        f.seek(-1, 1)
        f.write(bytes([byte ^ 1]))


def resave(directory: Path, change: Callable[[Meta], Meta]) -> None:
    """A meta.json of which the checksum is right."""
    change(Meta.load(directory)).save(directory / "meta.json")


def test_a_flipped_bit_is_found_when_its_block_is_read_and_only_then(long_text: Path, tmp_path: Path) -> None:
    data = shutil.copytree(long_text, tmp_path / "data")
    whole = TokenStore(long_text)
    flip(data / "train-00001.npy", HEADER_BYTES + 2 * (BLOCK_TOKENS + 9))  # token 9 of the second block
    store = TokenStore(data)
    first = store.split.shards[0].tokens
    bad = range(first + BLOCK_TOKENS, first + 2 * BLOCK_TOKENS)
    for start, stop in ((0, first), (first, bad.start), (bad.stop, bad.stop + 3), (bad.stop, len(store))):
        assert np.array_equal(store[start:stop], whole[start:stop])
    for start, stop in ((bad.start, bad.start + 1), (bad.stop - 1, bad.stop + 1), (0, len(store))):
        with pytest.raises(TokenSuperpositionError, match=r"train-00001\.npy differs from its checksum") as e:
            store[start:stop]
        assert "\n" not in str(e.value)
    (line,) = verify_store(data)
    assert line.startswith(f"{data / 'train-00001.npy'} differs from its checksum in meta.json; ")


def test_no_sample_of_a_damaged_store_has_other_tokens(long_text: Path, tmp_path: Path) -> None:
    """Every sample of a run is the one of the whole store, or an error."""
    data = shutil.copytree(long_text, tmp_path / "data")
    flip(data / "train-00000.npy", -1)
    flip(data / "train-00002.npy", HEADER_BYTES)
    schedule = Schedule.two_phase(60, 4, 0.5)
    plans = [PlannedDataset(TokenStore(path), schedule, 128, 4) for path in (long_text, data)]
    refused = 0
    for i in range(len(plans[0])):
        try:
            sample = plans[1][i]
        except TokenSuperpositionError:
            refused += 1
        else:
            assert all(sample[k].equal(v) for k, v in plans[0][i].items())
    assert 0 < refused < len(plans[0]) / 2


DAMAGE: dict[str, Callable[[Path], object]] = {
    "train-00000.npy": lambda p: flip(p, -1),
    "validation-00000.npy": lambda p: flip(p, HEADER_BYTES),
    "train-00000.documents.npy": lambda p: flip(p, -8),
    "train-00000.crc32.npy": lambda p: flip(p, -1),
    "tokenizer/tokenizer.json": lambda p: flip(p, 200),
    "tokenizer/tokenizer_config.json": lambda p: p.write_text("{}"),
    "meta.json": lambda p: flip(p, 40),
    "validation-00000.documents.npy": lambda p: p.unlink(),
    "validation-00000.crc32.npy": lambda p: p.write_bytes(p.read_bytes()[:-1]),
    "train-00000.npy header": lambda p: flip(p.with_name("train-00000.npy"), 30),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_verify_names_the_file(name: str, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    DAMAGE[name](data / name)
    assert main(["verify", str(data)]) == 2
    damaged, summary = capsys.readouterr().err.splitlines()
    assert damaged.startswith(f"tst: damaged: {data / name.split()[0]} ")
    assert summary.startswith("tst: error: 1 of the files are damaged")


def test_verify_finds_every_damaged_file_and_passes_whole_ones(
    prepared: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", str(prepared), str(data)]) == 0
    assert capsys.readouterr().out.count("every checksum is right") == 2
    for name in ("train-00000.npy", "train-00000.crc32.npy", "tokenizer/tokenizer.json"):
        DAMAGE[name](data / name)
    assert main(["verify", str(prepared), str(data)]) == 2
    printed = capsys.readouterr()
    assert printed.err.count("tst: damaged: ") == 3 and printed.out.count("every checksum is right") == 1


def test_ids_and_places_of_documents_are_held_to_what_meta_says(data: Path) -> None:
    """A store of which the checksums are right and the content is not."""
    resave(data, lambda meta: dataclasses.replace(meta, vocab_size=300))
    store = TokenStore(data)
    with pytest.raises(TokenSuperpositionError, match=r"train-00000\.npy holds token 3\d\d, the vocabulary has 300"):
        store[0 : len(store)]
    assert len(verify_store(data)) == 2  # train and validation
    documents = data / "train-00000.documents.npy"
    starts = np.load(documents)
    for wrong in (starts[::-1], starts + np.uint64(10**6)):
        np.save(documents, wrong)

        def change(meta: Meta) -> Meta:
            shard: Shard = dataclasses.replace(meta.train.shards[0], documents_sha256=file_sha256(documents))
            return dataclasses.replace(meta, vocab_size=320, train=dataclasses.replace(meta.train, shards=[shard]))

        resave(data, change)
        (line,) = verify_store(data)
        assert "train-00000.documents.npy does not hold rising places" in line


def test_the_first_id_past_the_vocabulary_is_refused(data: Path) -> None:
    largest = int(TokenStore(data)[:].max())
    resave(data, lambda meta: dataclasses.replace(meta, vocab_size=largest))
    with pytest.raises(TokenSuperpositionError, match=f"holds token {largest}, the vocabulary has {largest}"):
        TokenStore(data)[:]


def test_a_shard_with_more_bytes_than_meta_says_is_refused(data: Path) -> None:
    with (data / "train-00000.npy").open("ab") as f:
        f.write(b"\0\0")
    with pytest.raises(TokenSuperpositionError, match=r"train-00000\.npy has \d+ bytes where meta\.json says"):
        TokenStore(data)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b"7",
        b'{"format": 1}',
        b'{"format": 2}',
        b"\xff\xfe",
        b"[" * 99_999,
        b'{"format": []}',
    ],
)
def test_a_damaged_meta_has_one_line(content: bytes, data: Path) -> None:
    (data / "meta.json").write_bytes(content)
    with pytest.raises(TokenSuperpositionError, match=r"meta\.json .*run tst prepare again") as e:
        TokenStore(data)
    assert "\n" not in str(e.value)


def test_an_edited_meta_is_refused(data: Path) -> None:
    path = data / "meta.json"
    path.write_text(path.read_text().replace('"vocab_size": 320', '"vocab_size": 512'))
    with pytest.raises(TokenSuperpositionError, match="differs from its own checksum"):
        TokenStore(data)


def test_training_on_damaged_tokens_stops_with_one_line(
    data: Path, write_config: Callable[..., Path], tmp_path: Path
) -> None:
    """Also where a process of the loader finds it."""
    flip(data / "train-00000.npy", -1)
    config = write_config(path=str(data), append="loader_workers = 1\n")
    done = tst("train", config, "--out", tmp_path / "run", check=False)
    errors = [line for line in done.stderr.splitlines() if line.startswith("tst: ")]
    assert done.returncode == 2 and len(errors) == 1, done.stderr
    assert errors[0].startswith(f"tst: error: {data / 'train-00000.npy'} differs from its checksum")
    assert "Traceback" not in done.stderr and not (tmp_path / "run/model").exists()


def test_verify_reads_runs_as_far_as_they_say_what_they_should_be(
    two_seeds: tuple[Path, Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = shutil.copytree(two_seeds[1], tmp_path / ".cache/out")
    assert main(["verify", str(out)]) == 0 and "files can be read" in capsys.readouterr().out
    model = next(out.rglob("model.safetensors"))
    os.truncate(model, model.stat().st_size - 1)
    summary = out / "summary.json"
    summary.write_text(summary.read_text()[:-9])
    config = next(out.rglob("config.toml"))
    config.write_text("[train\n")
    assert main(["verify", str(out)]) == 2
    error = capsys.readouterr().err
    for file in (model, summary, config):
        assert f"tst: damaged: {file} cannot be read" in error
    assert len(error.splitlines()) == 4
    model.unlink()
    assert main(["verify", str(out)]) == 2 and f"tst: damaged: {model} is missing, and" in capsys.readouterr().err
    (tmp_path / "nothing").mkdir()
    for path, message in ((tmp_path / "nothing", "holds neither data"), (model, "is not a directory")):
        assert main(["verify", str(path)]) == 2 and message in capsys.readouterr().err


def test_a_store_without_its_meta_is_no_run(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (data / "meta.json").unlink()
    assert main(["verify", str(data)]) == 2
    assert f"tst: damaged: {data} holds no prepared data (no meta.json)" in capsys.readouterr().err


def test_a_store_of_an_earlier_version_has_no_checksums_of_all_tokenizer_files(data: Path) -> None:
    path = data / "meta.json"
    content = json.loads(path.read_text())
    for name in ("bos_id", "tokenizer_files", "sha256"):
        del content[name]
    path.write_text(json.dumps(content | {"sha256": json_sha256(content)}))
    (data / "tokenizer/tokenizer_config.json").write_text("{}")
    assert verify_store(data) == [] and len(TokenStore(data)) and Meta.load(data).bos_id is None


def test_verify_tells_what_a_killed_run_leaves_from_damage(
    finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(finished_run, tmp_path / "run")
    (run / "run.json").unlink()
    shutil.rmtree(run / "model")
    with (run / "metrics.jsonl").open("a") as f:
        f.write('{"step": 9, "lo')
    for folder in (".model.partial", "checkpoints/.writing"):
        (run / folder).mkdir(parents=True)
        (run / folder / "model.safetensors").write_bytes(b"half")
    assert main(["verify", str(run)]) == 0
    (run / "checkpoints/checkpoint-4/manifest.json").unlink()
    for path in (run, run / "checkpoints", run / "checkpoints/checkpoint-4"):
        assert main(["verify", str(path)]) == 2 and "checkpoint-4 has no manifest.json" in capsys.readouterr().err
    shutil.rmtree(run / "checkpoints/checkpoint-4")
    with (run / "metrics.jsonl").open("a") as f:
        f.write("\n")
    assert main(["verify", str(run)]) == 2 and "metrics.jsonl cannot be read" in capsys.readouterr().err


def test_a_store_of_a_terabyte_is_opened_without_reading_it(tmp_path: Path) -> None:
    """512 shards of 2 GiB, all links to one hole: resident memory tells what was read."""
    sparse_store(tmp_path / "data", 512, 2**30, linked=True)
    process = psutil.Process()
    before, read = process.memory_info().rss, process.io_counters().read_chars
    store = TokenStore(tmp_path / "data")
    assert len(store) == 2**39 and sum(s.tokens for s in store.split.shards) * 2 == 2**40
    plan = PlannedDataset(store, Schedule.two_phase(100, 8, 0.5), 1024, 8)
    for i in range(0, len(plan), 97):
        assert not plan[i]["input_ids"].any()
    grown, read = process.memory_info().rss - before, process.io_counters().read_chars - read
    assert grown < 40 * 2**20 and read < 40 * 2**20, (grown, read)


def command_on_a_closed_pipe(*args: str) -> None:
    end, write = os.pipe()
    os.close(end)
    os.dup2(write, 1)
    command(*args)


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["report", "{out}"], ["--version"]])
def test_a_reader_that_has_gone_ends_the_command_quietly(
    arguments: list[str], two_seeds: tuple[Path, Path, str]
) -> None:
    """As in ``tst train --help | head``: a real pipe whose reading end is closed."""
    done = call(command_on_a_closed_pipe, *(a.format(out=two_seeds[1]) for a in arguments))
    assert (done.returncode, done.stderr) == (141, "")
