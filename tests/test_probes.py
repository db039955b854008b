"""What ``TSTTrainer`` finds out about a model before it trains it, and what it leaves of itself on it."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BartConfig,
    BartForCausalLM,
    BartForConditionalGeneration,
    LlamaForCausalLM,
    default_data_collator,
)
from transformers.modeling_outputs import CausalLMOutput

from tests.architectures import BASE
from tests.conftest import VOCAB, tiny
from tests.test_trainer import Plain, Spy, arguments, losses
from token_superposition import Schedule, TokenSuperpositionError, place_weights, reference, superpose, unsuperpose
from token_superposition.data.plan import PlannedDataset, ValidationSet
from token_superposition.engines.transformers import TSTTrainer
from token_superposition.engines.transformers.head import check_causal, ids_used_elsewhere, read_head
from token_superposition.engines.transformers.mtp import MTPHeads

TOKENS = np.random.default_rng(0).integers(0, VOCAB - 8, 4_000)


def build(architecture: str, **options: Any) -> Any:
    settings = BASE | {"vocab_size": VOCAB} | options
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **settings))


def planned(steps: int = 2) -> PlannedDataset:
    return PlannedDataset(TOKENS, Schedule.two_phase(steps, 4, 0.5), 8, 4, 1)


class Ours(LlamaForCausalLM):
    """A Llama whose forward goes another way around its decoder and its head."""

    way = ""

    def forward(self, input_ids: Any = None, inputs_embeds: Any = None, logits_to_keep: int = 0, **kwargs: Any) -> Any:  # pyright: ignore
        run = self.model.forward if self.way == "decoder not called" else self.model
        hidden: Any = run(input_ids=input_ids, inputs_embeds=inputs_embeds, **kwargs).last_hidden_state
        hidden = hidden[:, -logits_to_keep:]  # of -0 all
        if self.way == "doubled in training" and self.training:
            hidden = 2 * hidden
        if self.way == "head not called":
            return CausalLMOutput(logits=F.linear(hidden, self.lm_head.weight))  # pyright: ignore
        if self.way == "head called by name":
            return CausalLMOutput(logits=self.lm_head(input=hidden))
        logits = self.lm_head(hidden)
        return CausalLMOutput(logits=logits[..., : VOCAB - 8] if self.way == "logits cut" else logits)


@pytest.mark.parametrize(
    ("way", "why"),
    [
        ("head not called", "its forward does not call its output head"),
        ("decoder not called", "its forward does not call its decoder"),
        ("head called by name", r"its forward fails for 4 ids \(.*index out of range"),
        ("logits cut", "of the head's 320 logits come 312"),
        ("doubled in training", "the hidden states are changed between decoder and head"),
    ],
)
def test_a_forward_that_cannot_be_looked_into_makes_whole_logits(way: str, why: str, tmp_path: Path) -> None:
    model = Ours(tiny("llama").config)
    model.load_state_dict(tiny("llama").state_dict())
    model.way = way
    trainer = TSTTrainer(model, arguments(tmp_path, max_steps=1), train_dataset=planned())
    assert trainer.head is None and re.match(why, trainer.whole_logits)
    trainer.train()
    batch, stock = default_data_collator([planned()[i] for i in range(4)]), tiny("llama").double()
    logits = stock(inputs_embeds=stock.get_input_embeddings()(batch["input_ids"]).mean(2)).logits
    logits = logits[..., : VOCAB - 8] if way == "logits cut" else logits
    logits = 2 * logits if way == "doubled in training" else logits
    expected = reference.multi_hot_cross_entropy(logits.flatten(0, 1), batch["shift_labels"].flatten(0, 1))
    assert losses(trainer)[0] == pytest.approx(expected.item(), rel=1e-5)


class NanoGPT(nn.Module):
    """Two embeddings, no ``inputs_embeds``, and positions from the shape of the ids."""

    def __init__(self, reads: str = "shape[:2]", vocab: int = VOCAB):
        super().__init__()
        torch.manual_seed(0)
        self.wte, self.wpe, self.lm_head = nn.Embedding(vocab, 16), nn.Embedding(32, 16), nn.Linear(16, vocab)
        self.reads = reads

    def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
        if self.reads == "size()":
            _, t = input_ids.size()
        else:
            t = input_ids.shape[-1 if self.reads == "shape[-1]" else 1]
        rows = self.wte(input_ids)
        if self.reads == "another embedding":
            rows = rows + 0 * self.wpe(input_ids % 32)
        return {"logits": self.lm_head(rows + self.wpe(torch.arange(t)))}


@pytest.mark.parametrize("place_signal", [0.0, 0.5])
def test_a_named_embedding_is_the_one_ever_after(place_signal: float, tmp_path: Path) -> None:
    """The remedy that the error names; the model has no ``inputs_embeds`` and is asked with bags."""
    model, args = NanoGPT(), arguments(tmp_path)
    with pytest.raises(TokenSuperpositionError, match=r"2 embeddings \(wte, wpe\); name the token embedding"):
        TSTTrainer(model, args, train_dataset=planned())
    superpose(model, model.wte, place_signal=place_signal)
    assert superpose(model, place_signal=place_signal) is model
    trainer = TSTTrainer(model, args, train_dataset=planned(), place_signal=place_signal)
    trainer.train()
    batch, plain = default_data_collator([planned()[i] for i in range(4)]), NanoGPT().double()
    if not place_signal:
        logits = plain.lm_head(plain.wte(batch["input_ids"]).mean(2) + plain.wpe.weight[:8])
        expected = reference.multi_hot_cross_entropy(logits.flatten(0, 1), batch["shift_labels"].flatten(0, 1))
        assert losses(trainer)[0] == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize(
    ("reads", "why"),
    [
        ("size()", r"does not take bags in place of token ids \(too many values to unpack"),
        ("shape[-1]", "makes something else of token ids than of bags of one token"),
        ("another embedding", r"makes logits of shape \(1, 4, 4, 320\) of 4 bags"),
    ],
)
def test_a_model_without_inputs_embeds_that_cannot_read_bags_is_refused(reads: str, why: str, tmp_path: Path) -> None:
    model = NanoGPT(reads)
    superpose(model, model.wte)
    with pytest.raises(TokenSuperpositionError, match=f"NanoGPT cannot read bags: it {why}"):
        TSTTrainer(model, arguments(tmp_path), train_dataset=planned())
    single = PlannedDataset(TOKENS, Schedule.two_phase(2, ratio=0.5, input_bag=1, output_bag=2), 8, 4, 1)
    TSTTrainer(model, arguments(tmp_path), train_dataset=single)


def test_a_family_without_inputs_embeds_is_refused(tmp_path: Path) -> None:
    options = {"dim_head": 16, "dim_ff": 48, "prompt_length": 4, "prompt_types": 2, "num_attention_heads": 2}
    config = AutoConfig.for_model("cpmant", vocab_size=VOCAB, hidden_size=32, num_hidden_layers=1, **options)
    with pytest.raises(TokenSuperpositionError, match="CpmAntForCausalLM cannot read bags: it does not take bags"):
        TSTTrainer(AutoModelForCausalLM.from_config(config), arguments(tmp_path), train_dataset=planned())


@pytest.mark.parametrize("pad", [1, 6])
def test_padding_is_not_what_a_model_is_asked_with(pad: int) -> None:
    """RoBERTa counts its positions from the ids that are no padding."""
    options = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = AutoConfig.for_model("roberta", vocab_size=VOCAB, is_decoder=True, pad_token_id=pad, **options)
    assert ids_used_elsewhere(AutoModelForCausalLM.from_config(config)) is None


@pytest.mark.parametrize("vocab", [2, 3, 5, 7])
def test_small_vocabularies_are_asked_too(vocab: int) -> None:
    model = tiny("llama", vocab_size=vocab, pad_token_id=0)
    assert ids_used_elsewhere(model) is None and not isinstance(read_head(model), str)
    nano = NanoGPT("shape[-1]", vocab)
    assert ids_used_elsewhere(superpose(nano, nano.wte)) is not None
    sees = tiny("bert", vocab_size=vocab, is_decoder=False, pad_token_id=0)
    with pytest.raises(TokenSuperpositionError, match="sees the tokens that it shall predict"):
        check_causal(sees)


def test_the_mode_of_every_module_stays(tmp_path: Path) -> None:
    model: Any = tiny("llama").train()
    model.model.layers[0].eval()
    modes = [m.training for m in model.modules()]
    TSTTrainer(model, arguments(tmp_path), train_dataset=planned())
    assert [m.training for m in model.modules()] == modes and len(set(modes)) == 2


def test_nothing_of_ours_stays_on_a_model(tmp_path: Path) -> None:
    """So that it can be pickled for those who do not have this package; a trainer that is left still validates."""
    model: Any = tiny("llama")
    trainer = TSTTrainer(model, arguments(tmp_path), train_dataset=planned())
    held_out: Any = ValidationSet(TOKENS[:200], 8)
    trainer.train()
    before = trainer.evaluate(held_out)["eval_loss"]
    for _ in range(2):
        unsuperpose(model)
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
        file = io.BytesIO()
        torch.save(model, file)
        assert b"token_superposition" not in file.getvalue()
        assert trainer.evaluate(held_out)["eval_loss"] == before


def test_a_trainer_that_is_refused_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    bags: Any = planned()
    for options, changes in (
        ({}, {"label_smoothing_factor": 0.1}),
        ({}, {"max_steps": 99}),
        ({"weighting": "powr"}, {}),
        ({"eval_dataset": bags}, {}),
    ):
        for model, superposed in ((tiny("llama"), False), (superpose(tiny("llama")), True)):
            hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
            kind = type(model.get_input_embeddings())
            with pytest.raises(TokenSuperpositionError):
                TSTTrainer(model, arguments(tmp_path, **changes), train_dataset=bags, **options)
            assert type(model.get_input_embeddings()) is kind and (kind is nn.Embedding) == (not superposed)
            assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()] == hooks


class FirstIsMasked(PlannedDataset):
    """Bags without their first target, in some rows."""

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        sample = super().__getitem__(index)
        if sample["shift_labels"].dim() == 2:
            sample["shift_labels"][: 2 * (index % 4) + 1, 0] = -100
        return sample


@pytest.mark.parametrize("accumulated", [1, 2])
@pytest.mark.parametrize("heads", [0, 2])
def test_rows_whose_targets_weigh_nothing_are_not_counted(accumulated: int, heads: int, tmp_path: Path) -> None:
    """With ``first``, a bag without its first target. Loss and gradients of a step against float64."""
    samples = FirstIsMasked(TOKENS, Schedule.two_phase(2, 4, 0.5), 8, 4, 1)
    size = 4 // accumulated
    args = arguments(
        tmp_path, max_steps=1, max_grad_norm=0.0, per_device_train_batch_size=size,
        gradient_accumulation_steps=accumulated,
    )  # fmt: skip
    model, spy = tiny("llama"), Spy()
    mtp = MTPHeads(model, heads, 0.3) if heads else None
    trainer = TSTTrainer(model, args, train_dataset=samples, weighting="first", mtp=mtp, callbacks=[spy])
    trainer.train()
    stock: Any = tiny("llama").double()
    batch = default_data_collator([samples[i] for i in range(4)])
    hidden = stock.get_decoder()(inputs_embeds=stock.get_input_embeddings()(batch["input_ids"]).mean(2))[0]
    logits, targets, weights = stock.lm_head(hidden), batch["shift_labels"], place_weights("first", 4)
    loss = reference.multi_hot_cross_entropy(logits.flatten(0, 1), targets.flatten(0, 1), weights)
    rows = (targets[..., 0] != -100).sum()
    assert rows == 4 * 8 - (1 + 3 + 5 + 7)
    for k in range(1, heads + 1):  # which predict, untrained, what the model does
        further, n = targets[:, k:].flatten(0, 1), (targets[:, k:, :1] != -100).sum()
        one = reference.multi_hot_cross_entropy(logits[:, :-k].flatten(0, 1), further, weights)
        loss = loss + 0.3 / heads * one * n / rows
    assert losses(trainer)[0] == pytest.approx(loss.item(), rel=1e-5)
    loss.backward()
    for name, p in stock.named_parameters():
        torch.testing.assert_close(spy.grads[name].double(), p.grad, rtol=2e-3, atol=2e-6, msg=name)


def test_a_batch_without_a_target_that_weighs_something_is_0(tmp_path: Path) -> None:
    trainer = TSTTrainer(tiny("llama"), arguments(tmp_path), weighting="first")
    ids, targets = torch.arange(24).view(1, 6, 4), torch.arange(4, 28).view(1, 6, 4)
    targets[..., 0] = -100
    batch = {"input_ids": ids, "shift_labels": targets}
    trainer.current_gradient_accumulation_steps = 1
    count = trainer._get_num_items_in_batch([batch], torch.device("cpu"))
    assert count == 0 and trainer.compute_loss(trainer.model, batch, num_items_in_batch=count).item() == 0


class Learned(LlamaForCausalLM):
    """What changes nothing before it has been trained: an adapter before the head, or a scale and a bias after it."""

    def __init__(self, config: Any, where: str = "after"):
        super().__init__(config)
        self.where = where
        self.scale, self.bias = nn.Parameter(torch.ones(())), nn.Parameter(torch.zeros(VOCAB))
        self.adapter = nn.Linear(32, 32, bias=False)
        nn.init.zeros_(self.adapter.weight)

    def forward(self, input_ids: Any = None, inputs_embeds: Any = None, logits_to_keep: int = 0, **kwargs: Any) -> Any:  # pyright: ignore
        hidden: Any = self.model(input_ids=input_ids, inputs_embeds=inputs_embeds, **kwargs).last_hidden_state
        if self.where == "between":
            return CausalLMOutput(logits=self.lm_head(hidden + self.adapter(hidden)))
        return CausalLMOutput(logits=self.lm_head(hidden) * self.scale + self.bias)  # pyright: ignore


@pytest.mark.parametrize(
    ("where", "why", "learned"),
    [
        ("between", "the hidden states are changed between decoder and head", ["adapter.weight"]),
        ("after", "parameters change the logits after the head", ["scale", "bias"]),
    ],
)
def test_parameters_that_change_nothing_yet_are_trained(
    where: str, why: str, learned: list[str], tmp_path: Path
) -> None:
    model = Learned(tiny("llama").config, where)
    before = {name: model.get_parameter(name).detach().clone() for name in learned}
    trainer = TSTTrainer(model, arguments(tmp_path, max_steps=2), train_dataset=planned())
    assert trainer.whole_logits == why
    trainer.train()
    assert all(not torch.equal(model.get_parameter(name), before[name]) for name in learned)
    frozen = Learned(tiny("llama").config, where).requires_grad_(False)
    assert not isinstance(read_head(frozen), str)


def test_an_encoder_is_refused_also_where_only_targets_are_bags() -> None:
    options: dict[str, Any] = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "vocab_size": VOCAB}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    model = BartForConditionalGeneration(BartConfig(**options, **heads))
    with pytest.raises(TokenSuperpositionError, match="BartForConditionalGeneration has an encoder"):
        check_causal(model)
    check_causal(BartForCausalLM(BartConfig(**options, **heads)))


def test_ids_that_are_found_out_from_their_embeddings_are_refused() -> None:
    """Of bags there are none: Gemma 4 looks its further embeddings up by the ids that it reads off the first ones."""
    options: dict[str, Any] = {"vocab_size_per_layer_input": VOCAB, "num_key_value_heads": 2, "head_dim": 16}
    why = ids_used_elsewhere(build("gemma4_text", hidden_size_per_layer_input=4, **options))
    assert why is not None and why.startswith("it does not take embeddings in place of token ids (It seems like you")
    assert ids_used_elsewhere(build("gemma4_text", hidden_size_per_layer_input=0, **options)) is None


def test_custom_models_that_give_mappings_are_asked_as_they_are_trained() -> None:
    class Custom(Plain):
        def forward(self, input_ids: Any = None, inputs_embeds: Any = None, scale: float = 1.0) -> dict[str, Tensor]:  # pyright: ignore
            rows = self.embedding(input_ids) * scale if inputs_embeds is None else inputs_embeds
            return {"logits": self.head(rows)}

    assert ids_used_elsewhere(Custom()) is None
    scaled = Custom()
    scaled.forward.__func__.__defaults__ = (None, None, 2.0)  # pyright: ignore
    why = ids_used_elsewhere(scaled)
    assert why is not None and "another scale" in why
