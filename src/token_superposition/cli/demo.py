"""``tst demo``"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from token_superposition.cli.arguments import parse


@dataclass(frozen=True)
class DemoCommand:
    """Train a small model with and without TST on the text of this Python installation, and show the difference.

    No configuration, no network. Reads source code and documentation of the standard library and the installed
    packages; nothing of it leaves this machine. Writes the same files as tst compare. Calling it again goes on with
    what is not done.

    Example: tst demo --minutes 20 --out my-demo
    """

    out: Path = Path("tst-demo")
    """Directory to write."""
    minutes: float | None = None
    """Time for the two runs together; preparing the data comes on top. More minutes, more steps. By default the steps
    with which TST was seen to win, about ten minutes on two cores."""
    seed: int = 0
    """Decides initial weights and the order of the data, in both runs."""


def run(args: Sequence[str]) -> None:
    options = parse(DemoCommand, "demo", args)
    from rich.console import Console

    from token_superposition.cli.quiet import quiet
    from token_superposition.data.progress import bars
    from token_superposition.experiment.demo import demo
    from token_superposition.report import print_table, write_report

    quiet()
    console = Console()
    note = demo(options.out, options.minutes, console, lambda: bars(console), options.seed)
    path = write_report(options.out)
    print_table(options.out, console)
    if note is not None:
        console.print(f"[yellow]note[/yellow]: {note}", soft_wrap=True, highlight=False)
    console.print(f"\nreport: {path}", markup=False)
