"""Whether a model can read a text: its ids and its length."""

from __future__ import annotations

from typing import Any

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
    """Whether the model can read so many tokens: positions of a table end, rotary ones and none do not."""
    named, settings = positions(model), model.config.get_text_config()
    if named is None or getattr(settings, "rope_parameters", None) or model.device.type == "meta":
        return True
    if length <= named - MARGIN:
        return True
    devices = [] if model.device.type == "cpu" else [model.device]
    try:
        with torch.random.fork_rng(devices, device_type=model.device.type if devices else "cuda"):
            ids = torch.zeros(1, length, dtype=torch.long, device=model.device)
            model(input_ids=ids, use_cache=False).logits[0, -1, 0].item()  # on a GPU the error comes with the result
    except (IndexError, RuntimeError):
        return False
    return True


def check_fit(model: Any, plan: PlannedDataset) -> None:
    """Raise ``TokenSuperpositionError`` for a plan with ids or a length beyond the model's.

    A store knows its ids; of other text the first ones are looked at.
    """
    tokens = plan.tokens
    known = isinstance(tokens, TokenStore)
    largest = tokens.meta.vocab_size - 1 if known else int(torch.as_tensor(tokens[: plan.sequence_length]).max())
    rows: int = find_embedding(model).weight.shape[0]  # pyright: ignore
    if largest >= rows:
        raise TokenSuperpositionError(
            f"the plan has the token id {largest}, the model {rows} embeddings; give tokens of the model's tokenizer"
        )
    if hasattr(getattr(model, "config", None), "get_text_config") and not reads(model, plan.sequence_length):
        raise TokenSuperpositionError(
            f"the plan's sequence_length is {plan.sequence_length}; the model has {positions(model)} positions, give "
            "at most that"
        )
