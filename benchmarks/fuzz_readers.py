"""Coverage-guided fuzzing of the readers of files, with atheris (pip install 'token-superposition[fuzz]', Python 3.11).

    python -m benchmarks.fuzz_readers READER [--seconds 60]

READER is jsonl, gz, zst, txt, parquet, meta, shard or tokenizer. Anything but a result or a one-line
``TokenSuperpositionError`` is a finding: atheris stops, and leaves the input in ``crash-*``. Findings become cases of
tests/reliability.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import atheris  # pyright: ignore
import numpy as np

with atheris.instrument_imports(include=["token_superposition.data"]):
    from token_superposition.data.sources import read_documents
    from token_superposition.data.store import Meta, TokenStore
    from token_superposition.data.tokenizer import load_tokenizer
    from token_superposition.data.verify import verify_store

from tests.reliability.stores import sparse_store
from tests.reliability.test_odd_text import parquet, zstd
from token_superposition.errors import TokenSuperpositionError

warnings.simplefilter("ignore")
Try = Callable[[bytes], object]


def text_reader(name: str) -> Callable[[Path], Try]:
    def make(folder: Path) -> Try:
        def read(content: bytes) -> None:
            path, dropped = folder / name, Counter[str]()
            path.write_bytes(content)
            texts = list(read_documents([path], "text", dropped))
            assert texts or dropped, "silent"
            assert all(t.strip() and t.encode() for t in texts)

        return read

    return make


def meta(folder: Path) -> Try:
    """Any JSON, also with the right checksum."""
    whole = sparse_store(folder, 1, 2**14, linked=False)

    def read(content: bytes) -> None:
        (folder / "meta.json").write_bytes(content)
        if content.startswith(b"{"):
            try:
                tree = json.loads(content)
                tree.pop("sha256", None)
                digest = hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()
                (folder / "meta.json").write_text(json.dumps(tree | {"sha256": digest}))
            except (ValueError, RecursionError):
                pass
        Meta.load(folder)

    assert whole
    return read


def shard(folder: Path) -> Try:
    """Bytes in the place of a shard and of its checksums."""
    sparse_store(folder, 1, 2**14, linked=False)
    name = folder / "train-00000.npy"
    original = name.read_bytes()

    def read(content: bytes) -> None:
        name.write_bytes(content if len(content) % 2 else content + original[len(content) :])
        verify_store(folder)
        store = TokenStore(folder)
        assert not store[0 : len(store)].any()

    return read


def tokenizer(folder: Path) -> Try:
    def read(content: bytes) -> None:
        (folder / "tokenizer.json").write_bytes(content)
        (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
        load_tokenizer(str(folder))

    return read


LINES = b'{"text": "one"}\n{"text": null}\n[1]\n'
READERS: dict[str, tuple[Callable[[Path], Try], list[bytes]]] = {
    "jsonl": (text_reader("a.jsonl"), [LINES, b'{"text": "\\ud800"}']),
    "gz": (text_reader("a.jsonl.gz"), [gzip.compress(LINES)]),
    "zst": (text_reader("a.jsonl.zst"), [zstd(LINES)]),
    "txt": (text_reader("a.txt"), ["café".encode(), "é".encode("utf-16")]),
    "parquet": (text_reader("a.parquet"), [parquet([b"one", None, b"\xff"])]),
    "meta": (meta, []),
    "shard": (shard, [np.zeros(9, np.uint16).tobytes()]),
    "tokenizer": (tokenizer, [b'{"version": "1.0", "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}']),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("reader", choices=READERS)
    parser.add_argument("--seconds", type=int, default=60)
    given = parser.parse_args()
    make, seeds = READERS[given.reader]
    with tempfile.TemporaryDirectory() as name:
        folder, corpus = Path(name) / "files", Path(name) / "corpus"
        folder.mkdir()
        corpus.mkdir()
        one = make(folder)
        seeds = seeds or [(folder / "meta.json").read_bytes()]
        for i, seed in enumerate(seeds):
            (corpus / str(i)).write_bytes(seed)

        def attempt(content: bytes) -> None:
            try:
                one(content)
            except TokenSuperpositionError as e:
                assert str(e) and "\n" not in str(e), repr(str(e))

        arguments = [f"-max_total_time={given.seconds}", "-max_len=4096", "-timeout=30", "-rss_limit_mb=4096"]
        atheris.Setup([sys.argv[0], *arguments, str(corpus)], attempt)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
