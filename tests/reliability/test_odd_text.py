"""Odd text: each case is handled as docs/data.md says, counted in the summary, and never a traceback."""

from __future__ import annotations

import gzip
import json
import os
import random
import shutil
import tarfile
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import AutoTokenizer

from tests.conftest import text
from tests.nobody import without_privileges
from token_superposition import TokenSuperpositionError
from token_superposition.cli import main
from token_superposition.data import sources
from token_superposition.data.files import HIDDEN, OTHER_FILE, STORE, check_files, find_files
from token_superposition.data.prepare import PrepareOptions, prepare
from token_superposition.data.sources import CUT, read_documents
from token_superposition.data.store import SPLITS, Meta, Split, TokenStore
from token_superposition.data.verify import verify_store

OPTIONS = PrepareOptions(vocab_size=300, validation_share=0.3)


def zstd(content: bytes) -> bytes:
    out = pa.BufferOutputStream()
    with pa.CompressedOutputStream(out, "zstd") as f:
        f.write(content)
    return out.getvalue().to_pybytes()


def parquet(texts: list[bytes | None]) -> bytes:
    """A column that says it is text, whatever the bytes are."""
    column = pa.array(texts, pa.binary())
    out = pa.BufferOutputStream()
    pq.write_table(pa.table({"text": pa.Array.from_buffers(pa.string(), len(column), column.buffers())}), out)
    return out.getvalue().to_pybytes()


def lines(*records: object) -> bytes:
    return b"".join(r if isinstance(r, bytes) else json.dumps(r).encode() + b"\n" for r in records)


# 1.3 MiB of JSON lines of which the end will be missing: the first MiB is read whole.
RECORDS = lines(*({"text": f"record {i} of the lines " * 30} for i in range(2000)))
NO_TEXT = "no text in field 'text'"

# name of the file, its bytes, the texts that are read from it (None: some of them), what is counted
CASES: list[tuple[str, bytes, list[str] | None, dict[str, int]]] = [
    ("empty.txt", b"", [], {"empty file": 1}),
    ("empty.jsonl", b"", [], {"empty file": 1}),
    ("empty.txt.gz", b"", [], {"empty file": 1}),
    ("empty.parquet", parquet([]), [], {"empty file": 1}),
    ("blank.txt", b" \n\t\r\n", [], {"empty document": 1}),
    ("blank.jsonl", lines({"text": ""}, {"text": " \n"}, {"text": "a"}), ["a"], {"empty document": 2}),
    ("crlf.txt", b"one\r\ntwo\r\n", ["one\r\ntwo\r\n"], {}),
    ("crlf.jsonl", b'{"text": "a\\r\\nb"}\r\n\r\n{"text": "c"}', ["a\r\nb", "c"], {}),
    ("mark.txt", b"\xef\xbb\xbfmarked", ["marked"], {}),
    ("mark.jsonl", b'\xef\xbb\xbf{"text": "marked"}\n', ["marked"], {}),
    ("latin.txt", "café".encode("latin-1"), [], {"not UTF-8": 1}),
    ("utf16.txt", "café".encode("utf-16"), [], {"UTF-16 or UTF-32": 1}),
    ("utf32.txt", "café".encode("utf-32"), [], {"UTF-16 or UTF-32": 1}),
    ("half.txt", "café".encode()[:-1], [], {"not UTF-8": 1}),
    ("surrogate.txt", b"\xed\xa0\x80", [], {"not UTF-8": 1}),
    ("nul.txt", b"one\0two", [], {"binary": 1}),
    ("nul.jsonl", lines({"text": "one\0two"}), ["one\0two"], {}),
    ("latin.jsonl", lines({"text": "a"}, '{"text": "é"}\n'.encode("latin-1"), {"text": "b"}), ["a", "b"],
     {"not JSON": 1}),
    ("surrogate.jsonl", b'{"text": "\\ud800"}\n{"text": "\\ud83d\\ude00"}\n', ["😀"],
     {"not Unicode (half of a surrogate pair)": 1}),
    ("fields.jsonl", lines({"body": "x"}, {"text": 3}, {"text": None}, [1], 7, {"text": ["a"]}, {"text": "a"}), ["a"],
     {NO_TEXT: 6}),
    ("broken.jsonl", lines(b'{"text": "a\n', b"}\n", {"text": "b"}, b'{"text": "c"'), ["b"], {"not JSON": 3}),
    ("deep.jsonl", b"[" * 100_000 + b"\n" + lines({"text": "a"}), ["a"], {"not JSON": 1}),
    ("digits.jsonl", b"1" * 10_000 + b"\n" + lines({"text": "a"}), ["a"], {"not JSON": 1}),
    ("c4.json.gz", gzip.compress(lines({"text": "a", "url": "x"}, {"text": "b"}, {"url": "y"})), ["a", "b"],
     {NO_TEXT: 1}),
    ("lines.json", lines({"text": "a"}, {"text": "b"}, b"{\n"), ["a", "b"], {"not JSON": 1}),
    ("object.json", b'{"text": "a"}\n', ['{"text": "a"}\n'], {}),
    ("pretty.json", b'{\n"text": "a"\n}\n', ['{\n"text": "a"\n}\n'], {}),
    ("numbers.json", b"1\n2\n", ["1\n2\n"], {}),
    ("cut.jsonl.gz", gzip.compress(RECORDS)[:-9], None, {"unreadable rest of a file": 1}),
    ("cut.jsonl.zst", zstd(RECORDS)[:-9], None, {"unreadable rest of a file": 1}),
    ("cut.txt.gz", gzip.compress(b"some text")[:-9], ["some text"], {"unreadable rest of a file": 1}),
    ("letter.txt.gz", gzip.compress("né".encode() * 9, 0)[:-9], ["né" * 8 + "n"], {"unreadable rest of a file": 1}),
    ("end.txt.gz", gzip.compress(b"some text")[:-4], ["some text"], {"unreadable rest of a file": 1}),
    ("more.txt.gz", gzip.compress(b"some text") + b"garbage", ["some text"], {"unreadable rest of a file": 1}),
    ("plain.txt.gz", b"not compressed at all", [], {"unreadable rest of a file": 1}),
    ("twice.txt.gz", gzip.compress(b"one ") + gzip.compress(b"two"), ["one two"], {}),
    ("nulls.parquet", parquet([b"row", None, b"", b"caf\xe9", b"end"]), ["row", "end"],
     {NO_TEXT: 1, "not UTF-8": 1, "empty document": 1}),
]  # fmt: skip


@pytest.mark.filterwarnings("ignore:.* breaks off")
@pytest.mark.parametrize(("ending", "compressed"), [("gz", gzip.compress), ("zst", zstd)])
def test_a_text_that_breaks_off_is_kept_up_to_the_last_mebibyte(
    ending: str, compressed: Callable[[bytes], bytes], tmp_path: Path
) -> None:
    whole = random.Random(0).choices("abcdefghijklmnopqrstuvwxyz", k=3 * 2**20)
    path = tmp_path / f"a.txt.{ending}"
    path.write_bytes(compressed("".join(whole).encode())[:-99])
    dropped: Counter[str] = Counter()
    (got,) = read_documents([str(path)], "text", dropped)
    assert list(got) == whole[: len(got)] and len(got) > 2 * 2**20 and dropped == {"unreadable rest of a file": 1}


@pytest.mark.filterwarnings("ignore:.* breaks off")
@pytest.mark.parametrize(("name", "content", "expected", "counted"), CASES, ids=[c[0] for c in CASES])
def test_what_is_read_and_what_is_counted(
    name: str, content: bytes, expected: list[str] | None, counted: dict[str, int], tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    dropped: Counter[str] = Counter()
    got = list(read_documents([str(tmp_path / name)], "text", dropped))
    assert dropped == counted
    if expected is None:
        whole = [json.loads(line)["text"] for line in RECORDS.splitlines()]
        assert got == whole[: len(got)] and len(got) > len(whole) / 2
    else:
        assert got == expected


def test_the_summary_counts_all_of_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All the odd files in one folder with some good ones, in folders with spaces and other letters in their names."""
    folder = tmp_path / "sp ace" / "ünï 中文 [x]"
    folder.mkdir(parents=True)
    for i, document in enumerate(text(60)):
        (folder / f"good {i}.txt").write_text(document)
    for name, content, _, _ in CASES:
        (folder / name).write_bytes(content)
    (folder / os.fsdecode(b"caf\xe9.txt")).write_text("a name that is not UTF-8")
    (folder / "picture.png").write_bytes(b"\x89PNG")
    os.mkfifo(folder / "pipe.txt")
    (folder / "self.txt").symlink_to("self.txt")
    (folder / "loop").symlink_to(folder)
    (folder / "also.txt").symlink_to("good 0.txt")
    out = tmp_path / "out put"
    arguments = ["--out", str(out), "--vocab-size", "300", "--validation-share", "0.3"]
    assert main(["prepare", str(tmp_path / "sp ace"), *arguments]) == 0
    printed = capsys.readouterr()
    expected = Counter({OTHER_FILE: 3, "duplicate": 1})
    for _, _, _, counted in CASES:
        expected.update(counted)
    meta = Meta.load(out)
    expected["duplicate"] = meta.dropped["duplicate"]  # the short texts of the cases are alike
    assert meta.dropped == expected and meta.dropped["duplicate"] >= 1
    summary = " ".join(printed.out.split())
    for reason, count in expected.items():
        assert f"left out: {count:,} ({reason})" in summary
    for name, _, _, counted in CASES:
        if "unreadable rest of a file" in counted:
            assert f"{name} breaks off" in printed.err
    assert verify_store(out) == []


def refusals(folder: Path) -> Iterator[tuple[str, str]]:
    """Sources that are refused before any work, and what is said of them."""
    with tarfile.open(folder / "a.tar.gz", "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("../outside.txt"))
    with zipfile.ZipFile(folder / "a.zip", "w") as archive:
        archive.writestr("../outside.txt", "x")
    for name in ("a.txt.xz", "A.TAR", "a.txt.Z"):
        (folder / name).write_bytes(b"\xfd7zXZ\0")
    for name in ("a.tar.gz", "a.zip", "a.txt.xz", "A.TAR", "a.txt.Z"):
        yield name, "is an archive or compressed"
    os.mkfifo(folder / "pipe")
    yield "pipe", "is a pipe or a device"
    yield "/dev/zero", "is a pipe or a device"
    (folder / "loop").symlink_to("loop")
    yield "loop", "is a link that leads nowhere"
    yield "~nobody-of-this-name/x", "does not exist"
    yield "no\0name", "does not exist"
    yield "\n".join(f"file{i}.txt" for i in range(99)), "does not exist"  # longer than a name may be
    (folder / "a.parquet").write_bytes(parquet([b"row"])[:-20])
    yield "a.parquet", "is not a Parquet file, or not a whole one"
    (folder / "name.parquet").write_bytes(parquet([b"row"]).replace(b"text", b"te\xa0t"))
    yield "name.parquet", "is not a Parquet file, or not a whole one"
    pq.write_table(pa.table({"body": ["x"]}), folder / "b.parquet")
    yield "b.parquet", "has no column 'text'; choose one of body"
    pq.write_table(pa.table({"text": [1]}), folder / "c.parquet")
    yield "c.parquet", "has int64 in its column 'text', not text"


def test_what_cannot_be_read_at_all_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    work = tmp_path / "inside"
    work.mkdir()
    monkeypatch.chdir(work)
    (work / "good.txt").write_text("good")
    cases = list(refusals(work))
    before = sorted(work.iterdir())
    for source, message in cases:
        assert main(["prepare", "good.txt", source, "--out", "data"]) == 2
        error = capsys.readouterr().err
        assert error.startswith("tst: error: ") and error.count("\n") == 1
        assert (source in error or "\n" in source) and message in error
    assert sorted(work.iterdir()) == before and sorted(tmp_path.iterdir()) == [work]


def test_a_text_about_archives_is_text(tmp_path: Path) -> None:
    for name in ("how-to.tar.md", "notes.zip.txt", "what.is.7z.rst.gz"):
        content = f"The text of {name}".encode()
        (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    files = find_files([str(tmp_path)])
    check_files(files, "text")
    assert len(list(read_documents(files, "text", Counter()))) == 3


def test_an_unreadable_file_or_folder_is_named(tmp_path: Path) -> None:
    for name in ("file.txt", "folder/a.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("secret")
    (tmp_path / "file.txt").chmod(0)
    (tmp_path / "folder").chmod(0)
    try:
        with without_privileges(tmp_path):
            for source, named in (("file.txt", "file.txt"), (".", "folder"), ("folder/a.txt", "a.txt")):
                with pytest.raises(TokenSuperpositionError, match=f"{named} cannot be read .Permission denied") as e:
                    check_files(find_files([str(tmp_path / source)]), "text")
                assert "\n" not in str(e.value)
    finally:
        (tmp_path / "folder").chmod(0o755)


@pytest.mark.parametrize("ending", [".txt", ".jsonl"])
def test_a_document_too_long_for_one_is_cut_and_loses_nothing(
    ending: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a line end near, it is cut between two characters, never inside one."""
    monkeypatch.setattr(sources, "MAX_TEXT_BYTES", 1000)
    document = "€" * 5000 + "\n" + "ab c\n" * 1000 + "é" * 999
    content = document if ending == ".txt" else json.dumps({"text": document}) + "\n"
    (tmp_path / f"long{ending}").write_text(content, encoding="utf-8")
    dropped: Counter[str] = Counter()
    pieces = list(read_documents([str(tmp_path / f"long{ending}")], "text", dropped))
    assert "".join(pieces) == document and dropped == {CUT: 1}
    assert len(pieces) > 5 and all(len(p) <= 1125 for p in pieces)


@pytest.mark.parametrize("ending", [".txt", ".jsonl"])
def test_a_document_cut_into_several_is_held_out_as_a_whole_or_not_at_all(
    ending: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the model is validated on must not go on where the text that it trained on ends."""
    monkeypatch.setattr(sources, "MAX_TEXT_BYTES", 200)
    for n in range(40):
        document = " " * 300 * (n % 2) + "".join(f"line {i} of {n}\n" for i in range(60))  # one in two begins with a
        content = document if ending == ".txt" else json.dumps({"text": document}) + "\n"  # piece that is left out
        (tmp_path / f"{n}{ending}").write_text(content)
    meta = prepare([str(tmp_path)], tmp_path / "data", OPTIONS)
    found: dict[int, set[str]] = {n: set() for n in range(40)}
    for split in SPLITS:
        for document in documents_of(tmp_path / "data", split):
            found[int(document.splitlines()[-1].split()[-1])].add(split)
    assert meta.cut == 40 and all(len(splits) == 1 for splits in found.values())
    assert {split for splits in found.values() for split in splits} == set(SPLITS)


@pytest.mark.parametrize("ending", [".txt", ".jsonl"])
def test_of_a_document_cut_into_several_only_what_another_begins_with_is_dropped(
    ending: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pieces of one document may be alike."""
    monkeypatch.setattr(sources, "MAX_TEXT_BYTES", 200)
    log, other = "the same line in the log\n" * 64, "another line in the log\n" * 64
    documents = [log, log, log + other, other + log, *(f"document {i}\n" for i in range(40))]
    for i, document in enumerate(documents):
        content = document if ending == ".txt" else json.dumps({"text": document}) + "\n"
        (tmp_path / f"{i:02d}{ending}").write_text(content)
    again, longer = (list(read_documents([str(tmp_path / f"{i:02d}{ending}")], "text", Counter())) for i in (1, 2))
    alike = sum(a == b for a, b in zip(again, longer, strict=False))
    meta = prepare([str(tmp_path)], tmp_path / "data", OPTIONS)
    assert meta.dropped == {"duplicate": len(again) + alike} and len(again) > 5
    got = "".join(documents_of(tmp_path / "data", *SPLITS))
    kept = [log, "".join(longer[alike:]), *documents[3:]]
    assert len(got) == sum(map(len, kept)) and all(document in got for document in kept)


def test_a_json_line_longer_than_memory_should_hold_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "MAX_RECORD_BYTES", 100)
    (tmp_path / "a.jsonl").write_bytes(lines({"text": "a"}, {"text": "x" * 500}, {"text": "b"}))
    dropped: Counter[str] = Counter()
    assert list(read_documents([str(tmp_path / "a.jsonl")], "text", dropped)) == ["a", "b"]
    assert dropped == {"JSON line of more than 100 bytes": 1}


def test_a_folder_that_holds_the_output_does_not_read_it(tmp_path: Path) -> None:
    """The tokenizer that is written aside would pass for text."""
    for i, document in enumerate(text(40)):
        (tmp_path / f"{i}.txt").write_text(document)
    meta = prepare([str(tmp_path)], tmp_path / "data", OPTIONS)
    assert meta.train.documents + meta.validation.documents == 40 and not meta.dropped
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep/meta.json").write_text('{"format": "of something else"}')
    again = prepare([str(tmp_path)], tmp_path / "deep/again", OPTIONS)
    assert again.train.documents + again.validation.documents == 41 and again.dropped == {STORE: 1}


def test_what_is_hidden_in_a_folder_is_read_only_where_it_is_named(tmp_path: Path) -> None:
    for name in ("a.txt", ".b.txt", ".git/c.txt", "deep/.venv/lib/d.py", "deep/.venv/e.py", "deep/f.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)

    def read(*sources: str) -> list[str]:
        return [str(p.relative_to(tmp_path)) for p in find_files([str(tmp_path / s) for s in sources], dropped)]

    dropped: Counter[str] = Counter()
    assert read("") == ["a.txt", "deep/f.py"] and dropped == {HIDDEN: 3}
    named = read(".b.txt", ".git", "deep/.venv", "**/*.txt")
    assert named == [".b.txt", ".git/c.txt", "deep/.venv/e.py", "deep/.venv/lib/d.py", "a.txt"]
    assert dropped == {HIDDEN: 3}


def test_what_a_killed_run_left_in_its_source_changes_nothing(tmp_path: Path) -> None:
    """Killed while it tokenises, or before: its tokenizer and its lock lie in the folder that the next one reads."""
    for i, document in enumerate(text(40)):
        (tmp_path / f"{i}.txt").write_text(document)
    expected = prepare([str(tmp_path)], tmp_path / "data", OPTIONS)
    shutil.copytree(tmp_path / "data", tmp_path / ".new.partial")
    (tmp_path / ".new.partial/meta.json").unlink()
    (tmp_path / ".new.partial.lock").touch()
    for source in (tmp_path, tmp_path / "**/*.[tj]*"):
        (tmp_path / "data").rename(tmp_path.parent / f"{tmp_path.name}-data")
        assert prepare([str(source)], tmp_path / "new", OPTIONS) == expected
        (tmp_path.parent / f"{tmp_path.name}-data").rename(tmp_path / "data")
        shutil.move(tmp_path / "new", tmp_path / ".new.partial")


def documents_of(data: Path, *splits: Split) -> Iterator[str]:
    tokenizer = AutoTokenizer.from_pretrained(data / "tokenizer")
    for split in splits or SPLITS:
        store = TokenStore(data, split)
        for a, b in pairwise([*store.document_starts().tolist(), len(store)]):
            yield tokenizer.decode(store[a : b - 1].tolist())


def size(request: pytest.FixtureRequest, short: int, long: int) -> int:
    return long if request.config.getoption("--long") else short


@pytest.fixture
def other_documents(tmp_path: Path) -> Callable[[str], Path]:
    def write(name: str) -> Path:
        (tmp_path / "others.jsonl").write_bytes(lines(*({"text": t} for t in text(30))))
        return tmp_path / name

    return write


def test_one_very_long_document(other_documents: Callable[[str], Path], request: pytest.FixtureRequest) -> None:
    """5 MB in a line; a gigabyte with --long, which becomes documents of 8 MiB."""
    length = size(request, 5_000_000, 10**9)
    path = other_documents("long.txt")
    line = "naïve words ünd só weiter, " * 4000
    with path.open("w", encoding="utf-8") as f:
        written = sum(f.write(f"{i} {line}") for i in range(length // len(line.encode()) + 1))
    meta = prepare([str(path), str(path.parent / "others.jsonl")], path.parent / "data", OPTIONS)
    pieces = -(-path.stat().st_size // sources.MAX_TEXT_BYTES)
    assert meta.cut == (pieces > 1) and not meta.dropped
    assert 30 + (pieces + 1) // 2 <= meta.train.documents + meta.validation.documents <= 30 + pieces
    assert sum(len(d) for d in documents_of(path.parent / "data") if "naïve" in d) == written


def test_very_many_documents_of_one_word(
    other_documents: Callable[[str], Path], request: pytest.FixtureRequest
) -> None:
    """20,000; ten million with --long."""
    count = size(request, 20_000, 10_000_000)
    path = other_documents("words.jsonl")
    with path.open("w") as f:
        f.writelines(f'{{"text": "word{i}"}}\n' for i in range(count))
    meta = prepare([str(path)], path.parent / "data", OPTIONS)
    assert meta.train.documents + meta.validation.documents == count and not meta.dropped
    assert verify_store(path.parent / "data") == []
    if count <= 20_000:
        assert sorted(documents_of(path.parent / "data")) == sorted(f"word{i}" for i in range(count))
