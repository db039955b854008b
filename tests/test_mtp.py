"""Heads for further tokens: the loss is the reference, the limit case the plain method, the end a stock model."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, default_data_collator

from tests.conftest import VOCAB, tiny
from tests.test_accountings import directory_of, run, shown
from tests.test_places import lines_of
from tests.test_trainer import Spy, arguments, losses, plan_of
from tests.test_variants import changed
from token_superposition import Schedule, TokenSuperpositionError, place_weights, reference
from token_superposition.data.plan import PlannedDataset, ValidationSet
from token_superposition.data.store import TokenStore
from token_superposition.engines.transformers import TSTTrainer
from token_superposition.engines.transformers.mtp import FILE, MTPHeads, check_checkpoint
from token_superposition.engines.transformers.muon import split_parameters
from token_superposition.experiment.budget import shape_of
from token_superposition.experiment.checkpoints import newest_whole
from token_superposition.experiment.compare import jobs_of
from token_superposition.experiment.config import Config, load_config
from token_superposition.experiment.dry_run import cost_of_job
from token_superposition.experiment.launch import Launch
from token_superposition.experiment.summary import comparison
from token_superposition.experiment.superposition import SuperpositionConfig
from token_superposition.report.contents import interval_table, read

HEADS, WEIGHT = 2, 0.3


def with_heads(model: nn.Module, heads: int = HEADS) -> MTPHeads:
    """Heads that have learned something."""
    mtp, g = MTPHeads(model, heads, WEIGHT), torch.Generator().manual_seed(3)
    for p in mtp.parameters():
        p.data.normal_(0, 0.2, generator=g)
    return mtp


def by_hand(model: Any, mtp: MTPHeads, batch: dict[str, Tensor], weighting: str) -> Tensor:
    """From whole logits, row by row; a position without a further target counts as a row with no loss."""
    ids, targets = batch["input_ids"], batch["shift_labels"]
    rows = model.get_input_embeddings()(ids)
    hidden = model.get_decoder()(inputs_embeds=rows.mean(2) if ids.dim() == 3 else rows).last_hidden_state
    targets = targets if targets.dim() == 3 else targets.unsqueeze(2)
    weights = place_weights(weighting, targets.shape[2]).double()  # pyright: ignore
    cap = getattr(model.config, "final_logit_softcapping", None)

    def loss(h: Tensor, t: Tensor) -> Tensor:
        z = h @ model.get_output_embeddings().weight.T / (getattr(model.config, "logits_scaling", None) or 1)
        z = cap * torch.tanh(z / cap) if cap else z
        return reference.multi_hot_cross_entropy(z.flatten(0, 1), t.flatten(0, 1), weights)

    total, length = loss(hidden, targets), targets.shape[1]
    for k, matrix in enumerate(mtp.parameters(), 1):
        further = hidden + F.silu(hidden @ matrix.T)
        total = total + WEIGHT / HEADS * loss(further[:, :-k], targets[:, k:]) * (length - k) / length
    return total


@pytest.mark.parametrize(
    ("architecture", "tied", "weighting"),
    [("llama", False, "uniform"), ("llama", True, "power"), ("gemma2", True, "uniform"), ("granite", False, "power")],
)
@pytest.mark.parametrize("ratio", [0.5, 0.0])
def test_the_first_step_is_the_reference(
    architecture: str, tied: bool, weighting: Any, ratio: float, prepared: Path, tmp_path: Path
) -> None:
    """Loss and every gradient, the heads' too, on bags and on tokens."""
    model, spy = tiny(architecture, tie_word_embeddings=tied), Spy()
    plan = PlannedDataset(TokenStore(prepared), Schedule.two_phase(2, 4, ratio), 16, 4, seed=1)
    trainer = TSTTrainer(
        model, arguments(tmp_path, max_steps=1, max_grad_norm=0.0), train_dataset=plan, weighting=weighting,
        mtp=with_heads(model), callbacks=[spy],
    )  # fmt: skip
    trainer.train()
    model = tiny(architecture, tie_word_embeddings=tied)
    mtp = with_heads(model)
    model = model.double()
    loss = by_hand(model, mtp, default_data_collator([plan[i] for i in range(4)]), weighting)
    assert losses(trainer)[0] == pytest.approx(loss.item(), rel=1e-4)
    loss.backward()
    assert sum("mtp_heads" in name for name in spy.grads) == HEADS
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.abs().sum() > 0
        torch.testing.assert_close(spy.grads[name].double(), p.grad, rtol=2e-3, atol=2e-6, msg=name)


def test_a_head_begins_as_the_model() -> None:
    model, hidden = tiny("llama"), torch.randn(2, 5, 32)
    assert torch.equal(MTPHeads(model, 3, WEIGHT)(hidden), hidden.expand(3, 2, 5, 32))


def test_the_targets_are_the_models_further_on() -> None:
    mtp = MTPHeads(tiny("llama"), 2, WEIGHT)
    assert mtp.targets(torch.arange(4)[None]).tolist() == [[[1, 2, 3, -100]], [[2, 3, -100, -100]]]
    bags = torch.arange(6).reshape(1, 3, 2)
    none = [-100, -100]
    assert mtp.targets(bags).tolist() == [[[[2, 3], [4, 5], none]], [[[4, 5], none, none]]]


@pytest.mark.parametrize("counted", [True, False])  # a model may leave the division by rows to the trainer
def test_accumulation_does_not_change_the_loss(counted: bool, prepared: Path, tmp_path: Path) -> None:
    found: list[list[float]] = []
    for parts in (1, 2):
        model = tiny("llama")
        args = arguments(tmp_path, per_device_train_batch_size=4 // parts, gradient_accumulation_steps=parts)
        trainer = TSTTrainer(model, args, train_dataset=plan_of(prepared), mtp=with_heads(model))
        trainer.model_accepts_loss_kwargs = counted
        trainer.train()
        found.append(losses(trainer))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5) and found[0] == pytest.approx(found[1], rel=2e-3)


def test_masked_rows_count_for_no_head(prepared: Path, tmp_path: Path) -> None:
    """Whoever divides by the rows that have a target, trainer or loss: the mean is the same."""

    class Masked(PlannedDataset):
        def __getitem__(self, index: int) -> dict[str, Tensor]:
            sample = super().__getitem__(index)
            sample["shift_labels"][5:] = -100
            return sample

    found: list[float] = []
    for counted in (True, False):
        model = tiny("llama")
        plan = Masked(TokenStore(prepared), Schedule.two_phase(2, 4, 0.5), 16, 4)
        trainer = TSTTrainer(model, arguments(tmp_path, max_steps=1), train_dataset=plan, mtp=with_heads(model))
        trainer.model_accepts_loss_kwargs = counted
        trainer.train()
        found += losses(trainer)
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_without_heads_or_weight_it_is_the_plain_method(write_config: Callable[..., Path], tmp_path: Path) -> None:
    config = load_config(write_config())
    expected = lines_of(config, tmp_path / "plain")
    for name, limit in {"no heads": {"mtp_weight": 0.9}, "no weight": {"mtp_heads": 2, "mtp_weight": 0.0}}.items():
        assert lines_of(changed(config, limit), tmp_path / name) == expected
        weights = "model/model.safetensors"
        assert (tmp_path / name / weights).read_bytes() == (tmp_path / "plain" / weights).read_bytes()


@pytest.mark.parametrize(
    ("settings", "saves"),
    [({}, (4, 6, 9)), ({"ratio": 0.0}, (6,)), ({"optimizer": "muon", "reset_optimizer": True}, (6,))],
)
def test_it_resumes_as_itself_and_ends_as_a_stock_model(
    settings: dict[str, Any], saves: tuple[int, ...], write_config: Callable[..., Path], tmp_path: Path
) -> None:
    """With TST (from before, at and after the switch), alone, and with Muon."""
    plain = changed(load_config(write_config()), settings)
    config = changed(plain, {"mtp_heads": HEADS}, save_at=saves)
    before, whole = lines_of(plain, tmp_path / "plain"), lines_of(config, tmp_path / "whole")
    assert [m["val_loss"] for m in before if "val_loss" in m] != [m["val_loss"] for m in whole if "val_loss" in m]
    for step in saves:
        checkpoint = tmp_path / f"whole/checkpoints/checkpoint-{step}"
        assert lines_of(config, tmp_path / f"{step}", checkpoint) == whole
    files = [sorted(p.name for p in (tmp_path / name / "model").iterdir()) for name in ("plain", "whole")]
    assert files[0] == files[1]
    for saved in (tmp_path / "whole/model", tmp_path / "whole/checkpoints/checkpoint-6"):
        _, info = AutoModelForCausalLM.from_pretrained(saved, output_loading_info=True)
        assert not any(info.values())
        assert (saved / "config.json").read_text() == (tmp_path / "plain/model/config.json").read_text()
    results = [json.loads((tmp_path / name / "run.json").read_text()) for name in ("plain", "whole")]
    assert results[0]["parameters"] == results[1]["parameters"]
    extra = 6 * HEADS * 32 * (32 + VOCAB) * results[0]["latent_tokens"]
    assert results[1]["flops"] - results[0]["flops"] == extra and whole[-1]["flops"] == results[1]["flops"]


def test_validation_is_the_models_own_next_token_loss(prepared: Path, tmp_path: Path) -> None:
    held_out = ValidationSet(TokenStore(prepared, "validation"), 16)
    model = tiny("llama")
    args = arguments(tmp_path, eval_strategy="steps", eval_steps=3, per_device_eval_batch_size=len(held_out))
    mtp = with_heads(model)
    trainer = TSTTrainer(model, args, train_dataset=plan_of(prepared), eval_dataset=held_out, mtp=mtp)
    trainer.train()
    found = [line["eval_loss"] for line in trainer.state.log_history if "eval_loss" in line]
    del model.mtp_heads
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in tiny("llama").named_parameters()]
    batch = default_data_collator(list(held_out))
    logits = model.double().eval()(batch["input_ids"]).logits
    expected = F.cross_entropy(logits.flatten(0, 1), batch["shift_labels"].flatten())
    assert len(found) == 2 and found[-1] == pytest.approx(expected.item(), rel=1e-4)


def test_the_heads_are_trained_and_are_in_no_state_dict(prepared: Path, tmp_path: Path) -> None:
    model = tiny("llama")
    mtp = MTPHeads(model, HEADS, WEIGHT)
    assert list(model.state_dict()) == list(tiny("llama").state_dict())
    trainer = TSTTrainer(model, arguments(tmp_path), train_dataset=plan_of(prepared), mtp=mtp)
    trainer.train()
    matrices = list(mtp.parameters())
    assert all(p.abs().max() > 1e-3 for p in matrices) and not torch.equal(*matrices)
    decayed = trainer.optimizer.param_groups[0]["params"]
    assert all(any(p is q for q in decayed) for p in matrices)
    assert all(any(p is q for q in split_parameters(model)[0]) for p in matrices)
    mtp.save(tmp_path)
    twin = MTPHeads(tiny("llama"), HEADS, WEIGHT)
    twin.load(tmp_path)
    assert all(map(torch.equal, matrices, twin.parameters()))


def test_flops_are_what_torch_counts(write_config: Callable[..., Path]) -> None:
    model = tiny("llama")
    mtp = MTPHeads(model, 3, WEIGHT)
    with FlopCounterMode(display=False) as counter:
        model.get_output_embeddings()(mtp(torch.zeros(1, 16, 32)))
    assert 3 * counter.get_total_flops() == mtp.flops_per_token * 16
    shape = shape_of(load_config(write_config()), VOCAB)
    assert shape.flops_per_token(16, 3) - shape.flops_per_token(16) == mtp.flops_per_token


VARIANTS = """
[[compare.variants]]
name = "mtp"
superposition = { ratio = 0.0, mtp_heads = 2 }
[[compare.variants]]
name = "tst+mtp"
superposition = { ratio = 0.5, mtp_heads = 2, mtp_weight = 0.1 }
"""


def test_alone_and_with_tst_side_by_side(write_config: Callable[..., Path]) -> None:
    config = load_config(write_config(append=VARIANTS))
    config.check()
    shape = shape_of(config, VOCAB)
    jobs = {j.name: j for j in jobs_of(config)}
    heads = {name: j.config.superposition.trained_heads for name, j in jobs.items()}
    assert heads == {"baseline": 0, "tst": 0, "mtp": 2, "tst+mtp": 2}
    assert not jobs["mtp"].config.schedule.switches and jobs["tst+mtp"].config.schedule.switches
    flops = {name: float(shape.flops_per_token(16, n)) for name, n in heads.items()}
    costs = {n: cost_of_job(j, 12, flops[n], flops[n] / flops["tst"]) for n, j in jobs.items()}
    assert costs["mtp"].flops / costs["tst"].flops == flops["mtp"] / flops["tst"] > 1.2
    assert costs["mtp"].step_equivalents > costs["tst"].step_equivalents


def test_the_report_says_that_equal_steps_are_not_equal_flops(tmp_path: Path) -> None:
    runs = [run("baseline", 0, 1000, 3.0), run("baseline-x2", 0, 2000, 2.8), run("tst", 0, 1000, 2.9)]
    runs.append(replace(run("mtp", 0, 1000, 2.95), flops=1.25e12))
    result = comparison(runs)["variants"]
    assert result["tst"]["flops_ratio"] == 1 and result["mtp"]["flops_ratio"] == 1.25
    assert result["mtp"]["equal_flops"]["baseline_steps"] == 1250
    for text in shown(directory_of(runs, tmp_path / "report")):
        words = " ".join(text.split())
        assert "tst: equal FLOPs" in words and "tst: equal steps" not in words
        assert "mtp: equal steps" in words and "1.25 x the FLOPs of the" in words
        assert "1,189 steps, 1.19 x the 1,000 (between baselines that were run; its steps cost more: 0.95 x in" in words
        assert "1.41 x the 1,000 (between baselines that were run)" in words


def test_a_speedup_in_steps_that_cost_more_is_told_in_flops(tmp_path: Path) -> None:
    """1.19 x the steps, of which each costs 1.25 x: 0.95 x the FLOPs, which is no speed-up."""
    runs = [
        run(name, seed, n, loss)
        for name, n, loss in (("baseline", 1000, 3.0), ("baseline-x2", 2000, 2.8))
        for seed in (0, 1)
    ]
    runs += [run("tst", seed, 1000, 2.9) for seed in (0, 1)]
    runs += [replace(run("mtp", seed, 1000, 2.95), flops=1.25e12) for seed in (0, 1)]
    for text in shown(directory_of(runs, tmp_path / "report")):
        words = " ".join(text.split())
        assert "needs 1.19 x the steps" in words and "its steps cost more: 0.95 x in FLOPs" in words
        assert "needs 1.41 x the steps" in words and "1.41 x in FLOPs" not in words
    table = interval_table(read(tmp_path / "report"))
    column = table[0].index("speed-up")
    assert [row[column] for row in table] == ["speed-up", "1.41", "0.95"]


def test_a_checkpoint_of_other_heads_is_refused(tmp_path: Path, write_config: Callable[..., Path]) -> None:
    with_heads(tiny("llama")).save(tmp_path)
    check_checkpoint(tmp_path, 2)
    with pytest.raises(TokenSuperpositionError, match="with 2 heads for further tokens and this run has 0; set "):
        check_checkpoint(tmp_path, 0)
    (tmp_path / FILE).unlink()
    with pytest.raises(TokenSuperpositionError, match="with 0 heads for further tokens and this run has 3; set "):
        check_checkpoint(tmp_path, 3)
    config = changed(load_config(write_config(steps=2)), {"mtp_heads": 1}, save_at=(1,))
    lines_of(config, tmp_path / "one")
    checkpoint = newest_whole(tmp_path / "one/checkpoints")
    assert checkpoint is not None
    with pytest.raises(TokenSuperpositionError, match="with 1 heads"):
        lines_of(changed(config, {"mtp_heads": 2}), tmp_path / "two", checkpoint)


def test_a_model_that_hides_its_hidden_states_is_refused(prepared: Path, tmp_path: Path) -> None:
    model = tiny("bert")
    with pytest.raises(TokenSuperpositionError, match="but BertLMHeadModel shows no hidden states for them"):
        TSTTrainer(model, arguments(tmp_path), train_dataset=plan_of(prepared), mtp=MTPHeads(model, 1, WEIGHT))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mtp_heads": -1}, "superposition.mtp_heads is -1"),
        ({"mtp_heads": 1024}, "superposition.mtp_heads 1024 look past the sequence; give less than data.sequence"),
        ({"mtp_heads": 1, "mtp_weight": -0.1}, "superposition.mtp_weight is -0.1; give a number from 0 up"),
    ],
)
def test_bad_input_has_one_clear_line(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(TokenSuperpositionError, match=message):
        changed(Config(), settings).check()


def test_fsdp_and_other_engines_refuse(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FSDP_VERSION", "2")
    launch = Launch(sharded=True, device_memory=80e9)
    launch.check(changed(Config(), {"mtp_heads": 2, "mtp_weight": 0.0}))
    with pytest.raises(TokenSuperpositionError, match=r"superposition.mtp_heads is 2, which was not made for FSDP"):
        launch.check(changed(Config(), {"mtp_heads": 2}))
    with pytest.raises(TokenSuperpositionError, match=r"superposition.mtp_heads is 2; the other engine does not have"):
        SuperpositionConfig(mtp_heads=2).refuse_variants("other")
