"""A model of our configuration (fields of transformers) as a model of torchtitan."""

from __future__ import annotations

from dataclasses import fields, replace
from functools import partial
from typing import Any

from torch import nn
from torchtitan.components.optimizer import register_moe_load_balancing_hook
from torchtitan.distributed.pipeline_parallel import pipeline_llm
from torchtitan.models.common import ComplexRoPE, CosSinRoPE, Linear, TransformerBlock
from torchtitan.models.common.attention import ScaledDotProductAttention
from torchtitan.models.common.config_utils import (
    make_ffn_config,
    make_gqa_config,
    make_moe_config,
    make_routed_experts_config,
)
from torchtitan.models.common.decoder import Decoder
from torchtitan.models.common.embedding import Embedding
from torchtitan.models.common.nn_modules import RMSNorm
from torchtitan.models.llama3 import Llama3Model, parallelize_llama
from torchtitan.models.llama3.model import Llama3TransformerBlock
from torchtitan.models.llama3.state_dict_adapter import Llama3StateDictAdapter
from torchtitan.models.qwen3 import Qwen3Model, parallelize_qwen3
from torchtitan.models.qwen3.model import Qwen3TransformerBlock
from torchtitan.models.qwen3.state_dict_adapter import Qwen3StateDictAdapter
from torchtitan.protocols.model_spec import ModelSpec
from transformers import PretrainedConfig

from token_superposition.engines.torchtitan.balance import BalancedRouter
from token_superposition.engines.torchtitan.embedding import BagEmbedding
from token_superposition.errors import TokenSuperpositionError
from token_superposition.experiment.config import ModelConfig
from token_superposition.experiment.model import model_settings

ARCHITECTURES = ("llama", "qwen3", "qwen3_moe")
# What torchtitan's code for these models does, whatever a configuration says.
FIXED: dict[str, Any] = {
    "hidden_act": "silu",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "mlp_bias": False,
    "use_sliding_window": False,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}


def checked_settings(
    model: ModelConfig, vocab_size: int, eos_id: int, sequence_length: int, bos_id: int | None = None
) -> PretrainedConfig:
    """The configuration of transformers that describes the model: read to build it, saved beside its exported weights.

    Raises ``TokenSuperpositionError`` for a field that does not exist or that torchtitan's model does not have.
    """
    settings = model_settings(model, vocab_size, eos_id, sequence_length, bos_id)
    if settings.model_type not in ARCHITECTURES:
        raise TokenSuperpositionError(
            f"model.architecture is {settings.model_type}; the torchtitan engine has {', '.join(ARCHITECTURES)}"
        )
    fixed = FIXED | {"rope_parameters": {"rope_type": "default"}}
    for key, value in fixed.items():
        given = getattr(settings, key, value)
        if key == "rope_parameters":
            given, value = given["rope_type"], value["rope_type"]
        if given != value:
            raise TokenSuperpositionError(
                f"model.options: {key} is {given!r}; torchtitan's {settings.model_type} has {value!r}"
            )
    _holds_vocabulary(settings.vocab_size, vocab_size)
    return settings


def balance_coefficient(settings: Any) -> float:
    """Of Qwen3-MoE's auxiliary loss, which transformers too adds only where the router's logits are put out."""
    return settings.router_aux_loss_coef if getattr(settings, "output_router_logits", False) else 0.0


def model_spec(settings: PretrainedConfig, sequence_length: int, batch_size: int) -> ModelSpec:
    """torchtitan's model, with our embedding, causal attention and the initial distribution of transformers.

    A sample is one stretch of text, so that plain causal attention is all it needs; documents in it see each other, as
    in the transformers engine. Weights are drawn with the standard deviation ``initializer_range``, norms are 1.
    """
    s: Any = settings
    is_llama, rows = s.model_type == "llama", batch_size * sequence_length
    weight = partial(nn.init.normal_, std=s.initializer_range)
    linear_init: dict[str, Any] = {"weight": weight}
    embedding_init: dict[str, Any] = {"weight": (lambda _: None) if s.tie_word_embeddings else weight}

    def norm(width: int) -> RMSNorm.Config:
        return RMSNorm.Config(normalized_shape=width, eps=s.rms_norm_eps, param_init={"weight": nn.init.ones_})

    def layer() -> TransformerBlock.Config:
        head_dim = getattr(s, "head_dim", None) or s.hidden_size // s.num_attention_heads
        rope = (ComplexRoPE if is_llama else CosSinRoPE).Config(
            dim=head_dim, max_seq_len=sequence_length, theta=s.rope_parameters["rope_theta"]
        )
        parts: dict[str, Any] = {
            "attention_norm": norm(s.hidden_size),
            "ffn_norm": norm(s.hidden_size),
            "attention": make_gqa_config(
                dim=s.hidden_size,
                n_heads=s.num_attention_heads,
                n_kv_heads=s.num_key_value_heads,
                head_dim=head_dim,
                wqkv_param_init=linear_init,
                wo_param_init=linear_init,
                inner_attention=ScaledDotProductAttention.Config(),
                fuse_qkv=True,
                rope=rope,
                qk_norm=None if is_llama else norm(head_dim),
            ),
        }
        if s.model_type == "qwen3_moe":
            parts["moe"] = _moe(s, weight, rows)
        else:
            parts["feed_forward"] = make_ffn_config(
                dim=s.hidden_size,
                hidden_dim=s.intermediate_size,
                w1_param_init=linear_init,
                w2w3_param_init=linear_init,
            )
        return (Llama3TransformerBlock if is_llama else Qwen3TransformerBlock).Config(**parts)

    model = (Llama3Model if is_llama else Qwen3Model).Config(
        dim=s.hidden_size,
        vocab_size=s.vocab_size,
        enable_weight_tying=s.tie_word_embeddings,
        tok_embeddings=BagEmbedding.Config(
            num_embeddings=s.vocab_size, embedding_dim=s.hidden_size, param_init=embedding_init
        ),
        norm=norm(s.hidden_size),
        lm_head=Linear.Config(in_features=s.hidden_size, out_features=s.vocab_size, param_init=linear_init),
        layers=[layer() for _ in range(s.num_hidden_layers)],
    )
    return ModelSpec(
        name="llama3" if is_llama else "qwen3",
        flavor=s.model_type,
        model=model,
        parallelize_fn=parallelize_llama if is_llama else parallelize_qwen3,
        pipelining_fn=pipeline_llm,
        post_optimizer_build_fn=None if is_llama else register_moe_load_balancing_hook,
        state_dict_adapter=Llama3StateDictAdapter if is_llama else Qwen3StateDictAdapter,
    )


def with_bags(spec: ModelSpec, vocab_size: int) -> ModelSpec:
    """A model of one's own, with our embedding in place of torchtitan's; the rest of it stays.

    Raises ``TokenSuperpositionError`` for an embedding that is not torchtitan's, for layers of multi-token prediction,
    and for fewer tokens than the data has.
    """
    model = spec.model
    if not isinstance(model, Decoder.Config):
        raise TokenSuperpositionError(
            f"config.model_spec has the model {type(model).__qualname__}; give one whose configuration is a "
            "torchtitan.models.common.decoder.Decoder.Config, in which bags can be embedded"
        )
    embedding = model.tok_embeddings
    if type(embedding) is Embedding.Config:
        embedding = BagEmbedding.Config(**{f.name: getattr(embedding, f.name) for f in fields(embedding)})
    elif not isinstance(embedding, BagEmbedding.Config):
        raise TokenSuperpositionError(
            f"config.model_spec has the embedding {type(embedding).__qualname__}, which does not read bags; give a "
            "subclass of token_superposition.engines.torchtitan.embedding.BagEmbedding"
        )
    if getattr(model, "mtp_layers", None):
        raise TokenSuperpositionError(
            "config.model_spec has layers for multi-token prediction, with which torchtitan has no chunked loss; "
            "give num_mtp_layers=0"
        )
    _holds_vocabulary(model.vocab_size, vocab_size)
    return replace(spec, model=replace(model, tok_embeddings=embedding))


def _holds_vocabulary(embeddings: int, vocab_size: int) -> None:
    if embeddings < vocab_size:
        raise TokenSuperpositionError(
            f"the model has {embeddings} token embeddings, the data's vocabulary has {vocab_size}; "
            "prepare the data with the model's tokenizer (tst prepare --tokenizer)"
        )


def _moe(s: Any, weight: Any, rows: int) -> Any:
    return make_moe_config(
        num_experts=s.num_experts,
        load_balance_coeff=None,  # see balance.py
        router=BalancedRouter.Config(
            num_experts=s.num_experts,
            gate=Linear.Config(in_features=s.hidden_size, out_features=s.num_experts, param_init={"weight": weight}),
            top_k=s.num_experts_per_tok,
            score_func="softmax",
            route_norm=s.norm_topk_prob,
            coefficient=balance_coefficient(s),
            rows=rows,
        ),
        routed_experts=make_routed_experts_config(
            dim=s.hidden_size,
            hidden_dim=s.moe_intermediate_size,
            num_experts=s.num_experts,
            top_k=s.num_experts_per_tok,
            param_init={"w1_EFD": weight, "w2_EDF": weight, "w3_EFD": weight},
            comm_backend="standard",
        ),
    )
