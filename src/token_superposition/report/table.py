"""The table of a comparison or a sweep on the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from token_superposition.report.cautions import ARM_HEADERS, arms, cautions
from token_superposition.report.contents import HEADERS, interval_table, read, rows
from token_superposition.report.page import is_sweep
from token_superposition.report.verdicts import bottom_line, verdicts

TOP = 20  # settings of a sweep; the report has all


def print_table(directory: Path, console: Console) -> None:
    """Raises ``TokenSuperpositionError`` if ``directory`` holds no finished comparison or sweep."""
    if is_sweep(directory):
        _print_sweep(directory, console)
    else:
        _print_comparison(directory, console)


def _print_comparison(directory: Path, console: Console) -> None:
    contents = read(directory)
    shown = [i for i, h in enumerate(HEADERS) if h != "seed" or len({r.seed for r in contents.runs}) > 1]
    names = [HEADERS[i].removesuffix(" tokens").removeprefix("val. ") for i in shown]
    console.print(_table(names, [[row[i] for i in shown] for row in rows(contents)], "run"))
    if means := arms(contents.runs):
        console.print(_table(ARM_HEADERS, means, "run"))
    headers, *variants = interval_table(contents)
    console.print(_table(headers, variants, "variant"))
    _sentences([*verdicts(contents), *cautions(contents), *bottom_line(contents)], console)
    for sample in contents.summary["samples"]:
        console.print(f"\n[bold]{escape(sample['name'])}[/bold], prompt and continuation:", highlight=False)
        console.print(sample["prompt"] + sample["text"], highlight=False, markup=False)


def _print_sweep(directory: Path, console: Console) -> None:
    from token_superposition.report.sweep import headers, read_sweep, sentences, sweep_rows

    contents = read_sweep(directory)
    rows = sweep_rows(contents)
    shown = [row for i, row in enumerate(rows) if i < TOP or row[0]]
    names = [h.removesuffix(" tokens") for h in headers(contents)]
    console.print(_table(names, shown, names[0]))
    if len(shown) < len(rows):
        console.print(f"and {len(rows) - len(shown)} more settings in the report")
    _sentences(sentences(contents), console)


def _table(headers: Sequence[str], rows: Sequence[Sequence[str]], left: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for header in headers:
        table.add_column(header, justify="left" if header == left else "right", overflow="fold")
    for row in rows:
        table.add_row(*map(escape, row))
    return table


def _sentences(sentences: Sequence[tuple[str, str]], console: Console) -> None:
    for label, sentence in sentences:
        console.print(f"[bold]{escape(label)}[/bold]: {escape(sentence)}", highlight=False, soft_wrap=True)
