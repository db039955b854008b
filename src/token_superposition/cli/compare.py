"""``tst compare``"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from token_superposition.cli.arguments import parse, split_config
from token_superposition.cli.ignored import refuse_bag_size, refuse_ignored, refuse_seed
from token_superposition.experiment.config import Config


@dataclass(frozen=True)
class CompareCommand:
    """Train a baseline and TST at equal compute: tst compare CONFIG.toml|PRESET [OPTIONS]

    Same model, data, learning rate and number of steps, hence equal FLOPs. --out gets summary.json, report.html and
    runs/NAME/ with metrics.jsonl and model/. Calling it again goes on with what is not done.

    Several seeds give 95% intervals, longer baselines the speed-up to equal loss; further ways of superposing stand in
    the file, each as [[compare.variants]] with a name and a superposition of its own.

    Example: five seeds, and longer baselines
      tst compare config.toml --compare.seeds 0 1 2 3 4 --compare.baseline-lengths 1 1.5 2 --out comparison
      --dry-run                                         what it would cost
    """

    config: Annotated[Config, tyro.conf.arg(name="")] = field(default_factory=Config)
    out: Path = Path("comparison")
    """Directory of the comparison."""
    dry_run: bool = False
    """Print the runs, their tokens, FLOPs and estimated time on this machine; write nothing."""


def run(args: Sequence[str]) -> None:
    config, rest = split_config(args)
    options = parse(CompareCommand, "compare", rest, CompareCommand(config))
    which = "which tst compare does not read; give it to tst sweep, or leave it out"
    refuse_ignored(config, options.config, "sweep", which)
    refuse_seed(config, options.config)
    refuse_bag_size(config, options.config)
    options.config.check()
    from rich.console import Console

    from token_superposition.cli.quiet import quiet

    quiet()
    console = Console()
    if options.dry_run:
        from token_superposition.experiment.dry_run import dry_run
        from token_superposition.report.dry_run import print_dry_run

        with console.status("measuring the speed of this machine"):
            dry = dry_run(options.config, options.out)
        print_dry_run(dry, console)
        return
    from token_superposition.experiment.compare import compare
    from token_superposition.report import print_table, write_report

    compare(options.config, options.out, console)
    path = write_report(options.out)
    print_table(options.out, console)
    console.print(f"report: {path}", markup=False, soft_wrap=True)
