"""Load and soak: memory of preparing text, opening a terabyte, training for long, many reports at once.

    python -m benchmarks.soak [--gigabytes 5] [--steps 2000] [--reports 100] [--only prepare open train report]

Appends rows to benchmarks/results.csv and writes the last one of each load into docs/reliability.md.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from benchmarks.measure import append_rows, read_rows, write_table
from tests.conftest import CONFIG, TINY, prepare_text, toml
from tests.processes import call, command
from tests.reliability.stores import sparse_store
from token_superposition.data.installation import installed_documents

Row = dict[str, Any]
PAGE = Path(__file__).parent.parent / "docs/reliability.md"
FIGURES = {
    "seconds": "{seconds} s",
    "cpu_seconds": "{cpu_seconds} s of processor time",
    "peak_mb": "resident memory of {peak_mb} MB at most",
    "grown_mb": "resident memory grows by {grown_mb} MB",
    "slope_bytes_per_step": "{slope_bytes_per_step} bytes a step (95% interval {slope_low} to {slope_high})",
    "store_gb": "a store of {store_gb} GB",
    "verify_seconds": "`tst verify` in {verify_seconds} s",
    "looks": "the page read {looks} times meanwhile, {cut_short} times cut short",
}


def prepare_much(folder: Path, gigabytes: float) -> Row:
    """``tst prepare`` in a process of its own; its peak of resident memory.

    The text is that of this installation, again and again, each time with another first line.
    """
    path, written = folder / "text.jsonl", 0
    with path.open("w", encoding="utf-8") as f:
        for copy, text in ((i, text) for i in count() for text in installed_documents(Counter())):
            written += f.write(json.dumps({"text": f"{copy}\n{text}"}, ensure_ascii=False) + "\n")
            if written >= gigabytes * 1e9:
                break
    written = path.stat().st_size
    start = time.monotonic()
    arguments = ["prepare", str(path), "--out", str(folder / "data"), "--vocab-size", "4096"]
    subprocess.run([sys.executable, "-m", "token_superposition", *arguments], check=True)
    seconds = time.monotonic() - start
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    start = time.monotonic()
    subprocess.run([sys.executable, "-m", "token_superposition", "verify", str(folder / "data")], check=True)
    return {
        "case": f"prepare {written / 1e9:.1f} GB of text",
        "seconds": round(seconds, 1),
        "peak_mb": round(peak / 1e6),
        "verify_seconds": round(time.monotonic() - start, 1),
        "store_gb": round(sum(p.stat().st_size for p in (folder / "data").iterdir() if p.is_file()) / 1e9, 2),
    }


def open_terabyte(folder: Path) -> Row:
    """8,192 sparse shards of the size that tst prepare writes."""
    from token_superposition.data.store import TokenStore

    sparse_store(folder / "terabyte", 8192, 2**26, linked=False)
    before, start, cpu = psutil.Process().memory_info().rss, time.perf_counter(), time.process_time()
    store = TokenStore(folder / "terabyte")
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    start = time.perf_counter()
    _ = store[2**38 : 2**38 + 4096]
    grown = psutil.Process().memory_info().rss - before
    return {
        "case": f"open {2 * len(store) / 2**40:.0f} TiB of tokens in {len(store.split.shards)} shards",
        "seconds": round(seconds, 3),
        "cpu_seconds": round(cpu, 3),
        "first_slice_ms": round(1e3 * (time.perf_counter() - start), 2),
        "grown_mb": round(grown / 1e6, 1),
    }


def train_long(folder: Path, steps: int) -> Row:
    """Resident memory over the steps, after the first quarter: slope with its 95% interval, bytes a step."""
    from scipy.stats import linregress, t

    from token_superposition.experiment.config import load_config
    from token_superposition.experiment.run import train

    prepare_text(folder)
    options = "\n".join(f"{k} = {toml(v)}" for k, v in TINY["llama"].items())
    content = CONFIG.format(architecture="llama", options=options, data=folder / "data")
    content = content.replace("steps = 12", f"steps = {steps}")  # a line of metrics each step
    (folder / "config.toml").write_text(content.replace("eval_every = 4", f"eval_every = {steps}"))
    process, seen = psutil.Process(), np.zeros(steps + 1, np.int64)  # made before, so that it does not grow itself
    start = time.monotonic()

    def look(lines: list[dict[str, Any]]) -> None:
        seen[lines[-1]["step"]] = process.memory_info().rss

    train(load_config(folder / "config.toml"), folder / "run", report=look)
    x = np.arange(steps // 4, steps + 1)
    y = seen[x]
    fit = linregress(x, y)
    half = t.ppf(0.975, len(x) - 2) * fit.stderr
    return {
        "case": f"train {steps} steps",
        "seconds": round(time.monotonic() - start, 1),
        "slope_bytes_per_step": round(fit.slope),
        "slope_low": round(fit.slope - half),
        "slope_high": round(fit.slope + half),
        "grown_mb": round(int(y[-1] - y[0]) / 1e6, 2),
    }


def reports_at_once(directory: Path, count: int) -> tuple[int, set[bytes]]:
    """``count`` processes of ``tst report`` side by side: how often the page was looked at, and all that was seen."""
    looks, pages = 0, set[bytes]()
    with ThreadPoolExecutor(count) as pool:
        running = [pool.submit(call, command, "report", str(directory)) for _ in range(count)]
        while not all(r.done() for r in running):
            pages.add((directory / "report.html").read_bytes())
            looks += 1
            time.sleep(0.01)
        failed = [r.result().stderr for r in running if r.result().returncode]
    assert not failed, failed[0]
    return looks, pages | {(directory / "report.html").read_bytes()}


def report_much(folder: Path, count: int) -> Row:
    prepare_text(folder)
    options = "\n".join(f"{k} = {toml(v)}" for k, v in TINY["llama"].items())
    (folder / "config.toml").write_text(CONFIG.format(architecture="llama", options=options, data=folder / "data"))
    done = call(command, "compare", str(folder / "config.toml"), "--out", str(folder / "out"))
    assert done.returncode == 0, done.stderr
    start = time.monotonic()
    looks, pages = reports_at_once(folder / "out", count)
    return {
        "case": f"{count} reports at once",
        "seconds": round(time.monotonic() - start, 1),
        "looks": looks,
        "cut_short": sum(not p.rstrip().endswith(b"</html>") for p in pages),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=5)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--reports", type=int, default=100)
    parser.add_argument("--only", nargs="+", default=["prepare", "open", "train", "report"])
    given = parser.parse_args()
    parts = {
        "prepare": lambda folder: prepare_much(folder, given.gigabytes),
        "open": open_terabyte,
        "train": lambda folder: train_long(folder, given.steps),
        "report": lambda folder: report_much(folder, given.reports),
    }
    for name in given.only:
        folder = Path(tempfile.mkdtemp())
        try:
            row = {"benchmark": "soak", **parts[name](folder)}
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        print(", ".join(f"{k} {v}" for k, v in row.items()), flush=True)
        append_rows([row])
    last = {row["case"]: row for row in read_rows() if row["benchmark"] == "soak"}
    write_table(
        PAGE, "python -m benchmarks.soak", [("load", "figures"), *((case, told(r)) for case, r in last.items())]
    )


def told(row: dict[str, str]) -> str:
    return ", ".join(text.format(**row) for name, text in FIGURES.items() if row.get(name))


if __name__ == "__main__":
    main()
