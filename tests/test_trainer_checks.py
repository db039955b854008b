"""What ``TSTTrainer`` and the plans refuse or warn of, because it would train or validate on something else."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch.utils.data import Subset
from transformers import (
    EarlyStoppingCallback,
    GPT2LMHeadModel,
    RobertaConfig,
    RobertaForCausalLM,
    Trainer,
    TrainingArguments,
)

from tests.conftest import VOCAB, tiny
from tests.test_trainer import arguments, losses
from token_superposition import WSD, Phase, Schedule, TokenSuperpositionError, superpose
from token_superposition.data.plan import PlannedDataset, ValidationSet
from token_superposition.data.stream import StreamedPlan
from token_superposition.engines.transformers import TSTTrainer
from token_superposition.engines.transformers.fit import reads
from token_superposition.experiment.trainer import RunTrainer

TOKENS = np.arange(20_000) % VOCAB
Made = PlannedDataset | StreamedPlan


def planned(schedule: Schedule, batch: int = 4, seed: int = 1) -> PlannedDataset:
    return PlannedDataset(TOKENS, schedule, 16, batch, seed)


def streamed(schedule: Schedule, batch: int = 4) -> StreamedPlan:
    return StreamedPlan([{"input_ids": TOKENS[i : i + 100]} for i in range(0, 20_000, 100)], schedule, 16, batch)


def trainer_of(args: TrainingArguments, plan: Made, **settings: Any) -> TSTTrainer:
    torch.manual_seed(0)
    return TSTTrainer(tiny("llama"), args, train_dataset=plan, **settings)


@pytest.mark.parametrize("make", [planned, streamed])
def test_a_checkpoint_of_another_plan_is_refused(make: Callable[[Schedule], Made], tmp_path: Path) -> None:
    args = arguments(tmp_path, save_strategy="steps", save_steps=3)
    whole = trainer_of(args, make(Schedule.two_phase(6, 4, 0.5)))
    whole.train()
    checkpoint = tmp_path / "checkpoint-3"
    assert json.loads((checkpoint / "plan.json").read_text())["phases"] == [[0, 4, 4], [3, 1, 1]]
    longer = trainer_of(args, make(Schedule.two_phase(20, 4, 0.5)))
    with pytest.raises(TokenSuperpositionError, match=r"another plan of the samples: phases .*10, 1, 1.* here"):
        longer.train(resume_from_checkpoint=str(checkpoint))
    same = trainer_of(args, make(Schedule.two_phase(6, 4, 0.5)))
    same.train(resume_from_checkpoint=str(checkpoint))
    assert losses(same)[-3:] == losses(whole)[-3:]


def test_a_checkpoint_of_another_seed_is_refused(tmp_path: Path) -> None:
    args, schedule = arguments(tmp_path, save_strategy="steps", save_steps=2), Schedule.two_phase(4, 4, 0.5)
    trainer_of(args, planned(schedule)).train()
    with pytest.raises(TokenSuperpositionError, match="another plan of the samples: seed 1 there, 2 here"):
        trainer_of(args, planned(schedule, seed=2)).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


@pytest.mark.parametrize("make", [planned, streamed])
def test_nothing_is_validated_on_bags(make: Callable[[Schedule], Made], tmp_path: Path) -> None:
    bags, ordinary = make(Schedule.two_phase(4, 4, 0.5)), make(Schedule.two_phase(4, 1, 0.5))
    for held_out in (bags, {"text": ValidationSet(TOKENS[:200], 16), "code": bags}):
        with pytest.raises(TokenSuperpositionError, match=rf"{type(bags).__name__} with bags; give ValidationSet"):
            trainer_of(arguments(tmp_path), bags, eval_dataset=held_out)
    trainer = trainer_of(arguments(tmp_path), bags, eval_dataset=ValidationSet(TOKENS[:200], 16))
    for judge in (trainer.evaluate, trainer.predict):
        with pytest.raises(TokenSuperpositionError, match="with bags; give ValidationSet"):
            judge(bags)
    if isinstance(bags, PlannedDataset):  # whatever the samples come in
        for held_out in (Subset(bags, range(8)), [bags[i] for i in range(4)]):
            with pytest.raises(TokenSuperpositionError, match="with bags; give ValidationSet"):
                trainer.evaluate(cast(Any, held_out))
    assert trainer.evaluate()["eval_loss"] > 0 and trainer.evaluate(ordinary)["eval_loss"] > 0


def test_a_batch_that_is_split_is_that_of_all_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    split = arguments(tmp_path, accelerator_config={"split_batches": True})
    monkeypatch.setattr(TrainingArguments, "world_size", 2)
    plan = planned(Schedule.two_phase(4, 4, 0.5), batch=8)
    assert trainer_of(arguments(tmp_path), plan).args.max_steps == 4
    with pytest.raises(TokenSuperpositionError, match="the plan has 8 sequences a step, the arguments give 4"):
        trainer_of(split, plan)


def test_learning_rates_that_exclude_each_other(tmp_path: Path) -> None:
    plan = planned(Schedule.two_phase(4, 4, 0.5))
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], 0.1)
    both = (optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0))
    with pytest.raises(TokenSuperpositionError, match="lr_factor is given beside a scheduler"):
        trainer_of(arguments(tmp_path), plan, optimizers=both, lr_factor=WSD(4))
    with pytest.raises(TokenSuperpositionError, match="lr_factor is for 3 steps, the run has 4"):
        trainer_of(arguments(tmp_path), plan, lr_factor=WSD(3))
    assert trainer_of(arguments(tmp_path, max_steps=3), plan, lr_factor=WSD(4)).args.max_steps == 3


@pytest.mark.parametrize("kind", [TSTTrainer, RunTrainer])
def test_another_trainer_is_refused(kind: type[TSTTrainer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every private method that is overridden is looked for: renamed there, ours would not be called."""
    private = {n for c in kind.__mro__[: kind.__mro__.index(Trainer)] for n in vars(c) if re.match(r"_[a-z]", n)}
    assert private & set(dir(Trainer)) == set(kind.OVERRIDDEN)
    monkeypatch.delattr(Trainer, "_get_train_sampler")  # without ours, the plan would be shuffled
    with pytest.raises(TokenSuperpositionError, match=r"transformers \S+ has no Trainer._get_train_sampler"):
        trainer_of(arguments(tmp_path), planned(Schedule.two_phase(4, 4, 0.5)))


def test_what_is_misspelt_is_told_before_the_first_bag(tmp_path: Path) -> None:
    plan = planned(Schedule.two_phase(4, 1, 0.0))  # which has none
    weighed = {"weighting": "power", "bag_loss": "sum-to-one"}
    for options, message in (
        ({"weighting": "powr"}, "powr"),
        ({"bag_loss": "sum"}, "sum"),
        (weighed, "leave weighting 'power' out"),
    ):
        with pytest.raises(TokenSuperpositionError, match=message):
            trainer_of(arguments(tmp_path), plan, **options)


def test_a_part_of_a_plan_is_refused(tmp_path: Path) -> None:
    part: Any = Subset(planned(Schedule.two_phase(4, 4, 0.5)), range(8))
    with pytest.raises(TokenSuperpositionError, match="train_dataset is a Subset of a plan"):
        trainer_of(arguments(tmp_path), part)


def test_a_run_that_ends_before_the_switch_is_told_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    plan, held_out = planned(Schedule.two_phase(10, 4, 0.5)), ValidationSet(TOKENS[:200], 16)
    stop = {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True, "save_strategy": "steps"}
    logging.getLogger("token_superposition").propagate = True
    plateau = {"eval_strategy": "steps", "eval_steps": 1, "lr_scheduler_type": "reduce_lr_on_plateau"}
    for changes, callbacks, said in (
        ({"max_steps": 5}, [], "max_steps is 5: the run ends before the switch to ordinary training at 5"),
        (stop, [EarlyStoppingCallback()], "early stopping looks at validations before the switch at step 5"),
        (plateau, [], "reduce_lr_on_plateau looks at validations before the switch at step 5"),
        ({"max_steps": 6}, [], None),
        (stop | {"eval_delay": 6}, [EarlyStoppingCallback()], None),
    ):
        caplog.clear()
        trainer = trainer_of(arguments(tmp_path, **changes), plan, eval_dataset=held_out)
        for callback in callbacks:
            trainer.add_callback(callback)
        trainer.train()
        warned = [m for m in caplog.messages if "switch" in m]
        assert (len(warned) == 1 and said in warned[0]) if said else not warned


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"dataloader_in_order": False}, "dataloader_in_order is False, but the step decides which samples .* to True"),
        ({"ddp_static_graph": True}, "ddp_static_graph is True, with which DDP averages only .*; set it to False"),
    ],
)
def test_arguments_under_which_other_gradients_come_are_refused(
    given: dict[str, Any], message: str, tmp_path: Path
) -> None:
    plan = PlannedDataset(np.arange(2_000) % VOCAB, Schedule.two_phase(4, 4, 0.5), 16, 4)
    model = tiny("llama")
    with pytest.raises(TokenSuperpositionError, match=message):
        TSTTrainer(model, arguments(tmp_path, **given), train_dataset=plan)
    with pytest.raises(TokenSuperpositionError, match="model_init makes a model of its own for every training"):
        TSTTrainer(cast(Any, None), arguments(tmp_path), model_init=lambda: model, train_dataset=plan)


def test_a_sequence_spread_over_processes_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trainer then reads as many samples more often, and the switch would come late."""
    monkeypatch.setattr(TSTTrainer, "get_cp_size", lambda self: 2)
    plan = PlannedDataset(np.arange(2_000) % VOCAB, Schedule.two_phase(4, 4, 0.5), 16, 4)
    with pytest.raises(TokenSuperpositionError, match=r"a sequence is spread over 2 processes .*; set cp_size"):
        TSTTrainer(tiny("llama"), arguments(tmp_path), train_dataset=plan)


def test_padding_and_masked_tokens_are_refused() -> None:
    schedule = Schedule.two_phase(4, 2, 0.5)
    padded = [{"input_ids": [1, 2, 3, 0, 0], "attention_mask": [1, 1, 1, 0, 0]}]
    with pytest.raises(TokenSuperpositionError, match=r"is padded .*; tokenise without padding"):
        next(iter(StreamedPlan(padded, schedule, 4, 2)))
    with pytest.raises(TokenSuperpositionError, match="input_ids of a document have -100; give ids from 0 up"):
        next(iter(StreamedPlan([{"input_ids": [1, -100]}], schedule, 4, 2)))
    assert next(iter(StreamedPlan([padded[0] | {"attention_mask": [1] * 5}] * 9, schedule, 4, 2)))
    halves = torch.arange(300).half()  # of which a cast makes other ids
    for samples in (PlannedDataset(halves, Schedule.two_phase(12, 2, 0.5), 4, 2), ValidationSet(halves, 4)):
        with pytest.raises(TokenSuperpositionError, match="the tokens are float16; give ids, which are whole numbers"):
            samples[0]
    masked = np.where(np.arange(200) == 150, -100, 7)
    for samples in (PlannedDataset(masked, Schedule.two_phase(12, 2, 0.5), 4, 2), ValidationSet(masked, 4)):
        with pytest.raises(TokenSuperpositionError, match="the text has the id -100 at token 150; give ids from 0 up"):
            [samples[i] for i in range(len(samples))]


def test_a_list_of_documents_is_no_text() -> None:
    for documents in ([[1, 2, 3], [4, 5]], [np.arange(3), np.arange(9)], [torch.arange(4)] * 3):
        with pytest.raises(TokenSuperpositionError, match=r"have shape \(\d, \d\); give one stream .*np.concatenate"):
            PlannedDataset(documents, Schedule.two_phase(4, 2, 0.5), 4, 2)
    assert len(PlannedDataset([1, 2, 3] * 40, Schedule.two_phase(4, 2, 0.5), 4, 2)) == 8


def test_a_decay_that_the_run_does_not_reach_is_told_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    plan = planned(Schedule.two_phase(10, 4, 0.5))
    logging.getLogger("token_superposition").propagate = True
    for wsd, told in ((WSD(10, 1, 0.3), True), (WSD(6, 1, 0.3), False), (WSD(10, 1, 0.0), False)):
        caplog.clear()
        trainer_of(arguments(tmp_path, max_steps=6), plan, lr_factor=wsd)
        assert any("without all of its decay" in m for m in caplog.messages) == told


def test_training_again_begins_the_learning_rates_again(tmp_path: Path) -> None:
    """As with a scheduler of the arguments; at the last rate, 0, nothing would be trained, without a word."""
    trainer = trainer_of(arguments(tmp_path), planned(Schedule.two_phase(6, 4, 0.5)), lr_factor=WSD(6, 1, 0.5))
    rates: list[list[float]] = []
    for _ in range(2):
        before = [p.detach().clone() for p in trainer.model.parameters()]
        trainer.train()
        rates.append([line["learning_rate"] for line in trainer.state.log_history if "learning_rate" in line])
        assert any((a != b).any() for a, b in zip(before, trainer.model.parameters(), strict=True))
    assert len(rates[0]) == 6 and rates[0] == rates[1]


def test_a_plan_beyond_the_model_is_told_before_training(tmp_path: Path) -> None:
    plan = PlannedDataset(TOKENS, Schedule.two_phase(4, 4, 0.5), 16, 4)
    for architecture, settings, message in (
        ("gpt2", {"max_position_embeddings": 8}, "sequence_length is 16; the model has 8 positions"),
        ("llama", {"vocab_size": 8}, r"the token id \d+, the model 8 embeddings"),
        ("llama", {"max_position_embeddings": 8}, None),  # rotary ones do not end
    ):
        model = tiny(architecture, **settings)
        if message is None:
            TSTTrainer(model, arguments(tmp_path), train_dataset=plan)
            continue
        with pytest.raises(TokenSuperpositionError, match=message):
            TSTTrainer(model, arguments(tmp_path), train_dataset=plan)


@pytest.mark.parametrize("dtype", ["uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64", "list", "tensor"])
def test_tokens_of_any_whole_type_are_looked_at(dtype: str, tmp_path: Path) -> None:
    """The largest of the first ones, 99; that of the model is 98."""
    ids = list(range(100)) * 20
    tokens: Any = {"list": ids, "tensor": torch.tensor(ids)}.get(dtype)
    if tokens is None:
        np.array(ids, dtype).tofile(tmp_path / "tokens.bin")
        tokens = np.memmap(tmp_path / "tokens.bin", dtype, mode="r")
    plan = PlannedDataset(tokens, Schedule.two_phase(4, 4, 0.5), 128, 4)
    TSTTrainer(tiny("llama", vocab_size=100), arguments(tmp_path), train_dataset=plan)
    with pytest.raises(TokenSuperpositionError, match="the token id 99, the model 99 embeddings"):
        TSTTrainer(tiny("llama", vocab_size=99), arguments(tmp_path), train_dataset=plan)


def test_arguments_serve_a_second_trainer(tmp_path: Path) -> None:
    """The steps of the first plan would be those of the second."""
    args = arguments(tmp_path)
    for steps in (2, 4, 1):
        trainer = trainer_of(args, planned(Schedule.two_phase(steps, 4, 0.0)))
        trainer.train()
        assert trainer.state.global_step == steps
    assert args.max_steps == -1


class OwnCausalLM(GPT2LMHeadModel):
    """A class of one's own, that gives a dict and knows no cache."""

    def forward(self, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:  # pyright: ignore
        return {"logits": super().forward(input_ids).logits}  # pyright: ignore


class OutOfMemory(GPT2LMHeadModel):
    def forward(self, input_ids: torch.Tensor, **_: Any) -> None:  # pyright: ignore
        if input_ids.shape[1] > 8:
            raise torch.OutOfMemoryError("full")


def test_what_a_model_can_read_is_tried_only_as_far_as_it_can_be(tmp_path: Path) -> None:
    plan = PlannedDataset(TOKENS, Schedule([Phase(2, 1, 4), Phase(2)]), 16, 4)
    model: Any = OwnCausalLM(tiny("gpt2", max_position_embeddings=16).config)
    TSTTrainer(model, arguments(tmp_path), train_dataset=plan)  # though it has no use_cache, and no .logits
    assert reads(model, 16) and not reads(model, 17)
    full = OutOfMemory(model.config)
    assert reads(full, 16) and not reads(full, 17)  # what is known without trying
    settings = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    of_17 = RobertaConfig(vocab_size=VOCAB, max_position_embeddings=17, is_decoder=True, **settings)
    roberta = RobertaForCausalLM(of_17)  # two of which are for no token
    with pytest.raises(TokenSuperpositionError, match="has 17 positions, give fewer, for some of them are for no"):
        TSTTrainer(roberta, arguments(tmp_path), train_dataset=plan)


class OwnGPT(torch.nn.Module):
    """As nanoGPT's: a configuration and names of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(block_size=64)
        self.wte, self.wpe = torch.nn.Embedding(VOCAB, 8), torch.nn.Embedding(64, 8)
        self.head = torch.nn.Linear(8, VOCAB)

    def forward(self, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        hidden = self.wte(input_ids)
        return {"logits": self.head(hidden + self.wpe(torch.arange(hidden.shape[1])))}


def test_a_class_of_ones_own_with_two_embeddings_is_trained(tmp_path: Path) -> None:
    plan, model = planned(Schedule.two_phase(4, 4, 0.5)), OwnGPT()
    with pytest.raises(TokenSuperpositionError, match="OwnGPT has 2 embeddings"):
        TSTTrainer(OwnGPT(), arguments(tmp_path), train_dataset=plan)
    superpose(model, model.wte)
    trainer = TSTTrainer(model, arguments(tmp_path), train_dataset=plan)
    trainer.train()
    assert len(losses(trainer)) == 4
