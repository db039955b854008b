"""``tst prepare``: documents in, a token store out."""

from __future__ import annotations

import os
import shutil
import sqlite3
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import partial as bind
from pathlib import Path
from typing import Any, cast

import numpy as np

from token_superposition.data.files import check_files, estimated_bytes, find_files
from token_superposition.data.held_out import HeldOut, Piece, choose_held_out, digest
from token_superposition.data.sample import Part, Sample
from token_superposition.data.sources import CUT, Continued, cut_at_lines, cut_bytes, read_documents
from token_superposition.data.store import SPLITS, Meta, Split, file_sha256, partial_of
from token_superposition.data.tokenizer import (
    GivenBack,
    begin_token,
    can_be_cut,
    check_vocab_size,
    load_tokenizer,
    tokenizer_sha256,
    train_bpe,
)
from token_superposition.data.writer import ShardWriter
from token_superposition.errors import TokenSuperpositionError, errno_in, first_line, require_int

BATCH_BYTES = 2 * 2**20
PIECE_CHARS = 2**16  # a longer document is tokenised in pieces cut at line ends, if it can be: all cores share it
MAX_SHARD_TOKENS = 2**31  # a shard is filled in memory
DISK_FULL = "cannot write {out} ({why}); free the disk or choose another --out"
Progress = Callable[[str, float, float | None], None]  # (stage, bytes done, bytes in all if known)
Documents = Callable[[Counter[str]], Iterator[str]]  # reads texts, and counts in its argument what it drops


@dataclass(frozen=True)
class PrepareOptions:
    """How text becomes a token store."""

    vocab_size: int = 32768
    """Vocabulary of the byte-level BPE that is trained on the text."""
    tokenizer: str | None = None
    """Directory or hub name of an existing tokenizer, instead of training one."""
    text_field: str = "text"
    """Field of JSON lines, column of Parquet and of hub datasets that holds the text."""
    validation_share: float = 0.01
    """Share of the documents held out for validation, chosen by their hash; of the text, where they are too few."""
    tokenizer_bytes: int = 64 * 2**20
    """Bytes of text on which the BPE is trained, spread over all that is read. How much a dataset of the hub holds is
    not known: without --max-bytes, each gives its first bytes, and the files together as many, from everywhere."""
    max_bytes: int | None = None
    """Stop after this many bytes of text, which cuts the last document, at a line end if it can. Datasets of the hub
    are read first."""
    shard_tokens: int = 2**26
    """Tokens of one shard file."""
    seed: int = 0
    """Chooses which documents are held out."""


def prepare(
    sources: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    out: str | Path,
    options: PrepareOptions = PrepareOptions(),
    progress: Progress = lambda stage, done, total: None,
    documents: Documents | None = None,
) -> Meta:
    """Tokenise ``sources`` into the directory ``out``, which appears only when it is whole.

    Exact duplicates of a document are dropped. The same text, options and seed give the same bytes. ``documents``
    replaces the reading of ``sources`` by an iterator over texts (called three times: to see that there is text to
    train on and to hold out, to train the tokenizer, of which they give the first ``tokenizer_bytes`` unless
    ``max_bytes`` is set, then to tokenise; once more to train where there is far less text than ``max_bytes``; it
    counts in its argument what it drops).

    Raises ``TokenSuperpositionError`` for unusable options or sources, an empty corpus, or a full disk.
    """
    _check(options, Path(out))
    names = [os.fspath(s) for s in ([sources] if isinstance(sources, str | os.PathLike) else sources)]
    out = Path(os.path.realpath(out))  # a link stays, and leads to the store
    dropped: Counter[str] = Counter()
    total: int | None = None
    parts: list[tuple[Documents, int | None]] = []
    if documents is None:
        if not names:
            raise TokenSuperpositionError("no source given; name files, folders, globs or hf:DATASET")
        hub = [s for s in names if s.startswith("hf:")]
        files = find_files([s for s in names if not s.startswith("hf:")], dropped)
        check_files(files, options.text_field)  # what cannot be read is found before any work
        for name in hub:
            next(read_documents([name], options.text_field, Counter()), None)
        documents = bind(read_documents, [*hub, *files], options.text_field)
        if not hub:
            total = estimated_bytes(files, options.text_field)
        elif options.max_bytes is None:
            parts = [(bind(read_documents, [name], options.text_field), None) for name in hub]
            if files:
                size = estimated_bytes(files, options.text_field)
                parts.append((bind(read_documents, files, options.text_field), size))
    if options.max_bytes is not None:
        total = min(total, options.max_bytes) if total is not None else options.max_bytes
    parts = parts or [(documents, total)]
    from filelock import FileLock, Timeout

    partial = partial_of(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{partial}.lock", timeout=0):
            shutil.rmtree(partial, ignore_errors=True)
            try:
                _check(options, out)  # another may have written it meanwhile
                if out.exists():
                    out.rename(partial)  # here and back: what cannot be replaced is found before any work
                    partial.rename(out)
                partial.mkdir()
                meta = _prepare(documents, parts, partial, options, progress, total, dropped)
                meta.save(partial / "meta.json")
                if out.exists():
                    out.rmdir()
                partial.rename(out)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
                Path(f"{partial}.lock").unlink(missing_ok=True)
    except Timeout:
        raise TokenSuperpositionError(
            f"another tst prepare is writing {out}; wait for it or choose another --out"
        ) from None
    except OSError as e:
        raise TokenSuperpositionError(DISK_FULL.format(out=out, why=e.strerror or first_line(e))) from None
    except sqlite3.Error as e:
        raise TokenSuperpositionError(DISK_FULL.format(out=out, why=e)) from None
    return meta


def _read(documents: Documents, dropped: Counter[str]) -> Iterator[str]:
    """Of which an error is none of writing, such as a full disk's."""
    try:
        yield from documents(dropped)
    except OSError as e:
        raise TokenSuperpositionError(
            f"the text cannot be read to its end ({e.strerror or first_line(e)}); see to its source and run it again"
        ) from e


def _check(options: PrepareOptions, out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise TokenSuperpositionError(f"{out} exists already; choose another --out or remove it")
    target = Path(os.path.realpath(out))
    try:
        str(target).encode()
    except UnicodeEncodeError:
        raise TokenSuperpositionError(
            f"--out leads to {os.fsencode(target)}, a name that is not UTF-8, which tokenizers cannot be saved under; "
            "choose another --out"
        ) from None
    if target.is_symlink():
        raise TokenSuperpositionError(f"{out} is a link that leads in a circle; choose another --out")
    if target == Path.cwd() or target.is_mount():
        what = "the current folder" if target == Path.cwd() else "a mount point"
        raise TokenSuperpositionError(f"{out} is {what}, which cannot be replaced; name a new folder in it as --out")
    if not 0 < options.validation_share < 1:
        raise TokenSuperpositionError(
            f"validation share is {options.validation_share}; give a share in (0, 1), say 0.01"
        )
    for name in ("vocab_size", "tokenizer_bytes", "shard_tokens"):
        require_int(name, getattr(options, name), 1)
    if options.shard_tokens > MAX_SHARD_TOKENS:
        raise TokenSuperpositionError(
            f"shard_tokens is {options.shard_tokens:,}; give at most {MAX_SHARD_TOKENS:,}: a shard is filled in memory"
        )
    if options.tokenizer is None:
        check_vocab_size(options.vocab_size)
    else:
        for name in ("vocab_size", "tokenizer_bytes"):
            if (value := getattr(options, name)) != getattr(PrepareOptions, name):
                raise TokenSuperpositionError(
                    f"{name} is {value}, but no tokenizer is trained where {options.tokenizer} is given; leave out "
                    f"--{name.replace('_', '-')} or --tokenizer"
                )
    if require_int("seed", options.seed, 0) >= 2**64:
        raise TokenSuperpositionError(f"seed is {options.seed}; give a whole number below 2**64")
    if options.max_bytes is not None:
        require_int("max_bytes", options.max_bytes, 1)


def _prepare(
    documents: Documents,
    parts: Sequence[tuple[Documents, int | None]],
    out: Path,
    options: PrepareOptions,
    progress: Progress,
    total: int | None,
    dropped: Counter[str],
) -> Meta:
    sampled = False
    if options.tokenizer is not None:
        tokenizer = load_tokenizer(options.tokenizer)
        held_out = _choose_held_out(documents, out, options, dropped)
    else:
        held_out = _choose_held_out(documents, out, options, dropped)
        readers: list[Part] = [(bind(_read, read, Counter()), size) for read, size in parts]
        sample = Sample(
            readers,
            options.tokenizer_bytes,
            options.max_bytes,
            options.seed,
            report=lambda done: progress("train tokenizer", done, total),
        )
        tokenizer = train_bpe(iter(sample), options.vocab_size)
        sampled = not sample.whole
    try:
        tokenizer.save_pretrained(str(out / "tokenizer"))
    except Exception as e:  # tokenizers has no error of its own for a full disk
        if (number := errno_in(e)) is None:
            raise
        raise OSError(number, os.strerror(number)) from None
    bos, eos = begin_token(tokenizer), cast(int, tokenizer.eos_token_id)
    vocab_size = max(tokenizer.get_vocab().values()) + 1  # ids may have gaps
    dtype = "uint16" if vocab_size <= 2**16 else "uint32"
    writers: dict[Split, ShardWriter] = {
        split: ShardWriter(out, split, dtype, vocab_size, options.shard_tokens) for split in SPLITS
    }
    kept = _deduplicate(_read(documents, dropped), out, options, dropped)
    done, given_back = 0, GivenBack(tokenizer)
    for split, size, tokens in _tokenise(held_out.split(kept), tokenizer, bos, eos, dtype, given_back, total):
        if len(tokens) == 1 + (bos is not None):
            dropped["of which this tokenizer makes no token"] += 1
            continue
        if (tokens[:-1] == eos).any():  # a model of whole words, or of Unigram, that has it among them
            dropped["spells the end-of-text token, which this tokenizer does not give as text"] += 1
            continue
        writers[split].add(tokens, size)
        done += size
        progress("tokenise", done, total)
    given_back.require("the text")
    train, validation = (writers[s].finish() for s in ("train", "validation"))
    cut = dropped.pop(CUT, 0)
    if not train.tokens or not validation.tokens:
        empty = "validation" if train.tokens else "training"
        raise _nothing_left(empty, train.documents + validation.documents, dropped)
    return Meta(
        vocab_size=vocab_size,
        eos_id=eos,
        dtype=dtype,
        tokenizer_sha256=tokenizer_sha256(out / "tokenizer"),
        seed=options.seed,
        validation_share=options.validation_share,
        train=train,
        validation=validation,
        dropped=dict(sorted(dropped.items())),
        cut=cut,
        lost=given_back.shares,
        bos_id=bos,
        sampled=sampled,
        tokenizer_files={p.name: file_sha256(p) for p in sorted((out / "tokenizer").iterdir()) if p.is_file()},
    )


def _choose_held_out(documents: Documents, out: Path, options: PrepareOptions, dropped: Counter[str]) -> HeldOut:
    """By what is read before any work, mostly little: what cannot be split is told before a tokenizer is trained."""
    counted = Counter(dropped)
    with closing(_deduplicate(_read(documents, counted), out, options, counted)) as pieces:
        held_out = choose_held_out(pieces, options.validation_share)
    if held_out is None:
        raise _nothing_left("training", 0, counted)
    return held_out


def _nothing_left(split: str, usable: int, dropped: Counter[str]) -> TokenSuperpositionError:
    why = f" ({', '.join(f'{n} dropped: {why}' for why, n in dropped.items())})" if dropped else ""
    field = ", another --text-field" if any(why.startswith("no text in field") for why in dropped) else ""
    return TokenSuperpositionError(
        f"no document is left for {split}: {usable} usable in all{why}; give more text{field} or another "
        "--validation-share"
    )


def _deduplicate(
    texts: Iterator[str], scratch: Path, options: PrepareOptions, dropped: Counter[str]
) -> Generator[Piece]:
    """First occurrence of every text, and of every beginning of a long one; with its document and its size in bytes.

    The hashes seen are kept in a temporary SQLite file, so that memory does not grow with the corpus.
    """
    path, done, seen, document = scratch / "seen.sqlite", 0, b"", b""
    db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    try:
        db.execute("PRAGMA journal_mode=OFF")
        db.execute("PRAGMA synchronous=OFF")
        db.execute("PRAGMA cache_size=-65536")  # 64 MiB
        db.execute("CREATE TABLE seen (hash BLOB PRIMARY KEY) WITHOUT ROWID")
        db.execute("BEGIN")
        for text in texts:
            if options.max_bytes is not None and done >= options.max_bytes:
                return
            data, further = text.encode(), isinstance(text, Continued)
            # A further piece is a duplicate where all of its document up to its end is one.
            seen = digest((seen if further else b"") + data, options.seed)
            if not further:  # a document is held out as a whole, but for one where there are few
                document = seen
            if db.execute("INSERT OR IGNORE INTO seen VALUES (?)", (seen,)).rowcount == 0:
                dropped["duplicate"] += 1
                continue
            if options.max_bytes is not None and done + len(data) > options.max_bytes:
                if text := next(cut_bytes(data, options.max_bytes - done)):
                    yield document, len(text.encode()), text
                return
            done += len(data)
            yield document, len(data), text
    finally:
        db.close()
        path.unlink(missing_ok=True)


def _tokenise(
    documents: Iterator[tuple[Split, int, str]],
    tokenizer: Any,
    bos: int | None,
    eos: int,
    dtype: str,
    given_back: GivenBack,
    total: int | None,
) -> Iterator[tuple[Split, int, np.ndarray]]:
    """Tokens of each document, after BOS if there is one and before EOS, in order.

    The Rust tokenizer uses all cores and frees the GIL.
    """
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True  # where a text spells one, it is text: EOS is only where a document ends
    whole = not can_be_cut(backend)
    read = 0  # bytes
    begin, end = np.array([] if bos is None else [bos], dtype), np.array([eos], dtype)

    def encode(batch: list[tuple[Split, int, str]]) -> list[tuple[Split, int, np.ndarray]]:
        nonlocal read
        pieces = [[text] if whole else list(cut_at_lines(text, PIECE_CHARS)) for _, _, text in batch]
        texts = [p for ps in pieces for p in ps]
        encoded = [e.ids for e in backend.encode_batch_fast(texts, add_special_tokens=False)]
        some = slice(None, None, 1 + sum(map(len, texts)) // PIECE_CHARS)
        given_back.add(texts[some], encoded[some])
        read += sum(size for _, size, _ in batch)
        if (done := read / total if total else 0) < 1:
            given_back.require(f"the first {done:.0%} of the text", done)
        flat = iter(encoded)
        result: list[tuple[Split, int, np.ndarray]] = []
        for (split, size, _), ps in zip(batch, pieces, strict=True):
            parts = [np.array(next(flat), dtype) for _ in ps]
            result.append((split, size, np.concatenate([begin, *parts, end])))
        return result

    with ThreadPoolExecutor(1) as pool:
        running: Future[list[tuple[Split, int, np.ndarray]]] | None = None
        for batch in _batches(documents):
            following = pool.submit(encode, batch)
            if running is not None:
                yield from running.result()
            running = following
        if running is not None:
            yield from running.result()


def _batches(documents: Iterator[tuple[Split, int, str]]) -> Iterator[list[tuple[Split, int, str]]]:
    batch: list[tuple[Split, int, str]] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += document[1]
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
