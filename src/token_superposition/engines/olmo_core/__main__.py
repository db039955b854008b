"""``torchrun --nproc-per-node 2 -m token_superposition.engines.olmo_core CONFIG.toml --out run``"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from token_superposition.cli.arguments import split_config
from token_superposition.engines.olmo_core import require_engine
from token_superposition.errors import TokenSuperpositionError
from token_superposition.experiment.config import Config


@dataclass(frozen=True)
class OlmoCommand:
    """Train one model on OLMo-core: torchrun --nproc-per-node 8 -m token_superposition.engines.olmo_core CONFIG.toml

    Options override the file. The directory --out holds the configuration, metrics.jsonl, checkpoints/ (OLMo-core's
    own, with --train.save-every), and, when it is done, model/ (an ordinary transformers model) and run.json. Calling
    it again continues from the newest checkpoint. FSDP2 over all processes, or tensor parallelism inside groups of
    --tensor-parallel processes and FSDP2 over the groups. Architectures: llama and qwen3.
    """

    config: Annotated[Config, tyro.conf.arg(name="")] = field(default_factory=Config)
    out: Path = Path("run")
    """Directory of the run."""
    tensor_parallel: int = 1
    """Processes that share one model, which each hold a part of every layer."""


def main(args: Sequence[str]) -> int:
    """Exit status: 0 done, 2 unusable input or terminated (one line says what to do)."""
    first = os.environ.get("RANK", "0") == "0"  # the others have the same to say
    try:
        require_engine()
        config, rest = split_config(args)
        options = tyro.cli(
            OlmoCommand,
            prog="python -m token_superposition.engines.olmo_core",
            args=rest,
            default=OlmoCommand(config),
            config=(tyro.conf.AvoidSubcommands,),
            console_outputs=first,
        )
        from token_superposition.engines.olmo_core.train import train

        result = train(options.config, options.out, tensor_parallel=options.tensor_parallel)
    except TokenSuperpositionError as e:
        if first:
            print(f"tst: error: {e}", file=sys.stderr)
        return 2
    if first:
        print(f"validation loss {result.val_loss:.4f} nats/token, {result.val_bpb:.4f} bits/byte")
        print(f"model: {options.out}/model")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
