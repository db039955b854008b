"""What a run shows while it trains: on a terminal all of it, in a pipe a line for each validation."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import TrainerControl, TrainerState, TrainingArguments

from token_superposition.data.progress import bars
from token_superposition.experiment.files import NEWEST, read_metrics
from token_superposition.experiment.metrics import MetricsWriter
from token_superposition.experiment.progress import RunProgress

LINES: list[dict[str, Any]] = [
    {
        "step": step,
        "loss": 5.0 - step / 100,
        "input_bag": 4 if step <= 30 else 1,
        "output_bag": 4 if step <= 30 else 1,
        "raw_tokens": 400 * min(step, 30) + 100 * max(step - 30, 0),
        "seconds": step * 0.1,
    }
    for step in range(10, 70, 10)
]
VALIDATED = {"step": 60, "val_loss": 4.25, "input_bag": 1, "raw_tokens": LINES[-1]["raw_tokens"], "seconds": 6.0}


def shown(terminal: bool, lines: list[dict[str, Any]]) -> str:
    out = io.StringIO()
    with RunProgress(Console(file=out, force_terminal=terminal, width=80)) as progress:
        for n in range(1, len(lines) + 1):
            progress.update("tst", 100, lines[:n])
        progress.bars.refresh()
    return out.getvalue()


def last_frame(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text).replace("\r", "\n").rstrip().rpartition("\n")[2]


def test_a_terminal_shows_phase_loss_speed_and_time_left() -> None:
    superposed = last_frame(shown(True, LINES[:3]))
    assert re.search(r"tst .* 30/100 bags of 4  loss 4.700  4,000 raw tok/s +(\d|-)[\d:-]+$", superposed), superposed
    recovered = last_frame(shown(True, [*LINES, VALIDATED]))
    assert re.search(r"60/100 recovery  val 4.250  1,000 raw tok/s", recovered), (
        recovered
    )  # not the mean of both phases
    assert len(recovered) <= 80
    ordinary = last_frame(shown(True, [m for m in LINES if m["input_bag"] == 1]))
    assert "ordinary  loss 4.400" in ordinary, ordinary


def test_a_pipe_is_told_what_was_validated_and_nothing_else() -> None:
    assert shown(False, LINES) == ""
    assert shown(False, [*LINES, VALIDATED]) == "tst: step 60/100, validation loss 4.2500\n"


def test_preparing_is_quiet_in_a_pipe() -> None:
    for terminal in (True, False):
        out = io.StringIO()
        with bars(Console(file=out, force_terminal=terminal, width=80)) as report:
            report("reading", 50.0, 100.0)
        assert ("reading" in out.getvalue()) if terminal else (out.getvalue() == "")


def test_each_stage_of_preparing_ends_with_its_last_figure() -> None:
    """Also one that is over before the next figure would be shown."""
    out = io.StringIO()
    with bars(Console(file=out, force_terminal=True, width=80)) as report:
        for stage in ("reading", "writing"):
            for done in (50.0, 70.0, 100.0):
                report(stage, done, 100.0)
    for stage in ("reading", "writing"):
        assert "100/100 bytes" in [line for line in out.getvalue().splitlines() if stage in line][-1]


def test_a_long_run_keeps_few_lines_in_memory_and_all_of_them_in_its_file(tmp_path: Path) -> None:
    """Also one that goes on: it looks for a spike among the same lines."""
    path, seen = tmp_path / "metrics.jsonl", list[tuple[int, int, int]]()
    state, control = TrainerState(), TrainerControl()
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[])
    writer = MetricsWriter(
        path, 1.0, 1.0, report=lambda lines: seen.append((lines[0]["step"], lines[-1]["step"], len(lines)))
    )
    for step in range(1, 1001):
        state.global_step = state.max_steps = step
        logs = {"loss": 1.0, "input_bag": 1, "output_bag": 1}
        state.log_history.append({**logs, "step": step})  # as Trainer does
        writer.on_log(args, state, control, logs=logs)
    assert len(state.log_history) == 1
    assert seen[-1] == (1, 1000, NEWEST + 1) and max(count for _, _, count in seen) == NEWEST + 1
    assert [m["step"] for m in read_metrics(path)] == list(range(1, 1001))
    resumed = MetricsWriter(path, 1.0, 1.0)
    resumed.on_train_begin(args, state, control)
    assert resumed.lines == writer.lines


def test_a_line_is_shown_once_also_where_the_last_two_are_alike() -> None:
    """The last validation of a run may be that of its last step again."""
    out = io.StringIO()
    with RunProgress(Console(file=out, force_terminal=False), 1) as progress:
        for _ in range(3):
            progress.update("run", 60, [*LINES, VALIDATED, VALIDATED])
    assert out.getvalue().count("validation loss") == 2
