"""The paper's models in torchtitan's registry, as its own configuration manager finds them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torchtitan.config import ConfigManager
from torchtitan.distributed.activation_checkpoint import FullAC, SelectiveAC
from torchtitan.distributed.utils import clip_grad_norm_
from transformers import AutoModelForCausalLM

from token_superposition.engines.torchtitan import TSTTrainer
from token_superposition.engines.torchtitan.checks import batch_sizes, data_parallel, logits_divide, model_divides
from token_superposition.engines.torchtitan.config_registry import trainer_config
from token_superposition.engines.torchtitan.models import checked_settings, model_spec
from token_superposition.experiment.config import load_config

LLAMA3 = 128_256


def parse(name: str, *flags: str) -> TSTTrainer.Config:
    module = ["--module", "token_superposition.engines.torchtitan"]
    return ConfigManager().parse_args([*module, "--config", name, *flags])  # pyright: ignore


@pytest.mark.parametrize("preset", ["270m", "600m", "3b", "10b-a1b"])
def test_preset_in_the_registry(preset: str, tmp_path: Path) -> None:
    ours = load_config(preset)
    name = preset.replace("-", "_")
    flags = ("--dataloader.dataset_path", str(tmp_path), "--superposition.bag_size", "8")
    flags += ("--validator.dataloader.final_tokens", "4096")
    config, baseline = parse(f"tst_{name}", *flags), parse(f"baseline_{name}")
    t = ours.train
    assert config.superposition.schedule(config.training.steps).at(0).input_bag == 8
    assert config.superposition.ratio == ours.superposition.ratio
    assert not baseline.superposition.schedule(baseline.training.steps).switches
    assert config.dataloader.dataset_path == str(tmp_path)
    held_out = config.validator.dataloader
    assert (held_out.tokens, held_out.final_tokens) == (ours.data.eval_tokens, 4096)  # pyright: ignore
    for c in (config, baseline):
        assert (c.training.steps, c.training.global_batch_size, c.training.seq_len) == (
            t.steps,
            t.batch_size,
            ours.data.sequence_length,
        )
        rates = [g.optimizer_kwargs["lr"] for g in c.optimizer.param_groups]
        assert rates == [t.learning_rate] * 2 and c.optimizer.param_groups[1].optimizer_kwargs["betas"] == (0.9, 0.95)
        assert [g.pattern for g in c.optimizer.param_groups] == [r"norm\.weight$|\.bias$", ".*"]
        assert (c.lr_scheduler.warmup_steps, c.lr_scheduler.decay_ratio) == (t.warmup_steps, t.decay_ratio)
    settings = checked_settings(config.model, LLAMA3, 0, config.training.seq_len)
    with torch.device("meta"):
        model = model_spec(settings, config.training.seq_len, t.batch_size).model.build()
        stock = AutoModelForCausalLM.from_config(settings)
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in stock.parameters())
    processes = data_parallel(config.parallelism, 8)
    assert batch_sizes(config.training.global_batch_size, config.training.local_batch_size, processes) > 0
    model_divides(settings, config.parallelism)
    logits_divide(LLAMA3, config.parallelism, config.training.seq_len, config.loss.num_chunks)  # pyright: ignore


@pytest.mark.parametrize(("max_grad_norm", "left"), [(0.0, 5.0), (1.0, 1.0)])
def test_a_norm_of_0_clips_nothing(max_grad_norm: float, left: float) -> None:
    """As on the other engines; torchtitan's own function would scale every gradient to the norm 0."""
    ours = load_config("270m")
    config = trainer_config(replace(ours, train=replace(ours.train, max_grad_norm=max_grad_norm)), "run")
    weight = torch.nn.Parameter(torch.zeros(2))
    weight.grad = torch.tensor([3.0, 4.0])
    assert clip_grad_norm_([weight], config.training.max_norm).item() == 5
    assert weight.grad.norm().item() == pytest.approx(left, rel=1e-5)


def test_activation_checkpointing_is_that_of_the_configuration() -> None:
    """torchtitan's default is its selective one, whatever was asked for; a flag still has the last word."""
    ours = load_config("270m")
    full = trainer_config(replace(ours, train=replace(ours.train, activation_checkpointing=True)), "run")
    assert isinstance(full.activation_checkpoint, FullAC.Config)
    assert trainer_config(ours, "run").activation_checkpoint is None
    assert parse("tst_270m").activation_checkpoint is None
    assert isinstance(parse("tst_270m", "activation-checkpoint:selective").activation_checkpoint, SelectiveAC.Config)


def test_a_pipeline_needs_a_flag() -> None:
    pipeline = ("--parallelism.pipeline_parallel_degree", "2")
    with pytest.raises(SystemExit):
        parse("tst_270m", *pipeline)
    assert parse("tst_270m", *pipeline, "--training.disable_cuda_graphs").parallelism.pipeline_parallel_degree == 2


def test_the_embeddings_have_a_rate_of_their_own() -> None:
    ours = load_config("270m")
    ours = replace(ours, train=replace(ours.train, embedding_lr_factor=4.0))
    config = trainer_config(ours, "tst_270m")
    settings = checked_settings(config.model, LLAMA3, 0, config.training.seq_len)
    with torch.device("meta"):
        model = model_spec(settings, config.training.seq_len, 8).model.build()
    container = config.optimizer.build(model_parts=[model])
    groups = [group for optimizer in container.optimizers for group in optimizer.param_groups]
    rate = {id(p): group["lr"] for group in groups for p in group["params"]}
    for name, p in model.named_parameters():
        assert rate[id(p)] == pytest.approx(ours.train.learning_rate * (4 if "tok_embeddings" in name else 1)), name
    assert {"lr": groups[-1]["lr"]} == {"lr": ours.train.learning_rate}  # the one that is logged
