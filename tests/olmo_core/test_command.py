"""The OLMo-core engine's command: what is wrong is one line, before any process group starts."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

from tests.conftest import tiny
from tests.olmo_core.launch import run_config
from token_superposition.engines.olmo_core.__main__ import main
from token_superposition.experiment.config import ModelConfig, save_config

OF = "is not a multiple of"
ENGINE = "the OLMo-core engine"


@pytest.mark.parametrize(
    ("processes", "flags", "message"),
    [
        (3, "--tensor-parallel 2", "--tensor-parallel 2 does not divide 3 processes; start a multiple of 2"),
        (4, "--train.batch-size 6", f"train.batch_size 6 {OF} 4 data-parallel processes x micro-batch 1; change"),
        (2, "--train.micro-batch-size 4", f"train.batch_size 4 {OF} 2 data-parallel processes x micro-batch 4"),
        (3, "--tensor-parallel 3",
         f"the vocabulary, 320, {OF} --tensor-parallel 3; set model.options.vocab_size to 321, or"),
        (4, "--tensor-parallel 4", f"num_attention_heads, 2, {OF} --tensor-parallel 4"),
        (2, "--tensor-parallel 2 --data.sequence-length 17", f"data.sequence_length, 17, {OF} --tensor-parallel 2"),
        (2, "--superposition.shift", "superposition.shift is True; the OLMo-core engine does not have it, so use tst"),
        (2, "--superposition.anneal 4 2 --superposition.mixture 0.5",
         "superposition.mixture is 0.5; the OLMo-core engine does not have it"),
        (2, "--train.optimizer muon", "train.optimizer is 'muon'; the OLMo-core engine has adamw only, so use"),
        (1, "--train.on-nonfinite skip", "train.on_nonfinite is 'skip'; OLMo-core stops at a loss that is not finite"),
        (1, "--train.keep 5", "train.keep is 5; the OLMo-core engine keeps every checkpoint: leave it out"),
        (2, "--superposition.loss sum-to-one",
         "superposition.loss is 'sum-to-one'; the OLMo-core engine does not have it, so use tst train"),
        (2, "--data.path nowhere", "nowhere holds no prepared data"),
        (2, "--train.steps 0", "train.steps is 0; give a whole number of at least 1"),
        (2, ModelConfig("qwen3_moe", {"num_hidden_layers": 1}), f"model.architecture is qwen3_moe; {ENGINE}"),
        (2, ModelConfig("llama", {"hidden_act": "gelu"}), f"hidden_act is 'gelu'; {ENGINE} has 'silu' only"),
        (2, "gpt2", f"model.architecture is gpt2; {ENGINE} trains llama and qwen3, so"),
        (2, "small", "the model has 100 token embeddings, the data's vocabulary has 320"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_before_any_process_group(
    processes: int, flags: str | ModelConfig, message: str,
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    monkeypatch.setenv("RANK", "0")
    tiny("gpt2").save_pretrained(tmp_path / "gpt2")
    tiny("llama", vocab_size=100).save_pretrained(tmp_path / "small")
    model = flags if isinstance(flags, ModelConfig) else None
    config = run_config(prepared, start=tmp_path / flags if flags in ("gpt2", "small") else None)
    save_config(dataclasses.replace(config, model=model) if model else config, tmp_path / "config.toml")
    arguments = flags.split() if isinstance(flags, str) and flags.startswith("--") else []
    capsys.readouterr()
    assert main([str(tmp_path / "config.toml"), "--out", str(tmp_path / "run"), *arguments]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert message in lines[-1] and [x for x in lines if "error" in x] == [lines[-1]]
    assert not dist.is_initialized() and not (tmp_path / "run").exists()


def test_missing_and_wrong_engine(tmp_path: Path) -> None:
    """Without site-packages there is no OLMo-core; a distribution found first says it is another version."""
    source = str(Path(__file__).parents[2] / "src")
    name = "from token_superposition.engines.olmo_core import TSTTrainModule"
    done = subprocess.run(
        [sys.executable, "-S", "-c", name], capture_output=True, text=True, env={"PYTHONPATH": source}
    )
    remedy = "pip install 'token-superposition[olmo]'"
    assert f"needs ai2-olmo-core>=3.0,<3.1, it is not installed; {remedy}" in done.stderr
    wrong = tmp_path / "ai2_olmo_core-3.1.0.dist-info"
    wrong.mkdir()
    (wrong / "METADATA").write_text("Metadata-Version: 2.1\nName: ai2-olmo-core\nVersion: 3.1.0\n")
    command = [sys.executable, "-m", "token_superposition.engines.olmo_core", "config.toml"]
    path = {"PYTHONPATH": f"{tmp_path}{os.pathsep}{source}"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=os.environ | path)
    assert done.returncode == 2
    assert (
        done.stderr == f"tst: error: the OLMo-core engine needs ai2-olmo-core>=3.0,<3.1, 3.1.0 is installed; {remedy}\n"
    )
