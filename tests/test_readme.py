"""The README's Python code runs as it stands, and its configuration is a configuration."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import numpy as np
import torch
from transformers import TrainingArguments

from tests.conftest import VOCAB, tiny
from token_superposition.cli import COMMANDS
from token_superposition.experiment.config import Config
from token_superposition.experiment.tree import from_dict

README = Path(__file__).parent.parent / "README.md"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README.read_text(), re.S)


def test_python_blocks_train(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    model = tiny("llama")
    seen: list[tuple[int, ...]] = []
    model.model.embed_tokens.register_forward_hook(lambda m, args, out: seen.append(tuple(args[0].shape)))
    given = {
        "model": model,
        "optimizer": torch.optim.AdamW(model.parameters(), lr=1e-2),
        "total_steps": 10,
        "warmup_steps": 2,
        "length": 8,
        "next_tokens": lambda n: torch.randint(VOCAB, (2, n), generator=generator),
        "tokens": (np.arange(20_000) % VOCAB).astype(np.uint16),  # as tokens are kept on disks
        "validation_tokens": (np.arange(100) % VOCAB).astype(np.uint16),
        "sequence_length": 8,
        "batch_size": 8,
        "training_arguments": TrainingArguments(
            output_dir=str(tmp_path), use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True
        ),
    }
    loop, trainer = blocks("python")
    exec(loop, given)
    assert seen == [(2, 8, 4)] * 3 + [(2, 8)] * 7 and given["loss"].isfinite()  # pyright: ignore
    exec(trainer, given)
    assert given["trainer"].state.global_step == 10  # pyright: ignore


def test_configuration_block() -> None:
    (content,) = blocks("toml")
    from_dict(Config, tomllib.loads(content), "README").check()


def test_every_command_is_listed() -> None:
    table = README.read_text()
    assert all(f"`tst {command}" in table for command in COMMANDS)


def test_the_tests_of_other_versions_are_there() -> None:
    named = re.findall(r"tests/test_\{([\w,]+)\}\.py", (README.parent / ".ci/versions").read_text())
    names = [name for group in named for name in group.split(",")]
    assert len(names) > 10 and all((README.parent / f"tests/test_{name}.py").is_file() for name in names)


def test_commands_install_and_run() -> None:
    demo, tests = blocks("bash")
    assert demo.splitlines()[-1].endswith("tst demo") and "-c constraints.txt" in demo and "-c constraints.txt" in tests
    assert (README.parent / "constraints.txt").read_text().count("torch==2.13.0\n") == 1
