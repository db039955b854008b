"""The learning rate of the token embeddings, where it is not that of the rest."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import TrainingArguments

from tests.conftest import tiny
from token_superposition.data.store import Meta, json_sha256
from token_superposition.engines.transformers import TSTTrainer
from token_superposition.errors import TokenSuperpositionError
from token_superposition.experiment.checkpoints import read_manifest
from token_superposition.experiment.compare import checked_jobs, jobs_of
from token_superposition.experiment.config import CompareConfig, Config, Variant, load_config
from token_superposition.experiment.jobs import unfinished
from token_superposition.experiment.model import build_model
from token_superposition.experiment.run import train
from token_superposition.experiment.superposition import BASELINE

Write = Callable[..., Path]


def changed(config: Config, **settings: Any) -> Config:
    return replace(config, train=replace(config.train, **settings))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("architecture", ["llama", "gemma3_text"])
def test_the_embeddings_alone_move_by_so_many_times_as_much(
    optimizer: str, architecture: str, write_config: Write, tmp_path: Path
) -> None:
    """In the first step, whose gradients are the same; a Gemma's embeddings are its head as well."""
    config = load_config(write_config(architecture, steps=1, bag_size=1, warmup_steps=0))
    config = changed(config, optimizer=optimizer, weight_decay=0.0, decay_ratio=0.0)
    torch.manual_seed(config.train.seed)
    before = {
        name: p.detach().clone()
        for name, p in build_model(config, Meta.load(Path(config.data.path))).named_parameters()
    }
    moved: list[dict[str, Tensor]] = []
    for factor in (1.0, 0.25):
        out = tmp_path / f"{factor}"
        train(changed(config, embedding_lr_factor=factor), out)
        moved.append({name: p - before[name] for name, p in load_file(out / "model/model.safetensors").items()})
    plain, scaled = moved
    for name, by in plain.items():
        if name == "model.embed_tokens.weight":
            assert by.abs().max() > 0 and torch.allclose(scaled[name], by * 0.25, rtol=1e-3, atol=1e-8)
        else:
            assert torch.equal(scaled[name], by), name


def test_a_run_goes_on_with_both_rates_and_not_with_others(write_config: Write, tmp_path: Path) -> None:
    config = changed(load_config(write_config(steps=12, save_every=6)), embedding_lr_factor=4.0, keep=0)
    train(config, tmp_path / "whole")
    part = shutil.copytree(tmp_path / "whole", tmp_path / "part")
    (part / "run.json").unlink()
    for name in ("model", "checkpoints/checkpoint-12"):
        shutil.rmtree(part / name)
    other = shutil.copytree(part, tmp_path / "other")
    train(config, part)
    weights = [load_file(d / "model/model.safetensors") for d in (tmp_path / "whole", part)]
    assert all(torch.equal(p, weights[1][name]) for name, p in weights[0].items())
    with pytest.raises(TokenSuperpositionError, match=r"train.embedding_lr_factor 4.0 -> 2.0"):
        train(changed(config, embedding_lr_factor=2.0), other)


def test_a_checkpoint_that_does_not_say_had_one_rate(write_config: Write, tmp_path: Path) -> None:
    config = changed(load_config(write_config(steps=12, save_every=6)), embedding_lr_factor=1.0, keep=0)
    train(config, tmp_path / "whole")
    old = tmp_path / "whole/checkpoints/checkpoint-6"
    manifest = read_manifest(old)
    del manifest["config"]["train"]["embedding_lr_factor"]
    manifest["sha256"] = json_sha256(manifest)
    (old / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(TokenSuperpositionError, match=r"train.embedding_lr_factor 1.0 -> 4.0"):
        train(changed(config, embedding_lr_factor=4.0), tmp_path / "other", resume=old)
    train(config, tmp_path / "on", resume=old)
    models = [tmp_path / name / "model/model.safetensors" for name in ("whole", "on")]
    assert models[0].read_bytes() == models[1].read_bytes()


def test_a_run_of_before_there_was_the_factor_had_one_rate(write_config: Write, tmp_path: Path) -> None:
    """It is done for a comparison at one rate, and of another configuration for one with today's default."""
    config = changed(load_config(write_config(steps=4)), embedding_lr_factor=1.0)
    out = tmp_path / "out"
    job = jobs_of(config, out)[0]
    directory = out / "runs" / job.directory
    train(job.config, directory)
    path = directory / "config.toml"
    path.write_text(path.read_text().replace("embedding_lr_factor = 1.0\n", ""))
    assert job not in unfinished(checked_jobs(config, out), out)
    faster = changed(config, embedding_lr_factor=4.0)
    with pytest.raises(TokenSuperpositionError, match=r"other configuration \(train.embedding_lr_factor 1.0 -> 4.0\)"):
        checked_jobs(faster, out)
    (directory / "run.json").unlink()
    with pytest.raises(TokenSuperpositionError, match=r"other configuration \(train.embedding_lr_factor 1.0 -> 4.0\)"):
        train(changed(job.config, embedding_lr_factor=4.0), directory)


def test_a_variant_has_its_own_or_that_of_the_others(write_config: Write, tmp_path: Path) -> None:
    tst = load_config(write_config()).superposition
    faster = Variant("faster", tst, learning_rate=0.02)
    variants = (Variant("plain", tst, embedding_lr_factor=1.0), Variant("longer", tst, 1.5), faster)
    config = changed(load_config(write_config()), embedding_lr_factor=4.0)
    config = replace(config, compare=CompareConfig(variants=variants))
    jobs = jobs_of(config)
    factors = {j.name: j.config.train.embedding_lr_factor for j in jobs}
    assert factors == {"baseline": 4.0, "tst": 4.0, "plain": 1.0, "longer": 4.0, "faster": 4.0}
    rates = {j.name: j.config.train.learning_rate for j in jobs}
    assert rates == dict.fromkeys(rates, config.train.learning_rate) | {"faster": 0.02}
    ordinary = replace(config, compare=CompareConfig(variants=(Variant("ordinary", BASELINE, 1.0, 1.0),)))
    assert len(checked_jobs(ordinary, tmp_path / "out")) == 3
    tuned = replace(config, compare=CompareConfig(variants=(Variant("tuned", BASELINE, learning_rate=0.02),)))
    assert len(checked_jobs(tuned, tmp_path / "out")) == 3
    same = replace(config, compare=CompareConfig(variants=(Variant("ordinary", BASELINE, 1.0, 4.0),)))
    with pytest.raises(TokenSuperpositionError, match="it would be the baseline again"):
        checked_jobs(same, tmp_path / "out")


@pytest.mark.parametrize("name", ["learning_rate", "embedding_lr_factor"])
@pytest.mark.parametrize("value", [0.0, -1.0, math.inf, math.nan])
def test_a_rate_is_a_number_above_0(name: str, value: float, write_config: Write) -> None:
    config = load_config(write_config())
    with pytest.raises(TokenSuperpositionError, match=rf"train.{name} is \S+; give a finite number above 0, such"):
        changed(config, **{name: value}).check()
    own = CompareConfig(variants=(Variant("plain", config.superposition, **{name: value}),))
    with pytest.raises(
        TokenSuperpositionError, match=rf"compare.variants plain.{name} is \S+; give a finite number above 0"
    ):
        replace(config, compare=own).check()


def test_an_optimizer_of_ones_own_has_its_rates_already(tmp_path: Path) -> None:
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[])
    model = tiny("llama")
    own = torch.optim.AdamW(model.parameters(), lr=1e-3)
    with pytest.raises(TokenSuperpositionError, match=r"embedding_lr_factor is 4 beside an optimizer in optimizers"):
        TSTTrainer(model, args, embedding_lr_factor=4.0, optimizers=(own, None))  # pyright: ignore
    with pytest.raises(TokenSuperpositionError, match=r"embedding_lr_factor is 0; give a finite number above 0"):
        TSTTrainer(model, args, embedding_lr_factor=0)
    trainer = TSTTrainer(model, args, embedding_lr_factor=4.0)
    for _ in range(2):  # made once
        rates = [g["lr"] for g in trainer.create_optimizer().param_groups for _ in g["params"]]
    frozen = tiny("llama")
    frozen.get_input_embeddings().requires_grad_(False)
    with pytest.raises(TokenSuperpositionError, match="the optimizer does not train the token embeddings"):
        TSTTrainer(frozen, args, embedding_lr_factor=4.0).create_optimizer()
    assert sorted(rates) == [args.learning_rate] * (len([*model.parameters()]) - 1) + [4 * args.learning_rate]
