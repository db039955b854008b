"""The transformers engine: what is trained is the float64 reference."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset
from transformers import (
    AutoModelForCausalLM,
    EvalPrediction,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)

from tests.conftest import TINY, VOCAB, tiny
from token_superposition import Schedule, TokenSuperpositionError, place_weights, reference
from token_superposition.data.plan import PlannedDataset, ValidationSet
from token_superposition.data.store import TokenStore
from token_superposition.engines.transformers import TSTTrainer
from token_superposition.engines.transformers.head import Head
from token_superposition.experiment.config import load_config
from token_superposition.experiment.launch import Launch

FOUR = ("llama", "qwen3_moe", "gpt2", "mamba")


def arguments(out: Path, **changes: object) -> TrainingArguments:
    settings: dict[str, object] = {
        "per_device_train_batch_size": 4, "learning_rate": 3e-3, "logging_steps": 1, "report_to": "none",
        "save_strategy": "no", "use_cpu": True, "disable_tqdm": True, "seed": 1, "max_grad_norm": 1.0,
        "dataloader_pin_memory": False,
    }  # fmt: skip
    return TrainingArguments(output_dir=str(out), **(settings | changes))


def plan_of(prepared: Path, steps: int = 6, bag: int = 4, batch: int = 4) -> PlannedDataset:
    return PlannedDataset(TokenStore(prepared), Schedule.two_phase(steps, bag, 0.5), 16, batch, seed=1)


def losses(trainer: Trainer) -> list[float]:
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


class Spy(TrainerCallback):
    """Keeps the gradients of the first step, before they are used."""

    def __init__(self) -> None:
        self.grads: dict[str, torch.Tensor] = {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if not self.grads:
            self.grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("architecture", TINY)
@pytest.mark.parametrize("weighting", ["uniform", "power"])
def test_first_step_on_bags_is_the_reference(architecture: str, weighting: str, prepared: Path, tmp_path: Path) -> None:
    """Loss and gradients of phase 1 against float64 arithmetic on hand-averaged embeddings and whole logits."""
    plan, spy = plan_of(prepared, steps=2), Spy()
    trainer = TSTTrainer(
        tiny(architecture), arguments(tmp_path, max_steps=1, max_grad_norm=0.0), train_dataset=plan,
        weighting=weighting, callbacks=[spy],  # pyright: ignore
    )  # fmt: skip
    trainer.train()
    model = tiny(architecture)
    if architecture == "qwen3_moe":
        model.set_experts_implementation("eager")
    model = model.double()
    batch = default_data_collator([plan[i] for i in range(4)])
    out = model(inputs_embeds=model.get_input_embeddings()(batch["input_ids"]).mean(2))
    w = place_weights(weighting, 4).double()  # pyright: ignore
    loss = reference.multi_hot_cross_entropy(out.logits.flatten(0, 1), batch["shift_labels"].flatten(0, 1), w)
    assert abs(loss.item() - math.log(VOCAB)) < 0.3
    if getattr(out, "aux_loss", None) is not None:
        assert architecture == "qwen3_moe"
        loss = loss + model.config.router_aux_loss_coef * out.aux_loss
    assert losses(trainer)[0] == pytest.approx(loss.item(), rel=1e-4)
    loss.backward()
    for name, p in model.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(spy.grads[name].double(), p.grad, rtol=2e-3, atol=2e-6, msg=name)


def test_every_bag_size_has_place_weights_of_its_own(prepared: Path, tmp_path: Path) -> None:
    plan = PlannedDataset(TokenStore(prepared), Schedule.annealed(6, (4, 2), 0.7), 16, 4)
    trainer = TSTTrainer(tiny("llama"), arguments(tmp_path), train_dataset=plan, weighting="power")
    trainer.train()
    assert len(losses(trainer)) == 6 and all(abs(x - math.log(VOCAB)) < 1 for x in losses(trainer))


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_of_the_model_stays(training: bool, prepared: Path, tmp_path: Path) -> None:
    model = tiny("llama").train(training)
    TSTTrainer(model, arguments(tmp_path), train_dataset=plan_of(prepared))
    assert all(m.training == training for m in model.modules())


@pytest.mark.parametrize(
    ("architecture", "head"),
    [(a, Head()) for a in ("llama", "qwen3_moe", "gpt2", "mamba", "gemma3_text")]
    + [("gemma2", Head(softcap=30.0)), ("granite", Head(logit_scale=1 / 8)), ("cohere", Head(logit_scale=0.25))]
    + [("bert", None)],  # a projection between decoder and head
)
def test_whole_logits_only_where_the_head_is_not_known(
    architecture: str, head: Head | None, prepared: Path, tmp_path: Path
) -> None:
    trainer = TSTTrainer(tiny(architecture), arguments(tmp_path), train_dataset=plan_of(prepared))
    assert trainer.head == head
    seen: list[int] = []
    trainer.model.get_output_embeddings().register_forward_hook(lambda m, a, o: seen.append(o.shape[1]))
    trainer.train()
    assert set(seen) == ({1} if head else {16})


@pytest.mark.parametrize("architecture", FOUR)
def test_bag_size_one_is_the_stock_trainer(architecture: str, prepared: Path, tmp_path: Path) -> None:
    """Same losses as ``Trainer`` on the same samples; bit for bit where the batch takes the stock path."""

    class Stock(Dataset[dict[str, torch.Tensor]]):
        def __init__(self) -> None:
            self.plan = PlannedDataset(TokenStore(prepared), Schedule.two_phase(4, 1, 0), 16, 4, seed=1)

        def __len__(self) -> int:
            return len(self.plan)

        def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
            sample = self.plan[i]
            labels = torch.cat([sample["input_ids"][:1], sample["shift_labels"][:-1]])
            return {"input_ids": sample["input_ids"], "labels": labels}

    args = {"max_steps": 4, "train_sampling_strategy": "sequential"}
    stock = Trainer(tiny(architecture), arguments(tmp_path, **args), train_dataset=Stock())
    stock.train()
    ours = TSTTrainer(tiny(architecture), arguments(tmp_path, **args), train_dataset=Stock())
    ours.train()
    assert losses(ours) == losses(stock)
    for a, b in zip(stock.model.parameters(), ours.model.parameters(), strict=True):
        assert torch.equal(a, b)

    class Shifted(Stock):
        def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
            sample = super().__getitem__(i)
            shifted = torch.cat([sample["labels"][1:], torch.tensor([-100])])
            return {"input_ids": sample["input_ids"], "shift_labels": shifted}

    fused = TSTTrainer(tiny(architecture), arguments(tmp_path, **args), train_dataset=Shifted())
    fused.train()
    assert fused.head is not None
    # Trainer divides GPT-2's loss by all 16 labels of a row, of which 15 are targets (its loss has no registered type).
    miscounted = 16 / 15 if architecture == "gpt2" else 1
    assert losses(fused)[0] == pytest.approx(losses(stock)[0] * miscounted, rel=1e-5)
    assert losses(fused) == pytest.approx([x * miscounted for x in losses(stock)], rel=1e-3)


@pytest.mark.parametrize("accumulated", [2, 4])
@pytest.mark.parametrize("architecture", ["llama", "qwen3_moe"])
def test_accumulation_does_not_change_the_loss(
    architecture: str, accumulated: int, prepared: Path, tmp_path: Path
) -> None:
    """``Trainer`` alone would scale bags by s/(s-1) here."""
    options = {"output_router_logits": False} if architecture == "qwen3_moe" else {}
    whole = TSTTrainer(tiny(architecture, **options), arguments(tmp_path), train_dataset=plan_of(prepared))
    whole.train()
    args = arguments(tmp_path, per_device_train_batch_size=4 // accumulated, gradient_accumulation_steps=accumulated)
    parts = TSTTrainer(tiny(architecture, **options), args, train_dataset=plan_of(prepared))
    parts.train()
    assert losses(parts) == pytest.approx(losses(whole), rel=2e-3)
    assert losses(parts)[0] == pytest.approx(losses(whole)[0], rel=1e-5)


def test_the_auxiliary_loss_is_a_mean_over_micro_batches(prepared: Path, tmp_path: Path) -> None:
    """Which is nearly that of the whole batch."""
    found: list[float] = []
    for n in (1, 2):
        args = arguments(tmp_path, max_steps=1, per_device_train_batch_size=4 // n, gradient_accumulation_steps=n)
        model = tiny("qwen3_moe", router_aux_loss_coef=1.0)
        trainer = TSTTrainer(model, args, train_dataset=plan_of(prepared))
        trainer.train()
        found += losses(trainer)
    assert found[1] == pytest.approx(found[0], rel=0.02)


def test_masked_targets_count_rows(prepared: Path, tmp_path: Path) -> None:
    class Masked(PlannedDataset):
        def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
            sample = super().__getitem__(index)
            sample["shift_labels"][index % 5 :, ...] = -100
            sample["shift_labels"][0, 1:] = -100
            return sample

    plan = Masked(TokenStore(prepared), Schedule.two_phase(4, 4, 0.5), 16, 4, seed=1)
    args = arguments(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=1)
    trainer = TSTTrainer(tiny("llama"), args, train_dataset=plan)
    trainer.train()
    batch = default_data_collator([plan[i] for i in range(4)])
    model = tiny("llama").double()
    logits = model(inputs_embeds=model.get_input_embeddings()(batch["input_ids"]).mean(2)).logits
    expected = reference.multi_hot_cross_entropy(logits.flatten(0, 1), batch["shift_labels"].flatten(0, 1))
    assert losses(trainer)[0] == pytest.approx(expected.item(), rel=1e-5)


def test_validation_is_next_token_in_both_phases(prepared: Path, tmp_path: Path) -> None:
    held_out = ValidationSet(TokenStore(prepared, "validation"), 16)
    args = arguments(tmp_path, eval_strategy="steps", eval_steps=3, per_device_eval_batch_size=len(held_out))
    trainer = TSTTrainer(tiny("llama"), args, train_dataset=plan_of(prepared), eval_dataset=held_out)
    trainer.train()
    evals = [line for line in trainer.state.log_history if "eval_loss" in line]
    assert [(line["step"], line["input_bag"]) for line in evals] == [(3, 4), (6, 1)]
    batch = default_data_collator(list(held_out))
    logits = trainer.model.double().eval()(batch["input_ids"]).logits
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["shift_labels"].flatten())
    assert evals[-1]["eval_loss"] == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "bert"])
def test_metrics_are_of_whole_logits_and_their_targets(architecture: str, prepared: Path, tmp_path: Path) -> None:
    held_out = ValidationSet(TokenStore(prepared, "validation"), 16, 128)

    def accuracy(p: EvalPrediction) -> dict[str, float]:
        return {"accuracy": float((np.asarray(p.predictions).argmax(-1) == p.label_ids).mean())}

    trainer = TSTTrainer(
        tiny(architecture), arguments(tmp_path, max_steps=4), train_dataset=plan_of(prepared), eval_dataset=held_out,
        compute_metrics=accuracy,
    )  # fmt: skip
    trainer.train()
    found = trainer.evaluate()
    batch = default_data_collator(list(held_out))  # pyright: ignore
    with torch.no_grad():
        predicted = cast(Any, trainer.model).eval()(batch["input_ids"]).logits.argmax(-1)
    assert found["eval_accuracy"] == pytest.approx((predicted == batch["shift_labels"]).double().mean().item())
    trainer.compute_metrics = None  # then no logits are made
    assert found["eval_loss"] == pytest.approx(trainer.evaluate()["eval_loss"], rel=1e-5)


def test_logs_tell_the_phase_and_both_token_counts(prepared: Path, tmp_path: Path) -> None:
    trainer = TSTTrainer(tiny("llama"), arguments(tmp_path), train_dataset=plan_of(prepared))
    trainer.train()
    lines = [line for line in trainer.state.log_history if "loss" in line]
    assert [line["input_bag"] for line in lines] == [4, 4, 4, 1, 1, 1]
    assert lines[-1]["latent_tokens"] == 6 * 4 * 16 and lines[-1]["raw_tokens"] == 3 * 4 * 16 * (4 + 1)
    per_step = 6 * 4 * 16 * trainer.model.num_parameters(exclude_embeddings=True)
    assert trainer.state.total_flos == 6 * per_step  # a bag counts once


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"per_device_train_batch_size": 8}, "the plan has 4 sequences a step, the arguments give 8"),
        ({"gradient_accumulation_steps": 3}, "the arguments give 12"),
        ({"max_steps": 7}, "max_steps is 7, the plan has 6"),
        ({"label_smoothing_factor": 0.1}, "use weighting"),
        ({"ignore_data_skip": True}, "ignore_data_skip is True, but the step decides .* set it to False"),
        ({"auto_find_batch_size": True}, "auto_find_batch_size is True"),
    ],
)
def test_disagreement_with_the_arguments(
    changes: dict[str, object], message: str, prepared: Path, tmp_path: Path
) -> None:
    with pytest.raises(TokenSuperpositionError, match=message):
        TSTTrainer(tiny("llama"), arguments(tmp_path, **changes), train_dataset=plan_of(prepared))


def test_one_process_with_several_gpus_is_refused(prepared: Path, tmp_path: Path) -> None:
    """The Trainer would copy the model to all of them by DataParallel."""
    args = arguments(tmp_path, per_device_train_batch_size=2)
    args._n_gpu = 2  # pyright: ignore[reportPrivateUsage]  # what it is without a launcher where two are seen
    with pytest.raises(TokenSuperpositionError, match=r"sees 2 GPUs .*torchrun or accelerate launch"):
        TSTTrainer(tiny("llama"), args, train_dataset=plan_of(prepared))


def test_a_model_that_fails_without_a_word_is_refused_in_one_line(prepared: Path, tmp_path: Path) -> None:
    model = tiny("llama")
    forward = model.forward

    def only_ids(*args: Any, input_ids: Any = None, inputs_embeds: Any = None, **kwargs: Any) -> Any:
        if input_ids is None:
            raise AssertionError
        return forward(*args, input_ids=input_ids, inputs_embeds=inputs_embeds, **kwargs)

    cast(Any, model).forward = only_ids
    with pytest.raises(TokenSuperpositionError, match=r"cannot read bags: .*\(AssertionError\)"):
        TSTTrainer(model, arguments(tmp_path), train_dataset=plan_of(prepared))


def test_bfloat16_and_compile(prepared: Path, tmp_path: Path) -> None:
    plain = TSTTrainer(tiny("llama"), arguments(tmp_path), train_dataset=plan_of(prepared))
    plain.train()
    mixed = TSTTrainer(tiny("llama"), arguments(tmp_path, bf16=True), train_dataset=plan_of(prepared))
    mixed.train()
    assert losses(mixed) == pytest.approx(losses(plain), rel=1e-2) and losses(mixed) != losses(plain)
    args = arguments(tmp_path, torch_compile=True, torch_compile_backend="aot_eager")
    compiled = TSTTrainer(tiny("llama"), args, train_dataset=plan_of(prepared))
    compiled.train()
    assert losses(compiled) == pytest.approx(losses(plain), rel=1e-4)


def test_a_model_is_copied_after_every_step_and_trained_again(prepared: Path, tmp_path: Path) -> None:
    """As by a callback that averages weights: no hidden states with their graph stay behind, of bags or of labels."""

    class Copies(TrainerCallback):
        made: list[Any]

        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            self.made.append(copy.deepcopy(model))

    callback = Copies()
    callback.made = []
    model = tiny("llama")
    first = TSTTrainer(model, arguments(tmp_path), train_dataset=plan_of(prepared), callbacks=[callback])
    first.train()
    labelled: Any = [{"input_ids": (ids := torch.arange(i, i + 8)), "labels": ids} for i in range(8)]
    second = TSTTrainer(model, arguments(tmp_path, max_steps=2), train_dataset=labelled, callbacks=[callback])
    second.train()
    assert len(callback.made) == 8 and len(model.get_decoder()._forward_hooks) == 1
    held_out: Any = ValidationSet(TokenStore(prepared, "validation"), 16)
    again = TSTTrainer(callback.made[-1], arguments(tmp_path), train_dataset=plan_of(prepared))
    assert len({t.evaluate(held_out)["eval_loss"] for t in (first, second, again)}) == 1


class Plain(torch.nn.Module):
    """No model of transformers: an embedding and a head, and a mapping with the logits."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.head = torch.nn.Embedding(VOCAB, 16), torch.nn.Linear(16, VOCAB)

    def forward(self, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"logits": self.head(self.embedding(input_ids))}


def test_a_plain_module_trains_on_bags(prepared: Path, tmp_path: Path) -> None:
    plan, held_out = plan_of(prepared), ValidationSet(TokenStore(prepared, "validation"), 16)
    trainer = TSTTrainer(Plain(), arguments(tmp_path), train_dataset=plan, eval_dataset=held_out)
    trainer.train()
    batch, model = default_data_collator([plan[i] for i in range(4)]), Plain().double()
    logits = model.head(model.embedding(batch["input_ids"]).mean(2))
    expected = reference.multi_hot_cross_entropy(logits.flatten(0, 1), batch["shift_labels"].flatten(0, 1))
    assert losses(trainer)[0] == pytest.approx(expected.item(), rel=1e-5)
    assert trainer.evaluate()["eval_loss"] > 0


def test_gradient_checkpointing_changes_nothing(prepared: Path, tmp_path: Path) -> None:
    plain = TSTTrainer(tiny("llama"), arguments(tmp_path), train_dataset=plan_of(prepared))
    plain.train()
    args = arguments(tmp_path, gradient_checkpointing=True)
    checkpointed = TSTTrainer(tiny("llama"), args, train_dataset=plan_of(prepared))
    checkpointed.train()
    assert losses(checkpointed) == pytest.approx(losses(plain), rel=1e-5)


class Graphs(TrainerCallback):
    """How many graphs have been compiled after each step."""

    def __init__(self) -> None:
        self.after: list[int] = []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.after.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def test_layers_are_compiled_once_for_both_phases(
    prepared: Path, write_config: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the switch only the embedding is compiled again; losses and saved model are those of the plain run."""
    for name in ("BACKEND", "MODE"):  # set by transformers, for this test alone
        monkeypatch.setenv(f"ACCELERATE_DYNAMO_{name}", "no")
        monkeypatch.delenv(f"ACCELERATE_DYNAMO_{name}")
    for name, value in Launch().variables(load_config(write_config()).train).items():
        monkeypatch.setenv(name, value)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    graphs, plan = Graphs(), plan_of(prepared)
    plain = TSTTrainer(tiny("llama"), arguments(tmp_path), train_dataset=plan, callbacks=[graphs])
    plain.train()
    assert not any(graphs.after)
    graphs.after.clear()
    settings = arguments(tmp_path, torch_compile=True, torch_compile_backend="aot_eager")
    compiled = TSTTrainer(tiny("llama"), settings, train_dataset=plan, callbacks=[graphs])
    compiled.train()
    assert graphs.after[0] > 1 and graphs.after[-1] - graphs.after[2] <= 1, graphs.after  # the switch is after step 3
    assert losses(compiled) == pytest.approx(losses(plain), rel=1e-5)
    compiled.save_model(str(tmp_path / "model"))
    _, told = AutoModelForCausalLM.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"]
