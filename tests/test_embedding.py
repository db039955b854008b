from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrize

from tests.architectures import build
from tests.conftest import TINY, VOCAB, tiny
from token_superposition import TokenSuperpositionError, bag_embedding, reference, superpose, unsuperpose
from token_superposition.embedding import bag_mean
from token_superposition.engines.transformers.switch import initialise_embeddings
from token_superposition.places import _kept_signs  # pyright: ignore

IDS = torch.randint(VOCAB, (2, 6, 3), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("architecture", TINY)
def test_bags_equal_hand_averaged_embeddings(architecture: str) -> None:
    """Against float64; the embedding is plain, tied, scaled inside (Gemma 3) or outside it (Gemma 1, 2)."""
    model = tiny(architecture).double().eval()
    if architecture == "qwen3_moe":
        model.set_experts_implementation("eager")  # the grouped product has no float64
    embedding = model.get_input_embeddings()
    by_hand = embedding(IDS).mean(2)
    expected = model(inputs_embeds=by_hand).logits
    torch.testing.assert_close(superpose(model)(input_ids=IDS).logits, expected)
    torch.testing.assert_close(model(IDS).logits, expected)


@pytest.mark.parametrize("architecture", TINY)
def test_ordinary_ids_and_state_dict_are_untouched(architecture: str) -> None:
    model = tiny(architecture).eval()
    names, before = list(model.state_dict()), model(IDS[..., 0]).logits
    superpose(model)
    assert list(model.state_dict()) == names
    assert torch.equal(model(IDS[..., 0]).logits, before)


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text", "gpt2"])
def test_twice_is_once_and_it_can_be_undone(architecture: str) -> None:
    def state() -> list[object]:
        return [(type(m), len(m._forward_pre_hooks), len(m._forward_pre_hooks_with_kwargs)) for m in model.modules()]

    model = tiny(architecture).eval()
    before = state()
    once = superpose(model)(input_ids=IDS).logits
    changed = state()
    assert torch.equal(superpose(model)(input_ids=IDS).logits, once)
    assert state() == changed != before
    assert unsuperpose(model) is model and state() == before


def test_an_embedding_that_is_replaced_afterwards_is_told_and_can_be_superposed() -> None:
    model = superpose(tiny("llama"))
    new = torch.nn.Embedding(VOCAB, 32)
    model.set_input_embeddings(new)
    with pytest.raises(TokenSuperpositionError, match=r"LlamaForCausalLM was replaced .*unsuperpose\(model\), then"):
        model(input_ids=IDS)
    model(input_ids=IDS[..., 0])  # ordinary ids take the ordinary way
    expected = model(inputs_embeds=reference.bag_embedding(new.weight, IDS)).logits
    torch.testing.assert_close(superpose(model)(input_ids=IDS).logits, expected)
    torch.testing.assert_close(superpose(unsuperpose(model))(input_ids=IDS).logits, expected)


@pytest.mark.parametrize("compiled", [False, True])
def test_arguments_by_position(compiled: bool) -> None:
    """Llama's: ids, mask, positions, cache, embeddings; what is no bag goes through as it is."""
    model: Any = superpose(tiny("llama")).eval()
    torch._dynamo.reset()
    decoder: Any = model.get_decoder()
    run: Any = torch.compile(decoder, backend="eager", fullgraph=True) if compiled else decoder
    embeddings = decoder.embed_tokens(IDS)
    want = decoder(inputs_embeds=embeddings, use_cache=False).last_hidden_state
    mask = torch.ones(2, 6, dtype=torch.long)
    others = ((IDS, mask), (None, mask, None, None, embeddings))
    for args in ((IDS, mask, None, None, None), *(() if compiled else others)):
        torch.testing.assert_close(run(*args, use_cache=False).last_hidden_state, want)


class EmbeddingsFirst(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(10, 4)

    def forward(self, inputs_embeds: torch.Tensor | None = None, input_ids: torch.Tensor | None = None) -> torch.Tensor:
        return self.table(input_ids) if inputs_embeds is None else inputs_embeds


def test_embeddings_that_are_the_first_argument_are_no_ids() -> None:
    model, given, ids = superpose(EmbeddingsFirst()), torch.randn(2, 5, 4), torch.randint(10, (2, 5, 3))
    assert model(given) is given
    for got in (model(None, ids), model(input_ids=ids)):
        torch.testing.assert_close(got, model.table.weight[ids].mean(2))


def test_an_embedding_that_two_models_share_is_told_when_it_reads_no_bags() -> None:
    first, second = tiny("llama"), tiny("llama")
    second.set_input_embeddings(first.get_input_embeddings())
    want = superpose(second)(IDS).logits
    unsuperpose(superpose(first))
    with pytest.raises(TokenSuperpositionError, match=r"reads no bags any more: another .*; superpose\(model\) again$"):
        second(IDS)
    second(IDS[..., 0])
    torch.testing.assert_close(superpose(second)(IDS).logits, want)


def test_another_default_device_changes_nothing() -> None:
    """As after ``torch.set_default_device("cuda")``: signs and new weights are drawn on the CPU, as the seeds are."""
    table, model = nn.Embedding(VOCAB, 20, scale_grad_by_freq=True), tiny("llama")
    found: list[torch.Tensor] = []
    for device in ("meta", "cpu"):
        _kept_signs.cache_clear()
        torch.set_default_device(device)
        try:
            found.append(bag_embedding(table, IDS, 0.5))
            found.append(initialise_embeddings(model, 1)[0].detach().clone())
        finally:
            torch.set_default_device(None)
    assert torch.equal(found[0], found[2]) and torch.equal(found[1], found[3])


def test_an_embedding_whose_class_was_changed_afterwards_keeps_it() -> None:
    """As FSDP2 does it; the class that it was made of is no longer the right one."""
    model = superpose(tiny("llama"))
    embedding: Any = model.get_input_embeddings()
    parametrize.register_parametrization(embedding, "weight", nn.Identity())
    changed, logits = type(embedding), model(input_ids=IDS).logits
    with pytest.raises(TokenSuperpositionError, match=r"made a ParametrizedBagEmbedding after superpose .* leave it"):
        unsuperpose(model)
    assert type(embedding) is changed and torch.equal(model(input_ids=IDS).logits, logits)
    model = tiny("llama")
    embedding = model.get_input_embeddings()
    parametrize.register_parametrization(embedding, "weight", nn.Identity())
    before = type(embedding)
    assert type(unsuperpose(superpose(model)).get_input_embeddings()) is before


def test_hooks_that_hide_the_forward_come_after_superpose() -> None:
    """accelerate's: they keep the forward that they found, which would not know bags."""
    model = tiny("llama").eval()
    embedding = model.get_input_embeddings()
    expected = model(inputs_embeds=embedding(IDS).mean(2)).logits
    add_hook_to_module(embedding, ModelHook())
    with pytest.raises(TokenSuperpositionError, match=r"Embedding has a forward of its own.*remove_hook_from_module"):
        superpose(model)
    assert type(embedding) is nn.Embedding
    remove_hook_from_module(embedding)
    add_hook_to_module(superpose(model).get_input_embeddings(), ModelHook())
    torch.testing.assert_close(superpose(model)(input_ids=IDS).logits, expected)
    with pytest.raises(TokenSuperpositionError, match="BagEmbedding has a forward of its own"):
        unsuperpose(model)
    remove_hook_from_module(embedding)
    torch.testing.assert_close(model(input_ids=IDS).logits, expected)
    ordinary = model(input_ids=IDS[..., 0]).logits
    assert torch.equal(unsuperpose(model)(input_ids=IDS[..., 0]).logits, ordinary)
    assert type(embedding) is nn.Embedding


@pytest.mark.parametrize("compile_first", [False, True])
def test_an_embedding_that_is_compiled_alone(compile_first: bool) -> None:
    model = tiny("llama").eval()
    embedding = model.get_input_embeddings()
    expected = model(inputs_embeds=embedding(IDS).mean(2)).logits
    torch._dynamo.reset()
    if not compile_first:
        superpose(model)
    compiled: Any = torch.compile(embedding, backend="eager")
    model.set_input_embeddings(compiled)
    torch.testing.assert_close(superpose(model)(input_ids=IDS).logits, expected)
    torch.testing.assert_close(model.get_decoder()(IDS).last_hidden_state, model.model(IDS).last_hidden_state)
    torch.testing.assert_close(compiled(IDS), embedding(IDS))


@pytest.mark.parametrize("architecture", [*TINY, "opt", "mpt", "openai-gpt"])
def test_a_decoder_reads_bags_by_itself(architecture: str) -> None:
    """Contiguous ids, which a model could flatten to (B * L, s) without a word."""
    model = superpose(tiny(architecture) if architecture in TINY else build(architecture).float()).eval()
    ids = IDS % model.get_input_embeddings().num_embeddings
    decoder: Any = model.get_decoder()
    want = decoder(inputs_embeds=model.get_input_embeddings()(ids)).last_hidden_state
    for got in (decoder(ids), decoder(input_ids=ids)):
        torch.testing.assert_close(got.last_hidden_state, want)
    assert want.shape[:2] == ids.shape[:2]


class Wrapper(nn.Module):
    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor) -> Any:
        return self.model(input_ids)


@pytest.mark.parametrize("wrap", [Wrapper, lambda m: torch.compile(m, backend="eager"), lambda m: Wrapper(Wrapper(m))])
@pytest.mark.parametrize("named", [False, True])
def test_a_model_in_a_wrapper(wrap: Callable[[nn.Module], Any], named: bool) -> None:
    model = tiny("gpt2").eval()
    want = model(inputs_embeds=model.get_input_embeddings()(IDS).mean(2)).logits
    torch._dynamo.reset()
    wrapped = superpose(wrap(model), model.get_input_embeddings() if named else None)
    torch.testing.assert_close(wrapped(IDS).logits, want)
    unsuperpose(wrapped)
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_what_cannot_be_the_embedding_is_refused() -> None:
    model, other = tiny("llama"), tiny("llama")
    table = model.get_input_embeddings()
    for wrong, said in (
        (model.get_output_embeddings(), "embedding is a Linear"),
        (table.weight, "embedding is of type Parameter"),
        ("model.embed_tokens", "embedding is of type str"),
        (model.model.layers, "embedding is the container ModuleList"),
        (other.get_input_embeddings(), "embedding is one .Embedding. that is not in the LlamaForCausalLM"),
    ):
        with pytest.raises(TokenSuperpositionError, match=f"{said}; give the module of the model that maps ids"):
            superpose(model, wrong)
    assert type(table) is type(other.get_input_embeddings()) and model(torch.zeros(1, 4, dtype=torch.long))
    with pytest.raises(TokenSuperpositionError, match=r"ids are torch.uint16; give int64 or int32"):
        superpose(model)(torch.zeros(1, 4, 2, dtype=torch.uint16))


def test_gradients_are_those_of_the_mean() -> None:
    weight = torch.randn(7, 4, dtype=torch.float64, requires_grad=True)
    embedding = nn.Embedding(7, 4, dtype=torch.float64)
    embedding.weight.data.copy_(weight.data)
    ids = torch.randint(7, (2, 3, 4))
    expected, got = reference.bag_embedding(weight, ids), superpose(embedding, embedding)(ids)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(
        torch.autograd.grad(got.square().sum(), embedding.weight)[0],
        torch.autograd.grad(expected.square().sum(), weight)[0],
    )


def test_half_precision_accumulates_in_float32() -> None:
    embedding = nn.Embedding(300, 8, dtype=torch.bfloat16)
    ids = torch.randint(300, (4, 256))
    exact = embedding.weight.double()[ids].mean(1)
    error = (bag_embedding(embedding, ids).double() - exact).abs().max().item()
    assert error <= exact.abs().max().item() / 2**8  # one rounding of the result, none of the sum


def test_tied_weights_stay_tied_through_training() -> None:
    model = superpose(tiny("llama", tie_word_embeddings=True))
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    model(input_ids=IDS).logits.sum().backward()
    grad = model.get_input_embeddings().weight.grad
    assert isinstance(grad, torch.Tensor) and grad.abs().sum() > 0


def test_a_copied_model_uses_its_own_embedding() -> None:
    model = superpose(tiny("llama")).eval()
    twin = copy.deepcopy(model)
    before = model(input_ids=IDS).logits
    twin.get_input_embeddings().weight.data.zero_()  # pyright: ignore
    assert torch.equal(model(input_ids=IDS).logits, before)
    assert not torch.equal(twin(input_ids=IDS).logits, before)
    assert not unsuperpose(twin)._forward_pre_hooks


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text"])
def test_a_superposed_model_can_be_pickled(architecture: str) -> None:
    model = superpose(tiny(architecture), input_weighting="power").eval()
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    twin = torch.load(file, weights_only=False)
    assert torch.equal(twin(IDS).logits, model(IDS).logits)
    twin.get_input_embeddings().weight.data.zero_()
    assert not torch.equal(twin(IDS).logits, model(IDS).logits)
    assert type(unsuperpose(twin).get_input_embeddings()) is type(tiny(architecture).get_input_embeddings())


def test_any_module_with_an_embedding() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens = nn.Embedding(10, 4)
            self.positions = nn.Embedding(8, 4)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.tokens(ids) + self.positions.weight[: ids.shape[1]]

    net = Net()
    with pytest.raises(TokenSuperpositionError, match=r"2 embeddings \(tokens, positions\); name the token embedding"):
        superpose(net)
    superpose(net, net.tokens)
    assert superpose(net) is net  # it is named by now
    ids = torch.randint(10, (2, 5, 3))
    torch.testing.assert_close(net(ids), net.tokens.weight[ids].mean(2) + net.positions.weight[:5])


@pytest.mark.parametrize("shape", [(2, 8), (2, 8, 4)])
def test_a_decoder_is_one_graph_in_both_phases(shape: tuple[int, ...]) -> None:
    decoder: Any = superpose(tiny("llama")).get_decoder()
    ids = torch.randint(VOCAB, shape)
    torch._dynamo.reset()
    compiled: Any = torch.compile(decoder, backend="eager", fullgraph=True)
    got = compiled(ids, use_cache=False).last_hidden_state
    torch.testing.assert_close(got, decoder(ids, use_cache=False).last_hidden_state)


def test_superposed_model_generates_and_saves_as_before(tmp_path: Path) -> None:
    model = tiny("llama").eval()
    prompt = IDS[:1, :, 0]
    expected = model.generate(prompt, max_new_tokens=5, do_sample=False)
    superpose(model).save_pretrained(tmp_path)
    assert torch.equal(model.generate(prompt, max_new_tokens=5, do_sample=False), expected)
    assert torch.equal(type(model).from_pretrained(tmp_path)(prompt).logits, model(prompt).logits)


@settings(max_examples=40)
@given(
    v=st.sampled_from([1, 7, 700]),
    n=st.sampled_from([0, 1, 300]),
    s=st.integers(1, 5),
    most=st.floats(0, 1),  # share of the places that hold one token, so that it fills several rounds
    start=st.sampled_from([0, 3]),
    padding=st.sampled_from([-1, 3, 5]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    seed=st.integers(0, 99),
)
def test_gradient_of_any_part_of_a_vocabulary(
    v: int, n: int, s: int, most: float, start: int, padding: int, dtype: torch.dtype, seed: int
) -> None:
    """Rows ``start .. start + v`` of a table, against lookups in float64 of the ids that are there."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(v + 6, (n, s), generator=g)
    ids[torch.rand(n, s, generator=g) < most] = start
    rows, grad = torch.randn(v, 3, generator=g).to(dtype), torch.randn(n, 3, generator=g).to(dtype)
    exact = rows.double().requires_grad_()
    total = torch.zeros(n, 3, dtype=torch.float64)
    for place in range(s):
        here = (ids[:, place] >= start) & (ids[:, place] < start + v)
        total[here] += exact[ids[here, place] - start]
    (want,) = torch.autograd.grad((total / s * grad.double()).sum(), exact)
    if start <= padding < start + v:
        want[padding - start] = 0
    weight = rows.requires_grad_()
    (got,) = torch.autograd.grad((bag_mean(weight, ids, start, padding) * grad).sum(), weight)
    assert got.dtype == dtype
    rounding = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 2**-8}[dtype]  # once, of the result
    torch.testing.assert_close(got.double(), want, rtol=rounding, atol=rounding * 10)


def test_gradient_of_a_frequent_token_is_summed_in_float32() -> None:
    """In bfloat16 its sum would stop to grow: a token of every bag of 16,384."""
    grad = (torch.rand(16_384, 8, generator=torch.Generator().manual_seed(0)) + 0.5).bfloat16()
    weight = torch.zeros(2, 8, dtype=torch.bfloat16, requires_grad=True)
    (got,) = torch.autograd.grad(bag_mean(weight, torch.zeros(16_384, 4, dtype=torch.long), None, -1), weight, grad)
    torch.testing.assert_close(got[0].double(), grad.double().sum(0), rtol=2**-8, atol=0)
