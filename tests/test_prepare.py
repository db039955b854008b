from __future__ import annotations

import gzip
import json
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen2Config

from tests.conftest import VOCAB, text, tst
from token_superposition import TokenSuperpositionError
from token_superposition.data.files import OTHER_FILE, find_files
from token_superposition.data.prepare import PrepareOptions, prepare
from token_superposition.data.sources import read_documents
from token_superposition.data.store import Meta, TokenStore
from token_superposition.data.verify import verify_store

OPTIONS = PrepareOptions(vocab_size=VOCAB, validation_share=0.1)


def documents_of(store: TokenStore) -> list[str]:
    tokenizer = AutoTokenizer.from_pretrained(store.directory / "tokenizer")
    return [tokenizer.decode(store[a : b - 1].tolist()) for a, b in documents_in(store)]


def documents_in(store: TokenStore) -> Iterator[tuple[int, int]]:
    return pairwise([*store.document_starts().tolist(), len(store)])


def stores_of(data: Path) -> list[TokenStore]:
    return [TokenStore(data), TokenStore(data, "validation")]


def test_every_document_comes_back_once(prepared: Path) -> None:
    train, validation = TokenStore(prepared), TokenStore(prepared, "validation")
    got = Counter(documents_of(train) + documents_of(validation))
    assert got == Counter(text()) and train.meta.dropped == {"duplicate": 3}
    assert train.split.bytes + validation.split.bytes == sum(len(t.encode()) for t in got)
    assert 0.03 < validation.split.documents / len(got) < 0.25
    eos = train.meta.eos_id
    assert all(train[int(s) - 1 : int(s)].tolist() == [eos] for s in train.document_starts()[1:])
    assert verify_store(prepared) == []


def test_small_shards_are_one_stream(prepared: Path, tmp_path: Path) -> None:
    source = str(prepared.parent / "text")
    prepare([source], tmp_path / "data", PrepareOptions(vocab_size=VOCAB, validation_share=0.1, shard_tokens=333))
    whole, cut = TokenStore(prepared), TokenStore(tmp_path / "data")
    assert len(cut.split.shards) > 5
    assert np.array_equal(whole[0 : len(whole)], cut[0 : len(cut)])
    assert np.array_equal(whole[300:1400], cut[300:1400]) and len(cut[5:5]) == 0
    assert np.array_equal(whole.document_starts(), cut.document_starts())


def test_a_store_is_indexed_like_an_array(prepared: Path) -> None:
    store = TokenStore(prepared)
    whole = np.asarray(store)
    assert whole.dtype == np.uint16 and np.array_equal(whole, store[:])
    assert np.array(store, np.int64).dtype == np.int64
    assert (store[0], store[np.int64(7)], store[-1]) == (whole[0], whole[7], whole[-1])
    assert list(store) == whole.tolist()
    for i in (len(store), -len(store) - 1):
        with pytest.raises(IndexError):
            store[i]


def test_same_input_and_seed_give_the_same_bytes(prepared: Path, tmp_path: Path) -> None:
    prepare([str(prepared.parent / "text")], tmp_path / "again", OPTIONS)
    files = sorted(p.relative_to(prepared) for p in prepared.rglob("*") if p.is_file())
    assert files == sorted(p.relative_to(tmp_path / "again") for p in (tmp_path / "again").rglob("*") if p.is_file())
    for file in files:
        assert (prepared / file).read_bytes() == (tmp_path / "again" / file).read_bytes(), file


def test_all_formats_give_the_same_documents(tmp_path: Path) -> None:
    texts = text(60)
    records = "".join(json.dumps({"text": t, "n": 1}) + "\n" for t in texts).encode()
    (tmp_path / "a.jsonl").write_bytes(records)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(records))
    with pa.output_stream(str(tmp_path / "c.jsonl.zst"), compression="zstd") as f:
        f.write(records)
    pq.write_table(pa.table({"text": texts, "n": range(60)}), tmp_path / "d.parquet")
    folder = tmp_path / "folder with ünïcode"
    folder.mkdir()
    for i, t in enumerate(texts):
        (folder / f"{i:03d}.md").write_text(t)
        (folder / f"{i:03d}.bin").write_bytes(b"\0")
    for source in ("a.jsonl", "b.jsonl.gz", "c.jsonl.zst", "d.parquet", folder.name, "folder*/*.md"):
        dropped: Counter[str] = Counter()
        assert list(read_documents([str(tmp_path / source)], "text", dropped)) == texts, source
        assert not dropped - Counter({OTHER_FILE: 60})


def test_what_cannot_be_read_is_counted(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "good"}\n{"text": 3}\n{"body": "x"}\nnot json\n\n{"text": " "}\n[1]\n')
    (tmp_path / "b.txt").write_bytes(b"caf\xe9")
    (tmp_path / "c.txt").write_bytes(b"nul\0byte")
    (tmp_path / "d.txt").write_text("")
    (tmp_path / "e.jsonl.gz").write_bytes(gzip.compress(b'{"text": "whole"}\n' * 9999)[:-60])
    pq.write_table(pa.table({"text": ["row", None]}), tmp_path / "f.parquet")
    dropped: Counter[str] = Counter()
    texts = list(read_documents([str(tmp_path)], "text", dropped))
    assert {"good", "row"} <= set(texts)
    assert dropped["no text in field 'text'"] == 4 and dropped["not JSON"] >= 1 and dropped["not UTF-8"] == 1
    assert dropped["binary"] == 1 and dropped["empty document"] == 1 and dropped["unreadable rest of a file"] == 1
    assert dropped["empty file"] == 1


def test_a_long_file_is_cut_at_line_ends_and_loses_nothing(tmp_path: Path) -> None:
    line = "0123456789 " * 9 + "\n"
    (tmp_path / "long.txt").write_text(line * 200_000)
    pieces = list(read_documents([str(tmp_path / "long.txt")], "text", Counter()))
    assert len(pieces) > 1 and "".join(pieces) == line * 200_000
    assert all(p.endswith("\n") and len(p) < 9 * 2**20 for p in pieces)


def test_the_tokenizer_is_trained_on_text_from_everywhere(tmp_path: Path) -> None:
    """Also where the sample is smaller than any document; each of these has words of its own."""
    words = [[f"{a}{b}" for b in ("river", "carries", "boats", "harbour")] for a in ("un", "re", "over", "be", "by")]
    texts = ["".join(f"{own[i % 4]} {i}\n" for i in range(5_000)) for own in words]
    for name, documents in (("few", texts), ("one", ["".join(texts)])):
        source = tmp_path / f"{name}.jsonl"
        source.write_text("".join(json.dumps({"text": t}) + "\n" for t in [*documents, *map(str, range(20))]))
        options = PrepareOptions(vocab_size=500, validation_share=0.5, tokenizer_bytes=2**15)
        prepare([str(source)], tmp_path / name, options)
        vocabulary = AutoTokenizer.from_pretrained(tmp_path / name / "tokenizer").get_vocab()
        assert len(vocabulary) == 500 and {own[3] for own in words} <= vocabulary.keys()
        with pytest.raises(TokenSuperpositionError, match=r"tokenizer_bytes is 9, too few .* give at least 16384"):
            prepare([str(source)], tmp_path / "data", PrepareOptions(tokenizer_bytes=9))


def test_an_existing_tokenizer(prepared: Path, tmp_path: Path) -> None:
    options = PrepareOptions(tokenizer=str(prepared / "tokenizer"), validation_share=0.1)
    meta = prepare([str(prepared.parent / "text")], tmp_path / "data", options)
    assert meta.tokenizer_sha256 == TokenStore(prepared).meta.tokenizer_sha256


@pytest.mark.parametrize(("largest", "dtype"), [(2**16 - 1, "uint16"), (2**16, "uint32")])
def test_two_bytes_hold_65536_ids(largest: int, dtype: str, prepared: Path, tmp_path: Path) -> None:
    """A vocabulary whose ids have a gap before the last one."""
    file = shutil.copytree(prepared / "tokenizer", tmp_path / "tokenizer") / "tokenizer.json"
    content = json.loads(file.read_text())
    content["model"]["vocab"]["QQ"] = largest
    content["model"]["merges"].append(["Q", "Q"])
    file.write_text(json.dumps(content))
    options = PrepareOptions(tokenizer=str(file.parent), validation_share=0.3)
    texts = [f"QQ {i}" for i in range(20)]
    meta = prepare((), tmp_path / "data", options, documents=lambda _: iter(texts))
    assert (meta.vocab_size, meta.dtype) == (largest + 1, dtype)
    assert all(store[:].max() == largest for store in stores_of(tmp_path / "data"))


def test_the_seed_chooses_what_is_held_out(prepared: Path, tmp_path: Path) -> None:
    held_out: list[set[str]] = []
    for seed in (0, 1):
        options = PrepareOptions(tokenizer=str(prepared / "tokenizer"), validation_share=0.3, seed=seed)
        prepare((), tmp_path / f"{seed}", options, documents=lambda _: (f"document {i}" for i in range(40)))
        held_out.append(set(documents_of(TokenStore(tmp_path / f"{seed}", "validation"))))
    assert held_out[0] != held_out[1]


def test_no_document_is_begun_after_the_last_byte(prepared: Path, tmp_path: Path) -> None:
    options = PrepareOptions(tokenizer=str(prepared / "tokenizer"), validation_share=0.3, max_bytes=110)
    meta = prepare((), tmp_path / "data", options, documents=lambda _: (f"document {i}" for i in range(10, 90)))
    assert meta.train.documents + meta.validation.documents == 10 and meta.train.bytes + meta.validation.bytes == 110


def test_a_long_document_is_cut_at_the_last_byte(prepared: Path, tmp_path: Path) -> None:
    """At a line end if it has one before."""
    lines = "".join(f"line {i:04d} é\n" for i in range(5_000))
    for limit, kept in ((40_000, 40_000 // 13 * 13), (7, 7)):
        options = PrepareOptions(tokenizer=str(prepared / "tokenizer"), validation_share=0.3, max_bytes=30 + limit)
        out = tmp_path / f"{limit}"
        meta = prepare((), out, options, documents=lambda _: iter(["a" * 10, "b" * 10, "c" * 10, lines, "d" * 10]))
        assert meta.train.bytes + meta.validation.bytes == 30 + kept
        read = [d for split in ("train", "validation") for d in documents_of(TokenStore(out, split))]
        assert lines.encode()[:kept].decode() in read and "d" * 10 not in read


@pytest.mark.parametrize("is_bos", [True, False])
def test_a_document_begins_with_the_bos_that_the_tokenizer_itself_puts_before_a_text(
    is_bos: bool, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Llama 3's does. Once, also where a document is tokenised in pieces. Any other token there is left out."""
    monkeypatch.setattr("token_superposition.data.prepare.PIECE_CHARS", 30)
    tokenizer = AutoTokenizer.from_pretrained(prepared / "tokenizer")
    tokenizer.add_tokens(["<begin>"])
    begin = tokenizer.convert_tokens_to_ids("<begin>")
    if is_bos:
        tokenizer.bos_token = "<begin>"
    specials: Any = [("<begin>", begin)]
    template = processors.TemplateProcessing(single="<begin> $A", special_tokens=specials)
    tokenizer.backend_tokenizer.post_processor = template
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    options = PrepareOptions(tokenizer=str(tmp_path / "tokenizer"), validation_share=0.3)
    texts = [f"document {i}\n" * (1 + i) for i in range(20)]
    meta = prepare((), tmp_path / "data", options, documents=lambda _: iter(texts))
    assert meta == Meta.load(tmp_path / "data") and meta.bos_id == (begin if is_bos else None)
    for store in stores_of(tmp_path / "data"):
        starts = store.document_starts().tolist() if is_bos else []
        assert np.flatnonzero(store[:] == begin).tolist() == starts
        assert np.count_nonzero(store[:] == meta.eos_id) == store.split.documents
    read = [text for store in stores_of(tmp_path / "data") for text in documents_of(store)]
    assert sorted(read) == sorted("<begin>" * is_bos + text for text in texts)
    assert verify_store(tmp_path / "data") == []


def tokenizer_of(kind: str, folder: Path) -> Any:
    """Of the text that ``long_text`` gives, saved as transformers loads it."""
    specials = ["<unk>", "</s>", "[UNK]"]
    pre: Any = pre_tokenizers.ByteLevel(add_prefix_space=kind == "bytes, space first")
    decoder: Any = decoders.ByteLevel()
    if kind.startswith("metaspace"):
        scheme: Any = kind.split()[1]
        pre = pre_tokenizers.Metaspace(prepend_scheme=scheme)
        decoder = decoders.Metaspace(prepend_scheme=scheme)
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    trainer: Any = trainers.BpeTrainer(vocab_size=400, special_tokens=specials, show_progress=False)
    if kind == "unigram":
        pre, decoder, backend = pre_tokenizers.Metaspace(), decoders.Metaspace(), Tokenizer(models.Unigram())
        trainer = trainers.UnigramTrainer(
            vocab_size=80, special_tokens=specials, unk_token="<unk>", show_progress=False
        )
    backend.pre_tokenizer, backend.decoder = pre, decoder
    backend.train_from_iterator([long_text(), "<|/endoftext|>s"], trainer)
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>").save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def long_text() -> str:
    return "".join(f"line {i} of the text\n{' ' * (i % 3)}" for i in range(300)) + "without an end" * 100


@pytest.mark.parametrize(
    "kind", ["bytes", "bytes, space first", "metaspace first", "metaspace always", "metaspace never", "unigram"]
)
def test_a_long_document_has_the_tokens_that_the_tokenizer_gives_it(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some put a space before every text, so before every piece of it."""
    monkeypatch.setattr("token_superposition.data.prepare.PIECE_CHARS", 200)
    tokenizer = tokenizer_of(kind, tmp_path / "tokenizer")
    options = PrepareOptions(tokenizer=str(tmp_path / "tokenizer"), validation_share=0.3)
    texts = [long_text(), *(f"document {i}" for i in range(20))]
    prepare((), tmp_path / "data", options, documents=lambda _: iter(texts))
    longest = max(
        (store[a : b - 1].tolist() for store in stores_of(tmp_path / "data") for a, b in documents_in(store)), key=len
    )
    alone = tokenizer(long_text(), add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(longest) == tokenizer.decode(alone)
    assert tokenizer.decode(longest).strip() == long_text()
    if kind != "bytes":  # which may have another token where a word without an end is cut
        assert longest == alone


@pytest.mark.parametrize("kind", ["trained", "bytes", "metaspace first", "unigram"])
def test_a_text_that_spells_a_special_token_has_no_end_there(kind: str, tmp_path: Path) -> None:
    """The end of a document is where it ends, also in a text about tokenizers."""
    end = "<|endoftext|>" if kind == "trained" else "</s>"
    texts = [f"line {i} of the text {end if i % 2 else ''}{end}s" if i % 3 else f"line {i} of" for i in range(60)]
    options = PrepareOptions(vocab_size=400, validation_share=0.3)
    if kind != "trained":
        tokenizer_of(kind, tmp_path / "tokenizer")
        options = PrepareOptions(tokenizer=str(tmp_path / "tokenizer"), validation_share=0.3)
    meta = prepare((), tmp_path / "data", options, documents=lambda _: iter(texts))
    stores = stores_of(tmp_path / "data")
    for store in stores:
        assert np.count_nonzero(store[:] == store.meta.eos_id) == store.split.documents
    read = [text.strip() for store in stores for text in documents_of(store)]
    if kind == "unigram":  # it has </s> among its words, so that what spells it is left out
        assert sum(meta.dropped.values()) == 40 and len(read) == 20
    else:
        assert sorted(read) == sorted(texts) and not meta.dropped


@pytest.mark.parametrize(
    ("sources", "options", "message"),
    [
        (["missing"], OPTIONS, "missing does not exist"),
        (["nothing*.txt"], OPTIONS, "matches no file"),
        ([], OPTIONS, "no source given"),
        (["folder"], OPTIONS, "no file with a known text ending"),
        (["empty.txt"], OPTIONS, "no document is left"),
        (["one.txt"], OPTIONS, "a single document of 12 bytes cannot be split"),
        (["one.txt"], PrepareOptions(vocab_size=100), "vocab size is 100; give at least 257"),
        (["one.txt"], PrepareOptions(validation_share=1.0), "validation share is 1.0"),
        (["one.txt"], PrepareOptions(seed=2**64), r"seed is 18446744073709551616; give a whole number below 2\*\*64"),
        (["one.txt"], PrepareOptions(tokenizer="no/such/place"), "tokenizer no/such/place cannot be loaded"),
        (
            ["one.txt"],
            PrepareOptions(tokenizer="model", vocab_size=9),
            "vocab_size is 9, but .* leave out --vocab-size or",
        ),
        (
            ["one.txt"],
            PrepareOptions(tokenizer="model", tokenizer_bytes=9),
            "tokenizer_bytes is 9, but no tokenizer is",
        ),
        (["one.txt"], PrepareOptions(tokenizer="model"), "is its tokenizer.json missing"),
    ],
)
def test_unusable_input_has_one_line_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sources: list[str], options: PrepareOptions, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    Qwen2Config().save_pretrained("model")
    Path("empty.txt").touch()
    Path("one.txt").write_text("one document")
    with pytest.raises(TokenSuperpositionError, match=message) as caught:
        prepare(sources, "data", options)
    assert "\n" not in str(caught.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty.txt", "folder", "model", "one.txt"]


def test_datasets_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read by the datasets library; here a folder stands in for a name on the hub."""
    pq.write_table(pa.table({"text": text(40), "n": range(40)}), tmp_path / "train.parquet")
    dropped: Counter[str] = Counter()
    assert list(read_documents([f"hf:{tmp_path}"], "text", dropped)) == text(40)
    assert not dropped
    with pytest.raises(TokenSuperpositionError, match=r"hf:no/such cannot be opened"):
        next(read_documents(["hf:no/such"], "text", dropped))
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(TokenSuperpositionError, match="pip install 'token-superposition"):
        next(read_documents(["hf:no/such"], "text", dropped))


def test_the_tokenizer_knows_every_dataset_of_the_hub_and_the_files_beside_them(tmp_path: Path) -> None:
    """The first of them alone could fill the sample. Words of the last file are in its second half only."""
    words = ["river", "carries", "boats", "harbour"]
    for name, word in zip("abc", words, strict=False):
        (tmp_path / name).mkdir()
        texts = [f"{word} {i}" + f"\n{words[3]} {i}" * (name == "c" and i >= 3_000) for i in range(6_000)]
        pq.write_table(pa.table({"text": texts}), tmp_path / name / "train.parquet")
    sources = [f"hf:{tmp_path / 'a'}", f"hf:{tmp_path / 'b'}", str(tmp_path / "c")]
    for name, limit, known in (("all", None, words), ("some", 100_000, words[:2]), ("first", 50_000, words[:1])):
        options = PrepareOptions(vocab_size=400, validation_share=0.2, tokenizer_bytes=2**14, max_bytes=limit)
        prepare(sources, tmp_path / name, options)
        vocabulary = AutoTokenizer.from_pretrained(tmp_path / name / "tokenizer").get_vocab()
        assert [w for w in words if w in vocabulary] == known


def test_a_broken_connection_is_no_full_disk(tmp_path: Path) -> None:
    """Of the hub, and of a caller's own iterator. Like requests' errors, it is an OSError without a number."""
    content = "".join(json.dumps({"text": t}) + "\n" for t in text(40)).encode()
    (tmp_path / "train-0.jsonl.gz").write_bytes(gzip.compress(content))
    (tmp_path / "train-1.jsonl.gz").write_bytes(gzip.compress(content)[:-100])
    with pytest.raises(TokenSuperpositionError, match=r"hf:.* breaks off after 40 rows \(.*\); see to") as caught:
        prepare([f"hf:{tmp_path}"], tmp_path / "data", OPTIONS)
    assert "\n" not in str(caught.value)

    def documents(dropped: Counter[str]) -> Iterator[str]:
        yield from text()
        raise OSError("the server hung up")

    with pytest.raises(TokenSuperpositionError, match=r"cannot be read to its end \(the server hung up\)"):
        prepare((), tmp_path / "data", OPTIONS, documents=documents)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["train-0.jsonl.gz", "train-1.jsonl.gz"]


def test_hidden_order_of_find_files_is_fixed(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "c.py"):
        (tmp_path / name).write_text(name)
    assert [p.name for p in find_files([str(tmp_path), str(tmp_path / "a.txt")])] == ["a.txt", "b.txt", "c.py"]


def test_command_reports_what_it_did(tmp_path: Path, prepared: Path) -> None:
    done = tst("prepare", prepared.parent / "text", "--out", tmp_path / "data", "--vocab-size", "300")
    assert "train:" in done.stdout and "bytes/token" in done.stdout and "left out:" in done.stdout
    assert "vocabulary: 300\n" in done.stdout
    (tmp_path / "few.txt").write_text("some text\n" * 2000)
    done = tst("prepare", tmp_path / "few.txt", "--out", tmp_path / "few")
    assert "vocabulary: 264 (asked: 32,768; the text has no more)\n" in done.stdout
