"""What a fault costs a run: real runs of ``tst train`` are killed, damaged and starved, and go on.

    python -m benchmarks.faults --rounds 3 --seed 0

Prints a table and writes it to benchmarks/faults.csv and into docs/reliability.md. A run has survived a fault if it
ends as the uninterrupted one did: every logged figure, the weights and the number of raw tokens, bit for bit. The
faults and how they are injected are those of the tests (tests/reliability/harness.py).
"""

from __future__ import annotations

import argparse
import csv
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.measure import write_table
from tests.conftest import prepare_text
from tests.reliability.harness import EVERY, FAULTS, Recovery, Runs

ROOT = Path(__file__).parent.parent
HEADER = ("fault", "injected", "survived", "most steps lost", "raw tokens lost", "seeds")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.faults")
    parser.add_argument("--rounds", type=int, default=3, help="times that each fault is injected")
    parser.add_argument("--seed", type=int, default=0, help="first seed; each round has the next one")
    options = parser.parse_args()
    seeds = range(options.seed, options.seed + options.rounds)
    rows: list[tuple[str, ...]] = []
    everything: list[Recovery] = []
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "source").mkdir()
        prepare_text(Path(folder) / "source")
        runs = Runs(Path(folder), Path(folder) / "source/data")
        for fault in FAULTS:
            found = [runs.recover(fault, seed) for seed in seeds]
            rows.append(row(fault, found, runs))
            everything += found
            print(", ".join(rows[-1]), flush=True)
    survived = sum(r.end == runs.expected for r in everything)
    rows.append(row("all", everything, runs))
    table = Table(*HEADER, title=f"faults in runs of 24 steps with a checkpoint every {EVERY}")
    for r in rows:
        table.add_row(*r)
    Console().print(table)
    with (ROOT / "benchmarks/faults.csv").open("w", newline="") as f:
        csv.writer(f, lineterminator="\n").writerows([HEADER, *rows])
    write_table(ROOT / "docs/reliability.md", "python -m benchmarks.faults", [HEADER, *rows])
    return 0 if survived == len(everything) else 1


def row(fault: str, found: list[Recovery], runs: Runs) -> tuple[str, ...]:
    ended = [r.end for r in found if r.end is not None]
    lost = [runs.expected.raw_tokens - end.raw_tokens for end in ended]
    return (
        fault,
        str(len(found)),
        str(sum(end == runs.expected for end in ended)),
        str(max(r.steps_lost for r in found)),
        str(max(map(abs, lost))) if len(ended) == len(found) else "a run did not end",
        f"{found[0].seed} to {found[-1].seed}" if len(found) > 1 else str(found[0].seed),
    )


if __name__ == "__main__":
    raise SystemExit(main())
