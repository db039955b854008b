"""``tst plan``"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated

import tyro

from token_superposition.cli.arguments import parse, split_config
from token_superposition.cli.ignored import refuse_bag_size, refuse_ignored
from token_superposition.errors import TokenSuperpositionError
from token_superposition.experiment.budget import GpuType
from token_superposition.experiment.config import Config


@dataclass(frozen=True)
class PlanCommand:
    """What a run costs before it is started: tst plan PRESET|CONFIG.toml [OPTIONS]

    Steps, tokens, FLOPs, GPU-hours, memory per GPU and storage, by formula; what the paper's tables favour for this
    size and length; warnings where GPUs, memory or data do not suffice. Nothing is trained. Every key of the
    configuration is an option here, too.

    Example: tst plan 600m --gpus 64 --gpu-type H100 --tokens-available 80e9
    """

    config: Annotated[Config, tyro.conf.arg(name="")] = field(default_factory=Config)
    gpus: int = 8
    """Number of GPUs; weights, gradients and optimizer are sharded over all of them."""
    gpu_type: GpuType = "H100"
    """Which GPU: peak of dense bfloat16 and memory by its data sheet."""
    mfu: float = 0.4
    """Share of the peak that the run is taken to reach (model FLOPs utilisation)."""
    tokens_available: float | None = None
    """Raw tokens that there are, such as 80e9; by default those of the data, if it is prepared."""
    vocab_size: int | None = None
    """Vocabulary; by default that of the data, if it is prepared, else Llama 3's 128,256."""
    json: bool = False
    """Print JSON in place of tables."""


def run(args: Sequence[str]) -> None:
    config, rest = split_config(args)
    options = parse(PlanCommand, "plan", rest, PlanCommand(config))
    which = "which tst plan, of one run, does not read; tst {0} --dry-run says what all its runs cost"
    for section in ("compare", "sweep"):
        refuse_ignored(config, options.config, section, which.format(section))
    refuse_bag_size(config, options.config)
    available = options.tokens_available
    if available is not None and not 1 <= available < float("inf"):
        raise TokenSuperpositionError(f"tokens-available is {available}; give a number of tokens, such as 80e9")
    from token_superposition.cli.quiet import quiet
    from token_superposition.experiment.planning import plan

    quiet()
    result = plan(
        options.config,
        gpus=options.gpus,
        gpu_type=options.gpu_type,
        mfu=options.mfu,
        tokens_available=None if available is None else int(available),
        vocab_size=options.vocab_size,
    )
    if options.json:
        import json
        from dataclasses import asdict

        print(json.dumps(asdict(result), indent=2))
        return
    from rich.console import Console

    from token_superposition.report.plan import print_plan

    print_plan(result, Console())
