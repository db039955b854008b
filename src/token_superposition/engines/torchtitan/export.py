"""Write a model of torchtitan as a directory that transformers loads."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_saver import save
from torchtitan.tools.logging import logger
from transformers import PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from token_superposition.data.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from token_superposition.engines.torchtitan.trainer import TSTTrainer


@torch.no_grad()
def export_model(trainer: TSTTrainer, path: Path) -> None:
    """Weights (safetensors with the names of transformers), config.json and tokenizer, aside and then renamed.

    To be called on all processes. The names and shapes are the work of torchtitan's own adapter for the model. A model
    of one's own has no config.json, and without an adapter it is not written.
    """
    partial = path.with_name(f".{path.name}.partial")
    spec = trainer.config.model_spec
    assert spec is not None
    if spec.state_dict_adapter is None:
        logger.warning(f"{path} is not written: config.model_spec has no state_dict_adapter; its checkpoints remain")
        return
    adapter = spec.state_dict_adapter(trainer.model_config, None)
    state: dict[str, Any] = {}
    for part in trainer.model_parts:
        state |= part.state_dict()
    exported = adapter.to_hf(state)
    kept = any("expert_bias" in name or "correction_bias" in name for name in exported)
    if any("expert_bias" in name for name in state) and not kept:
        logger.warning(
            f"{path} lacks the bias with which the experts were balanced (load_balance_coeff), for which "
            f"{type(adapter).__name__} has no name: the exported model routes differently"
        )
    first = dist.get_rank() == 0
    if first:
        shutil.rmtree(partial, ignore_errors=True)
    dist.barrier()
    writer = HuggingFaceStorageWriter(str(partial), save_distributed=True, enable_consolidation=True)
    save(exported, storage_writer=writer)
    if first:
        shutil.rmtree(partial / "sharded", ignore_errors=True)
        if trainer.settings is None:
            logger.warning(f"{path} has no config.json: the model is that of config.model_spec; add the fitting one")
        else:
            as_saved(trainer.settings, exported).save_pretrained(partial)
        load_tokenizer(str(trainer.store / "tokenizer")).save_pretrained(partial)
        shutil.rmtree(path, ignore_errors=True)
        partial.rename(path)
    dist.barrier()


def as_saved(settings: PretrainedConfig, weights: dict[str, Any]) -> PretrainedConfig:
    """With the type that the weights have, in place of that of the model they were at first, and the model's class."""
    settings = copy.deepcopy(settings)
    (settings.dtype,) = {w.dtype for name, w in weights.items() if name.endswith("embed_tokens.weight")}
    settings.architectures = [cast(Any, MODEL_FOR_CAUSAL_LM_MAPPING)[type(settings)].__name__]
    return settings
