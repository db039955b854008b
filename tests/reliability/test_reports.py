"""Many ``tst report`` on one directory at once: whoever opens the page finds it whole, at every moment."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from benchmarks.soak import reports_at_once


def test_concurrent_reports_leave_one_whole_page(
    two_seeds: tuple[Path, Path, str], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Four; a hundred with --long."""
    out = shutil.copytree(two_seeds[1], tmp_path / "out")
    before = (out / "report.html").read_bytes()
    looks, pages = reports_at_once(out, 100 if request.config.getoption("--long") else 4)
    assert looks > 10 and pages == {before}
    assert not list(out.glob(".report*"))
