"""What a comparison directory holds, and the sentences and rows that table and page share."""

from __future__ import annotations

import json
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from token_superposition.errors import TokenSuperpositionError


@dataclass(frozen=True)
class Contents:
    summary: dict[str, Any]
    metrics: dict[str, list[dict[str, Any]]]
    """Lines of metrics.jsonl by run directory."""
    config_text: str

    @property
    def runs(self) -> list[dict[str, Any]]:
        return self.summary["runs"]

    @property
    def comparison(self) -> dict[str, Any]:
        return self.summary["comparison"]

    @property
    def steps(self) -> int:
        """Steps of every variant and of the baseline at equal FLOPs."""
        return next(r["steps"] for r in self.runs if r["name"] == "baseline")


def read(directory: Path) -> Contents:
    """Raises ``TokenSuperpositionError`` if ``directory`` holds no finished comparison."""
    try:
        summary = json.loads((directory / "summary.json").read_text())
        config_text = (directory / "config.toml").read_text()
        tomllib.loads(config_text)
        metrics = {
            r["directory"]: [
                json.loads(line)
                for line in (directory / "runs" / r["directory"] / "metrics.jsonl").read_text().splitlines()
            ]
            for r in summary["runs"]
        }
    except (OSError, ValueError, KeyError) as e:
        raise TokenSuperpositionError(
            f"{directory} holds no finished comparison ({e}); make one with tst compare or tst demo"
        ) from None
    return Contents(summary, metrics, config_text)


def rows(contents: Contents) -> list[tuple[str, ...]]:
    """A row for each run: name, seed, bag, steps, latent tokens, raw tokens, time, loss, bits per byte."""
    return [
        (
            r["name"],
            str(r["seed"]),
            f"{r['bag_size']} x {r['ratio']:.0%}" if r["bag_size"] > 1 else "1",
            f"{r['steps']:,}",
            short(r["latent_tokens"]),
            short(r["raw_tokens"]),
            duration(r["train_seconds"]),
            f"{r['val_loss']:.4f}",
            f"{r['val_bpb']:.4f}",
        )
        for r in contents.runs
    ]


HEADERS = ("run", "seed", "bags", "steps", "latent tokens", "raw tokens", "time", "val. loss", "bits/byte")


def verdicts(contents: Contents) -> list[tuple[str, str]]:
    """(accounting, sentence) for each variant: equal FLOPs, equal loss, equal data, cost of a step."""
    result: list[tuple[str, str]] = []
    variants: dict[str, dict[str, Any]] = contents.comparison["variants"]
    for name, c in variants.items():
        label = f"{name}: " if len(variants) > 1 else ""
        result.append((f"{label}equal FLOPs", equal_flops(name, c)))
        result.append((f"{label}equal loss", equal_loss(name, c["equal_loss"], contents.steps)))
        result.append((f"{label}equal data", equal_data(c["equal_data"])))
        if c["phase_step_time_ratio"] is not None:
            result.append(
                (f"{label}a step", f"{c['phase_step_time_ratio']:.2f} x the time of an ordinary one while superposed")
            )
    return result


def equal_flops(name: str, c: dict[str, Any]) -> str:
    delta, seeds = c["delta_val_loss"], c["delta_val_loss_per_seed"]
    spread = (
        f" (mean of {len(seeds)} seeds, standard deviation {c['delta_val_loss_sd']:.4f})"
        if len(seeds) > 1
        else " (one seed)"
    )
    if delta == 0:
        return f"{name} and the baseline end at the same loss{spread}"
    return f"{name} ends {abs(delta):.4f} nats {'below' if delta < 0 else 'above'} the baseline{spread}"


def equal_loss(name: str, equal: dict[str, Any] | None, steps: int) -> str:
    if equal is None:
        return (
            f"not measured; longer baselines (--compare.baseline-lengths 1 1.5 2) show what they need for {name}'s loss"
        )
    n, how = equal["baseline_steps"], equal["how"]
    about = "at least" if how.startswith("at least") else "about"
    source = " (extrapolated from shorter baselines)" if "extrapolated" in how else " (between baselines that were run)"
    return f"the baseline would need {about} {n:,} steps, {equal['speedup']:.2f} x the {steps:,}{source}"


def equal_data(equal: dict[str, Any]) -> str:
    n, loss = equal["baseline_steps"], equal["baseline_val_loss"]
    if loss is None:
        return f"a baseline that reads as much text takes {n:,} steps; it was not run"
    how = "" if equal["how"] == "measured" else f" ({equal['how']})"
    ours = equal["val_loss"]
    return f"a baseline that reads as much text takes {n:,} steps and ends at {loss:.4f}{how}, against {ours:.4f}"


def short(n: float) -> str:
    """1234567 -> 1.23M"""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if n >= size:
            return f"{n / size:.3g}{unit}"
    return f"{n:g}"


def duration(seconds: float) -> str:
    """3700 -> 1 h 2 min"""
    if seconds < 10:
        return f"{seconds:.2g} s"
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = seconds / 60
    return f"{minutes:.1f} min" if minutes < 90 else f"{minutes // 60:.0f} h {minutes % 60:.0f} min"
