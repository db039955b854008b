"""The examples train: phase 1 on bags and phase 2 not, from the loss that float64 arithmetic gives, like the script
without TST where there are no bags; what is saved loads without us."""

from __future__ import annotations

import importlib
import math
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from transformers import AutoModelForCausalLM

from examples import diff, text
from tests.conftest import once
from tests.processes import ROOT, launch
from token_superposition import Schedule, TokenSuperpositionError, reference
from token_superposition.embedding import is_superposed
from token_superposition.engines.transformers import trainer as engine

STEPS, BAG, LENGTH = 6, 4, 16
SMALL = ["--steps", str(STEPS), "--width", "16"]
LOOPS = {
    "nanogpt": ["--block-size", str(LENGTH), "--batch-size", "4"],
    "mamba": ["--length", str(LENGTH), "--batch-size", "4"],
    "muon": ["--length", str(LENGTH), "--batch-size", "4"],
    "accelerate_loop": ["--length", str(LENGTH), "--micro-batch-size", "2"],
    "ddp": ["--length", str(LENGTH), "--micro-batch-size", "2"],
    "lightning_example": ["--length", str(LENGTH), "--batch-size", "4"],
    "litgpt_pretrain": ["--length", str(LENGTH), "--micro-batch-size", "2"],
}
SAME_TEXT = ("nanogpt", "mamba", "muon", "continued_pretraining")  # plain and --ratio 0 draw the same batches


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    def make(root: Path) -> None:
        source = root / "text.txt"
        source.write_text("".join(f"The river carries {i * i % 97} boats to the sea. " for i in range(400)))
        text.main([str(source), "--out", str(root / "data")])

    return once(tmp_path_factory, "bytes", make) / "data"


def example(name: str, plain: bool = False) -> Any:
    if name == "litgpt_pretrain":
        pytest.importorskip("litgpt", reason="pip install --no-deps litgpt: its requirements exclude transformers 5")
    return importlib.import_module(f"examples.plain.{name}" if plain else f"examples.{name}")


def run(name: str, *args: str | Path, plain: bool = False) -> list[float]:
    # A small text is read more than once, data loaders have no workers.
    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        warnings.simplefilter("ignore")
        if name == "ddp" and "RANK" not in os.environ:  # as torchrun starts one process
            for key, value in (("RANK", 0), ("WORLD_SIZE", 1), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", 0)):
                patch.setenv(key, str(value))
        return example(name, plain).main([str(a) for a in args])


@dataclass
class Seen:
    """What went through the embedding and the loss of a run; they themselves do what they always do."""

    ids: list[Tensor] = field(default_factory=list)
    embedded: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    """Of bags: the weight at that time and the output."""
    losses: list[tuple[Tensor, Tensor, float]] = field(default_factory=list)
    """Logits, targets and loss."""

    @contextmanager
    def watch(self, module: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        def embedding(m: nn.Module, args: Any, output: Tensor) -> None:
            if is_superposed(m) and m.training:
                self.ids.append(args[0].clone())
                self.embedded.append((m.weight.detach().double(), output.detach().clone()))  # pyright: ignore

        def loss(function: Callable[..., Tensor], linear: bool) -> Callable[..., Tensor]:
            def watched(*args: Any, **kwargs: Any) -> Tensor:
                value = function(*args, **kwargs)
                given = {**dict(zip(("hidden", "weight", "targets"), args, strict=False)), **kwargs} if linear else {}
                first = given["hidden"].double() @ given["weight"].double().T if linear else args[0].double()
                self.losses.append((first.detach(), given["targets"] if linear else args[1], value.item()))
                return value

            return watched

        for name in ("linear_multi_hot_cross_entropy", "multi_hot_cross_entropy"):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, loss(getattr(module, name), name.startswith("linear")))
        handle = register_module_forward_hook(embedding)
        try:
            yield
        finally:
            handle.remove()

    def check(self, superposed: int) -> None:
        """The first so many calls were on bags and the rest were not; the first is the reference."""
        shapes = [ids.shape[2:] for ids in self.ids]
        assert shapes == [(BAG,)] * superposed + [()] * (len(shapes) - superposed), shapes
        assert 0 < superposed < len(shapes)
        weight, output = self.embedded[0]
        assert torch.allclose(output.double(), reference.bag_embedding(weight, self.ids[0]), atol=1e-6)
        logits, targets, value = self.losses[0]
        assert torch.equal(targets[:, :-1], self.ids[0][:, 1:])  # position j predicts bag j + 1
        expected = reference.multi_hot_cross_entropy(logits.flatten(0, 1), targets.flatten(0, 1))
        assert value == pytest.approx(expected.item(), rel=1e-5)
        assert abs(value - math.log(logits.shape[-1])) < 0.6


@pytest.mark.parametrize("name", LOOPS)
def test_a_loop_of_ones_own(name: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, module = Seen(), example(name)
    arguments = ["--data", data, *SMALL, *LOOPS[name], "--ratio", "0.5"]
    with seen.watch(module, monkeypatch):
        losses = run(name, *arguments, "--out", tmp_path)
    accumulated = len(losses) // STEPS
    assert accumulated == (2 if "--micro-batch-size" in LOOPS[name] else 1)
    seen.check(superposed=accumulated * STEPS // 2)
    assert losses[0] == pytest.approx(seen.losses[0][2])
    steps = [sum(losses[i : i + accumulated]) for i in range(0, len(losses), accumulated)]
    superposed, recovered = steps[: STEPS // 2], steps[STEPS // 2 :]
    assert min(superposed[1:]) < superposed[0] and min(recovered[1:]) < recovered[0]


@pytest.mark.parametrize("name", [*LOOPS])
def test_the_script_without_tst_trains(name: str, data: Path, tmp_path: Path) -> None:
    plain = run(name, "--data", data, *SMALL, *LOOPS[name], "--out", tmp_path / "plain", plain=True)
    assert plain[-1] < plain[0]
    if name in SAME_TEXT:
        without = run(name, "--data", data, *SMALL, *LOOPS[name], "--out", tmp_path / "tst", "--ratio", "0")
        assert without == pytest.approx(plain, rel=1e-4)


def test_nanogpt_goes_on_at_any_step(data: Path, tmp_path: Path) -> None:
    arguments = ["--data", data, *LOOPS["nanogpt"], *SMALL, "--ratio", "0.5"]
    whole = run("nanogpt", *arguments, "--out", tmp_path / "whole")
    weights = [torch.load(tmp_path / "whole/ckpt.pt", weights_only=True)["model"]]
    for stop in (2, 4):  # in either phase

        class Stop(Exception):
            pass

        def save(state: Any, path: Path, write: Callable[..., None] = torch.save, stop: int = stop) -> None:
            write(state, path)
            if state["step"] == stop:
                raise Stop

        with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop):
            patch.setattr(torch, "save", save)
            run("nanogpt", *arguments, "--out", tmp_path / str(stop), "--save-every", "2")
        rest = run("nanogpt", *arguments, "--out", tmp_path / str(stop), "--resume")
        assert rest == whole[stop:]
        weights.append(torch.load(tmp_path / str(stop) / "ckpt.pt", weights_only=True)["model"])
    for name, weight in weights[0].items():
        assert torch.equal(weight, weights[1][name]) and torch.equal(weight, weights[2][name])
    stock = example("nanogpt", plain=True).GPT(256, LENGTH, 2, 2, 16)
    stock.load_state_dict(weights[0])  # names are the stock ones


def test_accelerate_goes_on_at_any_step(data: Path, tmp_path: Path) -> None:
    arguments = ["--data", data, *LOOPS["accelerate_loop"], *SMALL, "--ratio", "0.5"]
    whole = run("accelerate_loop", *arguments, "--out", tmp_path, "--save-at", "2")
    assert run("accelerate_loop", *arguments, "--out", tmp_path, "--resume", "2") == whole[4:]
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert not any(is_superposed(m) for m in stock.modules())


def test_lightning_goes_on_at_any_step(data: Path, tmp_path: Path) -> None:
    arguments = ["--data", data, *LOOPS["lightning_example"], *SMALL, "--ratio", "0.5", "--save-every", "2"]
    whole = run("lightning_example", *arguments, "--out", tmp_path / "whole")
    for stop in (2, 4):
        checkpoint = tmp_path / f"whole/step={stop}.ckpt"
        rest = run("lightning_example", *arguments, "--out", tmp_path / str(stop), "--resume", checkpoint)
        assert rest == whole[stop:]


def test_lightning_accumulates(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bags up to the switch and nowhere else; a step of two batches of 2 is one of 4."""
    seen, module = Seen(), example("lightning_example")
    arguments = ["--data", data, *LOOPS["lightning_example"], *SMALL, "--ratio", "0.5"]
    arguments += ["--batch-size", "2", "--accumulate", "2"]
    with seen.watch(module, monkeypatch):
        run("lightning_example", *arguments, "--out", tmp_path)
    assert [ids.shape[2:] for ids in seen.ids] == [(BAG,)] * STEPS + [()] * STEPS


def test_ddp_on_two_processes_trains_the_model_of_one(data: Path, tmp_path: Path) -> None:
    """Across the switch: two processes read in one micro-batch each what one process accumulates."""
    arguments = ["--data", str(data), *LOOPS["ddp"], *SMALL, "--ratio", "0.5"]
    run("ddp", *arguments, "--out", tmp_path / "one")
    launch(2, run, "ddp", *arguments, "--accumulate", "1", "--out", str(tmp_path / "two"))
    one, two = (load_file(tmp_path / x / "model/model.safetensors") for x in ("one", "two"))
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-4, atol=1e-5)


def test_lightning_goes_on_inside_a_step(data: Path, tmp_path: Path) -> None:
    """With two optimizers, whose steps Lightning counts together; the batches after it are those of the whole run."""
    module = example("lightning_example")

    class Two(module.CausalLM):
        def __init__(self) -> None:
            super().__init__(module.LlamaConfig(
                vocab_size=256, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
            ))  # fmt: skip
            self.automatic_optimization, self.read = False, []

        def training_step(self, batch: dict[str, Tensor], i: int) -> None:
            self.read.append(batch["input_ids"].tolist())
            module.multi_hot_cross_entropy(self.model(batch["input_ids"]).logits, batch["shift_labels"]).backward()
            for optimizer in self.optimizers():
                optimizer.step()
                optimizer.zero_grad()

        def configure_optimizers(self) -> Any:
            head, *others = self.parameters()
            return [torch.optim.AdamW(p) for p in ([head], others)]

    class Save(lightning.Callback):
        def on_train_batch_end(self, trainer: lightning.Trainer, *args: Any) -> None:
            if args[-1] == 4:
                trainer.save_checkpoint(tmp_path / "three.ckpt")

    read = []
    for checkpoint in (None, tmp_path / "three.ckpt"):
        trainer = lightning.Trainer(
            max_epochs=1, callbacks=[module.Superposition(), Save()], use_distributed_sampler=False, logger=False,
            enable_checkpointing=False, default_root_dir=tmp_path, num_sanity_val_steps=0,
        )  # fmt: skip
        model, text = Two(), module.Text(data, LENGTH, 4, Schedule.two_phase(12, 4, 0.5))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer.fit(model, text, ckpt_path=checkpoint)
        read.append(model.read)
    assert len(read[0]) == 12 and read[1] == read[0][5:]


def test_lightning_on_two_devices_trains_the_model_of_one(data: Path, tmp_path: Path) -> None:
    """Across the switch; each process reads its half of every batch."""
    arguments = ["--data", data, *LOOPS["lightning_example"], *SMALL, "--ratio", "0.5"]
    run("lightning_example", *arguments, "--out", tmp_path / "one")
    arguments += ["--devices", "2", "--batch-size", "2", "--out", tmp_path / "two"]
    command = [sys.executable, "-m", "examples.lightning_example", *map(str, arguments)]
    subprocess.run(command, check=True, cwd=ROOT, timeout=300)
    one, two = (load_file(tmp_path / x / "model/model.safetensors") for x in ("one", "two"))
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["nanogpt", "accelerate_loop", "lightning_example"])
def test_a_run_does_not_go_on_with_another_switch(name: str, data: Path, tmp_path: Path) -> None:
    """More steps of the same ratio would put a model that is in recovery back to bags."""
    arguments = ["--data", data, *LOOPS[name], "--width", "16", "--ratio", "0.5", "--out", tmp_path]
    save, resume = {
        "nanogpt": ([], ["--resume"]),
        "accelerate_loop": (["--save-at", "5"], ["--resume", "5"]),
        "lightning_example": (["--save-every", "6"], ["--resume", tmp_path / "step=6.ckpt"]),
    }[name]
    run(name, *arguments, "--steps", "6", *save)
    with pytest.raises((SystemExit, TokenSuperpositionError), match=r"phases.*\[3, 1, 1\].*\[9, 1, 1\]"):
        run(name, *arguments, "--steps", "18", *resume)


def test_continued_pretraining_begins_with_the_checkpoint(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run("muon", "--data", data, *LOOPS["muon"], "--steps", "30", "--width", "16", "--out", tmp_path, plain=True)
    common = ["--model", tmp_path, "--data", data, *LOOPS["muon"], "--steps", "6", "--warmup-steps", "2"]
    seen, module = Seen(), example("continued_pretraining")
    with seen.watch(module, monkeypatch):
        losses = run("continued_pretraining", *common, "--ratio", "0.5", "--out", tmp_path / "tst")
    shapes = [ids.shape[2:] for ids in seen.ids]
    assert shapes == [(BAG,)] * 3 + [()] * 3
    logits, targets, value = seen.losses[0]
    expected = reference.multi_hot_cross_entropy(logits.flatten(0, 1), targets.flatten(0, 1)).item()
    assert value == pytest.approx(expected, rel=1e-5) and losses[0] == pytest.approx(value)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(seen.embedded[0][0], stock.get_input_embeddings().weight.double())
    plain = run("continued_pretraining", *common, "--out", tmp_path / "plain", plain=True)
    without = run("continued_pretraining", *common, "--ratio", "0", "--out", tmp_path / "tst")
    assert without == pytest.approx(plain, rel=1e-4)
    before = {line for line in capsys.readouterr().out.splitlines() if line.startswith("before")}
    assert len(before) == 1  # the same held-out loss, whichever way it goes on


def hf_arguments(prepared: Path, out: Path) -> list[str | Path]:
    text = prepared.parent / "text"
    return [
        "--train", text / "*.txt", "--validation", text / "000*.txt", "--tokenizer", prepared / "tokenizer",
        "--out", out, "--max-steps", "6", "--batch-size", "4", "--block-size", str(LENGTH), "--width", "16",
        "--save-steps", "2",
    ]  # fmt: skip


def test_trainer_with_streaming_datasets(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = Seen()
    arguments = hf_arguments(prepared, tmp_path / "tst")
    with seen.watch(engine, monkeypatch):
        losses = run("hf_trainer", *arguments, "--ratio", "0.5")
    shapes = [ids.shape[2:] for ids in seen.ids]
    assert shapes == [(BAG,)] * 3 + [()] * 3
    logits, targets, _ = seen.losses[0]
    expected = reference.multi_hot_cross_entropy(logits.flatten(0, 1), targets.flatten(0, 1)).item()
    assert losses[0] == pytest.approx(expected, rel=1e-4) and losses[2] < losses[0] and losses[5] < losses[3]
    rest = run("hf_trainer", *arguments, "--ratio", "0.5", "--resume", tmp_path / "tst/checkpoint-2")
    assert rest == losses
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "tst/model")
    assert not any(is_superposed(m) for m in stock.modules())


def test_trainer_without_tst(prepared: Path, tmp_path: Path) -> None:
    plain = run("hf_trainer", *hf_arguments(prepared, tmp_path / "plain"), plain=True)
    without = run("hf_trainer", *hf_arguments(prepared, tmp_path / "tst"), "--ratio", "0")
    assert plain[-1] < plain[0] and without[-1] < without[0]
    assert without[0] == pytest.approx(plain[0], rel=0.02)  # nearly the same tokens: the block's last one has a target


def test_the_page_is_what_the_scripts_are() -> None:
    assert diff.PAGE.read_text() == diff.page(), "run python -m examples.diff"
    assert {p.stem for p in diff.HERE.glob("plain/*.py")} - {"__init__"} == set(diff.NAMES)
