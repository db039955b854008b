"""Few documents, of which the hashes choose none: every text that can be split has a part that is held out."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.test_prepare import OPTIONS, documents_of, stores_of
from token_superposition import TokenSuperpositionError
from token_superposition.cli import main
from token_superposition.data.prepare import PrepareOptions, prepare


@pytest.mark.parametrize(
    ("sizes", "share", "least", "most"),
    [
        ([2_000], 0.01, 4_096, 8_192),  # bytes that are held out
        ([9_000], 0.3, 50_000, 58_000),
        ([9_000], 0.9, 149_000, 160_000),  # from the second of several pieces that it is read in
        ([3, 9_000, 4_000], 0.01, 2_300, 6_500),
        ([1, 1, 1, 1, 1], 0.01, 16, 16),
    ],
    ids=str,
)
def test_few_documents_have_a_held_out_part_of_their_own(
    sizes: list[int], share: float, least: int, most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole lines, and none of them twice."""
    monkeypatch.setattr("token_superposition.data.sources.MAX_TEXT_BYTES", 10_000)
    (tmp_path / "text").mkdir()
    for n, size in enumerate(sizes):
        (tmp_path / f"text/{n}.txt").write_text("".join(f"line {i} of {n}: ü\n" for i in range(size)))
    stores: list[list[str]] = []
    for name in ("data", "again"):
        options = PrepareOptions(vocab_size=300, validation_share=share)
        meta = prepare([str(tmp_path / "text")], tmp_path / name, options)
        stores.append(["".join(documents_of(s)) for s in stores_of(tmp_path / name)])
        assert least <= meta.validation.bytes <= most
    lines = [f"line {i} of {n}: ü" for n, size in enumerate(sizes) for i in range(size)]
    assert sorted("".join(stores[0]).splitlines()) == sorted(lines) and stores[0] == stores[1]


@pytest.mark.parametrize(("share", "told"), [(0.01, "held out: 0.333 of the text (asked: 0.01;"), (0.3, None)])
def test_more_text_than_was_asked_for_is_told(
    share: float, told: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for n in range(3):
        (tmp_path / f"{n}.txt").write_text(f"line of {n}\n" * 900)
    arguments = ["--validation-share", str(share), "--vocab-size", "300", "--out", str(tmp_path / "data")]
    assert main(["prepare", str(tmp_path / "*.txt"), *arguments]) == 0
    printed = capsys.readouterr().out
    assert told in printed if told else "held out" not in printed


def test_a_document_too_short_to_be_split_is_refused_before_any_work() -> None:
    read: list[int] = []
    with pytest.raises(TokenSuperpositionError, match=r"single document of 12 bytes cannot be split .*; give at least"):
        prepare((), "data", OPTIONS, documents=lambda _: iter(read.append(1) or ["one document"]))
    assert read == [1] and not Path("data").exists()
