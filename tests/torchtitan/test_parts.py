"""Loss, learning rate, loader and checks of the torchtitan engine, each against an independent reference."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torchtitan.components.lora import LoRAConverter
from torchtitan.components.optimizer import LRSchedulersContainer
from torchtitan.config import ParallelismConfig
from torchtitan.models.common import Embedding, Linear
from torchtitan.models.deepseek_v3 import model_registry as deepseek
from torchtitan.models.llama3 import model_registry
from transformers import LlamaConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

from tests.processes import call
from tests.torchtitan.mistakes import say_what_is_wrong
from tests.torchtitan.vocabulary import S, V, example, expected_loss
from token_superposition import WSD, Schedule, TokenSuperpositionError, place_weights
from token_superposition.data.plan import PlannedDataset, ValidationSet
from token_superposition.data.store import TokenStore
from token_superposition.engines.torchtitan.balance import BalancedRouter
from token_superposition.engines.torchtitan.checks import (
    batch_sizes,
    data_parallel,
    foreign,
    logits_divide,
    machine,
    model_divides,
)
from token_superposition.engines.torchtitan.data import HeldOutLoader, PlannedLoader
from token_superposition.engines.torchtitan.embedding import BagEmbedding
from token_superposition.engines.torchtitan.export import as_saved
from token_superposition.engines.torchtitan.loss import BagLoss
from token_superposition.engines.torchtitan.models import checked_settings, with_bags
from token_superposition.experiment.config import ModelConfig


@pytest.mark.parametrize("weighting", ["uniform", "power"])
def test_loss_is_the_reference(weighting: Any) -> None:
    loss = BagLoss.Config(weighting=weighting, vocab_size=V).build()
    weights = place_weights(weighting, S).double()
    logits, targets = example()
    got, metrics = loss(logits, targets, torch.tensor(7), positions=None)
    want = expected_loss(logits, targets, weights)
    assert metrics == {}
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, logits)[0], torch.autograd.grad(want, logits)[0])
    got, _ = loss(logits, targets[..., 2])
    want = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets[..., 2].flatten(), reduction="sum")
    torch.testing.assert_close(got, want)
    with pytest.raises(TokenSuperpositionError, match="targets of shape"):
        loss(logits, targets[:, :4])


def test_loss_of_a_sharded_vocabulary(runs: Path) -> None:
    """``vocabulary.check`` on two processes, in the same launch as the runs: the imports take longer than the test."""
    assert (runs / "vocabulary.0").read_text() == (runs / "vocabulary.1").read_text() == "equal"


def test_auxiliary_loss_is_that_of_transformers() -> None:
    """Gradients by gates and inputs of two layers, against autograd through transformers' function."""
    config = BalancedRouter.Config(
        num_experts=6, gate=Linear.Config(in_features=5, out_features=6), top_k=2, score_func="softmax",
        route_norm=True, coefficient=0.3, rows=2 * 2 * 7,
    )  # fmt: skip
    torch.manual_seed(0)
    model = torch.nn.ModuleList([config.build() for _ in range(2)])
    BalancedRouter.link(model)
    inputs = [torch.randn(2, 7, 5, requires_grad=True) for _ in range(2)]
    leaves = [*inputs, *model.parameters()]
    scores = [router(x)[0] for router, x in zip(model, inputs, strict=True)]
    gradients = torch.autograd.grad(sum(s.sum() * 0 for s in scores), leaves)  # pyright: ignore
    logits = tuple(router.gate(x).flatten(0, 1) for router, x in zip(model, inputs, strict=True))  # pyright: ignore
    loss = 0.3 * load_balancing_loss_func(logits, 6, 2)
    for got, want in zip(gradients, torch.autograd.grad(loss, leaves), strict=True):  # pyright: ignore
        torch.testing.assert_close(got, want / 2)  # one of the step's two micro-batches
    assert want.abs().max() > 1e-3  # pyright: ignore


@pytest.mark.parametrize(("steps", "warmup", "decay"), [(100, 10, 0.1), (12, 2, 0.25), (7, 0, 0.0), (10, 3, 0.7)])
def test_torchtitans_schedule_is_our_wsd(steps: int, warmup: int, decay: float) -> None:
    config = LRSchedulersContainer.Config(warmup_steps=warmup, decay_ratio=decay)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    container = config.build(optimizers=[optimizer], training_steps=steps)
    wsd = WSD(steps, warmup, decay)
    for step in range(steps):
        assert container.get_metrics()["lr/SGD"] == pytest.approx(wsd(step), rel=1e-12)
        optimizer.step()
        container.step()


def planned(store: Path, processes: int, rank: int, micro: int, steps: int = 6) -> PlannedLoader:
    schedule = Schedule.two_phase(steps, 4, 0.5)
    config = PlannedLoader.Config(dataset_path=str(store), schedule=schedule, global_batch_size=8)
    return config.build(dp_world_size=processes, dp_rank=rank, seq_len=16, local_batch_size=micro, tokenizer=None)


def test_loader_deals_the_plan(prepared: Path) -> None:
    """Over processes and micro-batches: every sample of a step once, in order; resumed with other processes too."""
    plan = PlannedDataset(TokenStore(prepared), Schedule.two_phase(6, 4, 0.5), 16, 8)
    loaders = [iter(planned(prepared, 2, rank, 2)) for rank in range(2)]
    for step in range(4):
        batches = [next(loader) for _ in range(2) for loader in loaders]
        ids, targets = torch.cat([b[0]["input"] for b in batches]), torch.cat([b[1] for b in batches])
        samples = [plan[step * 8 + i] for i in range(8)]
        assert torch.equal(ids, torch.stack([s["input_ids"] for s in samples]))
        assert torch.equal(targets, torch.stack([s["shift_labels"] for s in samples]))
        assert ids.shape == ((8, 16, 4) if step < 3 else (8, 16))
        assert all(torch.equal(b[0]["positions"], torch.arange(16).expand(2, 16)) for b in batches)
    before = planned(prepared, 2, 0, 2)
    batches = iter(before)
    for _ in range(8):
        next(batches)
    assert before.state_dict()["step"] == 4
    after = planned(prepared, 4, 3, 1)
    after.load_state_dict(before.state_dict())
    rest = list(after)
    assert [b[0]["input"].tolist() for b in rest] == [[plan[i]["input_ids"].tolist()] for i in (35, 39, 43, 47)]


def test_state_goes_through_a_checkpoint(prepared: Path, tmp_path: Path) -> None:
    """That of another plan is refused."""
    before = planned(prepared, 1, 0, 8)
    before.micro_batches = 2
    dcp.save({"dataloader": before}, checkpoint_id=tmp_path, no_dist=True)
    loader = planned(prepared, 2, 0, 2)
    loader.micro_batches = 10
    dcp.load({"dataloader": loader}, checkpoint_id=tmp_path, no_dist=True)
    assert loader.micro_batches == 4
    other = planned(prepared, 2, 0, 2, steps=12)
    differ = r"phases \[\[0, 4, 4\], \[3, 1, 1\]\] there, \[\[0, 4, 4\], \[6, 1, 1\]\] here; .*initial_load_path"
    with pytest.raises(TokenSuperpositionError, match=f"another plan of the samples: {differ}"):
        dcp.load({"dataloader": other}, checkpoint_id=tmp_path, no_dist=True)
    state = before.state_dict()
    older = {k: v for k, v in json.loads(state["plan"]).items() if k != "order"}  # what a later version adds
    with pytest.raises(TokenSuperpositionError, match=r"another plan of the samples: order .* there, 2 here"):
        loader.load_state_dict(state | {"plan": json.dumps(older)})


def test_held_out_text_is_read_once(prepared: Path) -> None:
    config = HeldOutLoader.Config(dataset_path=str(prepared), tokens=16 * 7, infinite=False)
    assert [config.steps(16, batch_size) for batch_size in (1, 4, 7, 8)] == [7, 2, 1, 1]
    loaders = [config.build(dp_world_size=2, dp_rank=r, seq_len=16, local_batch_size=2, tokenizer=None) for r in (0, 1)]
    held_out = ValidationSet(TokenStore(prepared, "validation"), 16, 16 * 7)
    assert len(held_out) == 7
    batches = [b for pair in zip(*loaders, strict=True) for b in pair]
    targets = torch.cat([t for _, t in batches])
    assert targets.shape == (8, 16) and bool((targets[7] == -100).all())
    assert torch.equal(targets[:7], torch.stack([held_out[i]["shift_labels"] for i in range(7)]))
    endless = replace(config, infinite=True).build(
        dp_world_size=1, dp_rank=0, seq_len=16, local_batch_size=1, tokenizer=None
    )
    after = [t for _, t in islice(endless, 9)][7:]  # a step of a pipeline with 4 micro-batches ends there
    assert all(bool((t == -100).all()) for t in after)


@pytest.mark.parametrize(
    ("flags", "world", "match"),
    [
        ({"tensor_parallel_degree": 3}, 8, r"8 processes cannot be divided .* 3 x 1 x 1 x -1; change parallelism"),
        ({"data_parallel_shard_degree": 4}, 8, "8 processes cannot be divided"),
        ({"expert_parallel_degree": 3}, 8, "expert_parallel_degree 3 does not divide the 8 processes"),
        ({"context_parallel_degree": 2}, 8, "context_parallel_degree is 2.*give 1"),
        ({"spmd_backend": "full_dtensor"}, 8, "full_dtensor.*give spmd_types"),
        (
            {"pipeline_parallel_degree": 2, "module_fqns_per_model_part": [["tok_embeddings"], ["layers.0", "norm"]]},
            8,
            r"a part \['tok_embeddings'\] without a norm, .*put a layer into it",
        ),
    ],
)
def test_processes_that_do_not_divide(flags: dict[str, Any], world: int, match: str) -> None:
    with pytest.raises(TokenSuperpositionError, match=match):
        data_parallel(ParallelismConfig(**flags), world)


def test_processes_and_batches_that_divide() -> None:
    assert data_parallel(ParallelismConfig(tensor_parallel_degree=2, pipeline_parallel_degree=2), 16) == 4
    assert data_parallel(ParallelismConfig(data_parallel_replicate_degree=2, expert_parallel_degree=4), 8) == 8
    assert batch_sizes(1024, -1, 8) == 128 and batch_sizes(1024, 4, 8) == 4
    with pytest.raises(TokenSuperpositionError, match=r"1000 is not a multiple of 8 .* micro-batch 3; give .* 984"):
        batch_sizes(1000, 3, 8)
    with pytest.raises(TokenSuperpositionError, match="6 is not a multiple of 4"):
        batch_sizes(6, -1, 4)


@pytest.mark.parametrize(
    ("options", "tensor", "expert", "match"),
    [
        (
            {"num_attention_heads": 9, "hidden_size": 72},
            2,
            1,
            "9 attention heads cannot .*degree 2; .*num_attention_heads",
        ),
        ({"num_key_value_heads": 1}, 2, 1, "1 key-value heads"),
        ({"vocab_size": 321}, 2, 1, "321 tokens of the vocabulary cannot be divided"),
        ({}, 1, 2, "no experts cannot be divided over .* 2"),
    ],
)
def test_models_that_do_not_divide(options: dict[str, Any], tensor: int, expert: int, match: str) -> None:
    given = {"num_attention_heads": 8, "num_key_value_heads": 8, "hidden_size": 64, **options}
    if given["num_attention_heads"] == 9:
        given["num_key_value_heads"] = 3
    settings = checked_settings(ModelConfig(options=given), 320, 0, 16)
    parallelism = ParallelismConfig(tensor_parallel_degree=tensor, expert_parallel_degree=expert)
    with pytest.raises(TokenSuperpositionError, match=match):
        model_divides(settings, parallelism)
        logits_divide(settings.vocab_size, parallelism, 16, 8)
    with pytest.raises(TokenSuperpositionError, match=r"17 is not a multiple of loss.num_chunks 8"):
        logits_divide(320, ParallelismConfig(), 17, 8)


@pytest.mark.parametrize(
    ("model", "match"),
    [
        (ModelConfig("gpt2"), "architecture is gpt2; the torchtitan engine has llama"),
        (ModelConfig(options={"hiden_size": 3}), "no field hiden_size; did you mean hidden_size"),
        (ModelConfig(options={"attention_bias": True}), "attention_bias is True; torchtitan's llama has False"),
        (ModelConfig(options={"vocab_size": 300}), "300 token embeddings, the data's vocabulary has 320"),
    ],
)
def test_models_that_torchtitan_lacks(model: ModelConfig, match: str) -> None:
    with pytest.raises(TokenSuperpositionError, match=match):
        checked_settings(model, 320, 0, 16)


def test_bags_go_into_a_model_of_ones_own() -> None:
    """All but the embedding stays, such as what a converter of torchtitan put in; the given spec is not changed."""
    given = model_registry("debugmodel")
    spec = with_bags(given, 320)
    assert isinstance(spec.model.tok_embeddings, BagEmbedding.Config)
    assert spec.model.tok_embeddings.param_init is given.model.tok_embeddings.param_init
    assert spec.model.layers is given.model.layers and spec.parallelize_fn is given.parallelize_fn
    assert type(given.model.tok_embeddings) is Embedding.Config
    assert with_bags(spec, 320).model.tok_embeddings is spec.model.tok_embeddings
    with pytest.raises(TokenSuperpositionError, match=r"2048 token embeddings, the data's vocabulary has 2049"):
        with_bags(given, 2049)
    frozen = model_registry("debugmodel", converters=[LoRAConverter.Config(rank=4, target_modules=["w1"])])
    with pytest.raises(TokenSuperpositionError, match=r"embedding FrozenEmbedding.Config, .* subclass of .*BagEmbedd"):
        with_bags(frozen, 320)
    several = deepseek("debugmodel", num_mtp_layers=1)
    with pytest.raises(TokenSuperpositionError, match=r"layers for multi-token prediction, .*num_mtp_layers=0"):
        with_bags(several, 320)
    with pytest.raises(TokenSuperpositionError, match=r"the model Embedding.Config; .*Decoder.Config"):
        with_bags(replace(given, model=given.model.tok_embeddings), 320)


def test_nothing_starts_where_torchtitan_cannot_run(configs: Path) -> None:
    """No accelerator: one line. With the shim: a bad batch stops before there is a process group."""
    if not torch.cuda.is_available():
        with pytest.raises(TokenSuperpositionError, match="no accelerator and has no CPU support"):
            machine()
    environment = {"TST_TEST_CONFIGS": str(configs), "WORLD_SIZE": "4", "RANK": "0", "LOCAL_RANK": "0"}
    done = call(say_what_is_wrong, **environment)
    said = [line for line in done.stdout.splitlines() if line.startswith("said:")]
    expected = [
        "global_batch_size 6 is not a multiple of 4 data-parallel processes",
        "ratio is 1.0",
        "nowhere holds no prepared data",
        "one block needs",
        "superposition.loss is 'sum-to-one'; the torchtitan engine does not have it",
        "debug.spmd_typechecking is set, .* leave it out",
        "lr_scheduler.total_steps 5 is less than training.steps 12; change one",
        "config.dataloader is a BaseDataLoader.Config, .* give a .*torchtitan.data.PlannedLoader.Config",
        "config.loss is a CrossEntropyLoss.Config, .* give a torchtitan.components.loss.ChunkedLossWrapper.Config",
        "config.loss.loss_fn is a CrossEntropyLoss.Config, .* give a .*torchtitan.loss.BagLoss.Config",
        "config.metrics is a MetricsProcessor.Config, .* give a .*torchtitan.metrics.BagMetrics.Config",
        "install torch 2.14",
        "train.optimizer is 'muon'; the torchtitan engine has adamw only",
        "torchtitan stops at a loss that is not finite",
        "keeps every checkpoint",
    ]
    assert len(said) == len(expected) and all(line.endswith(" False") for line in said), done.stdout + done.stderr
    for line, match in zip(said, expected, strict=True):
        assert re.search(match, line), line


def test_what_no_run_wrote_is_not_overwritten(tmp_path: Path) -> None:
    """Nor is the model from which the run starts; what a run wrote, its command writes again."""
    foreign(tmp_path / "new", None)
    (tmp_path / "model").mkdir()
    with pytest.raises(TokenSuperpositionError, match="model would be overwritten, and no run wrote it; choose"):
        foreign(tmp_path, None)
    (tmp_path / "metrics.jsonl").write_text('{"step": 3, "mine": true}\n')
    with pytest.raises(TokenSuperpositionError, match=r"metrics.jsonl would be overwritten, and no run wrote it"):
        foreign(tmp_path, None)
    counts = Schedule.two_phase(4, 4).counts(2, 8, 1)
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1, **counts}) + "\n")
    foreign(tmp_path, str(tmp_path / "other"))
    with pytest.raises(TokenSuperpositionError, match=r"model lies where the finished model of dump_folder .* goes"):
        foreign(tmp_path, str(tmp_path / "new" / ".." / "model"))


def test_an_export_says_of_what_type_its_weights_are() -> None:
    """That of a model in bfloat16, trained in float32, would be rounded when it is loaded."""
    settings = LlamaConfig(dtype=torch.bfloat16)
    told = as_saved(settings, {"model.embed_tokens.weight": torch.zeros(4, 2), "other": torch.zeros(2).half()})
    assert (told.dtype, told.architectures) == (torch.float32, ["LlamaForCausalLM"])
    assert (settings.dtype, settings.architectures) == (torch.bfloat16, None)


@pytest.mark.parametrize("installed", [None, "0.2.9"])
def test_another_torchtitan_is_refused(installed: str | None, tmp_path: Path) -> None:
    """Importing the engine without the extra, or with another version, which a real distribution's metadata names."""
    if installed is not None:
        info = tmp_path / f"torchtitan-{installed}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: torchtitan\nVersion: {installed}\n")
    hide = "sys.path = [p for p in sys.path if 'site-packages' not in p]\n" if installed is None else ""
    script = f"import sys, token_superposition\n{hide}import token_superposition.engines.torchtitan"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode and f"needs torchtitan==0.3.0, {installed or 'none'} is installed" in done.stderr
    assert "pip install 'token-superposition[torchtitan]'" in done.stderr
