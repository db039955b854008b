"""Which causal LMs of transformers train on bags: ``python -m tests.architectures > docs/architectures.md``.

Every family is a model of two layers with random weights in float64. Measured on it: loss and gradients of a batch of
bags against hand-averaged embeddings and whole logits, the loss of ordinary tokens against the model's own, and whether
the loss is taken from the hidden states (no whole logits) or why not.
"""

from __future__ import annotations

import copy
import tempfile
import warnings
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, TrainingArguments, logging

from token_superposition import fold, reference, span
from token_superposition.engines.transformers import TSTTrainer
from token_superposition.engines.transformers.head import auxiliary_weight, ids_used_elsewhere

VOCAB, LENGTH, BAG, BATCH = 64, 8, 3, 2
BASE: dict[str, object] = {
    "vocab_size": VOCAB, "max_position_embeddings": 32, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None,
    "use_cache": False, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
}  # fmt: skip
GROUPED: dict[str, object] = {"num_key_value_heads": 1, "head_dim": 16}
MOE: dict[str, object] = GROUPED | {
    "moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2, "output_router_logits": True,
    "num_local_experts": 4,
}  # fmt: skip
MLA: dict[str, object] = {
    "num_key_value_heads": 2, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
    "v_head_dim": 8, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1,
    "first_k_dense_replace": 1, "moe_intermediate_size": 24, "n_shared_experts": 1,
}  # fmt: skip
SSM: dict[str, object] = {
    "num_heads": 4, "head_dim": 16, "state_size": 4, "n_groups": 1, "chunk_size": 4, "conv_kernel": 4, "expand": 2,
}  # fmt: skip
HYBRID: dict[str, object] = {
    "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 4, "mamba_n_groups": 1, "mamba_chunk_size": 4,
}  # fmt: skip

FAMILIES: dict[str, dict[str, object]] = {
    "llama": GROUPED,
    "mistral": GROUPED | {"sliding_window": 4},
    "mixtral": MOE,
    "qwen2": GROUPED,
    "qwen2_moe": MOE | {"shared_expert_intermediate_size": 24},
    "qwen3": GROUPED,
    "qwen3_moe": MOE,
    "qwen3_next": MOE | {
        "shared_expert_intermediate_size": 24, "linear_num_value_heads": 2, "linear_num_key_heads": 2,
        "linear_key_head_dim": 8, "linear_value_head_dim": 8, "layer_types": ["linear_attention", "full_attention"],
    },
    "gemma": GROUPED,
    "gemma2": GROUPED | {"sliding_window": 4},
    "gemma3_text": GROUPED | {"sliding_window": 4},
    "gpt2": {},
    "gpt_neo": {"num_layers": 2, "num_heads": 2, "attention_types": [[["global", "local"], 1]], "window_size": 4},
    "gpt_neox": {},
    "gpt_bigcode": {},
    "gptj": {"rotary_dim": 8},
    "gpt_oss": MOE | {"sliding_window": 4},
    "olmo": {},
    "olmo2": GROUPED,
    "olmo3": GROUPED | {"sliding_window": 4},
    "olmoe": MOE,
    "phi": {},
    "phi3": GROUPED,
    "phimoe": MOE,
    "granite": GROUPED | {"logits_scaling": 8.0, "embedding_multiplier": 3.0},
    "granitemoe": MOE | {"logits_scaling": 8.0, "embedding_multiplier": 3.0},
    "cohere": {"logit_scale": 0.25},
    "cohere2": GROUPED | {"logit_scale": 0.25, "sliding_window": 4},
    "stablelm": GROUPED | {"num_key_value_heads": 2},
    "smollm3": GROUPED,
    "deepseek_v2": MLA | {"topk_method": "greedy"},
    "deepseek_v3": MLA,
    "mamba": {"state_size": 4, "time_step_rank": 4},
    "mamba2": SSM,
    "falcon_mamba": {"state_size": 4, "time_step_rank": 4},
    "falcon": {"new_decoder_architecture": False},
    "falcon (ALiBi)": {"alibi": True, "new_decoder_architecture": False},
    "falcon_h1": GROUPED | HYBRID | {"mamba_d_ssm": 64, "lm_head_multiplier": 0.5, "embedding_multiplier": 2.0},
    "bloom": {},
    "opt": {"word_embed_proj_dim": 16, "do_layer_norm_before": False, "ffn_dim": 48},
    "mpt": {},
    "codegen": {"rotary_dim": 8, "n_head": 4, "num_attention_heads": 4},
    "starcoder2": GROUPED | {"sliding_window": 4},
    "glm": GROUPED,
    "glm4": GROUPED,
    "glm4_moe": MOE | {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
    "nemotron": GROUPED,
    "ernie4_5": GROUPED,
    "ernie4_5_moe": MOE | {"moe_num_experts": 4, "moe_k": 2},
    "hunyuan_v1_dense": GROUPED,
    "jetmoe": MOE | {"kv_channels": 16, "aux_loss_coef": 0.1},
    "jamba": MOE | {"mamba_d_state": 4, "mamba_dt_rank": 4, "use_mamba_kernels": False, "attn_layer_offset": 1,
                    "attn_layer_period": 2},
    "bamba": GROUPED | HYBRID | {"attn_layer_indices": [1]},
    "nemotron_h": GROUPED | {"mamba_num_heads": 4, "mamba_head_dim": 16, "ssm_state_size": 4, "n_groups": 1,
                             "chunk_size": 4, "layers_block_type": ["mamba", "attention"]},
    "lfm2": GROUPED | {"layer_types": ["conv", "full_attention"]},
    "exaone4": GROUPED | {"sliding_window": 4},
    "apertus": GROUPED,
    "seed_oss": GROUPED,
    "nanochat": GROUPED,
    "recurrent_gemma": GROUPED | {
        "lru_width": 32, "attention_window_size": 4, "block_types": ["recurrent", "attention"],
    },
    "gemma3n_text": GROUPED | {
        "sliding_window": 4, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCAB,
        "num_kv_shared_layers": 0, "layer_types": ["sliding_attention", "full_attention"], "laurel_rank": 4,
        "activation_sparsity_pattern": [0.0, 0.0], "altup_num_inputs": 2, "intermediate_size": [48, 48],
    },
    "llama4_text": MOE | {"intermediate_size_mlp": 48},
    "hunyuan_v1_moe": MOE | {"moe_topk": 2},
    "minimax": MOE,
    "dbrx": {
        "d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64, "output_router_logits": True,
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "arcee": GROUPED,
    "helium": GROUPED,
    "persimmon": {},
    "vaultgemma": GROUPED | {"sliding_window": 4},
    "openai-gpt": {},
    "ctrl": {"dff": 48},
    "rwkv": {"attention_hidden_size": 32, "context_length": 32},
    "bert": {"is_decoder": True},
}  # fmt: skip
LIMIT = 1e-5  # largest relative difference that counts as equal: some models compute parts of themselves in float32


@dataclass(frozen=True)
class Facts:
    """What was measured of a family. Differences are relative, of the gradients to the largest one of a weight."""

    bag_loss: float
    bag_gradients: float
    token_loss: float
    head: str
    """How the logits are made from the hidden states, or why whole logits are made."""
    fused: bool
    tied: bool
    auxiliary: bool
    refused: str | None
    """Why it cannot read bags."""

    @property
    def equal(self) -> bool:
        return max(self.bag_loss, self.bag_gradients, self.token_loss) <= LIMIT


@cache
def measure(family: str) -> Facts:
    torch.manual_seed(0)
    model = build(family)
    theirs = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(1)
    raw = torch.randint(VOCAB, (BATCH, span(LENGTH, BAG, BAG)), generator=generator)
    ids, targets = fold(raw, BAG, BAG)
    with tempfile.TemporaryDirectory() as directory:
        arguments = TrainingArguments(output_dir=directory, use_cpu=True, report_to="none", disable_tqdm=True)
        trainer = TSTTrainer(model, arguments)
    refused = ids_used_elsewhere(model)
    loss = trainer.compute_loss(model.train(), {"input_ids": ids, "shift_labels": targets})
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    theirs.train()
    rows = theirs.get_input_embeddings()(ids.flatten(1)).unflatten(1, (LENGTH, BAG))
    out = theirs(inputs_embeds=sum(rows.unbind(2)) / BAG, use_cache=False)
    expected = reference.multi_hot_cross_entropy(out.logits.flatten(0, 1), targets.flatten(0, 1))
    auxiliary = getattr(out, "aux_loss", None)
    if auxiliary is not None:
        expected = expected + auxiliary_weight(theirs) * auxiliary
    expected.backward()
    wanted = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    assert gradients.keys() == wanted.keys(), gradients.keys() ^ wanted.keys()
    apart = max(distance(gradients[name], wanted[name]) for name in wanted)

    tokens, next_tokens = fold(raw[:, : LENGTH + 1])
    ours = trainer.compute_loss(model.eval(), {"input_ids": tokens, "shift_labels": next_tokens})
    labels = torch.cat([tokens[:, :1], next_tokens[:, :-1]], 1)  # the stock loss shifts them itself
    labelled = trainer.compute_loss(model, {"input_ids": tokens[:, :-1], "shift_labels": next_tokens[:, :-1]})
    with torch.no_grad():
        logits = theirs.eval()(input_ids=tokens, use_cache=False).logits
        stock = theirs(input_ids=tokens, labels=labels, use_cache=False)
    own: Tensor = stock.loss
    if auxiliary is not None:  # in training only
        own = own - auxiliary_weight(theirs) * stock.aux_loss
    whole = torch.nn.functional.cross_entropy(logits.double().flatten(0, 1), next_tokens.flatten())
    token_loss = max(distance(ours, whole), distance(labelled, own))
    head = trainer.head
    told = [] if head is None else [f"soft cap {head.softcap:g}"] if head is not None and head.softcap else []
    told += ["bias"] if head is not None and getattr(model.get_output_embeddings(), "bias", None) is not None else []
    told += [f"logits x {head.logit_scale:g}"] if head is not None and head.logit_scale != 1 else []
    return Facts(
        bag_loss=distance(loss, expected),
        bag_gradients=apart,
        token_loss=token_loss,
        head=", ".join(told) if head is not None else trainer.whole_logits,
        fused=head is not None,
        tied=model.get_input_embeddings().weight is model.get_output_embeddings().weight,
        auxiliary=auxiliary is not None,
        refused=refused,
    )


def build(family: str) -> PreTrainedModel:
    architecture = family.split()[0]
    config: Any = AutoConfig.for_model(architecture, **(BASE | FAMILIES[family]))
    for name, value in vars(config).items():
        if isinstance(value, float) and ("drop" in name or "jitter" in name):
            setattr(config, name, 0.0)  # nothing random between two forward passes
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float64)
    if hasattr(config, "num_experts_per_tok"):
        model.set_experts_implementation("eager")  # the grouped products have no float64
    return model


@torch.no_grad()
def distance(a: Tensor, b: Tensor) -> float:
    return ((a - b).abs().max() / b.abs().max().clamp(min=1e-12)).item()


def row(family: str) -> str:
    """Its line of docs/architectures.md, measured now."""
    f = measure(family)
    equal = "no" if not f.equal else "refused" if f.refused is not None else "yes"
    loss = f.refused or (("fused" + f", {f.head}" * bool(f.head)) if f.fused else f"whole logits: {f.head}")
    notes = ", ".join(["tied"] * f.tied + ["auxiliary loss"] * f.auxiliary)
    return f"| `{family}` | {equal} | {loss} | {notes} |".replace("|  |", "| |")


INTRODUCTION = f"""\
# Architectures

Which causal language models of transformers {version("transformers")} train with TST. Written by
`python -m tests.architectures > docs/architectures.md`; `tests/test_architectures.py` measures every row again.

Each is a model of two layers with random weights in float64. *Equal* means, to {LIMIT:.0e} relative: the loss of a
batch of bags and every gradient are those of hand-averaged embeddings (`inputs_embeds`) and whole logits, with the
mixture of experts' auxiliary loss where the model has one; and with bags of one token the loss is the model's own.
*Fused*: the loss is taken from the hidden states, with the soft cap or scale that the model puts on its logits, and the
logits (B, L, V) are never made. *Refused*: `TSTTrainer` says so before it trains on bags; output-only bags still
work. Families that are not here were not measured; `TSTTrainer` finds out the way of the loss, and what it must refuse,
on any model. BERT and its relatives see later tokens, and are refused, unless `is_decoder` is true.

In a loop of your own, `model.get_decoder()(ids).last_hidden_state` gives the hidden states of a *fused* family, and
`linear_multi_hot_cross_entropy` takes what the row names: `softcap=30`, `logit_scale=0.125`, `bias=head.bias`. Where
whole logits are named, use `multi_hot_cross_entropy(model(ids).logits, targets)`; so also with an *auxiliary loss*,
which `model(ids)` gives, `get_decoder()` does not, and your loop adds (`TSTTrainer` does all that by itself).
`superpose` does not refuse anything: a family that is *refused* would read bags without the scale or the further
embeddings that it gives to tokens, so leave its input bag 1.

| family | equal | loss | |
|---|---|---|---|"""


if __name__ == "__main__":
    logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    print("\n".join([INTRODUCTION, *map(row, FAMILIES)]))
