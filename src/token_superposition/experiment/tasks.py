"""Benchmark tasks on a finished model, by lm-evaluation-harness."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from transformers import PreTrainedTokenizerBase

from token_superposition.errors import TokenSuperpositionError, first_line

PAPER = ("arc_easy", "arc_challenge", "boolq", "hellaswag", "mmlu", "openbookqa", "piqa", "winogrande")
"""Downstream evaluation of arXiv 2605.06546, 0-shot."""

try:
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
except ImportError as e:
    raise TokenSuperpositionError(
        f"--tasks needs lm-eval>=0.4.13 ({e}); pip install 'token-superposition[eval]'"
    ) from None

Figures = dict[str, dict[str, float]]


def evaluate_tasks(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    *,
    batch_size: int = 8,
    limit: int | None = None,
) -> Figures:
    """Every metric of every task, 0-shot unless a task says otherwise; groups (mmlu) are one task.

    ``tasks`` are names of the harness, which fetches their data from the hub; paths of task files, whose data may be
    local; or ``paper``, which is ``PAPER``. ``limit`` takes so many documents of each.
    Raises ``TokenSuperpositionError`` for a task that does not exist or whose data cannot be had.
    """
    names = [name for given in tasks for name in (PAPER if given == "paper" else [given])]
    manager, found = find_tasks(names)
    try:
        language_model = cast(Any, HFLM)(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        evaluated: Any = simple_evaluate(
            language_model, tasks=found, task_manager=manager, limit=limit, log_samples=False, bootstrap_iters=0
        )
    except (ValueError, KeyError, OSError) as e:
        raise TokenSuperpositionError(f"{', '.join(names)}: {first_line(e)}") from e
    parts = {part for group in evaluated["group_subtasks"].values() for part in group}
    return {
        task: {name.removesuffix(",none"): float(v) for name, v in metrics.items() if _is_score(name, v)}
        for task, metrics in evaluated["results"].items()
        if task not in parts
    }


def find_tasks(names: Sequence[str]) -> tuple[Any, list[Any]]:
    """The harness's index and the names in it; its own thousands of tasks are indexed only if one is asked for."""
    files = {name: Path(name).resolve() for name in names if name.endswith(".yaml")}
    folders: list[str | Path] = list(dict.fromkeys(file.parent for file in files.values()))
    manager: Any = TaskManager(include_path=folders or None, include_defaults=len(files) < len(names))
    found: list[Any] = []
    for name in names:
        here = [task for task, entry in manager.task_index.items() if entry.yaml_path == files.get(name, ...)]
        matched = here if name in files else manager.match_tasks([name])
        if not matched:
            raise TokenSuperpositionError(
                f"there is no task {name}; give one that lm-eval ls tasks shows, or a YAML file"
            )
        found += matched
    return manager, found


def _is_score(name: str, value: Any) -> bool:
    return isinstance(value, float) and "stderr" not in name
