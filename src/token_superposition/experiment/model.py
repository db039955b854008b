"""The model of a configuration, built by transformers."""

from __future__ import annotations

import difflib
import re
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from textwrap import shorten
from typing import Any, Literal, cast

import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from token_superposition.data.boundaries import BoundaryKind, find_boundaries
from token_superposition.data.store import Meta
from token_superposition.data.tokenizer import load_tokenizer
from token_superposition.engines.transformers.fit import has_positions, reads
from token_superposition.errors import TokenSuperpositionError, first_line
from token_superposition.experiment.config import Config, ModelConfig
from token_superposition.experiment.launch import Launch

_MASK = re.compile(r"\.attn(\.attention)?\.((masked_)?bias|causal_mask)$")  # in old files of GPT-Neo, GPT-J, CodeGen


def build_model(config: Config, meta: Meta) -> PreTrainedModel:
    """The model of the configuration, with the vocabulary of the data; float32 weights.

    Raises ``TokenSuperpositionError`` for one that cannot be built, or cannot be trained on the data.
    """
    from token_superposition.engines.transformers.head import check_causal  # beside it the Trainer is imported

    with _building(config.model):
        if config.model.path is not None:
            model = load_exactly(config.model.path, torch.float32)
        else:
            settings = model_settings(
                config.model, meta.vocab_size, meta.eos_id, config.data.sequence_length, meta.bos_id
            )
            model = AutoModelForCausalLM.from_config(settings, dtype=torch.float32)
            if "pad_token_id" not in config.model.options:
                cast(Any, model).get_input_embeddings().padding_idx = None  # whose row would learn nothing
    rows: int = cast(Any, model).get_input_embeddings().weight.shape[0]
    if rows < meta.vocab_size:
        raise TokenSuperpositionError(
            f"the model has {rows} token embeddings, the data's vocabulary has {meta.vocab_size}; "
            "prepare the data with the model's tokenizer (tst prepare --tokenizer)"
        )
    check_causal(model)
    length = config.data.sequence_length
    if not reads(model, length):
        raise TokenSuperpositionError(f"data.sequence_length is {length}; the model {has_positions(model, length)}")
    return model


def check_superpositions(configs: Mapping[str, Config]) -> None:
    """Raise ``TokenSuperpositionError`` for what one of these runs, by name, would refuse and its baseline would not.

    They have the same model and data. What takes a model to tell is told by one with weights, in memory. One that does
    not run on the CPU is not asked: its runs will be.
    """
    from token_superposition.engines.transformers.head import ids_used_elsewhere, read_head

    first = next(iter(configs.values()))
    kinds: set[BoundaryKind] = {c.superposition.boundaries for c in configs.values()}
    for kind in kinds - {"none"}:
        find_boundaries(load_tokenizer(str(Path(first.data.path) / "tokenizer")), kind)
    bags = next((n for n, c in configs.items() if any(p.input_bag > 1 for p in c.schedule.phases)), None)
    heads = next((n for n, c in configs.items() if c.superposition.trained_heads), None)
    if bags is heads is None:
        return
    meta = Meta.load(Path(first.data.path))
    empty = empty_model(first, meta.vocab_size)
    Launch.from_environment().check_memory(sum(p.numel() for p in empty.parameters()))
    model = build_model(first, meta)
    try:
        with torch.no_grad():
            cast(Any, model)(input_ids=torch.zeros(1, 4, dtype=torch.long), use_cache=False)
    except Exception:
        return
    if bags is not None and (why := ids_used_elsewhere(model)) is not None:
        raise TokenSuperpositionError(
            f"{type(model).__name__} cannot read the bags of {bags}: {why}; superpose the output only "
            '(superposition.sides = "output")'
        )
    if heads is not None and isinstance(head := read_head(model), str):
        raise TokenSuperpositionError(
            f"superposition.mtp_heads of {heads} is {configs[heads].superposition.mtp_heads}, but "
            f"{type(model).__name__} shows no hidden states for them ({head}); set it to 0"
        )


def load_exactly(source: str | Path, dtype: torch.dtype | Literal["auto"] = "auto") -> Any:
    """The causal LM of a directory or of the hub, with the weights that are there and no others. No remote code is run.

    Raises ``TokenSuperpositionError`` where there is none, where it is damaged, and where weights are missing, left
    over or of another shape, which transformers would draw at random or ignore.
    """
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source, dtype=dtype, trust_remote_code=False, output_loading_info=True, ignore_mismatched_sizes=True
        )
    except Exception as e:  # safetensors, pickle and the models' own classes raise what they like
        what = "holds no causal LM" if Path(source).exists() else "is no file or folder, nor a causal LM of the hub"
        raise TokenSuperpositionError(
            f"{source} {what} that can be loaded ({first_line(e)}); name a run's model/ or another saved model"
        ) from None
    model, info = loaded
    wrong = [
        *(f"{name} is missing" for name in sorted(info["missing_keys"])),
        *(f"{name} is left over" for name in sorted(info["unexpected_keys"]) if not _MASK.search(name)),
        *(f"{name} has shape {tuple(a)}, not {tuple(b)}" for name, a, b in sorted(info["mismatched_keys"])),
    ]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise TokenSuperpositionError(
            f"{source} has not the weights of its config.json: {', '.join(wrong[:3])}{more}; save or fetch it again"
        )
    return model


def empty_model(config: Config, vocab_size: int) -> PreTrainedModel:
    """The same model without memory, on the meta device: to count, not to train."""
    with _building(config.model), torch.device("meta"):
        settings = model_settings(config.model, vocab_size, 0, config.data.sequence_length)
        return AutoModelForCausalLM.from_config(settings, dtype=torch.float32)


def model_settings(
    wanted: ModelConfig, vocab_size: int, eos_id: int, sequence_length: int, bos_id: int | None = None
) -> PretrainedConfig:
    """The model's configuration in transformers.

    Raises ``TokenSuperpositionError`` for an architecture or a field that does not exist.
    """
    with _building(wanted):
        if wanted.path is not None:
            return AutoConfig.from_pretrained(wanted.path, trust_remote_code=False)
        options = {
            "vocab_size": vocab_size,
            "bos_token_id": eos_id if bos_id is None else bos_id,
            "eos_token_id": eos_id,
        }
        # Stock defaults may name a padding token beyond a small vocabulary.
        options |= {"pad_token_id": None, "max_position_embeddings": sequence_length}
        if wanted.architecture not in CONFIG_MAPPING:
            near = difflib.get_close_matches(wanted.architecture, CONFIG_MAPPING, 1)
            hint = f"did you mean {near[0]}?" if near else "give a model type of transformers, such as llama"
            raise TokenSuperpositionError(f"model.architecture is {wanted.architecture!r}; {hint}")
        known = AutoConfig.for_model(wanted.architecture)
        fields = [*dir(known), "head_dim", "rope_theta"]  # read by models whose configuration does not declare them
        for key in wanted.options:
            if key not in fields:
                near = difflib.get_close_matches(key, fields, 1)
                hint = f"did you mean {near[0]}?" if near else "see its page in transformers"
                raise TokenSuperpositionError(f"model.options: {wanted.architecture} has no field {key}; {hint}")
        try:
            return AutoConfig.for_model(wanted.architecture, **(options | wanted.options))
        except Exception as e:
            if "pad_token_id" not in str(e) or "pad_token_id" in wanted.options:
                raise
        return AutoConfig.for_model(wanted.architecture, **(options | {"pad_token_id": eos_id} | wanted.options))


@contextmanager
def _building(wanted: ModelConfig) -> Generator[None]:
    """Errors of transformers become one line."""
    try:
        yield
    except TokenSuperpositionError:
        raise
    except Exception as e:
        where = f"model.path {wanted.path}" if wanted.path is not None else f"model {wanted.architecture}"
        remedy = "give the directory of a saved model" if wanted.path is not None else "change model.options"
        why = shorten(str(e), 300, placeholder=" ...")
        raise TokenSuperpositionError(f"{where} cannot be built ({why}); {remedy}") from e
