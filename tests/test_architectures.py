"""The families of docs/architectures.md, each measured again; see tests/architectures.py for what and how."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import TrainingArguments

from tests.architectures import FAMILIES, INTRODUCTION, build, measure, row
from token_superposition import Schedule, TokenSuperpositionError
from token_superposition.data.plan import PlannedDataset
from token_superposition.engines.transformers import TSTTrainer

PAGE = (Path(__file__).parent.parent / "docs/architectures.md").read_text()


@pytest.mark.parametrize("family", FAMILIES)
def test_bags_and_tokens_are_the_reference(family: str) -> None:
    facts = measure(family)
    assert facts.equal, facts
    assert row(family) in PAGE.splitlines(), "python -m tests.architectures > docs/architectures.md"


def test_the_page_has_these_families_and_no_other() -> None:
    head = INTRODUCTION.count("\n") + 1
    assert [line.split("`")[1] for line in PAGE.splitlines()[head:]] == list(FAMILIES) and len(FAMILIES) >= 25


def test_a_model_that_looks_at_ids_itself_is_refused_bags_and_only_these(tmp_path: Path) -> None:
    """Gemma 3n has an embedding of the token in every layer."""
    arguments = TrainingArguments(
        output_dir=str(tmp_path), per_device_train_batch_size=2, use_cpu=True, report_to="none"
    )
    tokens = list(range(64)) * 20
    for input_bag, refused in ((2, True), (1, False)):
        plan = PlannedDataset(tokens, Schedule.two_phase(4, ratio=0.5, input_bag=input_bag, output_bag=2), 8, 2)
        if refused:
            with pytest.raises(
                TokenSuperpositionError,
                match=r"it looks token ids up in model.embed_tokens_per_layer",
            ):
                TSTTrainer(build("gemma3n_text"), arguments, train_dataset=plan)
        else:
            TSTTrainer(build("gemma3n_text").float(), arguments, train_dataset=plan).train()
