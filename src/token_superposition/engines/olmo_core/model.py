"""An OLMo-core transformer from a transformers configuration, whose head takes bags of targets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

from olmo_core.nn.feed_forward import FeedForwardConfig
from olmo_core.nn.layer_norm import LayerNormType
from olmo_core.nn.lm_head import LMHead, LMHeadConfig, LMHeadType, LMLossImplementation, LMOutputWithLoss
from olmo_core.nn.transformer import TransformerConfig
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from transformers import PretrainedConfig

from token_superposition.errors import TokenSuperpositionError
from token_superposition.loss import linear_multi_hot_cross_entropy
from token_superposition.weights import Weighting, weights_for

ARCHITECTURES = ("llama", "qwen3")
TP_AND_CP = "tp_config and cp_config are both set, and the loss on bags has one of them at most; leave one out"
NO_NGPT = "nGPT's head has scales that the loss on bags knows nothing of, so choose another model"


@dataclass
class TSTLMHeadConfig(LMHeadConfig):
    """Builds a ``TSTLMHead`` where ``LMHeadConfig`` builds a ``LMHead``."""

    weighting: str = "uniform"
    """Weights of the places in a target bag."""

    def build(self, *, d_model: int, vocab_size: int, init_device: str = "cpu") -> LMHead:
        """Raises ``TokenSuperpositionError`` for the normalized head and for another implementation of the loss."""
        if self.loss_implementation != LMLossImplementation.default:
            raise TokenSuperpositionError(
                f"TSTLMHeadConfig: loss_implementation is {str(self.loss_implementation)!r}, but the head has a loss "
                "of its own, which makes no whole logits either; leave loss_implementation out"
            )
        if self.name != LMHeadType.default:
            raise TokenSuperpositionError(f"TSTLMHeadConfig: name is {str(self.name)!r}; {NO_NGPT}")
        return TSTLMHead(
            d_model=d_model,
            vocab_size=vocab_size,
            layer_norm=self.layer_norm,
            dtype=self.dtype.as_pt(),
            bias=self.bias is not False,
            init_device=init_device,
            weighting=cast(Weighting, self.weighting),
        )


class TSTLMHead(LMHead):
    """``LMHead`` whose training loss takes labels (B, L) or (B, L, s) and never makes the (B, L, V) logits.

    The loss is the multi-hot cross-entropy summed over the latent positions that have a target ("sum"), or their mean.
    Under tensor parallelism the head is sharded over V and every process gets the whole loss. What does not say
    ``return_logits=False``, as the train module does, and what asks for a loss per token or for some positions only
    goes the stock way, with labels (B, L).

    Raises ``TokenSuperpositionError`` for bags of labels on the stock way, and for tensor with context parallelism.
    """

    def __init__(self, *, weighting: Weighting = "uniform", **kwargs: Any):
        super().__init__(**kwargs)
        self.weighting: Weighting = weighting
        self.positions_are_counted = False
        """By ``TSTTrainModule``: its ``loss_div_factor`` counts a bag once, the stock one each of its tokens."""

    def forward(
        self,
        x: Tensor,  # (B, L, d)
        *,
        labels: Tensor | None = None,  # (B, L) or (B, L, s)
        loss_reduction: Any = "mean",
        return_logits: bool | None = None,
        loss_div_factor: Tensor | float | None = None,
        z_loss_multiplier: float | None = None,
        ignore_index: int = -100,
        logits_to_keep: int | Tensor = 0,
    ) -> Tensor | LMOutputWithLoss:
        every_position = isinstance(logits_to_keep, int) and logits_to_keep == 0
        if labels is None or loss_reduction == "none" or return_logits is not False or not every_position:
            if labels is not None and labels.dim() == 3:
                raise TokenSuperpositionError(
                    f"labels are bags {tuple(labels.shape)}, whose loss is over every position, without logits; "
                    'set return_logits=False, loss_reduction to "sum" or "mean", and no logits_to_keep'
                )
            return super().forward(
                x,
                labels=self._sharded_like_logits(labels),
                loss_reduction=loss_reduction,
                return_logits=return_logits,
                loss_div_factor=loss_div_factor,
                z_loss_multiplier=z_loss_multiplier,
                ignore_index=ignore_index,
                logits_to_keep=logits_to_keep,
            )
        if z_loss_multiplier is not None:
            raise TokenSuperpositionError(
                f"z_loss_multiplier is {z_loss_multiplier}; the loss on bags has no separate z-loss, so leave it None"
            )
        if labels.dim() == 3 and loss_div_factor is not None and not self.positions_are_counted:
            raise TokenSuperpositionError(
                f"labels are bags {tuple(labels.shape)}, of which a stock train module counts every token, so that the "
                "loss would be too small; train with TSTTrainModule"
            )
        loss = linear_multi_hot_cross_entropy(
            self.norm(x) if self.norm is not None else x,
            self.w_out.weight,
            labels,
            weights_for(labels, self.weighting) if labels.dim() == 3 else None,
            bias=self.w_out.bias,
            ignore_index=ignore_index,
            reduction=loss_reduction,
        )
        if not self.tp_enabled:
            loss = self._finalize_loss(loss, x.shape[0], loss_reduction=loss_reduction, loss_div_factor=loss_div_factor)
        elif loss_div_factor is not None:  # whole on every process, where the stock loss is of a share of the sequence
            loss = loss / loss_div_factor
        return LMOutputWithLoss(logits=None, loss=loss, ce_loss=loss.detach(), z_loss=None)

    def apply_tp(self, tp_mesh: DeviceMesh, input_layouts: Any = None) -> None:
        """As in ``LMHead``, but labels come whole to every process: each holds the rows of some tokens."""
        if self.cp_enabled:
            raise TokenSuperpositionError(TP_AND_CP)
        super().apply_tp(tp_mesh, None)

    def apply_cp(self, cp_mesh: DeviceMesh) -> None:
        if self.tp_enabled:
            raise TokenSuperpositionError(TP_AND_CP)
        super().apply_cp(cp_mesh)

    def _sharded_like_logits(self, labels: Tensor | None) -> Tensor | None:
        if labels is None or self._tp_mesh is None:
            return labels
        return labels.chunk(self._tp_mesh.size(), dim=1)[self._tp_mesh.get_local_rank()]


def transformer_config(hf: PretrainedConfig, weighting: Weighting = "uniform", seed: int = 0) -> TransformerConfig:
    """The OLMo-core model that computes what transformers computes for ``hf`` (model types llama and qwen3).

    Raises ``TokenSuperpositionError`` for another model type and for options that OLMo-core has nothing for.
    """
    h: Any = hf
    if h.model_type not in ARCHITECTURES:
        raise TokenSuperpositionError(
            f"model.architecture is {h.model_type}; the OLMo-core engine trains {' and '.join(ARCHITECTURES)}, "
            "so choose one of these or another engine (tst train, torchtitan)"
        )
    rope: dict[str, Any] = h.rope_parameters
    wanted = {
        "attention_bias": (h.attention_bias, False),
        "mlp_bias": (getattr(h, "mlp_bias", False), False),
        "attention_dropout": (h.attention_dropout, 0),
        "hidden_act": (h.hidden_act, "silu"),
        "rope_parameters.rope_type": (rope.get("rope_type", "default"), "default"),
        "use_sliding_window": (getattr(h, "use_sliding_window", False), False),
    }
    for name, (value, supported) in wanted.items():
        if value != supported:
            raise TokenSuperpositionError(
                f"model.options: {name} is {value!r}; the OLMo-core engine has {supported!r} only, or use tst train"
            )
    qwen = h.model_type == "qwen3"
    config = TransformerConfig.llama_like(
        d_model=h.hidden_size,
        vocab_size=h.vocab_size,
        n_layers=h.num_hidden_layers,
        n_heads=h.num_attention_heads,
        n_kv_heads=h.num_key_value_heads,
        head_dim=h.head_dim,
        qk_norm=qwen,
        use_head_qk_norm=qwen,
        layer_norm_eps=h.rms_norm_eps,
        layer_norm_name=LayerNormType.qwen_rms if qwen else LayerNormType.rms,
        rope_theta=cast(int, rope["rope_theta"]),
        rope_full_precision=not qwen,
        feed_forward=FeedForwardConfig(hidden_size=h.intermediate_size, bias=False),
        tie_word_embeddings=h.tie_word_embeddings,
        init_std=h.initializer_range,
        init_seed=seed,
    )
    config.lm_head = TSTLMHeadConfig(layer_norm=config.lm_head.layer_norm, bias=False, weighting=weighting)
    return config
