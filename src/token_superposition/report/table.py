"""The table of a comparison on the terminal."""

from __future__ import annotations

from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from token_superposition.report.contents import HEADERS, INTERVAL_HEADERS, interval_rows, read, rows, verdicts


def print_table(directory: Path, console: Console) -> None:
    contents = read(directory)
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    shown = [i for i, h in enumerate(HEADERS) if h != "seed" or len({r["seed"] for r in contents.runs}) > 1]
    for header in (HEADERS[i].removesuffix(" tokens").removeprefix("val. ") for i in shown):
        table.add_column(header, justify="left" if header == "run" else "right", no_wrap=True)
    for row in rows(contents):
        table.add_row(*(row[i] for i in shown))
    console.print(table)
    console.print(_intervals(interval_rows(contents)))
    for accounting, sentence in verdicts(contents):
        console.print(f"[bold]{accounting}[/bold]: {sentence}", highlight=False, soft_wrap=True)
    for sample in contents.summary.get("samples", []):
        console.print(f"\n[bold]{sample['name']}[/bold], prompt and continuation:", highlight=False)
        console.print(sample["prompt"] + sample["text"], highlight=False, markup=False)


def _intervals(rows: list[tuple[str, ...]]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for header in INTERVAL_HEADERS:
        table.add_column(header, justify="left" if header == "variant" else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table
