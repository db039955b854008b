"""What the processes of the tests run, and on which model."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from olmo_core.train import prepare_training_environment
from olmo_core.train.callbacks import Callback
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from tests.conftest import TINY, VOCAB
from token_superposition.engines.olmo_core import load_weights, transformer_config
from token_superposition.engines.olmo_core.train import Layout, train, train_module
from token_superposition.errors import TokenSuperpositionError
from token_superposition.experiment.config import Config, DataConfig, ModelConfig, TrainConfig
from token_superposition.experiment.superposition import SuperpositionConfig

SHAPES: dict[str, dict[str, Any]] = {"llama": TINY["llama"] | {"num_key_value_heads": 2}}
SHAPES["qwen3"] = SHAPES["llama"] | {"head_dim": 24}


def run_config(data: Path, architecture: str = "llama", start: Path | None = None, **train: Any) -> Config:
    """A tiny run: 6 steps on bags of 4, then 6 ordinary ones; a new model, or the one saved in ``start``."""
    settings = {"steps": 12, "batch_size": 4, "learning_rate": 3e-3, "warmup_steps": 2, "log_every": 1, "eval_every": 4}
    weighting = train.pop("weighting", "uniform")
    return Config(
        ModelConfig(path=str(start)) if start else ModelConfig(architecture, SHAPES[architecture]),
        DataConfig(str(data), 16, eval_tokens=256, final_eval_tokens=528),  # 33 sequences: they do not divide by 2
        SuperpositionConfig(4, 0.5, weighting=weighting),
        TrainConfig(**settings | {"precision": "float32"} | train),
    )


def small_model(architecture: str, **options: Any) -> PreTrainedModel:
    """With random weights, large enough that logits differ."""
    torch.manual_seed(0)
    settings = {"vocab_size": VOCAB, "max_position_embeddings": 64, "initializer_range": 0.1, "pad_token_id": None}
    settings |= {"bos_token_id": 0, "eos_token_id": 0}
    return AutoModelForCausalLM.from_config(
        AutoConfig.for_model(architecture, **settings | SHAPES[architecture] | options)
    )


@dataclass
class SignalAt(Callback):
    """The process gets SIGTERM after this step."""

    at: int = 0
    number: int = signal.SIGTERM

    def post_step(self) -> None:
        if self.step == self.at:
            os.kill(os.getpid(), self.number)


def run_training(config: Config, out: Path, tensor_parallel: int = 1, kill_at: int = 0) -> None:
    # As of power loss: nothing is written, closed or told to the others.
    callbacks: dict[str, Callback] = {"kill": SignalAt(at=kill_at, number=signal.SIGKILL)} if kill_at else {}
    train(config, out, tensor_parallel=tensor_parallel, callbacks=callbacks)


def run_diverging(config: Config, out: Path) -> None:
    try:
        train(config, out)
    except TokenSuperpositionError as e:
        if "has the norm" not in str(e):
            raise
        return
    raise AssertionError("it did not diverge")


def run_documented(data: Path, out: Path) -> None:
    """The script of the documentation on this process, with the sizes of the tests."""
    page = Path(__file__).parents[2] / "docs" / "engines" / "olmo_core.md"
    code = page.read_text().split("```python\n")[1].split("```")[0]
    for there, here in (
        ("seed=0)  ", 'seed=0, backend="gloo", shared_filesystem=True)  '),
        ("10_000, 2048, 64 ", "12, 16, 4 "),
        ('"data"', repr(str(data))),
        ("8 * length", "2 * length"),
        ("warmup_steps=100", "warmup_steps=2"),
    ):
        assert code.count(there) == 1, there
        code = code.replace(there, here)
    os.chdir(out)
    exec(code, {"shape": SHAPES["llama"]})


def per_token_losses(model: Path, out: Path) -> None:
    """Saves what a stock evaluator gets on this process of a model sharded over two."""
    start = AutoModelForCausalLM.from_pretrained(model)
    prepare_training_environment(backend="gloo", shared_filesystem=True)
    config = Config(data=DataConfig(sequence_length=16), train=TrainConfig(precision="float32"))
    module = train_module(config, transformer_config(start.config).build(init_device="meta"), Layout(1, 2, 4))
    load_weights(module.model, start)
    ids = torch.arange(64).reshape(4, 16)
    output: Any = module.eval_batch({"input_ids": ids, "labels": ids + 1})
    torch.save(output.ce_loss, out / f"{os.environ['RANK']}.pt")
