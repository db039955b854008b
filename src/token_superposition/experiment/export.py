"""A run, or one of its checkpoints, as a directory that stock transformers loads, with a model card."""

from __future__ import annotations

import os
import shutil
import tempfile
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from token_superposition.data.store import TokenStore
from token_superposition.data.tokenizer import load_tokenizer
from token_superposition.engines.transformers.fit import positions
from token_superposition.errors import TokenSuperpositionError
from token_superposition.experiment.checkpoints import checkpoints_in, damage, newest_whole, step_of
from token_superposition.experiment.config import load_written
from token_superposition.experiment.files import CONFIG, MODEL
from token_superposition.experiment.generate import run_of
from token_superposition.experiment.model import load_exactly, model_settings
from token_superposition.experiment.shards import check_shards, weights_only
from token_superposition.report.model_card import Figures, model_card

DType = Literal["bfloat16", "float32"]
SHARDS = "pytorch_model_fsdp_0"
TOKENS = 64  # at most, of the text that both models read when the export is checked


def export(run: Path, out: Path, *, checkpoint: int | None = None, dtype: DType = "float32") -> int:
    """Write ``out``: config.json, generation_config.json, safetensors, the tokenizer's files and README.md.

    Of a finished run its model, else its newest checkpoint; or the ``checkpoint`` of that step, also one in shards.
    The model is read from disk, so nothing of this package can be in it. What was written is loaded again and must give
    the same logits, bit for bit, before it appears under the name ``out``. Returns the step.

    Raises ``TokenSuperpositionError`` for a run without weights, or without weights of that step, for shards that
    name code, and for an ``out`` that is there already.
    """
    if out.exists():
        raise TokenSuperpositionError(f"{out} exists; choose another OUT or remove it")
    if run.name == MODEL and run_of(run) is not None:  # its finished model, as tst eval takes it
        run = run.parent
    elif checkpoint is None and run.absolute().parent.name == "checkpoints" and run.is_dir():
        run, checkpoint = run.absolute().parent.parent, step_of(run)
    source = find_weights(run, checkpoint)
    figures = Figures.of(run, step_of(source) if source.parent.name == "checkpoints" else None)
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        with whole_weights(run, source) as directory:
            model = load_exactly(directory, getattr(torch, dtype)).eval()
            tokenizer = load_tokenizer(str(tokenizer_directory(run, directory)))
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        model_card(figures, out.name, model.num_parameters(), dtype).save(partial / "README.md")
        ids = torch.arange(min(TOKENS, positions(model) or TOKENS)).remainder(len(tokenizer)).unsqueeze(0)
        expected = logits(model, ids)
        del model
        if not torch.equal(logits(load_exactly(partial, getattr(torch, dtype)).eval(), ids), expected):
            raise TokenSuperpositionError(
                f"what {source} was exported to gives other logits than it; please report its architecture"
            )
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return figures.step


def find_weights(run: Path, checkpoint: int | None) -> Path:
    """Directory of the finished model, or of a checkpoint of the transformers engine.

    Raises ``TokenSuperpositionError`` if the ``checkpoint`` of that step is not there or damaged; where none is named,
    if there is neither a finished model nor a checkpoint, or no checkpoint is whole.
    """
    checkpoints = run / "checkpoints"
    if checkpoint is not None:
        found = checkpoints / f"checkpoint-{checkpoint}"
        if not found.is_dir():
            steps = [step_of(c) for c in checkpoints_in(checkpoints)]
            have = f"it has those of steps {', '.join(map(str, steps))}" if steps else "it has none"
            raise TokenSuperpositionError(f"{run} has no checkpoint of step {checkpoint}; {have}")
        if problem := damage(found):
            raise TokenSuperpositionError(f"{problem}; take another checkpoint")
        return found
    if (run / MODEL / "config.json").exists():
        return run / MODEL
    newest = newest_whole(checkpoints, warnings.warn)
    if newest is not None:
        return newest
    if any(checkpoints.glob("step*")) or (run / "checkpoint").exists():
        raise TokenSuperpositionError(
            f"{run} is an unfinished run of OLMo-core or torchtitan, whose checkpoints are not exported; "
            "finish it with the command that started it"
        )
    raise TokenSuperpositionError(f"{run} holds no model/ and no checkpoint; name the --out of a tst train")


@contextmanager
def whole_weights(run: Path, source: Path) -> Generator[Path]:
    """A directory that transformers loads: ``source``, or its shards of FSDP put together by accelerate."""
    if not (source / SHARDS).exists():
        yield source
        return
    from accelerate.utils import merge_fsdp_weights

    config = load_written(run / CONFIG)
    meta = TokenStore(config.data.path).meta
    check_shards(source)
    with tempfile.TemporaryDirectory(dir=run, prefix=".export-") as merged:
        try:
            with weights_only():
                merge_fsdp_weights(str(source / SHARDS), merged)
        except CheckpointException as e:
            raise TokenSuperpositionError(
                f"{source / SHARDS} holds more than tensors and plain values, or is damaged; take another checkpoint"
            ) from e
        settings = (config.model, meta.vocab_size, meta.eos_id, config.data.sequence_length, meta.bos_id)
        model_settings(*settings).save_pretrained(merged)
        yield Path(merged)


def tokenizer_directory(run: Path, model: Path) -> Path:
    """Beside the model; an unfinished sharded run has it in its data only."""
    if (model / "tokenizer.json").exists():
        return model
    return Path(load_written(run / CONFIG).data.path) / "tokenizer"


@torch.no_grad()
def logits(model: Any, ids: Tensor) -> Tensor:  # (1, L) -> (1, L, V)
    return model(input_ids=ids, use_cache=False).logits
