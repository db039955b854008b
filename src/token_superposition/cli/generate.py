"""``tst generate``"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import tyro

from token_superposition.cli.arguments import parse
from token_superposition.errors import TokenSuperpositionError, require_seed


@dataclass(frozen=True)
class GenerateCommand:
    """Continue a prompt with a trained model: a run's model/ directory or any causal LM of transformers.

    Example: tst generate run/model "def main(" --max-new-tokens 80 --temperature 0.7
    """

    model: tyro.conf.Positional[str]
    """Directory of the model."""
    prompt: tyro.conf.Positional[str]
    """Text to continue; - reads it from standard input."""
    max_new_tokens: int = 64
    """Tokens to add."""
    temperature: float = 0.8
    """Randomness; 0 always takes the likeliest token."""
    top_p: float = 0.95
    """Draw from the likeliest tokens that hold this share of the probability."""
    seed: int = 0
    """The same seed gives the same text."""


def run(args: Sequence[str]) -> None:
    options = parse(GenerateCommand, "generate", args)
    if options.max_new_tokens < 1 or not 0 <= options.temperature < math.inf or not 0 < options.top_p <= 1:
        raise TokenSuperpositionError(
            f"max-new-tokens is {options.max_new_tokens}, temperature {options.temperature}, top-p {options.top_p}; "
            "give at least 1, at least 0, and a share in (0, 1]"
        )
    require_seed("seed", options.seed)
    prompt = options.prompt
    if prompt == "-":
        prompt = sys.stdin.buffer.read().decode(errors="surrogateescape").removesuffix("\n")
    try:
        prompt.encode()
    except UnicodeEncodeError as e:
        raise TokenSuperpositionError(
            f"the prompt is not UTF-8: character {e.start + 1} is {prompt[e.start]!r}; give it in UTF-8"
        ) from None
    from token_superposition.cli.quiet import quiet
    from token_superposition.experiment.generate import generate, load_model

    quiet()
    model, tokenizer = load_model(options.model)
    sampling = (options.temperature, options.top_p, options.seed)
    print(prompt + generate(model, tokenizer, prompt, options.max_new_tokens, *sampling))
