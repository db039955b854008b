"""What a run costs, by formula and before anything is run: FLOPs, time, memory of a GPU, storage.

The formulas, their sources and what they leave out are in docs/plan.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from textwrap import shorten
from typing import Any, Literal, cast

from token_superposition.errors import TokenSuperpositionError
from token_superposition.experiment.config import Config
from token_superposition.loss.chunked import CHUNK_BYTES, CHUNK_ROWS_KERNEL

GpuType = Literal["A100", "H100", "H200", "B200"]


@dataclass(frozen=True)
class Gpu:
    """A data sheet: dense bfloat16 FLOP/s (not the figure with sparsity) and bytes of memory."""

    flops: float
    memory: float


GPUS: dict[GpuType, Gpu] = {
    "A100": Gpu(312e12, 80e9),  # NVIDIA A100 Tensor Core GPU data sheet, SXM 80 GB
    "H100": Gpu(989e12, 80e9),  # NVIDIA H100 Tensor Core GPU data sheet, SXM
    "H200": Gpu(989e12, 141e9),  # NVIDIA H200 Tensor Core GPU data sheet, SXM
    "B200": Gpu(2250e12, 180e9),  # NVIDIA DGX B200 data sheet, an eighth of the system
}
NO_ATTENTION = ("linear_attention", "conv", "moe", "mlp")  # kinds of layers whose cost does not grow with the length
USABLE = 0.9  # share of the memory; ours: the rest is for the driver, communication and fragmentation


@dataclass(frozen=True)
class Shape:
    """A model's sizes, counted on the model itself without its memory."""

    parameters: int
    active_parameters: int
    """With only the experts that one token uses."""
    embedding_parameters: int
    """Input embedding and head, once if they are tied."""
    matrix_parameters: int
    """Active weights that take part in matrix products, the head among them."""
    layer_parameters: int
    """Of the largest layer, all experts."""
    layers: int
    hidden_size: int
    vocab_size: int
    attention_layers: int
    """Those in which every position is compared with every other."""
    attention_width: int
    """Heads x size of a head, of queries and values the mean; 0 without attention."""
    key_value_width: int
    mlp_width: int
    """Width of the MLP, or of the experts that one token uses together."""
    experts_per_token: int
    normalizes_queries: bool
    optimizer_bytes: int
    """float32: AdamW's two averages; with Muon one for the hidden matrices and AdamW's for the rest."""

    @property
    def checkpoint_bytes(self) -> int:
        """float32 weights and the optimizer's state."""
        return 4 * self.parameters + self.optimizer_bytes

    @property
    def body_parameters(self) -> int:
        """Active parameters without embedding and head."""
        return self.active_parameters - self.embedding_parameters

    def flops_per_token(self, sequence_length: int, mtp_heads: int = 0) -> int:
        """FLOPs of training on one latent token: 6 per matrix weight, 12 per position and attention layer's width.

        The convention of PaLM (appendix B) and torchtitan: forward and backward, no recomputation, attention as if
        it were not causal; recurrences (linear attention, Mamba) are left out. ``mtp_heads`` are the heads for
        further tokens, each with one unembedding more.
        """
        matrices = self.matrix_parameters + mtp_parameters(mtp_heads, self.hidden_size, self.vocab_size)
        return 6 * matrices + 12 * self.attention_layers * self.attention_width * sequence_length

    def activation_bytes(self) -> int:
        """Bytes that autograd keeps for one latent token in one layer, bfloat16 with fused attention.

        As transformers computes them: two norms in float32, queries, keys, values and the output of attention, four
        vectors of the width of the gated MLP; for each expert its input and output as well.
        """
        attention = 4 * (self.attention_width + self.key_value_width)
        if self.normalizes_queries:
            attention += 6 * (self.attention_width + self.key_value_width)
        return 16 * self.hidden_size + attention + 8 * self.mlp_width + 4 * self.experts_per_token * self.hidden_size


def mtp_parameters(heads: int, hidden_size: int, vocab_size: int) -> int:
    """Weights in the matrix products of the heads for further tokens: each its matrix and the shared unembedding."""
    return heads * hidden_size * (hidden_size + vocab_size)


def shape_of(config: Config, vocab_size: int) -> Shape:
    """Raises ``TokenSuperpositionError`` for a model that cannot be built, or whose configuration names no sizes."""
    from token_superposition.experiment.model import empty_model

    model = empty_model(config, vocab_size)
    try:
        return _shape(model, config.train.optimizer == "muon")
    except Exception as e:  # each model names them in its way
        why = shorten(str(e), 150, placeholder=" ...")
        raise TokenSuperpositionError(
            f"the sizes of the model {cast(Any, model).config.model_type} cannot be read ({why}), so what it costs is "
            "not known; give them in model.options, or train it without a plan or --dry-run"
        ) from e


def _shape(model: Any, muon: bool) -> Shape:
    from torch import nn

    from token_superposition.engines.transformers.muon import split_parameters

    settings = model.config.get_text_config()
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    # Of a model that also sees or hears, what a text goes through.
    text = model if settings is model.config else nn.ModuleDict({"decoder": model.get_decoder(), "head": head})
    named = dict(text.named_parameters())  # tied weights once
    experts = sum(p.numel() for name, p in named.items() if ".experts." in name)
    used = getattr(settings, "num_experts_per_tok", 0) if experts else 0
    total = next((n for k in ("num_local_experts", "num_experts", "n_routed_experts") if (n := _get(settings, k))), 1)
    idle = experts - experts * used // total
    parameters = sum(p.numel() for p in model.parameters())
    lookups = {id(m.weight) for m in text.modules() if isinstance(m, nn.Embedding)} - {id(head.weight)}
    matrices = sum(p.numel() for p in named.values() if p.dim() > 1 and id(p) not in lookups)
    layers: dict[str, int] = {}
    for name, p in named.items():
        if number := next((part for part in name.split(".") if part.isdigit()), None):
            layers[number] = layers.get(number, 0) + p.numel()
    hidden: int = settings.hidden_size
    heads: int = _get(settings, "num_attention_heads")
    attention = heads * (_get(settings, "head_dim") or hidden // max(heads, 1))
    keys = attention // max(heads, 1) * (_get(settings, "num_key_value_heads") or heads)
    if latent := _get(settings, "qk_nope_head_dim"):  # multi-head latent attention: keys and values of every head
        attention = keys = heads * (latent + _get(settings, "qk_rope_head_dim") + _get(settings, "v_head_dim")) // 2
    in_muon = sum(p.numel() for p in split_parameters(model)[0]) if muon else 0
    kinds = getattr(settings, "layer_types", None) or ["full_attention"] * settings.num_hidden_layers
    mlp: int = _get(settings, "moe_intermediate_size") * used or _get(settings, "intermediate_size") * max(used, 1)
    return Shape(
        parameters=parameters,
        active_parameters=sum(p.numel() for p in named.values()) - idle,
        embedding_parameters=sum(p.numel() for p in {id(p): p for p in (embedding.weight, head.weight)}.values()),
        matrix_parameters=matrices - idle,
        layer_parameters=max(layers.values()),
        layers=settings.num_hidden_layers,
        hidden_size=hidden,
        vocab_size=embedding.weight.shape[0],
        attention_layers=sum(kind not in NO_ATTENTION for kind in kinds),
        attention_width=attention,
        key_value_width=keys,
        mlp_width=mlp or 4 * hidden,
        experts_per_token=used,
        normalizes_queries=any("q_norm" in name for name in named),
        optimizer_bytes=8 * parameters - 4 * in_muon,
    )


def _get(settings: Any, name: str) -> int:
    """0 where the model has no such size; the mean where each layer has its own."""
    value = getattr(settings, name, None) or 0
    return sum(value) // len(value) if isinstance(value, (list, tuple)) else value


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU at the worst moment, sharded over all GPUs as FSDP does (ZeRO-3)."""

    weights: int
    """This GPU's share, float32."""
    gradients: int
    """This GPU's share, float32."""
    optimizer: int
    """This GPU's share of the optimizer's state, float32."""
    gathered: int
    """bfloat16 weights that are whole here: embedding, head, two layers, and the gradients of one; all on one GPU."""
    activations: int
    """What autograd keeps of a micro-batch."""
    activations_checkpointed: int
    """The same with activation checkpointing of every layer, which adds about a third to the FLOPs."""
    loss: int
    """Logits of one chunk and the head's gradient in float32."""
    loss_whole_logits: int
    """What cross-entropy on whole logits would take in place of that."""

    total: int
    total_checkpointed: int


def memory_of(shape: Shape, gpus: int, tokens: int) -> Memory:
    """``tokens`` is the number of latent positions of a micro-batch on one GPU; a bag counts once."""
    share, optimizer = (math.ceil(n / gpus) for n in (shape.parameters, shape.optimizer_bytes))
    embedding, layer, head = shape.embedding_parameters, shape.layer_parameters, shape.vocab_size * shape.hidden_size
    gathered = 2 * (embedding + 2 * layer) + 2 * (embedding + layer) if gpus > 1 else 2 * shape.parameters
    rows = min(CHUNK_ROWS_KERNEL, CHUNK_BYTES // (2 * shape.vocab_size), tokens)
    loss = 2 * rows * shape.vocab_size + 4 * head
    activations = tokens * shape.layers * shape.activation_bytes()
    checkpointed = tokens * (2 * shape.layers * shape.hidden_size + shape.activation_bytes())
    fixed = 8 * share + optimizer + gathered + loss
    return Memory(
        weights=4 * share,
        gradients=4 * share,
        optimizer=optimizer,
        gathered=gathered,
        activations=activations,
        activations_checkpointed=checkpointed,
        loss=loss,
        loss_whole_logits=10 * tokens * shape.vocab_size,
        total=fixed + activations,
        total_checkpointed=fixed + checkpointed,
    )


@dataclass(frozen=True)
class Cost:
    """One run. Tokens of a whole run are in the unit that is named."""

    steps: int
    superposed_steps: int
    latent_tokens: int
    raw_tokens: int
    flops: float
    gpu_hours: float
    days: float
    """On all GPUs."""
    data_bytes: int
    """Of the token store for one pass over the raw tokens."""


def cost_of(config: Config, shape: Shape, gpus: int, gpu_type: GpuType, mfu: float) -> Cost:
    """On so many GPUs, of whose peak the share ``mfu`` is used."""
    schedule, batch, length = config.schedule, config.train.batch_size, config.data.sequence_length
    latent, raw = schedule.latent_tokens(batch, length), schedule.raw_tokens(batch, length)
    flops = float(shape.flops_per_token(length, config.superposition.trained_heads)) * latent
    hours = flops / (GPUS[gpu_type].flops * mfu) / 3600
    return Cost(
        steps=schedule.total_steps,
        superposed_steps=sum(p.steps for p in schedule.phases if p.is_superposed),
        latent_tokens=latent,
        raw_tokens=raw,
        flops=flops,
        gpu_hours=hours,
        days=hours / gpus / 24,
        data_bytes=raw * (2 if shape.vocab_size <= 2**16 else 4),
    )


def micro_batch_of(config: Config, gpus: int) -> int:
    """Sequences that one GPU computes at once, as training takes them."""
    return config.train.micro_batch_size or max(config.train.batch_size // gpus, 1)
