"""``tst report``"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from token_superposition.cli.arguments import parse
from token_superposition.errors import TokenSuperpositionError


@dataclass(frozen=True)
class ReportCommand:
    """Write report.html of a comparison or a sweep again, from the files beside it, and print its table.

    Example: tst report comparison
    """

    directory: tyro.conf.Positional[Path]
    """Directory written by tst compare, tst sweep or tst demo."""


def run(args: Sequence[str]) -> None:
    options = parse(ReportCommand, "report", args)
    from jinja2 import UndefinedError
    from rich.console import Console

    from token_superposition.report import print_table, write_report
    from token_superposition.report.page import is_sweep

    console = Console()
    try:
        path = write_report(options.directory)
        print_table(options.directory, console)
    except TokenSuperpositionError:
        raise
    except (AttributeError, LookupError, StopIteration, TypeError, UndefinedError, ValueError) as e:
        file, command = ("sweep.json", "sweep") if is_sweep(options.directory) else ("summary.json", "compare")
        raise TokenSuperpositionError(
            f"{options.directory / file} has not the form that tst {command} writes ({e!r}); give tst {command} again, "
            "which keeps the finished runs"
        ) from e
    console.print(f"report: {path}", markup=False, soft_wrap=True)
