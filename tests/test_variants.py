"""Variants as configuration: the limit case is the plain method bit for bit, and a resumed run is the same run."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from tests.conftest import VOCAB, tiny
from tests.test_trainer import arguments, losses, plan_of
from token_superposition import WSD, TokenSuperpositionError
from token_superposition.engines.transformers import TSTTrainer
from token_superposition.engines.transformers.switch import AtSwitch
from token_superposition.experiment.config import Config, load_config
from token_superposition.experiment.metrics import read_metrics
from token_superposition.experiment.run import train

SAVES = (4, 6, 9)
Run = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def run(write_config: Callable[..., Path], tmp_path: Path) -> Run:
    """Trains a tiny run with settings of [superposition] and [train]; gives the lines of its metrics without times."""

    def go(
        name: str, settings: dict[str, Any], resume_from: Path | None = None, **changes: Any
    ) -> list[dict[str, Any]]:
        config = changed(load_config(write_config()), settings, **changes)
        train(config, tmp_path / name, resume_from=resume_from)
        lines = read_metrics(tmp_path / name / "metrics.jsonl")
        return [{k: v for k, v in m.items() if k != "seconds"} for m in lines]

    return go


def changed(config: Config, settings: dict[str, Any], **changes: Any) -> Config:
    superposition = replace(config.superposition, **settings)
    return replace(config, superposition=superposition, train=replace(config.train, **changes))


@pytest.mark.parametrize(
    ("plain", "variant"),
    [
        ({"bag_size": 1}, {"shift": True}),
        ({"bag_size": 1}, {"loss": "sum-to-one"}),
        ({"bag_size": 1}, {"reset_optimizer": True, "reset_embeddings": True}),
        ({"ratio": 0.0}, {"reset_optimizer": True, "reset_embeddings": True}),
        ({"anneal": (4,)}, {"mixture": 1.0}),
    ],
)
def test_the_limit_case_is_the_plain_method(plain: dict[str, Any], variant: dict[str, Any], run: Run) -> None:
    assert run("variant", plain | variant) == run("plain", plain)


@pytest.mark.parametrize(
    ("plain", "variant"),
    [
        ({}, {"shift": True}),
        ({}, {"loss": "sum-to-one"}),
        ({"anneal": (4, 2)}, {"mixture": 1.0}),
        ({}, {"reset_optimizer": True}),
        ({}, {"reset_embeddings": True}),
    ],
)
def test_the_variant_is_another_run_and_resumes_as_itself(
    plain: dict[str, Any], variant: dict[str, Any], run: Run, tmp_path: Path
) -> None:
    whole = run("whole", plain | variant, save_at=SAVES)
    assert [m["loss"] for m in whole if "loss" in m] != [m["loss"] for m in run("plain", plain) if "loss" in m]
    for step in SAVES:  # before, at and after the switch
        checkpoint = tmp_path / f"whole/checkpoints/checkpoint-{step}"
        assert run(f"resumed{step}", plain | variant, checkpoint, save_at=SAVES) == whole


class Ages(TrainerCallback):
    """How many steps the optimizer's state of each parameter has seen, after every step; loss and embedding too."""

    def __init__(self) -> None:
        self.ages: list[dict[str, int]] = []
        self.embeddings: list[torch.Tensor] = []

    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        seen = kwargs["optimizer"].state
        self.ages.append({n: int(seen[p]["step"]) for n, p in model.named_parameters()})

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.embeddings.append(model.get_input_embeddings().weight.detach().clone())


@pytest.mark.parametrize("tied", [False, True])
def test_what_the_switch_throws_away(tied: bool, prepared: Path, tmp_path: Path) -> None:
    """The state starts from nothing at the switch, of all parameters or of embedding and head; nothing else changes."""
    runs: dict[str, tuple[Ages, TSTTrainer]] = {}
    for name, what in {"plain": {}, "state": {"optimizer": True}, "weights": {"embeddings": True}}.items():
        spy = Ages()
        trainer = TSTTrainer(
            tiny("llama", tie_word_embeddings=tied), arguments(tmp_path), train_dataset=plan_of(prepared),
            callbacks=[AtSwitch(3, **what), spy],
        )  # fmt: skip
        trainer.train()
        runs[name] = spy, trainer
    plain, state, weights = (runs[name][0] for name in runs)
    assert [set(a.values()) for a in plain.ages] == [{i} for i in range(1, 7)]
    assert [set(a.values()) for a in state.ages] == [{1}, {2}, {3}, {1}, {2}, {3}]
    young = {"model.embed_tokens.weight"} | (set() if tied else {"lm_head.weight"})
    assert weights.ages[:3] == plain.ages[:3]
    assert weights.ages[3] == {n: 1 if n in young else 4 for n in plain.ages[0]}
    curves = {name: losses(trainer) for name, (_, trainer) in runs.items()}
    assert curves["state"][:4] == curves["plain"][:4]  # the first step without state starts from the same weights
    assert curves["state"][4:] != curves["plain"][4:]
    assert curves["weights"][:3] == curves["plain"][:3] and abs(curves["weights"][3] - math.log(VOCAB)) < 0.1
    old, new = weights.embeddings[2:4]
    similar = torch.nn.functional.cosine_similarity(old.flatten(), new.flatten(), dim=0)
    assert abs(similar) < 0.05 and new.std().item() == pytest.approx(0.02, rel=0.05)
    first = weights.embeddings[0]
    assert abs(torch.nn.functional.cosine_similarity(first.flatten(), new.flatten(), dim=0)) < 0.05


def test_the_warm_up_comes_once_more() -> None:
    again, once = WSD(20, 4, 0.2, restart=8), WSD(20, 4, 0.2)
    assert [again(i) for i in range(8, 13)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert [again(i) for i in (*range(8), *range(12, 20))] == [once(i) for i in (*range(8), *range(12, 20))]
    config = changed(Config(), {"reset_optimizer": True}, steps=100, warmup_steps=10)
    assert config.wsd.restart == 30 and changed(config, {"bag_size": 1}).wsd.restart is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mixture": 0.5}, "superposition.mixture is 0.5, but there are no bag sizes to mix; set superposition.anneal"),
        ({"mixture": 2.0, "anneal": (4, 2)}, "mixture is 2.0; give a number in"),
    ],
)
def test_bad_input_has_one_clear_line(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(TokenSuperpositionError, match=message):
        changed(Config(), settings).check()
