"""Training on ragged bags: the first step against float64, whole runs, resume."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import default_data_collator

from tests.conftest import VOCAB, text, tiny, toml
from tests.test_trainer import Spy, arguments, losses
from token_superposition import (
    Phase,
    Schedule,
    place_weights,
    reference,
)
from token_superposition.data.boundaries import Boundaries, BoundaryKind, find_boundaries
from token_superposition.data.plan import PlannedDataset
from token_superposition.data.prepare import PrepareOptions, prepare
from token_superposition.data.store import Meta, TokenStore
from token_superposition.data.tokenizer import load_tokenizer
from token_superposition.engines.transformers import TSTTrainer
from token_superposition.experiment.config import load_config
from token_superposition.experiment.files import read_metrics
from token_superposition.experiment.run import train
from token_superposition.experiment.superposition import SuperpositionConfig

KINDS: tuple[BoundaryKind, ...] = ("document", "line", "word")
NOWHERE = Boundaries(np.zeros(VOCAB, bool), np.zeros(VOCAB, bool))


@pytest.mark.parametrize("bags", [(4, 4), (4, 1), (1, 4)])
@pytest.mark.parametrize("options", [{}, {"weighting": "power"}, {"bag_loss": "sum-to-one"}])
def test_first_step_on_ragged_bags_is_the_reference(
    options: dict[str, Any], bags: tuple[int, int], prepared: Path, tmp_path: Path
) -> None:
    """Loss and gradients of one step against float64 arithmetic on hand-averaged embeddings and whole logits."""
    boundaries = find_boundaries(load_tokenizer(str(prepared / "tokenizer")), "word")
    plan = PlannedDataset(TokenStore(prepared), Schedule([Phase(1, *bags)]), 16, 4, seed=1, boundaries=boundaries)
    batch, spy = default_data_collator([plan[i] for i in range(4)]), Spy()
    for key, bag, absent in zip(("input_ids", "shift_labels"), bags, (-1, -100), strict=True):
        empty = (batch[key].reshape(-1, bag) == absent).sum(1)
        assert set(empty.tolist()) >= {0, bag - 1}
    tied = bags == (4, 4)
    args = arguments(tmp_path, max_steps=1, max_grad_norm=0.0)
    trainer = TSTTrainer(
        tiny("llama", tie_word_embeddings=tied), args, train_dataset=plan, callbacks=[spy], **options
    )  # fmt: skip
    trainer.train()
    model = tiny("llama", tie_word_embeddings=tied).double()
    weight = model.get_input_embeddings().weight
    embeds = reference.bag_embedding(weight, batch["input_ids"].reshape(4, 16, -1))  # pyright: ignore
    logits, targets = model(inputs_embeds=embeds).logits.flatten(0, 1), batch["shift_labels"].reshape(64, -1)
    if "bag_loss" in options:
        loss = reference.sum_to_one_cross_entropy(logits, targets)
    else:
        w = place_weights(options.get("weighting", "uniform"), bags[1]).double()
        loss = reference.multi_hot_cross_entropy(logits, targets, w)
    assert losses(trainer)[0] == pytest.approx(loss.item(), rel=1e-4)
    loss.backward()
    for name, p in model.named_parameters():
        assert p.grad is not None
        torch.testing.assert_close(spy.grads[name].double(), p.grad, rtol=2e-3, atol=2e-6, msg=name)


Run = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def run(write_config: Callable[..., Path], tmp_path: Path) -> Run:
    """``tst train`` in this process: the lines of the metrics without times."""

    def go(
        name: str, data: str = "", branch_from: Path | None = None, save_at: tuple[int, ...] = (), **settings: Any
    ) -> list[dict[str, Any]]:
        path = write_config()
        lines = "".join(f"{key} = {toml(value)}\n" for key, value in settings.items())
        path.write_text(path.read_text().replace("[superposition]\n", f"[superposition]\n{lines}"))
        config = load_config(path)
        config = replace(
            config,
            data=replace(config.data, path=data or config.data.path),
            train=replace(config.train, save_at=save_at),
        )
        train(config, tmp_path / name, branch_from=branch_from)
        metrics = read_metrics(tmp_path / name / "metrics.jsonl")
        return [{k: v for k, v in m.items() if k != "seconds"} for m in metrics]

    return go


def test_one_long_document_is_the_plain_method(run: Run, tmp_path: Path) -> None:
    """Every loss and every validation, bit for bit: a sample that meets no boundary is the plain one."""
    (tmp_path / "text").mkdir()
    for i in range(2):
        (tmp_path / f"text/{i}.txt").write_text("\n".join(text(200 + i)))
    data = tmp_path / "data"
    prepare([str(tmp_path / "text")], data, PrepareOptions(vocab_size=VOCAB, validation_share=0.5, seed=0))
    assert Meta.load(data).train.documents == 1
    plain, ragged = run("plain", str(data)), run("ragged", str(data), boundaries="document")
    assert [m["tokens_per_bag"] for m in ragged if "loss" in m] == [4] * 6 + [1] * 6
    assert [{k: v for k, v in m.items() if k != "tokens_per_bag"} for m in ragged] == plain


def test_a_run_on_ragged_bags_resumes_as_itself(run: Run, tmp_path: Path) -> None:
    """With a bag size and a shift that change by step and by sample."""
    settings: dict[str, Any] = {"boundaries": "word", "anneal": [6, 3], "mixture": 1.0, "shift": True}
    saves = (4, 6)
    whole = run("whole", save_at=saves, **settings)
    trained = [m for m in whole if "loss" in m]
    for m in trained:
        assert 1 < m["tokens_per_bag"] < m["input_bag"] or m["tokens_per_bag"] == m["input_bag"] == 1
    assert Counter(m["input_bag"] for m in trained) == {6: 3, 3: 3, 1: 6}
    plain = [m for m in run("plain", **(settings | {"boundaries": "none"})) if "loss" in m]
    assert [m["raw_tokens"] for m in trained] == [m["raw_tokens"] for m in plain]  # passed over, but used up
    assert [m["loss"] for m in trained] != [m["loss"] for m in plain]
    for step in saves:
        checkpoint = tmp_path / f"whole/checkpoints/checkpoint-{step}"
        assert run(f"resumed{step}", branch_from=checkpoint, save_at=saves, **settings) == whole


def test_a_random_bag_size_for_every_step() -> None:
    """``mixture = 1``: as many steps of each size, and what a step has says nothing of the next."""
    schedule = SuperpositionConfig(anneal=(8, 4, 2), mixture=1.0, ratio=0.75).schedule(4000)
    sizes = [schedule.at(step).input_bag for step in range(3000)]
    assert Counter(sizes) == {8: 1000, 4: 1000, 2: 1000}
    pairs = Counter(pairwise(sizes))
    assert len(pairs) == 9 and all(abs(n - 333) < 60 for n in pairs.values())
