"""How well models know random strings that their text repeated: ``python -m results.memorisation COMPARISON NAME``.

The data of COMPARISON were prepared from what ``python -m results.corpora strings`` writes. Writes
results/NAME/strings.csv: for every run and number of repetitions in the text the mean loss of the strings' tokens, nats
per token, after their first 8 characters. 0 repetitions are strings of the same kind that are in no text: what the
loss is below that was memorised.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path
from statistics import mean

import torch
from torch.nn import functional as F

from results.corpora import random_strings
from results.kept import write_rows
from token_superposition.experiment.generate import load_model

KNOWN = 8  # characters that are given


@torch.no_grad()
def losses(directory: Path, strings: dict[str, int]) -> dict[int, float]:
    """Mean loss by repetitions of the model in ``directory``."""
    model, tokenizer = load_model(directory)
    found: dict[int, list[float]] = defaultdict(list)
    for string, times in strings.items():
        given = tokenizer(string[:KNOWN], add_special_tokens=False)["input_ids"]
        rest = tokenizer(string[KNOWN:], add_special_tokens=False)["input_ids"]
        ids = torch.tensor([[*given, *rest]])
        logits = model(input_ids=ids).logits[0, len(given) - 1 : -1]
        found[times].append(float(F.cross_entropy(logits, ids[0, len(given) :])))
    return {times: mean(values) for times, values in sorted(found.items())}


def main(comparison: Path, out: Path) -> None:
    strings = random_strings()
    summary = json.loads((comparison / "summary.json").read_text())
    lines = [
        (run["name"], run["seed"], times, round(loss, 5))
        for run in summary["runs"]
        for times, loss in losses(comparison / "runs" / run["directory"] / "model", strings).items()
    ]
    write_rows(out / "strings.csv", ("name", "seed", "repetitions", "loss"), lines)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    if not (Path(__file__).parent / sys.argv[-1]).is_dir():
        sys.exit(f"results has no folder {sys.argv[-1]}; collect it first (python -m results.collect)")
    main(Path(sys.argv[1]), Path(__file__).parent / sys.argv[2])
