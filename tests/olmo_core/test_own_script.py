"""OLMo-core's parts in a script of one's own, with ours in the place of some of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from olmo_core.data import NumpyPaddedFSLDatasetConfig, TokenizerConfig
from olmo_core.nn.lm_head import LMHeadConfig, LMHeadType, LMLossImplementation
from olmo_core.nn.transformer import TransformerConfig
from olmo_core.optim import AdamWConfig, OptimConfig, SkipStepAdamWConfig
from olmo_core.optim.scheduler import SchedulerUnits
from olmo_core.train import Duration, TrainerConfig
from olmo_core.train.callbacks import LMEvaluatorCallbackConfig
from olmo_core.train.train_module import TransformerTrainModule

from tests.conftest import VOCAB
from tests.olmo_core.launch import run_config, small_model
from tests.olmo_core.test_engine import Spy, fit, plan_of
from token_superposition import WSD, TokenSuperpositionError
from token_superposition.data.plan import PlannedDataset
from token_superposition.engines.olmo_core import (
    PlannedDataLoader,
    PlannedWSD,
    TSTLMHeadConfig,
    TSTSpeedMonitor,
    TSTTrainModule,
    load_weights,
    transformer_config,
)


def own_module(plan: PlannedDataset, optim: OptimConfig, **options: Any) -> TSTTrainModule:
    model = transformer_config(small_model("llama").config).build(init_device="meta")
    tokens = plan.batch_size * plan.sequence_length
    return TSTTrainModule(model, optim, tokens, plan.sequence_length, max_grad_norm=1.0, **options)


def own_script(plan: PlannedDataset, out: Path, optim: OptimConfig, **options: Any) -> Spy:
    """What a user's own script does with the documented replacements, and no callback of ours but the speed monitor."""
    spy, module = Spy(), own_module(plan, optim, **options)
    duration = Duration.steps(plan.schedule.total_steps)
    trainer = TrainerConfig(str(out), max_duration=duration, metrics_collect_interval=1, no_checkpoints=True)
    trainer.add_callbacks({"spy": spy, "speed_monitor": TSTSpeedMonitor()})
    trainer.build(module, PlannedDataLoader(plan, out)).fit()
    return spy


def test_bag_sizes_and_token_counts_are_metrics_of_an_own_script(prepared: Path, tmp_path: Path) -> None:
    spy = own_script(plan_of(prepared), tmp_path, AdamWConfig())
    names = ("input_bag", "output_bag", "latent_tokens", "raw_tokens")
    counts = [tuple(spy.metrics[step][f"superposition/{name}"] for name in names) for step in range(1, 7)]
    bags = [(4, 4, 64 * step, 256 * step) for step in (1, 2, 3)]
    assert counts == bags + [(1, 1, 192 + 64 * step, 768 + 64 * step) for step in (1, 2, 3)]


def test_skip_step_compares_steps_of_the_same_bag_sizes(prepared: Path, tmp_path: Path) -> None:
    """With a limit that every step exceeds, three pass that have too few earlier ones, after the switch again three."""
    optim = SkipStepAdamWConfig(rolling_interval_length=8, sigma_factor=-100)
    spy = own_script(plan_of(prepared, 12), tmp_path, optim)
    assert [spy.metrics[step]["optim/step skipped"] for step in range(1, 13)] == [0, 0, 0, 1, 1, 1] * 2


def test_the_curve_is_as_long_as_the_trainer_runs(prepared: Path, tmp_path: Path) -> None:
    """Where it is not told, and it counts steps whatever the trainer counts."""
    spy = own_script(plan_of(prepared), tmp_path, AdamWConfig(lr=1e-3), scheduler=PlannedWSD(warmup_steps=2))
    curve = WSD(6, 2, 0.1)
    assert [spy.metrics[s]["optim/LR (group 0)"] for s in range(1, 7)] == [1e-3 * curve(s) for s in range(6)]
    with pytest.raises(TokenSuperpositionError, match="units is 'tokens', but a plan is made of steps"):
        PlannedWSD(warmup_steps=2, units=SchedulerUnits.tokens)


def test_a_trainer_that_ends_before_the_plan(prepared: Path, tmp_path: Path) -> None:
    """It may have seen nothing but bags; an epoch is over for a longer plan, too. With hard_stop it is meant."""
    plan, start = plan_of(prepared), small_model("llama")
    with pytest.raises(TokenSuperpositionError, match=r"max_duration is 2 steps, but the plan .* 6 steps"):
        fit(run_config(prepared, steps=2), plan, start, tmp_path)
    module = own_module(plan, AdamWConfig())
    for duration, told in ((Duration.epochs(1), "1 epochs"), (Duration.tokens(128), "2 steps")):
        trainer = TrainerConfig(str(tmp_path), max_duration=duration, no_checkpoints=True)
        with pytest.raises(TokenSuperpositionError, match=rf"max_duration is {told}, but .*Duration.steps\(6\)"):
            trainer.build(module, PlannedDataLoader(plan, tmp_path)).fit()
    stopped = TrainerConfig(str(tmp_path), max_duration=Duration.steps(6), no_checkpoints=True)
    stopped.hard_stop = Duration.steps(2)
    trainer = stopped.build(module, PlannedDataLoader(plan, tmp_path))
    trainer.fit()
    assert trainer.global_step == 2


def test_models_without_the_head_for_bags_are_refused() -> None:
    def train(config: TransformerConfig) -> None:
        TSTTrainModule(config.build(init_device="meta"), AdamWConfig(), 64, 16)

    stock = transformer_config(small_model("llama").config)
    stock.lm_head = LMHeadConfig(layer_norm=stock.lm_head.layer_norm, bias=False)
    with pytest.raises(TokenSuperpositionError, match=r"head is LMHead, .*build the model with lm_head=TSTLMHead"):
        train(stock)
    ngpt = TransformerConfig.ngpt_like(d_model=48, vocab_size=320, n_layers=2, n_heads=2)
    for head in (ngpt.lm_head, TSTLMHeadConfig(bias=False), TSTLMHeadConfig(name=LMHeadType.normalized)):
        ngpt.lm_head = head
        with pytest.raises(TokenSuperpositionError, match=r"nGPT's head has scales .*, so choose another model"):
            train(ngpt)


def test_weights_loaded_before_the_module_initialises_are_refused(prepared: Path) -> None:
    """It would initialise them anew."""
    start = small_model("llama")
    model = transformer_config(start.config).build()
    load_weights(model, start)
    with pytest.raises(TokenSuperpositionError, match=r"loaded weights, .*load_weights\(module.model, ...\) after it"):
        TSTTrainModule(model, AdamWConfig(), 64, 16)


def test_what_the_loss_on_bags_has_not_is_refused_at_once(prepared: Path) -> None:
    with pytest.raises(TokenSuperpositionError, match="z_loss_multiplier is 1e-05; the loss on bags has no separate"):
        own_module(plan_of(prepared), AdamWConfig(), z_loss_multiplier=1e-5)
    head = TSTLMHeadConfig(bias=False, loss_implementation=LMLossImplementation.fused_linear)
    with pytest.raises(TokenSuperpositionError, match="loss_implementation is 'fused_linear', but the head has a loss"):
        head.build(d_model=8, vocab_size=16)


@pytest.mark.parametrize("kept", [[True, False, True, True], [False] * 4])
def test_masked_instances_count_as_in_the_stock_module(kept: list[bool]) -> None:
    ours, stock = (transformer_config(small_model("llama").config) for _ in range(2))
    stock.lm_head = LMHeadConfig(layer_norm=stock.lm_head.layer_norm, bias=False)
    losses: list[torch.Tensor] = []
    for kind, config in ((TransformerTrainModule, stock), (TSTTrainModule, ours)):
        module: Any = kind(config.build(init_device="meta"), AdamWConfig(), 64, 16)
        module.record_metric = lambda *_, **__: None
        module.record_ce_loss = lambda value, *_: losses.append(value)
        module.train_batch({"input_ids": torch.arange(64).reshape(4, 16), "instance_mask": torch.tensor(kept)})
    torch.testing.assert_close(losses[0], losses[1])


def test_the_stock_module_is_refused_with_bags_of_targets() -> None:
    """It would divide by every token of a bag."""
    config = transformer_config(small_model("llama").config)
    module: Any = TransformerTrainModule(config.build(init_device="meta"), AdamWConfig(), 64, 16)
    module.record_metric = module.record_ce_loss = lambda *_, **__: None
    batch = {"input_ids": torch.ones(4, 16, dtype=torch.long), "labels": torch.ones(4, 16, 3, dtype=torch.long)}
    with pytest.raises(TokenSuperpositionError, match="train with TSTTrainModule"):
        module.train_batch(batch)


def test_the_stock_evaluator_of_language_modelling(prepared: Path, tmp_path: Path) -> None:
    """It takes the collator of the loader; what it pads is masked. It runs while bags are trained on, too."""
    documents = [list(range(2, 14)), list(range(20, 33)), [40, 41, 42], [50, 51]]  # four fill a batch
    tokens = np.array([t for d in documents for t in (*d, 0)], dtype=np.uint16)  # 0 ends a document and pads
    tokens.tofile(tmp_path / "held_out.npy")
    tokenizer = TokenizerConfig(vocab_size=VOCAB, eos_token_id=0, pad_token_id=0)
    mixture = {"paths": [str(tmp_path / "held_out.npy")], "metadata": [{"label": "text"}]}
    dataset = NumpyPaddedFSLDatasetConfig(tokenizer=tokenizer, sequence_length=16, work_dir=str(tmp_path), **mixture)
    evaluator = LMEvaluatorCallbackConfig(eval_dataset=dataset, eval_interval=2)
    plan, spy = plan_of(prepared), Spy()
    module = own_module(plan, AdamWConfig())
    trainer = TrainerConfig(str(tmp_path / "out"), max_duration=Duration.steps(6), no_checkpoints=True)
    trainer.add_callbacks({"lm": evaluator, "spy": spy})
    trainer.build(module, loader := PlannedDataLoader(plan, tmp_path)).fit()
    (name,) = {n for m in spy.metrics.values() for n in m if n.startswith("eval/lm/") and n.endswith("CE loss")}
    assert sorted(step for step, m in spy.metrics.items() if name in m) == [2, 4, 6]
    module.model.eval()
    losses: list[torch.Tensor] = []
    for d in documents:
        ids = torch.tensor([[*d, 0]])
        with torch.no_grad():
            logits = module.model(ids)[0]
        losses.append(torch.nn.functional.cross_entropy(logits[:-1], ids[0, 1:], reduction="none"))
    mean = float(torch.cat(losses).sum()) / len(tokens)  # as OLMo-core counts: a document's last token has loss 0
    assert spy.metrics[6][name] == pytest.approx(mean, rel=1e-5)
    assert loader.tokens_processed == 6 * 64


def test_batch_without_labels() -> None:
    """The next tokens are the labels of an ordinary batch, as in the stock module; those of bags are not in it."""
    ours, stock = (transformer_config(small_model("llama").config) for _ in range(2))
    stock.lm_head = LMHeadConfig(layer_norm=stock.lm_head.layer_norm, bias=False)
    losses: list[torch.Tensor] = []
    ids = torch.arange(64).reshape(4, 16)
    for kind, config in ((TransformerTrainModule, stock), (TSTTrainModule, ours)):
        module: Any = kind(config.build(init_device="meta"), AdamWConfig(), 64, 16)
        module.record_metric = lambda *_, **__: None
        module.record_ce_loss = lambda value, *_: losses.append(value)
        module.train_batch({"input_ids": ids})
    torch.testing.assert_close(losses[0], losses[1])
    with pytest.raises(TokenSuperpositionError, match=r"the batch of bags has no labels, .*; add labels"):
        module.train_batch({"input_ids": ids.reshape(4, 4, 4)})
