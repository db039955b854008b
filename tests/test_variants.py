"""Variants as configuration: the limit case is the plain method bit for bit, and a resumed run is the same run."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch
from transformers import AutoModelForCausalLM, PhiConfig, TrainerCallback

from tests.conftest import VOCAB, tiny
from tests.test_train import train_command
from tests.test_trainer import arguments, losses, plan_of
from token_superposition import WSD, TokenSuperpositionError
from token_superposition.engines.transformers import TSTTrainer
from token_superposition.engines.transformers.muon import MuonAdamW, split_parameters
from token_superposition.engines.transformers.switch import AtSwitch, initialise_embeddings
from token_superposition.experiment.config import Config, load_config
from token_superposition.experiment.files import read_metrics
from token_superposition.experiment.launch import Launch
from token_superposition.experiment.run import train
from token_superposition.experiment.superposition import VARIANTS, SuperpositionConfig
from token_superposition.weights import Weighting

SAVES = (4, 6, 9)
Run = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def run(write_config: Callable[..., Path], tmp_path: Path) -> Run:
    """Trains a tiny run with settings of [superposition] and [train]; gives the lines of its metrics without times."""

    def go(
        name: str, settings: dict[str, Any], branch_from: Path | None = None, **changes: Any
    ) -> list[dict[str, Any]]:
        config = changed(load_config(write_config()), settings, **changes)
        train(config, tmp_path / name, branch_from=branch_from)
        lines = read_metrics(tmp_path / name / "metrics.jsonl")
        return [{k: v for k, v in m.items() if k != "seconds"} for m in lines]

    return go


def changed(config: Config, settings: dict[str, Any], **changes: Any) -> Config:
    """``settings`` are of [superposition], or of [train] if they are only there."""
    inside = {k: v for k, v in settings.items() if hasattr(config.superposition, k)}
    changes |= {k: v for k, v in settings.items() if k not in inside}
    superposition = replace(config.superposition, **inside)
    return replace(config, superposition=superposition, train=replace(config.train, **changes))


@pytest.mark.parametrize(
    ("plain", "variant"),
    [
        ({"bag_size": 1}, {"shift": True}),
        ({"bag_size": 1}, {"loss": "sum-to-one"}),
        ({"bag_size": 1}, {"sides": "input"}),
        ({"bag_size": 1}, {"sides": "output"}),
        *(({"bag_size": 1}, {"weighting": weighting}) for weighting in get_args(Weighting)[1:]),
        *(({"bag_size": 1}, {"input_weighting": weighting}) for weighting in get_args(Weighting)[1:]),
        ({}, {"anneal": (4,)}),
        ({"bag_size": 1}, {"reset_optimizer": True}),
        ({"bag_size": 1}, {"reset_embeddings": True}),
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
        ({}, {"optimizer": "muon"}),
        ({}, {"optimizer": "muon", "reset_optimizer": True}),
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


def test_all_variants_at_once_on_two_processes(write_config: Callable[..., Path], tmp_path: Path) -> None:
    """By the command's flags; the second process must throw away the same things and draw the same weights."""
    flags = (
        "--superposition.loss sum-to-one --superposition.anneal 4 2 --superposition.mixture 0.7 --superposition.shift "
        "--superposition.reset-optimizer --superposition.reset-embeddings --train.optimizer muon "
        "--superposition.place-signal 0.5 --superposition.mtp-heads 2"
    )
    curves: list[list[float]] = []
    for processes in (1, 2):
        train_command(processes, write_config(), "--out", tmp_path / f"{processes}", *flags.split())
        lines = read_metrics(tmp_path / f"{processes}" / "metrics.jsonl")
        curves.append([m["loss"] for m in lines if "loss" in m])
    assert len(curves[0]) == 12 and curves[1] == pytest.approx(curves[0], rel=1e-3)


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
    in_decay = WSD(20, 4, 0.2, restart=15)  # both at once: their product
    assert [in_decay(i) for i in range(15, 20)] == pytest.approx([0.25, 0.5, 0.75**2, 0.5, 0.25])
    config = changed(Config(), {"reset_optimizer": True}, steps=100, warmup_steps=10)
    assert config.wsd.restart == 30 and changed(config, {"bag_size": 1}).wsd.restart is None


def test_the_padding_row_of_new_embeddings_is_empty() -> None:
    model = tiny("llama", pad_token_id=5)
    initialise_embeddings(model, 1)
    rows: Any = model.get_input_embeddings().weight
    assert not rows[5].any() and rows[4].all()


def parameters(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return [torch.randn(*shape, generator=g).requires_grad_() for shape in shapes]


def stepped(optimizer: torch.optim.Optimizer, params: list[torch.Tensor], steps: int = 3) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    for _ in range(steps):
        for p in params:
            p.grad = torch.randn(p.shape, generator=g)
        optimizer.step()
    return [p.detach().clone() for p in params]


def test_muon_is_torchs_and_without_matrices_it_is_adamw() -> None:
    matrices = parameters((4, 6), (5, 3))
    ours = stepped(MuonAdamW(matrices, [], lr=0.1, weight_decay=0.2), matrices)
    matrices = parameters((4, 6), (5, 3))
    torchs = torch.optim.Muon(matrices, lr=0.1, weight_decay=0.2, adjust_lr_fn="match_rms_adamw")
    assert all(map(torch.equal, ours, stepped(torchs, matrices)))
    others = parameters((4, 6), (5,))
    ours = stepped(MuonAdamW([], others, lr=0.1, betas=(0.8, 0.9), weight_decay=0.2), others)
    others = parameters((4, 6), (5,))
    groups = [{"params": others[:1], "weight_decay": 0.2}, {"params": others[1:], "weight_decay": 0.0}]
    assert all(map(torch.equal, ours, stepped(torch.optim.AdamW(groups, lr=0.1, betas=(0.8, 0.9)), others)))


def test_muon_goes_on_from_its_state() -> None:
    whole = parameters((4, 6), (5,))
    expected = stepped(MuonAdamW(whole[:1], whole[1:], lr=0.1), whole, 6)
    params, g = parameters((4, 6), (5,)), torch.Generator().manual_seed(1)
    state: dict[str, Any] | None = None
    for _ in range(6):
        optimizer = MuonAdamW(params[:1], params[1:], lr=0.1)
        if state is not None:
            optimizer.load_state_dict(state)
        for p in params:
            p.grad = torch.randn(p.shape, generator=g)
        optimizer.step()
        state = optimizer.state_dict()
    assert all(map(torch.equal, params, expected))


def test_the_learning_rate_of_every_group_is_scheduled() -> None:
    params = parameters((4, 6), (4, 6), (5,))
    before = [p.detach().clone() for p in params]
    optimizer = MuonAdamW(params[:1], params[1:], lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0 if step == 0 else 1.0)
    assert all(map(torch.equal, stepped(optimizer, params, 1), before))
    scheduler.step()
    assert not any(map(torch.equal, stepped(optimizer, params, 1), before))


@pytest.mark.parametrize(("architecture", "tied"), [("llama", False), ("llama", True), ("gpt2", True), ("mamba", True)])
def test_muon_takes_the_hidden_matrices_only(architecture: str, tied: bool) -> None:
    model = tiny(architecture, tie_word_embeddings=tied)
    matrices, others = split_parameters(model)
    names = {id(p): n for n, p in model.named_parameters()}
    assert len(matrices) + len(others) == len(names)
    hidden = {names[id(p)].split(".")[-2] for p in matrices}
    assert (
        hidden
        == {
            "llama": {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
            "gpt2": {"c_attn", "c_proj", "c_fc"},
            "mamba": {"in_proj", "x_proj", "dt_proj", "out_proj"},
        }[architecture]
    )
    ends: list[Any] = [model.get_input_embeddings(), model.get_output_embeddings()]
    assert all(any(p is end.weight for p in others) for end in ends)


@pytest.mark.parametrize("name", VARIANTS)
def test_another_engine_refuses_what_it_does_not_have(name: str) -> None:
    values: dict[str, Any] = {"loss": "sum-to-one", "mixture": 0.5}
    value = values.get(name, True)
    SuperpositionConfig(weighting="power", anneal=(4, 2)).refuse_variants("other")
    with pytest.raises(TokenSuperpositionError, match=f"superposition.{name} is .* the other engine does not have it"):
        SuperpositionConfig(**{name: value}).refuse_variants("other")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optimizer": "muon"}, "train.optimizer is 'muon', which was not made for FSDP"),
        ({"reset_optimizer": True}, "superposition.reset_optimizer is true, which was not made for FSDP"),
        ({"reset_embeddings": True}, "superposition.reset_embeddings is true, which was not made for FSDP"),
    ],
)
def test_fsdp_refuses(settings: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FSDP_VERSION", "2")
    launch = Launch(sharded=True, device_memory=80e9)
    launch.check(Config())
    with pytest.raises(TokenSuperpositionError, match=message):
        launch.check(changed(Config(), settings))


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


def switched(seed: int, **options: Any) -> Any:
    model: Any = tiny("llama", **options)
    step: Any = SimpleNamespace(seed=seed), SimpleNamespace(global_step=3), None
    AtSwitch(3, embeddings=True).on_step_begin(*step, model=model, optimizer=torch.optim.AdamW(model.parameters()))
    return model.get_input_embeddings().weight


def test_new_embeddings_are_drawn_by_the_seed_of_the_run_as_the_model_draws_its_own() -> None:
    a, b, again = (switched(seed) for seed in (1, 2, 1))
    assert torch.equal(a, again) and not torch.equal(a, b)
    assert switched(1, initializer_range=0.1).std().item() == pytest.approx(0.1, rel=0.05)
    phi = PhiConfig(vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2)
    model: Any = AutoModelForCausalLM.from_config(phi)
    torch.nn.init.ones_(model.lm_head.bias)
    changed = initialise_embeddings(model, 1)
    assert not model.lm_head.bias.any() and any(p is model.lm_head.bias for p in changed)
