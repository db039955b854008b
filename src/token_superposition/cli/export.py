"""``tst export``"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from token_superposition.cli.arguments import parse


@dataclass(frozen=True)
class ExportCommand:
    """Write the model of a run as a directory that stock transformers loads, with a model card.

    OUT gets config.json, generation_config.json, model.safetensors, the tokenizer and README.md: nothing of this
    package is in it or needed to load it. It is loaded again and its logits are compared before it gets its name.

    Example: a finished run, half the size, a checkpoint, a run of a comparison
      tst export run my-model                           the finished model, or the newest checkpoint
      tst export run my-model --dtype bfloat16          half the size
      tst export run my-model --checkpoint 2000         the run as it was after 2,000 steps
      tst export comparison/runs/tst my-model           a run of tst compare
    """

    run: tyro.conf.Positional[Path]
    """Directory of a run: the --out of tst train."""
    out: tyro.conf.Positional[Path]
    """Directory to write; it appears when it is whole."""
    checkpoint: int | None = None
    """Step of the checkpoint to export."""
    dtype: Literal["bfloat16", "float32"] = "float32"
    """Of the weights that are written. Training keeps them in float32."""


def run(args: Sequence[str]) -> None:
    options = parse(ExportCommand, "export", args)
    from token_superposition.cli.quiet import quiet
    from token_superposition.experiment.export import export

    quiet()
    step = export(options.run, options.out, checkpoint=options.checkpoint, dtype=options.dtype)
    print(f"{options.out}: the model after step {step} in {options.dtype}, logits compared")
