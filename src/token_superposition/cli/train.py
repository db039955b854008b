"""``tst train``"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from token_superposition.cli.arguments import parse, split_config
from token_superposition.cli.ignored import refuse_bag_size, refuse_ignored
from token_superposition.experiment.config import Config


@dataclass(frozen=True)
class TrainCommand:
    """Train one model: tst train CONFIG.toml|PRESET [OPTIONS]

    Presets: 270m, 600m, 3b, 10b-a1b (the paper's), demo, proof-cpu. Options override the file. The directory --out
    holds the configuration, metrics.jsonl, checkpoints/, and, when it is done, model/ (an ordinary transformers model)
    and run.json. Calling it again continues from the newest checkpoint that is whole.
    Ctrl-C, SIGTERM, SIGUSR1 and a closed terminal finish the step, save a checkpoint and exit with status 130 or 143:
    start it again. Exit status 1: a process died or hung, start it again; 2: one line says what to change first.

    Example: one process; several, with DDP; whatever a file of accelerate says, FSDP2 too
      tst train config.toml --superposition.bag-size 8 --train.seed 1 --out runs/s8
      torchrun --nproc-per-node 2 -m token_superposition train CONFIG.toml
      accelerate launch --config_file FILE -m token_superposition train CONFIG.toml
    """

    config: Annotated[Config, tyro.conf.arg(name="")] = field(default_factory=Config)
    out: Path = Path("run")
    """Directory of the run."""
    resume: str = "auto"
    """auto: from the newest whole checkpoint in --out, if any; never: refuse an --out with some; or a checkpoint."""
    branch_from: Path | None = None
    """Checkpoint of another run to start from if --out has none; its metrics up to there are taken over."""


def run(args: Sequence[str]) -> None:
    config, rest = split_config(args)
    options = parse(TrainCommand, "train", rest, TrainCommand(config))
    which = "which tst train, of one run, does not read; give it to tst {}, or leave it out"
    refuse_ignored(config, options.config, "compare", which.format("compare"))
    refuse_ignored(config, options.config, "sweep", which.format("sweep"))
    refuse_bag_size(config, options.config)
    options.config.check()
    from rich.console import Console

    from token_superposition.cli.loading import loading
    from token_superposition.cli.quiet import quiet
    from token_superposition.experiment.progress import RunProgress

    with loading():  # a comparison waits for it dozens of times
        from token_superposition.experiment.run import train

        quiet()
    console = Console()
    with RunProgress(console) as progress:
        steps = options.config.train.steps
        result = train(
            options.config,
            options.out,
            resume=options.resume if options.resume in ("auto", "never") else Path(options.resume),
            branch_from=options.branch_from,
            report=lambda lines: progress.update(options.out.name, steps, lines),
        )
    console.print(
        f"validation loss {result.val_loss:.4f} nats/token, {result.val_bpb:.4f} bits/byte\nmodel: {options.out}/model",
        markup=False,
        soft_wrap=True,
    )
