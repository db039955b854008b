"""Weights to and from transformers: start from a saved model, end with one that stock transformers loads."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from accelerate import init_empty_weights
from olmo_core.distributed.utils import barrier, get_rank
from olmo_core.nn.hf.convert import convert_state_from_hf, convert_state_to_hf
from olmo_core.nn.transformer import Transformer
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel


def load_weights(model: Transformer, source: PreTrainedModel) -> None:
    """Copy the weights of a transformers model into ``model``, which may be sharded: that of a train module.

    A train module initialises the model that it is made of, so load afterwards.
    """
    config: Any = source.config
    state = convert_state_from_hf(config, source.state_dict(), model_type=config.model_type)
    set_model_state_dict(model, state, options=StateDictOptions(full_state_dict=True, strict=True))
    marked: Any = model
    marked._has_loaded_weights = True


def is_loaded(model: Transformer) -> bool:
    """Whether ``load_weights`` has filled it."""
    return getattr(model, "_has_loaded_weights", False)


def export_model(model: Transformer, config: PretrainedConfig, path: str | Path, tokenizer: Any = None) -> None:
    """Write ``model`` as a directory that ``AutoModelForCausalLM.from_pretrained`` loads: aside, then renamed.

    ``config`` is the configuration that ``transformer_config`` made the model from. To be called on every rank.
    """
    path = Path(path)
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if get_rank() == 0:
        with init_empty_weights():
            target: Any = AutoModelForCausalLM.from_config(config)
        weights = convert_state_to_hf(config, state)
        target.load_state_dict({k: v.contiguous() for k, v in weights.items()}, assign=True)
        target.tie_weights()
        partial = path.with_name(f".{path.name}.partial")
        target.save_pretrained(partial)
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        shutil.rmtree(path, ignore_errors=True)
        partial.rename(path)
    barrier()
