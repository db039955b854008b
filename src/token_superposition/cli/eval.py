"""``tst eval``"""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

from token_superposition.cli.arguments import parse
from token_superposition.errors import TokenSuperpositionError


@dataclass(frozen=True)
class EvalCommand:
    """Next-token loss, perplexity and bits per byte of a causal LM of transformers, and benchmark tasks.

    MODEL is a run, its model/, an exported directory or any other one. On held-out tokens of a run's data the figure is
    the one that the run ended with: sequence length and number of tokens are the run's. Text files are read whole, in
    windows that overlap by half, so that every token has context; bits per byte compare models with different
    tokenizers. Tasks are run by lm-evaluation-harness, 0-shot (pip install 'token-superposition[eval]').

    Example: held-out tokens, any text, benchmarks
      tst eval run/model --data data                    the held-out part of tst prepare's data
      tst eval run/model --text notes.txt other.md      any UTF-8 text
      tst eval run/model --tasks paper                  the paper's eight: ARC, BoolQ, HellaSwag, MMLU, ...
      tst eval run/model --tasks arc_easy my-task.yaml  named ones, or a task file with local data
      tst eval run/model --data data --json             for other programs
    """

    model: tyro.conf.Positional[str]
    """Directory of the run or of the model."""
    data: Path | None = None
    """Directory written by tst prepare, with the model's tokenizer."""
    text: tuple[Path, ...] = ()
    """Text files."""
    tasks: tuple[str, ...] = ()
    """Tasks of lm-evaluation-harness, also joined by commas; YAML files of tasks; paper for the paper's eight."""
    sequence_length: int | None = None
    """Tokens of a sequence; by default those of the run, else all positions of the model, up to 4096."""
    stride: int | None = None
    """Tokens of a text (--text) that each window predicts; by default half of the sequence."""
    max_tokens: int | Literal["auto"] | None = "auto"
    """Tokens to read; None for all. auto: all of a text; of data as many as the run's last validation, or 524288."""
    limit: int | None = None
    """Documents of each task; all by default."""
    batch_size: int = 8
    """Sequences that are computed at once."""
    json: bool = False
    """Print JSON in place of a table."""
    out: Path | None = None
    """File to write the same JSON to."""


def run(args: Sequence[str]) -> None:
    options = parse(EvalCommand, "eval", args)
    if options.data is None and not options.text and not options.tasks:
        raise TokenSuperpositionError("there is nothing to evaluate on; give --data, --text or --tasks")
    if options.stride is not None and not options.text:
        raise TokenSuperpositionError(f"stride is {options.stride}, which only --text has; give it or leave this out")
    if options.limit is not None and not options.tasks:
        raise TokenSuperpositionError(f"limit is {options.limit}, which only --tasks has; give it or leave this out")
    for name, value, default in (
        ("sequence-length", options.sequence_length, None),
        ("max-tokens", options.max_tokens, "auto"),
    ):
        if value != default and options.data is None and not options.text:
            raise TokenSuperpositionError(
                f"{name} is {value}, which only --data and --text have; give one of them or leave this out"
            )
    if isinstance(most := options.max_tokens, int) and most < 1:
        raise TokenSuperpositionError(f"max-tokens is {most}; give at least 1, or None")
    if (limit := options.limit) is not None and limit < 1:
        raise TokenSuperpositionError(f"limit is {limit}; give at least 1, or None")
    effective = os.access in os.supports_effective_ids
    if (file := options.out) is not None and (
        file.is_dir() or not os.access(file.parent, os.W_OK | os.X_OK, effective_ids=effective)
    ):
        raise TokenSuperpositionError(
            f"--out {file} cannot be written; give a file in a directory that exists and can be written to"
        )
    from token_superposition.cli.quiet import quiet

    quiet()
    if options.tasks:
        importlib.import_module("token_superposition.experiment.tasks")  # refuses before anything is computed
    from token_superposition.experiment.config import DataConfig
    from token_superposition.experiment.evaluate import Loss, evaluate_store, evaluate_text, settings_of
    from token_superposition.experiment.files import write_json
    from token_superposition.experiment.generate import load_model

    model, tokenizer = load_model(options.model)
    trained = settings_of(options.model)
    common: dict[str, Any] = {
        "sequence_length": options.sequence_length,
        "trained_length": trained.get("sequence_length"),
        "batch_size": options.batch_size,
    }
    losses: list[Loss] = []
    if options.data is not None:
        of_data = trained.get("final_eval_tokens", DataConfig.final_eval_tokens) if most == "auto" else most
        losses.append(evaluate_store(model, tokenizer, options.data, max_tokens=of_data, **common))
    if options.text:
        of_text = None if most == "auto" else most
        losses.append(
            evaluate_text(model, tokenizer, options.text, stride=options.stride, max_tokens=of_text, **common)
        )
    scores: dict[str, dict[str, float]] = {}
    if options.tasks:
        from token_superposition.experiment.tasks import evaluate_tasks

        names = [name for given in options.tasks for name in given.split(",")]
        scores = evaluate_tasks(model, tokenizer, names, batch_size=options.batch_size, limit=options.limit)
    result = {"model": options.model, "losses": [asdict(loss) for loss in losses], "tasks": scores}
    if options.json:
        import json

        print(json.dumps(result, indent=2))
    else:
        from rich.console import Console

        from token_superposition.report.evaluation import print_evaluation

        print_evaluation(losses, scores, Console())
    if options.out is not None:
        write_json(options.out, result)
