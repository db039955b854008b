"""The costs of a run: every formula against what torch counts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from tests.conftest import TINY, VOCAB, tiny
from token_superposition.engines.transformers.muon import MuonAdamW, split_parameters
from token_superposition.experiment.budget import GPUS, memory_of, shape_of
from token_superposition.experiment.config import Config, DataConfig, ModelConfig, load_preset
from token_superposition.experiment.flops import flops_per_sequence
from token_superposition.experiment.model import empty_model
from token_superposition.experiment.planning import LLAMA3_VOCAB, plan

DENSE = ("270m", "600m", "3b")


@pytest.fixture(autouse=True)
def _no_data_here(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Presets read ``data``: a folder of that name would change their vocabulary."""
    monkeypatch.chdir(tmp_path_factory.mktemp("empty"))
    monkeypatch.setenv("COLUMNS", "80")


def counts(layers: int, d: int, queries: int, keys: int, mlp: int, norms: int) -> int:
    """Parameters of the layers and the last norm."""
    return layers * (2 * d * queries + 2 * d * keys + 3 * d * mlp + norms) + d


MOE = {
    "layers": 32,
    "d": 1024,
    "queries": 2048,
    "keys": 512,
    "norms": 2 * 1024 + 2 * 128 + 128 * 1024,
}  # with the router
SIZES: dict[str, tuple[int, int, int]] = {  # without embedding and head: total, active; in embedding and head
    "270m": (counts(30, 576, 576, 192, 1536, 2 * 576),) * 2 + (2 * 128_256 * 576,),
    "600m": (counts(32, 960, 960, 320, 2560, 2 * 960),) * 2 + (2 * 128_256 * 960,),
    "3b": (counts(36, 2048, 2048, 512, 11008, 2 * 2048),) * 2 + (2 * 128_256 * 2048,),
    "10b-a1b": (counts(mlp=128 * 768, **MOE), counts(mlp=8 * 768, **MOE), 2 * 128_256 * 1024),
}


@pytest.mark.parametrize("name", SIZES)
def test_sizes_and_flops_of_the_presets(name: str) -> None:
    body, active, embedding = SIZES[name]
    result = plan(load_preset(name))
    shape, config = result.shape, load_preset(name)
    assert (shape.parameters, shape.active_parameters) == (body + embedding, active + embedding)
    assert (shape.embedding_parameters, shape.body_parameters) == (embedding, active)
    options: Any = config.model.options
    head_size = options.get("head_dim", options["hidden_size"] // options["num_attention_heads"])
    attention = options["num_hidden_layers"] * options["num_attention_heads"] * head_size
    norms = {"10b-a1b": 32 * (2 * 1024 + 2 * 128) + 1024}.get(name, (2 * shape.layers + 1) * shape.hidden_size)
    per_token = 6 * (active - norms + embedding // 2) + 12 * attention * config.data.sequence_length
    assert result.latent_tokens_per_step == (2**23 if name == "10b-a1b" else 2**21)
    assert result.flops_per_step == per_token * result.latent_tokens_per_step
    assert result.run.flops == result.baseline.flops == result.flops_per_step * config.train.steps
    assert 0.98e10 < shape.parameters < 1.02e10 or name != "10b-a1b"
    assert 0.95e9 < shape.active_parameters < 1.05e9 or name != "10b-a1b"


@pytest.mark.parametrize("name", DENSE)
def test_flops_are_what_torch_counts_at_full_size(name: str) -> None:
    config = load_preset(name)
    model, length = empty_model(config, LLAMA3_VOCAB), config.data.sequence_length
    with torch.device("meta"), FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        ids, mask = torch.zeros(1, length, dtype=torch.long), torch.zeros(1, 1, length, length)
        model(input_ids=ids, attention_mask=mask, position_ids=torch.arange(length)[None], use_cache=False)
    assert 3 * counter.get_total_flops() == shape_of(config, LLAMA3_VOCAB).flops_per_token(length) * length


def config_of(architecture: str, **options: Any) -> Config:
    return Config(ModelConfig(architecture, TINY[architecture] | options), DataConfig(sequence_length=32))  # pyright: ignore


@pytest.mark.parametrize("architecture", ["llama", "qwen3_moe", "gpt2"])
@pytest.mark.parametrize("tied", [False, True])
def test_flops_are_what_torch_counts(architecture: str, tied: bool) -> None:
    config = config_of(architecture, tie_word_embeddings=tied)
    model = tiny(architecture, tie_word_embeddings=tied)
    shape = shape_of(config, VOCAB)
    assert shape.parameters == sum(p.numel() for p in model.parameters()) + (
        (32 - 64) * 32 if architecture == "gpt2" else 0  # its table of positions
    )
    assert shape.embedding_parameters == VOCAB * 32 * (1 if tied else 2)
    assert shape.flops_per_token(32) * 32 == flops_per_sequence(model, 32)


LATENT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "q_lora_rank": 16,
    "kv_lora_rank": 12,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 4,
    "v_head_dim": 10,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
FEW_ATTENTION_LAYERS = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
LAYERS: dict[str, tuple[dict[str, Any], int]] = {  # options, attention layers
    "deepseek_v3": (LATENT, 2),
    "lfm2": (FEW_ATTENTION_LAYERS | {"layer_types": ["conv", "full_attention", "conv", "conv"]}, 1),
    "jamba": (FEW_ATTENTION_LAYERS | {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False}, 2),
}


@pytest.mark.parametrize("architecture", LAYERS)
def test_flops_of_attention_of_another_form(architecture: str) -> None:
    """What grows with the square of the length is all attention's, and torch counts as much of it."""
    options, attention_layers = LAYERS[architecture]
    shape = shape_of(Config(ModelConfig(architecture, options)), VOCAB)
    settings = AutoConfig.for_model(architecture, vocab_size=VOCAB, pad_token_id=0, **options)
    model = AutoModelForCausalLM.from_config(settings)
    assert shape.attention_layers == attention_layers
    for length in (32, 128):
        counted = flops_per_sequence(model, length)
        assert shape.flops_per_token(length) * length == pytest.approx(counted, rel=0.01)


def test_what_sees_costs_a_text_no_more_flops() -> None:
    """Of ``gemma3``, a text goes through what ``gemma3_text`` is; the vision tower is weights that are kept."""
    seeing = shape_of(Config(ModelConfig("gemma3")), VOCAB)
    text = shape_of(Config(ModelConfig("gemma3_text")), seeing.vocab_size)
    assert seeing.parameters > text.parameters + 90_000_000
    assert replace(seeing, parameters=text.parameters, optimizer_bytes=text.optimizer_bytes) == text


def test_widths_that_each_layer_names_count_by_their_mean() -> None:
    options: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 16}
    options |= {"num_key_value_heads": 1, "intermediate_size": [48, 96], "num_kv_shared_layers": 0}
    options |= {"layer_types": ["full_attention"] * 2, "activation_sparsity_pattern": [0.0, 0.0]}
    assert shape_of(Config(ModelConfig("gemma3n_text", options)), VOCAB).mlp_width == 72


def kept_bytes(model: PreTrainedModel, tokens: int) -> int:
    """Bytes that autograd keeps for the backward pass of the decoder, without the parameters."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, tuple[int, torch.Tensor]] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes(), t
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model.get_decoder()(torch.zeros(1, tokens, dtype=torch.long), use_cache=False)
    return sum(n for n, _ in kept.values())


@pytest.mark.parametrize("architecture", ["llama", "qwen3_moe"])
def test_activations_are_what_autograd_keeps(architecture: str) -> None:
    mlp = {"llama": "intermediate_size", "qwen3_moe": "moe_intermediate_size"}[architecture]
    options: dict[str, Any] = {"hidden_size": 128, mlp: 192, "num_attention_heads": 4, "head_dim": 48}
    one, three = (
        kept_bytes(tiny(architecture, **options, num_hidden_layers=n).bfloat16(), tokens=64) / 64 for n in (1, 3)
    )
    per_layer = (three - one) / 2  # what is outside of the layers cancels
    assert shape_of(config_of(architecture, **options), VOCAB).activation_bytes() == pytest.approx(per_layer, rel=0.03)


def test_memory_of_weights_gradients_and_optimizer_is_what_they_hold() -> None:
    model = tiny("llama")
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.zeros(1, 8, dtype=torch.long)).logits.sum().backward()
    optimizer.step()
    parameters = list(model.parameters())
    states = [t for state in optimizer.state.values() for key, t in state.items() if key != "step"]
    shape = shape_of(config_of("llama"), VOCAB)
    memory = memory_of(shape, gpus=1, tokens=8)
    assert shape.checkpoint_bytes == memory.weights + memory.optimizer
    assert memory.weights == sum(p.nbytes for p in parameters)
    assert memory.gradients == sum(p.grad.nbytes for p in parameters if p.grad is not None)
    assert memory.optimizer == sum(t.nbytes for t in states)
    assert memory.loss == 2 * 8 * VOCAB + 4 * VOCAB * 32  # no chunk has more rows than there are
    shared = memory_of(shape_of(config_of("llama"), VOCAB), gpus=4, tokens=8)
    assert shared.weights + shared.gradients + shared.optimizer == 4 * sum(p.numel() for p in parameters)
    assert shared.activations == memory.activations > memory.activations_checkpointed


def test_sizes_that_a_model_does_not_name() -> None:
    gpt2 = shape_of(config_of("gpt2"), VOCAB)
    assert (gpt2.attention_width, gpt2.key_value_width, gpt2.mlp_width) == (32, 32, 4 * 32)


def test_a_token_goes_through_two_experts_of_a_mixtral() -> None:
    options = TINY["llama"] | {"num_local_experts": 4, "num_experts_per_tok": 2}
    shape = shape_of(Config(ModelConfig("mixtral", options)), VOCAB)
    layers, width = 2, 48
    assert (options["num_hidden_layers"], options["intermediate_size"]) == (layers, width)
    assert shape.mlp_width == 2 * width
    assert shape.parameters - shape.active_parameters == layers * (4 - 2) * 3 * 32 * width


def test_the_largest_layer_counts() -> None:
    config = Config(ModelConfig("deepseek_v3", LATENT))
    model: Any = empty_model(config, VOCAB)
    sizes = [sum(p.numel() for p in layer.parameters()) for layer in model.model.layers]
    assert shape_of(config, VOCAB).layer_parameters == max(sizes) > min(sizes)


def test_memory_of_muon_is_what_it_holds() -> None:
    model = tiny("llama")
    optimizer = MuonAdamW(*split_parameters(model), lr=0.01)
    model(torch.zeros(1, 8, dtype=torch.long)).logits.sum().backward()
    optimizer.step()
    states = [t for state in optimizer.state.values() for key, t in state.items() if key != "step"]
    config = config_of("llama")
    config = replace(config, train=replace(config.train, optimizer="muon"))
    assert memory_of(shape_of(config, VOCAB), gpus=1, tokens=8).optimizer == sum(t.nbytes for t in states)


def test_time_is_flops_over_speed() -> None:
    one, many = plan(load_preset("3b"), gpus=8, mfu=0.4), plan(load_preset("3b"), gpus=64, gpu_type="B200", mfu=0.2)
    assert one.run.gpu_hours == pytest.approx(one.run.flops / (0.4 * 989e12) / 3600)
    assert many.run.gpu_hours == pytest.approx(one.run.gpu_hours * (0.4 * 989e12) / (0.2 * 2250e12))
    assert many.run.days == pytest.approx(many.run.gpu_hours / 64 / 24)
    assert one.run.data_bytes == 4 * one.run.raw_tokens == 4 * 104_857_600_000
    assert plan(load_preset("3b"), vocab_size=65_536).run.data_bytes == 2 * one.run.raw_tokens


def test_gpus_are_their_data_sheets() -> None:
    assert {name: (gpu.flops / 1e12, gpu.memory / 1e9) for name, gpu in GPUS.items()} == {
        "A100": (312, 80),
        "H100": (989, 80),
        "H200": (989, 141),
        "B200": (2250, 180),
    }
