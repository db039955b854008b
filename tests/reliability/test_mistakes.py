"""Each of the likely mistakes has one line that docs/mistakes.md shows, word for word."""

from __future__ import annotations

from pathlib import Path

from tests.reliability.mistakes import LIBRARY, MISTAKES, PAGE, answers, library_answers, page


def test_every_mistake_has_one_line_that_the_page_shows(prepared: Path) -> None:
    found = list(answers(prepared))
    assert len(found) == sum(map(len, MISTAKES.values())) >= 60
    for _, mistake, error, status in found:
        where = f"tst {mistake.typed} {mistake.written}\n{error}"
        assert status == 2 and error.startswith("tst: error: ") and error.count("\n") == 1, where
        assert "Traceback" not in error and "; " in error and len(error) < 500, where
    library = list(library_answers())
    assert len(library) == len(LIBRARY)
    for code, said in library:
        assert "\n" not in said and "; " in said and len(said) < 300, f"{code}: {said}"
    assert page(found, library) == PAGE.read_text(), "python -m tests.reliability.mistakes > docs/mistakes.md"
