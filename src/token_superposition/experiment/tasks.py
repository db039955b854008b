"""Benchmark tasks on a finished model, by lm-evaluation-harness."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from transformers import PreTrainedTokenizerBase

from token_superposition.errors import TokenSuperpositionError

PAPER = ("arc_easy", "arc_challenge", "boolq", "hellaswag", "mmlu", "openbookqa", "piqa", "winogrande")
"""Downstream evaluation of arXiv 2605.06546, 0-shot."""

try:
    from lm_eval.config.evaluate_config import EvaluatorConfig
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM
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
    config: Any = EvaluatorConfig(tasks=names)
    try:
        manager = config.process_tasks()
        language_model = cast(Any, HFLM)(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        found: Any = simple_evaluate(
            language_model, tasks=config.tasks, task_manager=manager, limit=limit, log_samples=False, bootstrap_iters=0
        )
    except (ValueError, KeyError, OSError) as e:
        raise TokenSuperpositionError(f"{', '.join(names)}: {str(e).strip().splitlines()[0]}") from e
    parts = {part for group in found["group_subtasks"].values() for part in group}
    return {
        task: {name.removesuffix(",none"): float(v) for name, v in metrics.items() if _is_score(name, v)}
        for task, metrics in found["results"].items()
        if task not in parts
    }


def _is_score(name: str, value: Any) -> bool:
    return isinstance(value, float) and "stderr" not in name
