"""``tst sweep``"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from token_superposition.cli.arguments import parse, split_config
from token_superposition.cli.ignored import refuse_ignored, refuse_seed, refuse_swept
from token_superposition.experiment.config import Config


@dataclass(frozen=True)
class SweepCommand:
    """Try bag sizes, ratios and more, every value with every other: tst sweep CONFIG.toml|PRESET [OPTIONS]

    Each cell is a run of the configuration with those values changed, beside a baseline for each learning rate, with
    paired seeds and equal FLOPs. --out gets sweep.csv (every cell's settings and result), sweep.json (the best setting,
    judged by seeds that did not choose it), report.html (heat map, U-curves, the paper's curves) and runs/NAME/.
    Calling it again goes on with what is not done; more values and seeds may be added.

    Example: a full grid of 3 x 3 cells and a baseline, with four seeds
      tst sweep config.toml --sweep.bag-sizes 2 4 8 --sweep.ratios 0.2 0.3 0.4 --compare.seeds 0 1 2 3 --out sweep
      --dry-run                                         what it would cost
      --sweep.keep 0.5                                  half of the cells go on from each seed to the next
      --sweep.learning-rates 1e-3 2e-3 4e-3             tune the baseline, too
      --sweep.schedules switch halving                  take the bag size down in steps
      --sweep.weightings uniform power                  weigh the places in a bag
    """

    config: Annotated[Config, tyro.conf.arg(name="")] = field(default_factory=Config)
    out: Path = Path("sweep")
    """Directory of the sweep."""
    dry_run: bool = False
    """Print the rounds, their runs, tokens, FLOPs and estimated time on this machine; write nothing."""


def run(args: Sequence[str]) -> None:
    import shlex

    config, rest = split_config(args)
    options = parse(SweepCommand, "sweep", rest, SweepCommand(config))
    which = "which tst sweep does not read; give it to tst compare, or leave it out"
    refuse_ignored(config, options.config, "compare", which, ["baseline_lengths", "variants"])
    refuse_seed(config, options.config)
    refuse_swept(config, options.config)
    options.config.check()
    from rich.console import Console

    from token_superposition.cli.quiet import quiet
    from token_superposition.experiment.sweep import dry_run, sweep

    quiet()
    console = Console()
    if options.dry_run:
        from token_superposition.report.dry_run import print_rounds

        with console.status("measuring the speed of this machine"):
            dry = dry_run(options.config, options.out)
        print_rounds(dry, console)
        return
    from token_superposition.report import print_table, write_report

    sweep(options.config, options.out, console, shlex.join(["tst", "sweep", *args]))
    path = write_report(options.out)
    print_table(options.out, console)
    console.print(f"report: {path}", markup=False, soft_wrap=True)
