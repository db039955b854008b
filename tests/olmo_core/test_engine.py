"""The OLMo-core engine on one process: it trains the float64 reference and counts what is computed."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from olmo_core.nn.hf.convert import convert_state_from_hf
from olmo_core.nn.lm_head import LMHeadConfig
from olmo_core.train.callbacks import Callback
from transformers import AutoModelForCausalLM

from tests.conftest import tiny
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
from token_superposition.engines.olmo_core.__main__ import main
from token_superposition.engines.olmo_core.train import Layout, build_trainer, train_module
from token_superposition.experiment.config import Config, ModelConfig, save_config

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


def fit(config: Config, plan: PlannedDataset, start: Any, out: Path) -> tuple[Any, Spy]:
    """Train from the weights of a transformers model."""
    spy = Spy()
    model = transformer_config(start.config, config.superposition.weighting).build(init_device="meta")
    module = train_module(config, model, Layout(1, 1, config.train.micro_batch_size or plan.batch_size))
    load_weights(module.model, start)
    trainer = build_trainer(config, out, module, plan, {"spy": spy})
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


def test_norms_are_not_decayed(prepared: Path) -> None:
    start = small_model("qwen3")
    module = train_module(
        run_config(prepared, weight_decay=0.3), transformer_config(start.config).build(), Layout(1, 1, 4)
    )
    assert module.optim is not None
    decay = {id(p): group["weight_decay"] for group in module.optim.param_groups for p in group["params"]}
    for name, p in module.model.named_parameters():
        assert decay[id(p)] == (0.0 if p.dim() == 1 else 0.3), name


@pytest.mark.parametrize("workers", [0, 1])
def test_ranks_share_the_batches_of_the_plan(workers: int, prepared: Path, tmp_path: Path) -> None:
    plan = plan_of(prepared)
    loaders = [PlannedDataLoader(plan, tmp_path, 2, rank, workers) for rank in range(2)]
    for loader in loaders:
        loader.load_state_dict({"step": 2})
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
    """The states of the same plan and of one saved before there were fingerprints are taken."""
    loader = PlannedDataLoader(plan_of(prepared), tmp_path)
    other = PlannedDataLoader(plan_of(prepared, 12, 8), tmp_path).state_dict() | {"step": 4}
    differ = r"phases .* there, \[\[0, 4, 4\], \[3, 1, 1\]\] here, batch_size 8 there, 4 here; .*load_trainer"
    with pytest.raises(TokenSuperpositionError, match=f"another plan of the samples: {differ}"):
        loader.load_state_dict(other)
    ordinary = {"dataset_type": "fsl", "batches_processed": 5, "tokens_processed": 320, "epoch": 1, "seed": 0}
    with pytest.raises(TokenSuperpositionError, match=r"no step of a plan; .*load_trainer_state=False"):
        loader.load_state_dict(ordinary)
    assert loader.batches_processed == 0
    for state in (loader.state_dict() | {"step": 2}, {"step": 2}):
        loader.load_state_dict(state)
        assert loader.batches_processed == 2


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
    got, want = (head(x, labels=labels, loss_reduction="none") for head in (ours, stock))
    assert torch.equal(got.loss, want.loss) and torch.equal(got.logits, want.logits)
    with pytest.raises(TokenSuperpositionError, match="leave it None"):
        ours(x, labels=labels, z_loss_multiplier=1e-4)


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


OF = "is not a multiple of"
ENGINE = "the OLMo-core engine"


@pytest.mark.parametrize(
    ("processes", "flags", "message"),
    [
        (3, "--tensor-parallel 2", "--tensor-parallel 2 does not divide 3 processes; start a multiple of 2"),
        (4, "--train.batch-size 6", f"train.batch_size 6 {OF} 4 data-parallel processes x micro-batch 1; change"),
        (2, "--train.micro-batch-size 4", f"train.batch_size 4 {OF} 2 data-parallel processes x micro-batch 4"),
        (3, "--tensor-parallel 3",
         f"the vocabulary, 320, {OF} --tensor-parallel 3; set model.options.vocab_size to 321, or"),
        (4, "--tensor-parallel 4", f"num_attention_heads, 2, {OF} --tensor-parallel 4"),
        (2, "--tensor-parallel 2 --data.sequence-length 17", f"data.sequence_length, 17, {OF} --tensor-parallel 2"),
        (2, "--superposition.shift", "superposition.shift is True; the OLMo-core engine does not have it, so use tst"),
        (2, "--superposition.anneal 4 2 --superposition.mixture 0.5",
         "superposition.mixture is 0.5; the OLMo-core engine does not have it"),
        (2, "--train.optimizer muon", "train.optimizer is 'muon'; the OLMo-core engine has adamw only, so use"),
        (1, "--train.on-nonfinite skip", "train.on_nonfinite is 'skip'; OLMo-core stops at a loss that is not finite"),
        (1, "--train.keep 5", "train.keep is 5; the OLMo-core engine keeps every checkpoint: leave it out"),
        (2, "--superposition.loss sum-to-one",
         "superposition.loss is 'sum-to-one'; the OLMo-core engine does not have it, so use tst train"),
        (2, "--data.path nowhere", "nowhere holds no prepared data"),
        (2, "--train.steps 0", "train.steps is 0; give a whole number of at least 1"),
        (2, ModelConfig("qwen3_moe", {"num_hidden_layers": 1}), f"model.architecture is qwen3_moe; {ENGINE}"),
        (2, ModelConfig("llama", {"hidden_act": "gelu"}), f"hidden_act is 'gelu'; {ENGINE} has 'silu' only"),
        (2, "gpt2", f"model.architecture is gpt2; {ENGINE} trains llama and qwen3, so"),
        (2, "small", "the model has 100 token embeddings, the data's vocabulary has 320"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_before_any_process_group(
    processes: int, flags: str | ModelConfig, message: str,
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    monkeypatch.setenv("RANK", "0")
    tiny("gpt2").save_pretrained(tmp_path / "gpt2")
    tiny("llama", vocab_size=100).save_pretrained(tmp_path / "small")
    model = flags if isinstance(flags, ModelConfig) else None
    config = run_config(prepared, start=tmp_path / flags if flags in ("gpt2", "small") else None)
    save_config(dataclasses.replace(config, model=model) if model else config, tmp_path / "config.toml")
    arguments = flags.split() if isinstance(flags, str) and flags.startswith("--") else []
    capsys.readouterr()
    assert main([str(tmp_path / "config.toml"), "--out", str(tmp_path / "run"), *arguments]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert message in lines[-1] and [x for x in lines if "error" in x] == [lines[-1]]
    assert not dist.is_initialized() and not (tmp_path / "run").exists()


def test_missing_and_wrong_engine(tmp_path: Path) -> None:
    """Without site-packages there is no OLMo-core; a distribution found first says it is another version."""
    source = str(Path(__file__).parents[2] / "src")
    name = "from token_superposition.engines.olmo_core import TSTTrainModule"
    done = subprocess.run(
        [sys.executable, "-S", "-c", name], capture_output=True, text=True, env={"PYTHONPATH": source}
    )
    remedy = "pip install 'token-superposition[olmo]'"
    assert f"needs ai2-olmo-core>=3.0,<3.1, it is not installed; {remedy}" in done.stderr
    wrong = tmp_path / "ai2_olmo_core-3.1.0.dist-info"
    wrong.mkdir()
    (wrong / "METADATA").write_text("Metadata-Version: 2.1\nName: ai2-olmo-core\nVersion: 3.1.0\n")
    command = [sys.executable, "-m", "token_superposition.engines.olmo_core", "config.toml"]
    path = {"PYTHONPATH": f"{tmp_path}{os.pathsep}{source}"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=os.environ | path)
    assert done.returncode == 2
    assert (
        done.stderr == f"tst: error: the OLMo-core engine needs ai2-olmo-core>=3.0,<3.1, 3.1.0 is installed; {remedy}\n"
    )
