"""Whether a model can read a text: its ids and its length."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from token_superposition.data.plan import PlannedDataset
from token_superposition.data.store import TokenStore
from token_superposition.embedding import find_embedding
from token_superposition.errors import TokenSuperpositionError

MARGIN = 8  # of a table some positions are for no token, as RoBERTa's first two


def positions(model: Any) -> int | None:
    """That the model's configuration names, if it does."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


@torch.no_grad()
def reads(model: Any, length: int) -> bool:
    """Whether the model can read so many tokens: positions of a table end, rotary ones and none do not.

    Where trying it fails for another reason, it is up to the positions that the configuration names.
    """
    named, settings = positions(model), model.config.get_text_config()
    if named is None or getattr(settings, "rope_parameters", None) or model.device.type == "meta":
        return True
    if length <= named - MARGIN:
        return True
    if (error := _error(model, length)) is None:
        return True
    if isinstance(error, torch.AcceleratorError):  # after which nothing more can be tried
        return False
    if isinstance(error, torch.OutOfMemoryError) or _error(model, 1) is not None:
        return length <= named  # a class of one's own takes other arguments, or weights in bfloat16 need autocast
    return False


def _error(model: Any, length: int) -> Exception | None:
    devices = [] if model.device.type == "cpu" else [model.device]
    try:
        with torch.random.fork_rng(devices, device_type=model.device.type if devices else "cuda"):
            model(input_ids=torch.zeros(1, length, dtype=torch.long, device=model.device), use_cache=False)
            if devices:  # where the error comes later
                torch.accelerator.synchronize(model.device)
    except Exception as e:
        return e
    return None


def has_positions(model: Any, length: int) -> str:
    """What is told of a model that does not read so many tokens, and what to do."""
    named = positions(model) or 0
    some = "at most that" if length > named else "fewer, for some of them are for no token"
    return f"has {named} positions, give {some}"


def check_fit(model: Any, plan: PlannedDataset) -> None:
    """Raise ``TokenSuperpositionError`` for a plan with ids or a length beyond the model's.

    A store knows its ids; of other text the first ones are looked at.
    """
    tokens = plan.tokens
    known = isinstance(tokens, TokenStore)
    largest = tokens.meta.vocab_size - 1 if known else int(np.asarray(tokens[: plan.sequence_length]).max())
    rows: int = find_embedding(model).weight.shape[0]  # pyright: ignore
    if largest >= rows:
        raise TokenSuperpositionError(
            f"the plan has the token id {largest}, the model {rows} embeddings; give tokens of the model's tokenizer"
        )
    length = plan.sequence_length
    if hasattr(getattr(model, "config", None), "get_text_config") and not reads(model, length):
        raise TokenSuperpositionError(
            f"the plan's sequence_length is {length}; the model {has_positions(model, length)}"
        )
