"""What importing the library adds to importing torch: ``python -m benchmarks.bench_import``.

Fresh interpreters in turn, one that imports torch and one that imports torch and every public name of the package.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

from benchmarks.measure import append_rows

ROUNDS = 9
CONTENDERS = {
    "torch": "import torch",
    "torch and token_superposition": "import torch; from token_superposition import *",
}


def main() -> None:
    seconds: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    for r in range(ROUNDS + 1):
        for name in sorted(CONTENDERS, reverse=r % 2 == 1):
            start = time.perf_counter()
            subprocess.run([sys.executable, "-c", CONTENDERS[name]], check=True)
            if r:  # the first round reads the files from the disk
                seconds[name].append(time.perf_counter() - start)
    ratio = statistics.median(b / a for a, b in zip(*seconds.values(), strict=True))
    rows: list[dict[str, object]] = [
        {
            "benchmark": "import",
            "contender": name,
            "median_ms": round(1e3 * statistics.median(s), 1),
            "min_ms": round(1e3 * min(s), 1),
            "max_ms": round(1e3 * max(s), 1),
        }
        for name, s in seconds.items()
    ]
    for row in rows:
        print(", ".join(f"{k} {v}" for k, v in row.items()))
    print(f"median ratio of a round: {ratio:.3f}")
    append_rows(rows)


if __name__ == "__main__":
    main()
