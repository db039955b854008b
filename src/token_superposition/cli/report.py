"""``tst report``"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from token_superposition.cli.arguments import parse


@dataclass(frozen=True)
class ReportCommand:
    """Write report.html of a comparison or a sweep again, from the files beside it, and print its table.

    Example: tst report comparison
    """

    directory: tyro.conf.Positional[Path]
    """Directory written by tst compare, tst sweep or tst demo."""


def run(args: Sequence[str]) -> None:
    options = parse(ReportCommand, "report", args)
    from rich.console import Console

    from token_superposition.report import print_table, write_report

    console = Console()
    print_table(options.directory, console)
    path = write_report(options.directory)
    console.print(f"report: {path}", markup=False, soft_wrap=True)
