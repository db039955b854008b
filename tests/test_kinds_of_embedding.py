"""Embeddings that are more than a table of rows: scaled, normed, padded, or with a greatest norm."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding
from transformers.models.t5gemma2.modeling_t5gemma2 import T5Gemma2TextScaledWordEmbedding

from tests.conftest import VOCAB, tiny
from tests.test_embedding import IDS
from token_superposition import TokenSuperpositionError, bag_embedding, superpose


def test_vocabulary_padded_and_padding_index_rows() -> None:
    """Rows past the vocabulary do not matter; a padding row counts in the mean as it counts in a lookup."""
    embedding = nn.Embedding(VOCAB + 64, 8, padding_idx=0)
    ids = torch.tensor([[[0, 5, 7]]])
    torch.testing.assert_close(superpose(embedding, embedding)(ids)[0, 0], embedding.weight[[0, 5, 7]].mean(0))


def test_a_greatest_norm_and_sparse_gradients_are_as_in_a_lookup() -> None:
    ids, lookup = IDS % 12, nn.Embedding(12, 8, max_norm=0.5)
    table = nn.Embedding(12, 8, max_norm=0.5, _weight=lookup.weight.detach().clone())
    torch.testing.assert_close(bag_embedding(table, ids), lookup(ids).mean(2))
    table = nn.Embedding(12, 8, sparse=True)
    bag_embedding(table, ids).sum().backward()
    assert table.weight.grad is not None and table.weight.grad.is_sparse


def test_scaled_embedding_is_scaled_once() -> None:
    model = tiny("gemma3_text")
    embedding = model.get_input_embeddings()
    plain = embedding.weight[IDS].mean(2) * math.sqrt(32)  # pyright: ignore
    superpose(model)
    torch.testing.assert_close(embedding(IDS), plain, rtol=1e-4, atol=1e-5)


class Normed(nn.Embedding):
    """Does more than to scale."""

    def __init__(self) -> None:
        super().__init__(VOCAB, 8)
        self.embed_scale, self.norm = 2.0, nn.LayerNorm(8)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self.norm(super().forward(input)) * self.embed_scale


class Shifted(Gemma3TextScaledWordEmbedding):
    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return super().forward(input_ids) + 1


@pytest.mark.parametrize(
    "make",
    [
        Normed,
        lambda: Shifted(VOCAB, 8, 0, embed_scale=2.0),
        lambda: T5Gemma2TextScaledWordEmbedding(VOCAB, 8, 0, embed_scale=2.0, eoi_token_index=int(IDS[0, 0, 0])),
    ],
)
def test_an_embedding_that_does_more_than_scale_is_asked_for_its_rows(make: Callable[[], nn.Embedding]) -> None:
    torch.manual_seed(0)
    embedding = make()
    for p in embedding.parameters():
        nn.init.normal_(p)
    expected = embedding(IDS).mean(2)
    torch.testing.assert_close(bag_embedding(embedding, IDS), expected, rtol=1e-5, atol=1e-6)
    superpose(nn.Sequential(embedding), embedding)
    torch.testing.assert_close(embedding(IDS), expected, rtol=1e-5, atol=1e-6)


def test_a_single_bag_and_a_place_signal_out_of_range() -> None:
    embedding = nn.Embedding(9, 4)
    ids = torch.tensor([1, 2, 2])
    torch.testing.assert_close(bag_embedding(embedding, ids), embedding(ids).mean(0))
    for wrong in (1.5, math.nan, "x"):
        with pytest.raises(TokenSuperpositionError, match=r"place_signal is .*; give a number in \[0, 1\]"):
            bag_embedding(embedding, ids, wrong)  # pyright: ignore
