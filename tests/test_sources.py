"""What a source holds is read, or what was left of it is said: saved datasets, other fields, links, globs, samples."""

from __future__ import annotations

import gzip
import json
import os
import random
import sys
from collections import Counter
from pathlib import Path
from typing import Any, cast

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.conftest import VOCAB, text, tst
from tests.nobody import without_privileges
from token_superposition import TokenSuperpositionError
from token_superposition.data.files import (
    DESCRIPTION,
    LINK,
    MATCHED_FOLDER,
    OTHER_FILE,
    check_files,
    estimated_bytes,
    find_files,
)
from token_superposition.data.prepare import PrepareOptions, prepare
from token_superposition.data.sample import Sample
from token_superposition.data.sources import CUT, read_documents
from token_superposition.data.verify import verify_store

OPTIONS = PrepareOptions(vocab_size=VOCAB, validation_share=0.1)


def read(*sources: Path | str) -> tuple[list[str], dict[str, int]]:
    dropped: Counter[str] = Counter()
    return list(read_documents(list(map(str, sources)), "text", dropped)), dict(dropped)


def zstd(content: bytes) -> bytes:
    out = pa.BufferOutputStream()
    with pa.CompressedOutputStream(out, "zstd") as f:
        f.write(content)
    return out.getvalue().to_pybytes()


def lines(path: Path, *records: object) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_a_saved_dataset_is_its_text(tmp_path: Path) -> None:
    """As ``save_to_disk`` writes it, with what ``map`` keeps there; what lies beside the text is no document."""
    saved = datasets.Dataset.from_dict({"text": text(50), "n": range(50)})
    saved.save_to_disk(tmp_path / "one", num_shards=2)
    saved.select(range(9)).save_to_disk(tmp_path / "cached")
    datasets.load_from_disk(tmp_path / "cached").map(lambda row: {"m": row["n"]})
    splits = {"train": saved.select(range(40)), "test": saved.select(range(40, 50))}
    datasets.DatasetDict(cast(Any, splits)).save_to_disk(tmp_path / "two")
    assert list((tmp_path / "cached").glob("cache-*.arrow"))
    assert read(tmp_path / "one") == (text(50), {DESCRIPTION: 2})
    assert read(tmp_path / "cached") == (text(9), {DESCRIPTION: 3})
    assert read(tmp_path / "two") == (text(50)[40:] + text(50)[:40], {DESCRIPTION: 5})
    assert read(tmp_path / "two/train") == (text(40), {DESCRIPTION: 2})


def test_an_arrow_file_without_text_or_its_end(tmp_path: Path) -> None:
    table = pa.table({"text": pa.array([*text(400), None]).dictionary_encode(), "n": range(401)})
    path = tmp_path / "a.arrow"
    with pa.ipc.new_file(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=7)
    assert read(path) == (text(400), {"no text in field 'text'": 1})
    for field, what in (("body", "no column 'body'; choose one of text, n with"), ("n", "int64 in its column 'n'")):
        with pytest.raises(TokenSuperpositionError, match=f"a.arrow has {what}"):
            check_files([path], field)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(TokenSuperpositionError, match="is not an Arrow file, or not a whole one"):
        check_files([path], "text")
    with pa.ipc.new_stream(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=7)
    path.write_bytes(path.read_bytes()[:-99])
    check_files([path], "text")
    with pytest.warns(UserWarning, match="breaks off"):
        found, dropped = read(path)
    assert found == text(400)[: len(found)] and len(found) > 300 and dropped == {"unreadable rest of a file": 1}


@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson.gz", "c4.json", "a.parquet", "hub"])
def test_text_under_another_name_is_refused_with_the_names_there_are(name: str, tmp_path: Path) -> None:
    """Before any work, and also beside a source that has it."""
    good = lines(tmp_path / "good.jsonl", *({"text": t} for t in text(40)))
    path = tmp_path / name
    records = [{"content": t, "id": i, "turns": [t]} for i, t in enumerate(text(40))]
    if name == "a.parquet":
        pq.write_table(pa.Table.from_pylist(records), path)
    elif name == "hub":
        path.mkdir()
        lines(path / "train.jsonl", *records)
    else:
        lines(path, *records)
    if name.endswith(".gz"):
        path.write_bytes(gzip.compress(path.read_bytes()))
    source, worked = f"hf:{path}" if name == "hub" else str(path), []
    for field, what in (
        ("text", f"no (field|column) 'text'; choose one of {', '.join(records[0])} with --text-field"),
        ("turns", r"list.* in its (field|column) 'turns', not text; choose another with --text-field"),
    ):
        options = PrepareOptions(text_field=field)
        with pytest.raises(TokenSuperpositionError, match=what) as caught:
            sources = [source] if field != "text" else [source, str(good)]
            prepare(sources, tmp_path / "data", options, lambda *_: worked.append(1))
        assert source in str(caught.value) and "\n" not in str(caught.value) and not worked
    assert prepare(source, tmp_path / "data", PrepareOptions(VOCAB, text_field="content")).train.documents


def test_a_field_that_some_records_lack_is_no_mistake(tmp_path: Path) -> None:
    """The first has another, or null, or is no record: those are counted."""
    path = lines(tmp_path / "a.jsonl", {"id": 1}, [2], {"text": None}, {"text": 3}, {"text": "here"}, {"id": 3})
    check_files([path], "text")
    assert read(path) == (["here"], {"no text in field 'text'": 5})
    lines(path, *({"text": None} for _ in range(200)), {"text": "late"})
    check_files([path], "text")
    with pytest.raises(TokenSuperpositionError, match=r"200 dropped: no text in field 'text'.* another --text-field"):
        prepare(lines(path, *({"text": None} for _ in range(200))), tmp_path / "data", OPTIONS)


def test_only_the_text_of_a_dataset_of_the_hub_is_decoded(tmp_path: Path) -> None:
    features = {"text": {"dtype": "string", "_type": "Value"}, "image": {"_type": "Image"}}
    image = pa.array(
        [{"bytes": b"no picture", "path": None}] * 40, pa.struct({"bytes": pa.binary(), "path": pa.string()})
    )
    described = {"huggingface": json.dumps({"info": {"features": features}})}
    table = pa.table({"text": text(40), "image": image}).replace_schema_metadata(described)
    pq.write_table(table, tmp_path / "train.parquet")
    assert read(f"hf:{tmp_path}") == (text(40), {})


def test_links_to_folders_and_folders_of_a_glob_are_counted(tmp_path: Path) -> None:
    for name in ("data/a.txt", "data/deep/b.txt", "elsewhere/c.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "data/out").symlink_to("../elsewhere")
    (tmp_path / "data/loop").symlink_to(".")  # all of which is read
    (tmp_path / "data/gone").symlink_to("nowhere")
    assert read(tmp_path / "data") == (["data/a.txt", "data/deep/b.txt"], {LINK: 1, OTHER_FILE: 1})
    assert read(tmp_path / "data/[ad]*") == (["data/a.txt"], {MATCHED_FOLDER: 1})
    for pattern in ("data/**", "data/**/*.txt", "dat*/**/"):
        texts, dropped = read(tmp_path / pattern)
        assert texts == ["data/a.txt", "data/deep/b.txt"] and dropped.keys() <= {MATCHED_FOLDER}  # the links


def test_sources_are_strings_or_paths_and_not_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("[x]").mkdir()
    for i, document in enumerate(text(40)):
        Path(f"[x]/{i:02d}.txt").write_text(document)
    one = prepare("[x]", "one", OPTIONS)
    assert prepare(Path("[x]"), "two", OPTIONS) == prepare([Path("[x]")], "three", OPTIONS) == one
    assert verify_store(Path("two")) == []
    with pytest.raises(TokenSuperpositionError, match=r'a source is empty \(""\); name a file'):
        prepare(["[x]", ""], "four", OPTIONS)


def test_a_zstandard_file_with_a_long_window_is_refused(tmp_path: Path) -> None:
    """Written by hand: a frame with a window of 2 GiB (zstd --long=31) or 128 MiB, and one block as it stands."""
    content = lines(tmp_path / "a.jsonl", {"text": "a"}).read_bytes()
    for name in ("a.jsonl.zst", "a b.txt.zst", "a.json.zst"):
        path = tmp_path / name
        for window, works in ((27, True), (31, False)):
            frame = b"\x28\xb5\x2f\xfd\0" + bytes([(window - 10) << 3]) + (len(content) << 3 | 1).to_bytes(3, "little")
            path.write_bytes(frame + content)
            if works:
                check_files([path], "text")
                assert len(read(path)[0]) == 1
            else:
                with pytest.raises(TokenSuperpositionError, match=r"window of more .* zstd -d --long=31 '?/") as caught:
                    check_files([path], "text")
                assert "\n" not in str(caught.value)


def test_a_long_document_is_cut_by_its_bytes_in_every_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not by its characters, of which these have three bytes."""
    monkeypatch.setattr("token_superposition.data.sources.MAX_TEXT_BYTES", 1000)
    document = ("漢字" * 60 + "\n") * 7 + "漢" * 1000
    (tmp_path / "a.txt").write_text(document, encoding="utf-8")
    lines(tmp_path / "a.jsonl", {"text": document})
    pq.write_table(pa.table({"text": [document]}), tmp_path / "a.parquet")
    for name in ("a.txt", "a.jsonl", "a.parquet"):
        pieces, dropped = read(tmp_path / name)
        assert "".join(pieces) == document and dropped == {CUT: 1}
        assert len(pieces) >= 5 and all(len(piece.encode()) <= 1125 for piece in pieces)


def test_a_tokenizer_has_its_sample_where_most_of_a_file_is_no_text(tmp_path: Path) -> None:
    """Beside columns of other things; the summary says whether it was all the text that had no more tokens."""
    rng = random.Random(0)
    texts = [" ".join(f"w{rng.randrange(400)}" for _ in range(40)) for _ in range(300)]
    rows = [{"text": t, "blob": rng.randbytes(5000).hex()} for t in texts]
    lines(tmp_path / "a.jsonl", *rows)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    size = sum(map(len, texts))  # 60 kB of 3 MB
    for source in ("a.jsonl", "a.parquet", "saved"):
        for sample, whole in ((2 * size, True), (2**14, False)):
            options = PrepareOptions(vocab_size=600, validation_share=0.1, tokenizer_bytes=sample)
            meta = prepare(tmp_path / source, tmp_path / f"{source}-{sample}", options)
            assert meta.vocab_size > (599 if whole else 450) and meta.sampled == (not whole)
    few = ["--out", tmp_path / "few", "--vocab-size", "9000", "--tokenizer-bytes"]
    said = " ".join(tst("prepare", tmp_path / "a.parquet", *few, "20000").stdout.split())
    assert "(asked: 9,000; the sample has no more: give more --tokenizer-bytes)" in said
    (tmp_path / "few").rename(tmp_path / "before")
    assert "(asked: 9,000; the text has no more)" in tst("prepare", tmp_path / "a.parquet", *few, "10000000").stdout


def test_zeros_behind_a_compressed_file_are_no_damage(tmp_path: Path) -> None:
    """As tapes and dd leave them; gzip takes them, too."""
    whole = gzip.compress(b"".join(json.dumps({"text": t}).encode() + b"\n" for t in text(50)))
    (tmp_path / "a.jsonl.gz").write_bytes(whole + bytes(5000))
    assert read(tmp_path / "a.jsonl.gz") == (text(50), {})


def test_folders_that_may_not_be_read_are_told_under_a_glob(tmp_path: Path) -> None:
    """A pattern passes over them by itself: the half of a corpus."""
    for name in ("open", "shut"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.txt").write_text(name)
    (tmp_path / "shut").chmod(0)
    with without_privileges(tmp_path):
        for pattern in ("**/*.txt", "*/*.txt", "*/**"):
            with pytest.raises(TokenSuperpositionError, match="shut cannot be read"):
                find_files([str(tmp_path / pattern)])
        assert find_files([str(tmp_path / "o*/*.txt")]) == [tmp_path / "open/a.txt"]
    (tmp_path / "shut").chmod(0o711)  # which is enough where no name in it is looked for
    with without_privileges(tmp_path):
        assert len(find_files([str(tmp_path / "*/a.txt")])) == 2
        with pytest.raises(TokenSuperpositionError, match=r"^[^ ]*shut cannot be read"):
            find_files([str(tmp_path / "*/*.txt")])
    (tmp_path / "shut").rename(tmp_path / "lost+found")  # every disk has one, of the super-user alone
    with without_privileges(tmp_path):
        for found in (find_files([str(tmp_path / "**/*.txt")]), find_files([str(tmp_path)])):
            assert found == [tmp_path / "open/a.txt"]
    (tmp_path / "lost+found").chmod(0o755)


@pytest.mark.skipif(sys.version_info >= (3, 13), reason="** is * there")
def test_two_stars_in_a_name_are_no_pattern(tmp_path: Path) -> None:
    with pytest.raises(TokenSuperpositionError, match=r"is no pattern .* write \*\*/ for all folders"):
        read(tmp_path / "a**.txt")


def test_json_lines_are_told_by_their_first_lines_however_long(tmp_path: Path) -> None:
    texts = ["a book. " * 1_200_000, "second", "third"]
    read_texts, dropped = read(lines(tmp_path / "a.json", *({"id": i, "text": t} for i, t in enumerate(texts))))
    assert "".join(read_texts) == "".join(texts) and dropped == {CUT: 1}


def test_a_file_that_is_named_in_several_ways_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("a")
    Path("b.txt").symlink_to("a.txt")
    assert find_files(["./a.txt", str(tmp_path / "a.txt"), "a.txt", "b.txt", str(tmp_path)]) == [Path("a.txt")]


def test_white_space_in_the_middle_of_a_long_document_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("token_superposition.data.sources.MAX_TEXT_BYTES", 80)
    got, dropped = read(lines(tmp_path / "a.jsonl", {"text": "begin" + " " * 200 + "end"}))
    assert [t.strip() for t in got] == ["begin", "end"] and dropped == {CUT: 1, "empty document": 1}


def test_a_tokenizer_has_its_sample_from_everywhere_in_compressed_files(tmp_path: Path) -> None:
    """Text that is compressed to a thirtieth, the last third of it another."""
    compress = {"gz": gzip.compress, "zst": zstd}
    for ending, compressed in compress.items():
        parts = [f"{kind * 30} {i} " * 3 for kind in "abc" for i in range(3000)]
        path = tmp_path / f"a.jsonl.{ending}"
        content = b"".join(json.dumps({"text": t}).encode() + b"\n" for t in parts)
        path.write_bytes(compressed(content))
        size = estimated_bytes([path], "text")
        assert size == pytest.approx(len(content), rel=0.1)
        sample = Sample([(lambda path=path: iter(read(path)[0]), size)], 2**16, None, 0, lambda done: None)
        taken = Counter(piece[0] for piece in sample)
        assert min(taken[kind] for kind in "abc") > 0.5 * max(taken.values())


def test_a_store_that_appears_meanwhile_is_told_before_the_work(tmp_path: Path) -> None:
    read_now: list[bool] = []

    def documents(dropped: Counter[str]) -> Any:
        read_now.append(True)
        return iter(text(60))

    out = Path(os.path.realpath(tmp_path / "out"))
    shown = Path.mkdir

    def appears(self: Path, *args: Any, **kwargs: Any) -> None:  # between the first look and the lock
        shown(self, *args, **kwargs)
        if self == out.parent:
            shown(out, exist_ok=True)
            (out / "meta.json").write_text("{}")

    with pytest.MonkeyPatch.context() as patch, pytest.raises(TokenSuperpositionError, match="out exists already"):
        patch.setattr(Path, "mkdir", appears)
        prepare((), out, OPTIONS, documents=documents)
    assert not read_now and list(out.iterdir()) == [out / "meta.json"]
