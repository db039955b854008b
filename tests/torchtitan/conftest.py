"""Real runs of torchtitan and of transformers from the same weights, shared by the tests."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import once, tiny
from tests.processes import launch
from tests.torchtitan import cpu_shim
from token_superposition.experiment.config import Config, load_config
from token_superposition.experiment.files import read_metrics
from token_superposition.experiment.run import train

CONFIG = """\
[model]
path = "{init}"
[data]
path = "{data}"
sequence_length = 16
eval_tokens = 256
final_eval_tokens = 336
[superposition]
bag_size = 4
ratio = 0.5
weighting = "{weighting}"
[train]
steps = 12
batch_size = 4
{micro}
learning_rate = 3e-3
warmup_steps = 2
decay_ratio = 0.25
precision = "float32"
log_every = 1
eval_every = 4
"""
MOE = {"norm_topk_prob": True, "router_aux_loss_coef": 0.5}
# configuration: architecture, options, weighting, micro-batch
CONFIGS: dict[str, tuple[str, dict[str, object], str, int | None]] = {
    "llama": ("llama", {"num_key_value_heads": 2, "rms_norm_eps": 1e-5}, "uniform", None),
    "power": ("llama", {"num_key_value_heads": 1, "tie_word_embeddings": True}, "power", 1),
    "own": ("llama", {"num_key_value_heads": 2, "head_dim": 8}, "uniform", None),
    "moe": ("qwen3_moe", MOE | {"output_router_logits": False}, "uniform", None),
    "balanced": ("qwen3_moe", MOE | {"output_router_logits": True}, "uniform", 2),
}
FLAGS = "--optimizer.implementation for-loop --metrics.enable_tensorboard"
TWO = " --parallelism.spmd_backend partial_dtensor"  # the default backend, spmd_types, needs torch 2.14 from two on
SAVE = " --checkpoint.enable --checkpoint.interval 4"
TENSOR, EXPERT = " --parallelism.tensor_parallel_degree 2", " --parallelism.expert_parallel_degree 2"
PIPELINE = " --parallelism.pipeline_parallel_degree 2 --training.disable_cuda_graphs"
# run: configuration, processes, flags; two processes without a degree are FSDP2 x 2, with experts FSDP2 x EP 2
RUNS = {
    "llama-fsdp": ("llama", 2, SAVE),
    "llama-tp": ("llama", 2, TENSOR),
    "llama-pp": ("llama", 2, PIPELINE),
    "power-one": ("power", 1, ""),
    "own-one": ("own", 1, ""),
    "moe-ep": ("moe", 2, SAVE + EXPERT),
    "balanced-ep": ("balanced", 2, EXPERT),
}


# further runs on one process: one that logs its first step only, and the beginning of one of 12 steps
ALONE = {
    "sparse": "--config power --metrics.log_freq 100",
    "beginning": "--config power --training.steps 8 --lr_scheduler.total_steps 12",
}


def torchtitan(configs: Path, processes: int, runs: dict[str, str]) -> None:
    """Run ``{dump folder: flags}`` one after the other in the same processes: one under torchrun, or two."""
    stock = f"--module tests.torchtitan.registry {FLAGS}{TWO if processes > 1 else ''} --dump_folder"
    arguments = " THEN ".join(f"VOCABULARY {o}" if "--" not in f else f"{stock} {o} {f}" for o, f in runs.items())
    if processes > 1:
        launch(processes, cpu_shim.run, arguments, TST_TEST_CONFIGS=str(configs))
        return
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--rdzv-backend", "c10d", "--rdzv-endpoint"]
    done = subprocess.run(
        [*torchrun, "localhost:0", "--nproc-per-node=1", "-m", "tests.torchtitan.cpu_shim", *arguments.split()],
        capture_output=True,
        text=True,
        env=os.environ | {"TST_TEST_CONFIGS": str(configs)},
        timeout=280,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-5000:]


@pytest.fixture(scope="session")
def configs(tmp_path_factory: pytest.TempPathFactory, prepared: Path) -> Path:
    return once(tmp_path_factory, "configs", lambda root: write_configs(root, prepared))


def write_configs(root: Path, prepared: Path) -> None:
    for name, (architecture, options, weighting, micro) in CONFIGS.items():
        tiny(architecture, **options).save_pretrained(root / name)
        micro_line = f"micro_batch_size = {micro}" if micro else ""
        text = CONFIG.format(init=root / name, data=prepared, weighting=weighting, micro=micro_line)
        (root / f"{name}.toml").write_text(text)


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory, configs: Path) -> Path:
    """A directory with a finished run for each of ``RUNS``, and ``NAME-resumed``: taken up again after step 4.

    ``llama-finished`` is a finished run whose command was given again, ``llama-weights`` one that was taken up again
    without the state of its loader; and those of ``ALONE``.
    """
    return once(tmp_path_factory, "runs", lambda root: run_all(root, configs))


def run_all(root: Path, configs: Path) -> None:
    for processes in (1, 2):
        chosen = {name: r for name, r in RUNS.items() if r[1] == processes}
        planned = {str(root / n): f"--config {c}{flags}" for n, (c, _, flags) in chosen.items()}
        also = {"vocabulary": ""} if processes == 2 else ALONE
        torchtitan(configs, processes, planned | {str(root / n): flags for n, flags in also.items()})
    saved = {f"{n}-resumed": r for n, r in RUNS.items() if SAVE in r[2]}
    for name in saved:
        before = root / name.removesuffix("-resumed")
        shutil.copytree(before / "checkpoint/step-4", root / name / "checkpoint/step-4")
        shutil.copy(before / "metrics.jsonl", root / name)
    shutil.copytree(root / "llama-fsdp/checkpoint/step-4", root / "llama-weights/checkpoint/step-4")
    shutil.copy(root / "llama-fsdp/metrics.jsonl", root / "llama-weights")
    saved["llama-weights"] = ("llama", 2, SAVE + " --checkpoint.exclude_from_loading dataloader")
    saved["llama-finished"] = RUNS["llama-fsdp"]
    shutil.copytree(root / "llama-fsdp/checkpoint", root / "llama-finished/checkpoint")
    shutil.copy(root / "llama-fsdp/metrics.jsonl", root / "llama-finished")
    torchtitan(configs, 2, {str(root / n): f"--config {c}{flags}" for n, (c, _, flags) in saved.items()})


@pytest.fixture(scope="session")
def references(tmp_path_factory: pytest.TempPathFactory, configs: Path) -> Callable[[str], list[dict[str, Any]]]:
    """The metrics of the transformers engine for a configuration, on one process."""

    def metrics(name: str) -> list[dict[str, Any]]:
        config = load_config(configs / f"{name}.toml")
        root = once(tmp_path_factory, f"reference-{name}", lambda root: run_transformers(config, root))
        return read_metrics(root / "run/metrics.jsonl")

    return metrics


def run_transformers(config: Config, root: Path) -> None:
    train(config, root / "run")
