"""Text from a finished model, by transformers' own ``generate``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, set_seed

from token_superposition.data.tokenizer import begin_token, load_tokenizer
from token_superposition.engines.transformers.fit import positions, reads
from token_superposition.errors import TokenSuperpositionError
from token_superposition.experiment.files import CONFIG, MODEL, RESULT, SWEEP
from token_superposition.experiment.model import load_exactly

AGAIN = "train one with tst train, its config.toml and another --out"


def load_model(path: str | Path) -> tuple[Any, PreTrainedTokenizerBase]:
    """A causal LM and its tokenizer; of a run, its finished model.

    Raises ``TokenSuperpositionError`` if there is none, or not all of it.
    """
    if Path(path).absolute() == run_of(path):
        path = Path(path) / MODEL
    elif (Path(path) / "runs").is_dir():
        runs = sorted(p.parent.name for p in Path(path).glob(f"runs/*/{MODEL}"))
        if not runs and (Path(path) / SWEEP).is_file():
            raise TokenSuperpositionError(f"{path} is a sweep, which keeps no models; {AGAIN}")
        raise TokenSuperpositionError(
            f"{path} holds several runs; name one of them, such as {Path(path) / 'runs' / (runs or ['NAME'])[0]}"
        )
    elif (Path(path) / CONFIG).is_file() and (Path(path) / RESULT).is_file():
        raise TokenSuperpositionError(f"{path} is a finished run whose model was removed, as a sweep does; {AGAIN}")
    elif (Path(path) / CONFIG).is_file():
        raise TokenSuperpositionError(
            f"{path} is a run that is not finished; give its command again, or make a model of its newest checkpoint "
            f"with tst export {path} OUT"
        )
    model = load_exactly(path)
    if torch.accelerator.is_available():
        torch.nn.Module.to(model, torch.accelerator.current_accelerator())
    return model.eval(), load_tokenizer(str(path))


def run_of(model: str | Path) -> Path | None:
    """The finished run that ``model`` names, by its directory or its model/; None for anything else."""
    path = Path(model).absolute()
    run = path.parent if path.name == MODEL and not (path / CONFIG).exists() else path
    return run if (run / CONFIG).is_file() and (run / MODEL / "config.json").is_file() else None


def generate(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    max_new_tokens: int = 64,
    temperature: float = 0.8,
    top_p: float = 0.95,
    seed: int = 0,
) -> str:
    """The continuation of ``prompt``. An empty prompt starts a new document.

    Raises ``TokenSuperpositionError`` where both need more positions than the model can read.
    """
    set_seed(seed)
    encoded: Any = tokenizer(prompt, add_special_tokens=False)
    ids: list[Any] = encoded["input_ids"]
    if not ids:  # as a document begins in a token store
        ids = [tokenizer.eos_token_id if (bos := begin_token(tokenizer)) is None else bos]
    length = len(ids) + max_new_tokens - 1  # the last one is not read
    if not reads(model, length):
        raise TokenSuperpositionError(
            f"max-new-tokens {max_new_tokens} after a prompt of {len(ids)} needs {length} positions, the model has "
            f"{positions(model)}; give at most that in all"
        )
    sampling = (
        {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}  # 0: top_p alone decides
        if temperature > 0
        else {"do_sample": False}
    )
    out = model.generate(
        torch.tensor([ids], device=model.device),
        attention_mask=torch.ones(1, len(ids), dtype=torch.long, device=model.device),
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.eos_token_id,
        **sampling,
    )
    read, whole = (str(tokenizer.decode(x, skip_special_tokens=True)) for x in (ids, out[0]))
    if whole.startswith(read):
        return whole.removeprefix(read)
    return str(tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True))  # the prompt ends inside a character
