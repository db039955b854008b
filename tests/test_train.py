"""``tst train``: what is resumed is the same run, and what it ends with is a stock model."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.conftest import VOCAB, tiny, tst
from tests.processes import command, launch
from tests.test_trainer import FOUR
from token_superposition.errors import TokenSuperpositionError
from token_superposition.experiment.config import load_config, save_config
from token_superposition.experiment.files import read_metrics
from token_superposition.experiment.run import train


def train_command(processes: int, *args: str | Path) -> None:
    """``tst train`` in one process, or in several over gloo."""
    launch(processes, command, "train", *map(str, args))


def torchrun(*args: str | Path) -> None:
    """The documented command for two processes."""
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*start, "-m", "token_superposition", "train", *map(str, args)],
        capture_output=True, text=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


TIMES = {"seconds"}


def test_resume_across_the_switch_is_bit_equal(write_config: Callable[..., Path], tmp_path: Path) -> None:
    """Stop in phase 1, go on over the switch: every logged figure and every weight is the uninterrupted run's.

    On one process and on two, which train alike, and validate alike where the last samples do not fill their batches.
    """
    config = write_config(save_every=4, eval_tokens=19 * 16, final_eval_tokens=25 * 16)
    losses: list[list[float]] = []
    validation: list[list[float]] = []
    for processes in (1, 2):
        first, resumed = tmp_path / f"{processes}-whole", tmp_path / f"{processes}-resumed"
        if processes == 1:
            train_command(1, config, "--out", first)
        else:
            torchrun(config, "--out", first)
        shutil.copytree(first, resumed)
        for later in ("checkpoint-6", "checkpoint-8", "checkpoint-12"):
            shutil.rmtree(resumed / "checkpoints" / later)
        shutil.rmtree(resumed / "model")
        (resumed / "run.json").unlink()
        train_command(processes, config, "--out", resumed)
        whole, again = (
            [{k: v for k, v in m.items() if k not in TIMES} for m in read_metrics(p / "metrics.jsonl")]
            for p in (first, resumed)
        )
        assert [m["input_bag"] for m in whole if "loss" in m] == [4] * 6 + [1] * 6
        assert again == whole
        weights = "model/model.safetensors"
        assert (resumed / weights).read_bytes() == (first / weights).read_bytes()
        losses.append([m["loss"] for m in whole if "loss" in m])
        validation.append([m["val_loss"] for m in whole if "val_loss" in m])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4) and len(validation[0]) == 4
    assert validation[1] == pytest.approx(validation[0], rel=1e-5)


def test_two_runs_do_not_write_one_directory(write_config: Callable[..., Path], tmp_path: Path) -> None:
    """The parent of a run may be killed, which goes on; whoever starts it again is told."""
    path, out = write_config(), tmp_path / "run"
    out.mkdir()
    config = load_config(path)
    save_config(config, out / "config.toml")
    (out / "metrics.jsonl").touch()
    script = (
        f"from filelock import FileLock as F; x = F({str(out / '.lock')!r}); x.acquire(); print(1, flush=True); input()"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None and other.stdout.readline()
        with pytest.raises(TokenSuperpositionError, match=r"another tst train is writing .*run; wait for it, stop it"):
            train(replace(config, train=replace(config.train, keep=7)), out)
        assert load_config(out / "config.toml") == config  # what the other is trained with
        other.kill()
    result = train(load_config(path), out)
    assert result.steps == 12 and not (out / ".lock").exists()


def test_what_no_run_has_written_is_not_overwritten(write_config: Callable[..., Path], tmp_path: Path) -> None:
    """The model that a run begins with, another one, or metrics."""
    config, out = load_config(write_config()), tmp_path / "work"
    tiny("llama").save_pretrained(out / "model")
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    began = replace(config, model=replace(config.model, path=str(out / "model"), options={}))
    with pytest.raises(
        TokenSuperpositionError, match=r"model.path .*work/model lies where the finished model of --out"
    ):
        train(began, out)
    with pytest.raises(TokenSuperpositionError, match=r"work/model would be overwritten, and no run wrote it; choose"):
        train(config, out)
    (out / "model").rename(tmp_path / "model")
    (out / "metrics.jsonl").write_text('{"epoch": 1}\n')
    with pytest.raises(TokenSuperpositionError, match=r"metrics.jsonl would be overwritten, and no run wrote it; choo"):
        train(config, out)
    assert [p.name for p in out.iterdir()] == ["metrics.jsonl"]
    assert {p: (tmp_path / "model" / p.name).read_bytes() for p in before} == before


def test_tst_train_ends_with_stock_models(write_config: Callable[..., Path], tmp_path: Path) -> None:
    """Both phases from the command line; a process that cannot import this package loads the results."""
    for architecture in FOUR:
        run = tmp_path / architecture
        tst("train", write_config(architecture, learning_rate=1e-2), "--out", run)
        result = json.loads((run / "run.json").read_text(), parse_constant=pytest.fail)  # NaN is no JSON
        lines = [m for m in read_metrics(run / "metrics.jsonl") if "loss" in m]
        assert abs(lines[0]["loss"] - math.log(VOCAB)) < 0.4, architecture
        assert result["val_loss"] < lines[0]["loss"] - 0.2, architecture
        assert result["raw_tokens"] == 4 * 16 * (6 * 4 + 6) and result["flops"] > 0, architecture
    script = (
        "import sys; sys.modules['token_superposition'] = None\n"
        "import torch; from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        f"for architecture in {FOUR}:\n"
        f"    run = {str(tmp_path)!r} + '/' + architecture\n"
        "    model = AutoModelForCausalLM.from_pretrained(run + '/model').eval()\n"
        "    ids = torch.arange(12)[None]\n"
        "    vocab = AutoTokenizer.from_pretrained(run + '/model').vocab_size\n"
        "    torch.save((model(ids).logits, vocab), run + '/out.pt')\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)
    for architecture in FOUR:
        logits, vocab = torch.load(tmp_path / architecture / "out.pt", weights_only=True)
        here = AutoModelForCausalLM.from_pretrained(tmp_path / architecture / "model").eval()
        assert torch.equal(here(torch.arange(12)[None]).logits, logits), architecture
        assert vocab == VOCAB, architecture
