"""Each of the likely mistakes has one line that docs/mistakes.md shows, word for word."""

from __future__ import annotations

from pathlib import Path

from tests.reliability.mistakes import MISTAKES, PAGE, answers, page


def test_every_mistake_has_one_line_that_the_page_shows(prepared: Path) -> None:
    found = list(answers(prepared))
    assert len(found) == sum(map(len, MISTAKES.values())) >= 60
    for _, mistake, error, status in found:
        where = f"tst {mistake.typed} {mistake.written}\n{error}"
        assert status == 2 and error.startswith("tst: error: ") and error.count("\n") == 1, where
        assert "Traceback" not in error and "; " in error and len(error) < 500, where
    assert page(found) == PAGE.read_text(), "python -m tests.reliability.mistakes > docs/mistakes.md"
