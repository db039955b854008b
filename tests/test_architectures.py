"""The families of docs/architectures.md, each measured again; see tests/architectures.py for what and how."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, TrainingArguments, set_seed

from tests.architectures import BASE, FAMILIES, INTRODUCTION, build, measure, row
from token_superposition import Schedule, TokenSuperpositionError
from token_superposition.data.plan import PlannedDataset
from token_superposition.data.store import TokenStore
from token_superposition.engines.transformers import TSTTrainer
from token_superposition.experiment.config import Config, DataConfig, ModelConfig, TrainConfig
from token_superposition.experiment.model import build_model
from token_superposition.experiment.run import train

PAGE = (Path(__file__).parent.parent / "docs/architectures.md").read_text()


@pytest.mark.parametrize("family", FAMILIES)
def test_bags_and_tokens_are_the_reference(family: str) -> None:
    facts = measure(family)
    assert facts.equal, facts
    assert row(family) in PAGE.splitlines(), "python -m tests.architectures > docs/architectures.md"


def test_the_page_has_these_families_and_no_other() -> None:
    head = INTRODUCTION.count("\n") + 1
    assert [line.split("`")[1] for line in PAGE.splitlines()[head:]] == list(FAMILIES) and len(FAMILIES) >= 25


def test_a_model_that_looks_at_ids_itself_is_refused_bags_and_only_these(tmp_path: Path) -> None:
    """Gemma 3n has an embedding of the token in every layer."""
    arguments = TrainingArguments(
        output_dir=str(tmp_path), per_device_train_batch_size=2, use_cpu=True, report_to="none"
    )
    tokens = list(range(64)) * 20
    for input_bag, refused in ((2, True), (1, False)):
        plan = PlannedDataset(tokens, Schedule.two_phase(4, ratio=0.5, input_bag=input_bag, output_bag=2), 8, 2)
        if refused:
            with pytest.raises(
                TokenSuperpositionError,
                match=r"it looks token ids up in model.embed_tokens_per_layer",
            ):
                TSTTrainer(build("gemma3n_text"), arguments, train_dataset=plan)
        else:
            TSTTrainer(build("gemma3n_text").float(), arguments, train_dataset=plan).train()


SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 48,
}
BIDIRECTIONAL = ("bert", "electra", "ernie", "megatron-bert", "rembert", "roformer", "big_bird", "bert-generation")


@pytest.mark.parametrize("architecture", BIDIRECTIONAL)
def test_a_model_that_sees_later_tokens_is_refused(architecture: str, tmp_path: Path) -> None:
    """By ``build_model``, before a run begins, and by the trainer; with ``is_decoder`` it is built."""
    config = Config(ModelConfig(architecture, SMALL), DataConfig(sequence_length=16))
    meta: Any = SimpleNamespace(vocab_size=64, eos_id=0, bos_id=None)
    with pytest.raises(TokenSuperpositionError, match=r"sees the tokens that .* set model.options.is_decoder = true"):
        build_model(config, meta)
    decoder = ModelConfig(architecture, SMALL | {"is_decoder": True})
    assert not seen_by_earlier(build_model(replace(config, model=decoder), meta))
    arguments = TrainingArguments(
        output_dir=str(tmp_path), per_device_train_batch_size=2, use_cpu=True, report_to="none"
    )
    plan = PlannedDataset(list(range(64)) * 20, Schedule.two_phase(4, 1, 0), 8, 2)
    settings: Any = AutoConfig.for_model(architecture, vocab_size=64, pad_token_id=None, **SMALL)
    model = AutoModelForCausalLM.from_config(settings)
    assert seen_by_earlier(model)
    with pytest.raises(TokenSuperpositionError, match="sees the tokens that it shall predict"):
        TSTTrainer(model, arguments, train_dataset=plan)


@torch.no_grad()
def seen_by_earlier(model: Any) -> bool:
    """Whether the logits of earlier tokens change with the last one."""
    ids = torch.arange(16).unsqueeze(0)
    other = torch.where(ids == 15, 40, ids)
    return not torch.equal(model.eval()(ids).logits[:, :-1], model(other).logits[:, :-1])


def test_an_architecture_that_must_have_a_padding_token_is_trained(prepared: Path, tmp_path: Path) -> None:
    """The end of a document stands in for it, and is learned all the same."""
    config = Config(
        ModelConfig("modernbert-decoder", SMALL | {"num_hidden_layers": 2, "tie_word_embeddings": False}),
        DataConfig(str(prepared), sequence_length=16, eval_tokens=64, final_eval_tokens=64),
        train=TrainConfig(steps=3, batch_size=2, warmup_steps=1, weight_decay=0.0, learning_rate=0.01),
    )
    train(config, tmp_path / "run")
    set_seed(0)
    meta = TokenStore(prepared).meta
    before: Any = build_model(config, meta)
    after: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "run/model")
    rows = [m.get_input_embeddings().weight[meta.eos_id] for m in (before, after)]
    assert not torch.equal(*rows)


def test_the_models_own_z_loss_is_trained_and_not_validated(tmp_path: Path) -> None:
    torch.manual_seed(0)
    settings: Any = AutoConfig.for_model("bamba", **(BASE | FAMILIES["bamba"] | {"z_loss_coefficient": 0.1}))
    model = AutoModelForCausalLM.from_config(settings)
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    trainer = TSTTrainer(model, arguments)
    ids, targets = torch.arange(16).reshape(2, 8), torch.arange(1, 17).reshape(2, 8)
    own = model.train()(input_ids=ids, labels=ids, shift_labels=targets, use_cache=False)
    batch = {"input_ids": ids, "shift_labels": targets}
    assert trainer.compute_loss(model, batch).item() == pytest.approx(own.loss.item(), rel=1e-6)
    cross_entropy = torch.nn.functional.cross_entropy(own.logits.flatten(0, 1), targets.flatten())
    assert trainer.compute_loss(model.eval(), batch).item() == pytest.approx(cross_entropy.item(), rel=1e-6)
    assert own.loss > cross_entropy + 1
