"""Small real things that many tests use: prepared text, a configuration, tiny models."""
# ruff: noqa: E402

from __future__ import annotations

import gc
import os
import shutil
import subprocess
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
gc.disable()  # until all is imported, of which nothing is garbage: see pytest_collection_finish and tests/frozen.py

import pytest
import torch
from filelock import FileLock
from hypothesis import HealthCheck, settings

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is defined: kernels run on the CPU

from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from tests.processes import call, command, command_with_forks
from token_superposition.data.prepare import PrepareOptions, prepare

settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")  # how long an example takes says what else the machine does

SENTENCES = ("The river carries {} boats to the sea.", "def add_{0}(x):\n    return x + {0}", "Bag {} holds tokens {}.")

TINY: dict[str, dict[str, object]] = {
    "llama": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "qwen3_moe": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "moe_intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "output_router_logits": True,
    },
    "mamba": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4, "time_step_rank": 4},
    "gemma": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
              "num_key_value_heads": 1, "head_dim": 16},
    "gemma2": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
               "num_key_value_heads": 1, "head_dim": 16},
    "gemma3_text": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
                    "num_key_value_heads": 1, "head_dim": 16},
    "granite": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
                "num_key_value_heads": 1, "logits_scaling": 8.0, "embedding_multiplier": 3.0},
    "cohere": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
               "logit_scale": 0.25},
    "bert": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
             "is_decoder": True, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
}  # fmt: skip
VOCAB = 320


def tiny(architecture: str, vocab_size: int = VOCAB, **options: object) -> PreTrainedModel:
    """A small model with random weights, always the same ones."""
    torch.manual_seed(0)
    settings: dict[str, object] = {"vocab_size": vocab_size, "max_position_embeddings": 64, "pad_token_id": None}
    settings |= {"bos_token_id": 0, "eos_token_id": 0, "use_cache": False} | TINY[architecture] | options
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **settings))


def text(n: int = 400) -> list[str]:
    return [SENTENCES[i % 3].format(i, i * i % 97) * (1 + i % 4) for i in range(n)]


def once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """A directory that ``make`` fills, once for all workers of pytest-xdist."""
    base = factory.getbasetemp()
    root = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    with FileLock(f"{root}.lock"):
        if not (root / "made").exists():
            shutil.rmtree(root, ignore_errors=True)
            root.mkdir()
            make(root)
            (root / "made").touch()
    return root


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A token store with a vocabulary of 320, beside its text."""
    return once(tmp_path_factory, "prepared", prepare_text) / "data"


def prepare_text(root: Path) -> None:
    source = root / "text"
    source.mkdir()
    for i, document in enumerate([*text(), *text(3)]):
        (source / f"{i:04d}.txt").write_text(document)
    prepare([str(source)], root / "data", PrepareOptions(vocab_size=VOCAB, validation_share=0.1))


CONFIG = """\
[model]
architecture = "{architecture}"
[model.options]
{options}
[data]
path = "{data}"
sequence_length = 16
eval_tokens = 256
final_eval_tokens = 512
[superposition]
bag_size = 4
ratio = 0.5
[train]
steps = 12
batch_size = 4
learning_rate = 3e-3
warmup_steps = 2
precision = "float32"
log_every = 1
eval_every = 4
save_every = 0
"""


@pytest.fixture
def write_config(tmp_path: Path, prepared: Path) -> Callable[..., Path]:
    """Writes a TOML file for a tiny run; keyword arguments replace lines ("steps = 12") or append text."""

    def write(architecture: str = "llama", append: str = "", name: str = "config.toml", **replaced: object) -> Path:
        options = "\n".join(f"{k} = {toml(v)}" for k, v in TINY.get(architecture, {}).items())
        content = CONFIG.format(architecture=architecture, options=options, data=prepared)
        for key, value in replaced.items():
            assert f"\n{key} =" in content, key
            lines = [f"{key} = {toml(value)}" if line.startswith(f"{key} =") else line for line in content.splitlines()]
            content = "\n".join(lines) + "\n"
        path = tmp_path / name
        path.write_text(content + append)
        return path

    return write


@pytest.fixture(scope="session")
def two_seeds(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, str]:
    """Configuration, result and, from before it, the dry run of a real comparison."""
    options = "\n".join(f"{k} = {toml(v)}" for k, v in TINY["llama"].items())
    content = CONFIG.format(architecture="llama", options=options, data=prepared)
    content += "[compare]\nbaseline_lengths = [1, 1.5]\nseeds = [3, 4]\n"

    def make(root: Path) -> None:
        config = root / "config.toml"
        config.write_text(content)
        dry = tst("compare", config, "--out", root / "out", "--dry-run", COLUMNS="120").stdout
        assert sorted(root.iterdir()) == [config]  # it wrote nothing
        (root / "dry.txt").write_text(dry)
        tst("compare", config, "--out", root / "out", target=command_with_forks)

    root = once(tmp_path_factory, "two-seeds", make)
    return root / "config.toml", root / "out", (root / "dry.txt").read_text()


@pytest.fixture(scope="session")
def finished_run(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a model with tied weights and a scaled embedding, in float32; checkpoints after 4, 8 and 12 steps."""
    options = "\n".join(f"{k} = {toml(v)}" for k, v in TINY["gemma3_text"].items())
    content = CONFIG.format(architecture="gemma3_text", options=options, data=prepared)

    def make(root: Path) -> None:
        (root / "config.toml").write_text(content.replace("save_every = 0", "save_every = 4"))
        tst("train", root / "config.toml", "--out", root / "run")

    return once(tmp_path_factory, "finished-run", make) / "run"


def toml(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else f'"{value}"' if isinstance(value, str) else str(value)


def tst(
    *args: str | Path, check: bool = True, target: Callable[..., None] = command, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run the command in a process of its own."""
    done = call(target, *map(str, args), **environment)
    if check:
        assert done.returncode == 0, done.stdout + done.stderr
    return done


def pytest_collection_finish() -> None:
    """No garbage collection looks at what was imported: the one that accelerate asks for in each run takes 0.4 s."""
    gc.enable()
    gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the implementations of the loss that the installed torch, or a missing package, does not give."""
    missing = {
        "native": None if hasattr(torch.nn.functional, "linear_cross_entropy") else "needs torch 2.13",
        "liger": None if find_spec("liger_kernel") else "needs liger-kernel",
    }
    for item in items:
        parameters = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
        if reason := missing.get(parameters.get("impl", "")):
            item.add_marker(pytest.mark.skip(reason=reason))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="the long versions of tests/reliability")
