"""The OLMo-core engine on one process: it trains the float64 reference and counts what is computed."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from olmo_core.nn.hf.convert import convert_state_from_hf
from olmo_core.nn.lm_head import LMHead, LMHeadConfig
from olmo_core.train import Duration
from olmo_core.train.callbacks import BatchSizeSchedulerCallback, Callback
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper
from transformers import AutoModelForCausalLM

from tests.olmo_core.launch import run_config, small_model
from token_superposition import WSD, TokenSuperpositionError, place_weights, reference
from token_superposition.data.plan import PlannedDataset
from token_superposition.data.store import TokenStore
from token_superposition.engines.olmo_core import (
    PlannedDataLoader,
    TSTLMHead,
    TSTSpeedMonitor,
    export_model,
    load_weights,
    transformer_config,
)
from token_superposition.engines.olmo_core.train import Layout, build_trainer, train_module
from token_superposition.experiment.config import Config

BOTH = ("llama", "qwen3")


def plan_of(prepared: Path, steps: int = 6, batch: int = 4, kind: type[PlannedDataset] = PlannedDataset) -> Any:
    config = run_config(prepared, steps=steps)
    return kind(TokenStore(prepared), config.schedule, 16, batch, seed=1)


@dataclasses.dataclass
class Spy(Callback):
    """Keeps what the trainer says of every step, and the gradients of the first one before they are clipped."""

    def __post_init__(self) -> None:
        self.grads: dict[str, torch.Tensor] = {}
        self.metrics: dict[int, dict[str, float]] = {}
        self.whole_logits = 0

    def pre_train(self) -> None:
        def count(*_: Any) -> None:
            self.whole_logits += 1

        self.trainer.train_module.model.lm_head.w_out.register_forward_hook(count)

    def pre_optim_step(self) -> None:
        if self.step == 1:
            model = self.trainer.train_module.model
            self.grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    def log_metrics(self, step: int, metrics: dict[str, float]) -> None:
        self.metrics.setdefault(step, {}).update(metrics)


def fit(
    config: Config, plan: PlannedDataset, start: Any, out: Path, callbacks: dict[str, Callback] | None = None
) -> tuple[Any, Spy]:
    """Train from the weights of a transformers model."""
    spy = Spy()
    model = transformer_config(start.config, config.superposition.weighting).build(init_device="meta")
    module = train_module(config, model, Layout(1, 1, config.train.micro_batch_size or plan.batch_size))
    load_weights(module.model, start)
    trainer = build_trainer(config, out, module, plan, {"spy": spy} | (callbacks or {}))
    trainer.fit()
    return trainer, spy


@pytest.mark.parametrize("architecture", BOTH)
@pytest.mark.parametrize("weighting", ["uniform", "power"])
def test_first_step_on_bags_is_the_reference(architecture: str, weighting: Any, prepared: Path, tmp_path: Path) -> None:
    """Loss and gradients against float64 arithmetic of transformers on hand-averaged embeddings and whole logits."""
    config, plan = run_config(prepared, architecture, steps=6, weighting=weighting), plan_of(prepared)
    _, spy = fit(config, plan, small_model(architecture), tmp_path)
    model = small_model(architecture).double()
    ids, targets = (torch.stack([plan[i][k] for i in range(4)]) for k in ("input_ids", "shift_labels"))
    logits = model(inputs_embeds=model.get_input_embeddings()(ids).mean(2)).logits.flatten(0, 1)
    loss = reference.multi_hot_cross_entropy(logits, targets.flatten(0, 1), place_weights(weighting, 4).double())
    assert spy.metrics[1]["train/CE loss"] == pytest.approx(loss.item(), rel=1e-6)
    loss.backward()
    grads: dict[str, Any] = {n: p.grad for n, p in model.named_parameters()}
    expected = convert_state_from_hf(model.config, grads, model_type=architecture)
    assert spy.grads.keys() == expected.keys()
    for name, grad in expected.items():
        torch.testing.assert_close(spy.grads[name].double(), grad, rtol=1e-4, atol=1e-7, msg=name)
    norm = torch.cat([g.flatten() for g in grads.values()]).norm()
    assert spy.metrics[1]["optim/total grad norm"] == pytest.approx(norm.item(), rel=1e-5)
    assert spy.whole_logits == 0


def test_activation_checkpointing_computes_every_block_again(prepared: Path, tmp_path: Path) -> None:
    """With the same losses in both phases and the same finished model."""
    start, plan = small_model("llama"), plan_of(prepared)
    runs = [
        fit(run_config(prepared, steps=6, activation_checkpointing=again), plan, start, tmp_path / str(again))
        for again in (False, True)
    ]
    for (trainer, _), wrapped in zip(runs, ([], ["0", "1"]), strict=True):
        blocks = trainer.train_module.model.blocks
        assert [i for i, block in blocks.items() if isinstance(block, CheckpointWrapper)] == wrapped
        export_model(trainer.train_module.model, start.config, tmp_path / f"model{len(wrapped)}")
    losses = [[spy.metrics[step]["train/CE loss"] for step in range(1, 7)] for _, spy in runs]
    assert losses[0] == losses[1]
    files = [tmp_path / f"model{n}" / "model.safetensors" for n in (0, 2)]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize("sides", ["input", "output"])
def test_one_sided_bags(sides: Any, prepared: Path, tmp_path: Path) -> None:
    config = run_config(prepared, steps=2)
    config = dataclasses.replace(config, superposition=dataclasses.replace(config.superposition, sides=sides))
    plan = PlannedDataset(TokenStore(prepared), config.schedule, 16, 4)
    _, spy = fit(config, plan, small_model("llama"), tmp_path)
    model = small_model("llama").double()
    ids, targets = (torch.stack([plan[i][k] for i in range(4)]) for k in ("input_ids", "shift_labels"))
    vectors = model.get_input_embeddings()(ids)
    logits = model(inputs_embeds=vectors.mean(2) if sides == "input" else vectors).logits.flatten(0, 1)
    expected = reference.multi_hot_cross_entropy(logits, targets.reshape(64, -1))
    assert spy.metrics[1]["train/CE loss"] == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("micro", [1, 2])
def test_masked_targets_and_micro_batches(micro: int, prepared: Path, tmp_path: Path) -> None:
    """The mean is over the latent positions of the whole batch that have a target."""

    class Masked(PlannedDataset):
        def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
            sample = super().__getitem__(index)
            sample["shift_labels"][index % 5 :, ...] = -100
            if index < 4:  # the first step, on bags
                sample["shift_labels"][0, 1:] = -100
            return sample

    config = run_config(prepared, steps=2, warmup_steps=0, micro_batch_size=micro)
    plan = plan_of(prepared, 2, kind=Masked)
    _, spy = fit(config, plan, small_model("llama"), tmp_path)
    model = small_model("llama").double()
    ids, targets = (torch.stack([plan[i][k] for i in range(4)]) for k in ("input_ids", "shift_labels"))
    logits = model(inputs_embeds=model.get_input_embeddings()(ids).mean(2)).logits.flatten(0, 1)
    expected = reference.multi_hot_cross_entropy(logits, targets.flatten(0, 1))
    assert spy.metrics[1]["train/CE loss"] == pytest.approx(expected.item(), rel=1e-6)


def test_tokens_and_flops_follow_latent_positions(prepared: Path, tmp_path: Path) -> None:
    """Six FLOPs per weight, and causal attention's 12 d (L + 1) / 2 per layer, for each of B * L positions."""
    trainer, spy = fit(run_config(prepared, steps=6), plan_of(prepared), small_model("llama"), tmp_path)
    layer = 4 * 32 * 32 + 3 * 32 * 48
    per_position = 2 * (6 * layer + 6 * 17 * 32) + 6 * 32 * (320 + 1)  # the last norm is counted with the head
    assert trainer.global_train_tokens_seen == 6 * 4 * 16
    assert trainer.global_train_petaflops * 1e15 == pytest.approx(6 * 4 * 16 * per_position, rel=1e-12)
    for step in (2, 5):  # one on bags, one ordinary
        tokens, flops, steps = (spy.metrics[step][f"throughput/device/{x}"] for x in ("TPS", "flopsPS", "BPS"))
        assert tokens / steps == pytest.approx(4 * 16) and flops / tokens == pytest.approx(per_position)
    assert any(isinstance(c, TSTSpeedMonitor) for c in trainer.callbacks.values())


def test_learning_rate_is_the_curve_of_wsd(prepared: Path, tmp_path: Path) -> None:
    config = run_config(prepared, steps=10, warmup_steps=3, decay_ratio=0.4)
    _, spy = fit(config, plan_of(prepared, 10), small_model("llama"), tmp_path)
    curve = WSD(10, 3, 0.4)
    assert [spy.metrics[s]["optim/LR (group 0)"] for s in range(1, 11)] == [3e-3 * curve(s) for s in range(10)]


@pytest.mark.parametrize("std", [0.1, 0.02])
def test_new_weights_have_the_standard_deviation_of_the_configuration(std: float) -> None:
    model = transformer_config(small_model("llama", initializer_range=std).config).build(init_device="cpu")
    model.init_weights(device=torch.device("cpu"), max_seq_len=64)
    for name, p in model.named_parameters():
        assert p.dim() == 1 or p.std().item() == pytest.approx(std, rel=0.1), name


def test_norms_are_not_decayed(prepared: Path) -> None:
    start = small_model("qwen3")
    module = train_module(
        run_config(prepared, weight_decay=0.3), transformer_config(start.config).build(), Layout(1, 1, 4)
    )
    assert module.optim is not None
    decay = {id(p): group["weight_decay"] for group in module.optim.param_groups for p in group["params"]}
    for name, p in module.model.named_parameters():
        assert decay[id(p)] == (0.0 if p.dim() == 1 else 0.3), name


def test_the_embeddings_have_a_rate_of_their_own(prepared: Path, tmp_path: Path) -> None:
    config = run_config(prepared, steps=10, warmup_steps=3, embedding_lr_factor=4.0)
    module = train_module(config, transformer_config(small_model("qwen3").config).build(), Layout(1, 1, 4))
    assert module.optim is not None
    rate = {id(p): group["lr"] for group in module.optim.param_groups for p in group["params"]}
    for name, p in module.model.named_parameters():
        assert rate[id(p)] == pytest.approx(12e-3 if name == "embeddings.weight" else 3e-3), name
    trainer, spy = fit(config, plan_of(prepared, 10), small_model("llama"), tmp_path)
    assert spy.metrics[2]["optim/LR (group 0)"] == 3e-3 * WSD(10, 3, config.train.decay_ratio)(1)
    optim: Any = cast(Any, trainer.train_module).optim
    rates = {group["initial_lr"] for group in optim.param_groups}
    assert rates == {3e-3, 12e-3}


@pytest.mark.parametrize("workers", [0, 1])
def test_ranks_share_the_batches_of_the_plan(workers: int, prepared: Path, tmp_path: Path) -> None:
    plan = plan_of(prepared)
    loaders = [PlannedDataLoader(plan, tmp_path, 2, rank, workers) for rank in range(2)]
    for loader in loaders:
        loader.load_state_dict(loader.state_dict() | {"step": 2})
        loader.reshuffle(epoch=1)
    seen = 2
    for parts in zip(*loaders, strict=True):
        for name, key in (("input_ids", "input_ids"), ("labels", "shift_labels")):
            expected = torch.stack([plan[i][key] for i in range(4 * seen, 4 * seen + 4)])
            assert torch.equal(torch.cat([p[name] for p in parts]), expected)
        seen += 1
        assert [loader.state_dict()["step"] for loader in loaders] == [seen] * 2
    assert seen == len(loaders[0]) == 6


def test_state_of_another_loader_is_refused(prepared: Path, tmp_path: Path) -> None:
    """That of the same plan is taken."""
    loader = PlannedDataLoader(plan_of(prepared), tmp_path)
    other = PlannedDataLoader(plan_of(prepared, 12, 8), tmp_path).state_dict() | {"step": 4}
    differ = r"phases .* there, \[\[0, 4, 4\], \[3, 1, 1\]\] here, batch_size 8 there, 4 here; .*load_trainer"
    with pytest.raises(TokenSuperpositionError, match=f"another plan of the samples: {differ}"):
        loader.load_state_dict(other)
    ordinary = {"dataset_type": "fsl", "batches_processed": 5, "tokens_processed": 320, "epoch": 1, "seed": 0}
    with pytest.raises(TokenSuperpositionError, match=r"no step of a plan; .*load_trainer_state=False"):
        loader.load_state_dict(ordinary)
    assert loader.batches_processed == 0
    loader.load_state_dict(loader.state_dict() | {"step": 2})
    assert loader.batches_processed == 2


def test_a_trainer_that_goes_on_beyond_the_plan(prepared: Path, tmp_path: Path) -> None:
    """It would begin with bags again. The module tells before the first step, the loader when the plan is over."""
    plan, remedy = plan_of(prepared), r"6 steps, in one epoch; set max_duration to Duration.steps\(6\)"
    with pytest.raises(TokenSuperpositionError, match=f"max_duration is 10 steps, but the plan .* has {remedy}"):
        fit(run_config(prepared, steps=10), plan, small_model("llama"), tmp_path)
    loader = PlannedDataLoader(plan, tmp_path)
    loader.reshuffle()
    assert loader.epoch == 1
    with pytest.raises(TokenSuperpositionError, match=f"epoch 2 begins, but the plan .* has {remedy}"):
        loader.reshuffle(2)


def test_another_batch_size_is_refused(prepared: Path, tmp_path: Path) -> None:
    """The loader went on with the plan's batches, while learning rate, token counts and resume point changed."""
    schedule = BatchSizeSchedulerCallback(batch_sizes=[64, 128], schedule=[Duration.steps(0), Duration.steps(2)])
    message = r"to become 128 tokens, but every step of the plan has 64 \(4 sequences of 16\); leave BatchSizeSchedul"
    with pytest.raises(TokenSuperpositionError, match=message):
        fit(run_config(prepared, steps=6), plan_of(prepared), small_model("llama"), tmp_path, {"sizes": schedule})


def test_head_on_ordinary_labels_is_the_stock_head() -> None:
    torch.manual_seed(0)
    config = transformer_config(small_model("llama").config).lm_head
    ours = config.build(d_model=32, vocab_size=320)
    stock = LMHeadConfig(layer_norm=config.layer_norm, bias=False).build(d_model=32, vocab_size=320)
    assert isinstance(ours, TSTLMHead) and not isinstance(stock, TSTLMHead)
    stock.load_state_dict(ours.state_dict())
    x, labels = torch.randn(2, 5, 32), torch.randint(320, (2, 5))
    labels[0, :3] = -100
    for options in ({"loss_reduction": "sum", "loss_div_factor": torch.tensor(7)}, {"loss_reduction": "mean"}):
        got, want = (head(x, labels=labels, return_logits=False, **options) for head in (ours, stock))
        assert got.logits is None
        torch.testing.assert_close((got.loss, got.ce_loss), (want.loss, want.ce_loss))
    assert torch.equal(ours(x), stock(x))
    kept: list[dict[str, Any]] = [{"logits_to_keep": 2}, {"logits_to_keep": torch.tensor([[3, 0], [1, 2]])}]
    for options in ({"loss_reduction": "none"}, {}, *kept, *({"return_logits": False} | k for k in kept)):
        got, want = (head(x, labels=labels, **options) for head in (ours, stock))
        assert torch.equal(got.loss, want.loss), options
        assert (got.logits is None) == ("return_logits" in options) == (want.logits is None)
        assert got.logits is None or torch.equal(got.logits, want.logits)
        with pytest.raises(TokenSuperpositionError, match=r"labels are bags \(2, 5, 1\), .*; set return_logits=False"):
            ours(x, labels=labels[..., None], **options)
    with pytest.raises(TokenSuperpositionError, match="leave it None"):
        ours(x, labels=labels, return_logits=False, z_loss_multiplier=1e-4)


@pytest.mark.parametrize("first", ["apply_tp", "apply_cp"])
def test_tensor_with_context_parallelism_is_refused(first: str) -> None:
    """The loss was too small by the number of context-parallel processes."""
    head = transformer_config(small_model("llama").config).lm_head.build(d_model=32, vocab_size=320)
    mesh: Any = SimpleNamespace(size=lambda: 2)
    with pytest.MonkeyPatch.context() as patch:  # a mesh of several processes takes several
        patch.setattr(LMHead, "apply_tp", lambda self, mesh, _: setattr(self, "_tp_mesh", mesh))
        getattr(head, first)(mesh)
        with pytest.raises(TokenSuperpositionError, match=r"tp_config and cp_config are both set, .*; leave one out"):
            (head.apply_cp if first == "apply_tp" else head.apply_tp)(mesh)


@pytest.mark.parametrize("architecture", BOTH)
@pytest.mark.parametrize("tied", [False, True])
def test_trained_and_exported_logits_are_equal(architecture: str, tied: bool, prepared: Path, tmp_path: Path) -> None:
    start = small_model(architecture, tie_word_embeddings=tied)
    trainer, _ = fit(run_config(prepared, architecture, steps=4), plan_of(prepared, 4), start, tmp_path)
    model = trainer.train_module.model.eval()
    export_model(model, start.config, tmp_path / "model")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    assert type(exported) is type(start) and exported.config.tie_word_embeddings is tied
    ids = torch.randint(320, (2, 16), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits, before = model(ids), start.eval()(ids).logits
        torch.testing.assert_close(exported(ids).logits, logits, rtol=1e-5, atol=1e-5)
    assert (logits - before).abs().max() > 0.1
