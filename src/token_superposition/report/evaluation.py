"""Losses and task scores on the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from token_superposition.experiment.evaluate import Loss


def print_evaluation(losses: Sequence[Loss], tasks: Mapping[str, Mapping[str, float]], console: Console) -> None:
    if losses:
        table = Table("text", "tokens", "sequence", "nats/token", "perplexity", "bits/byte")
        for x in losses:
            figures = (f"{x.loss:.4f}", f"{x.perplexity:.2f}", f"{x.bits_per_byte:.4f}")
            table.add_row(escape(x.text), f"{x.tokens:,}", f"{x.sequence_length:,}", *figures)
        console.print(table)
    if tasks:
        table = Table("task", "metric", "value")
        for task, metrics in tasks.items():
            for metric, value in metrics.items():
                table.add_row(escape(task), escape(metric), f"{value:.4f}")
        console.print(table)
