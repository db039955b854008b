"""Where a difference is: ``python -m results.copying COMPARISON DATA NAME``.

DATA is the token store of COMPARISON. Writes results/NAME/copying.csv: for every run the mean loss, in nats per token,
over the held-out tokens whose pair with the token before has occurred earlier in the same window (kind repeated), so
that they can be copied from there, and over the others (kind new), with the number of tokens of each.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from rich.progress import track
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader

from results.kept import write_rows
from token_superposition.data.plan import ValidationSet
from token_superposition.data.store import TokenStore
from token_superposition.experiment.generate import load_model

KINDS = ("new", "repeated")


def repeated_pairs(ids: Tensor, targets: Tensor) -> Tensor:  # (B, L), (B, L) -> (B, L) bool
    """Whether the pair of a token and its target is also one of an earlier place of its row.

    >>> repeated_pairs(torch.tensor([[5, 7, 5, 7]]), torch.tensor([[7, 5, 7, 9]])).tolist()
    [[False, False, True, False]]
    """
    pairs = ids * (int(targets.max()) + 1) + targets
    return (pairs.unsqueeze(2) == pairs.unsqueeze(1)).tril(-1).any(2)


@torch.no_grad()
def losses(directory: Path, data: ValidationSet) -> dict[str, tuple[int, float]]:
    """Number of tokens and mean loss by kind, of the model in ``directory``."""
    model, _ = load_model(directory)
    counts, sums = torch.zeros(2, dtype=torch.long), torch.zeros(2, dtype=torch.float64)
    for batch in DataLoader(data, batch_size=32):
        ids, targets = (batch[k].to(model.device) for k in ("input_ids", "shift_labels"))
        loss = F.cross_entropy(model(input_ids=ids).logits.flatten(0, 1), targets.flatten(), reduction="none")
        kind = repeated_pairs(ids, targets).flatten().long()
        counts += kind.bincount(minlength=2).cpu()
        sums += kind.bincount(loss.double(), minlength=2).cpu()
    return {k: (int(n), float(s) / max(int(n), 1)) for k, n, s in zip(KINDS, counts, sums, strict=True)}


def main(comparison: Path, store: Path, out: Path) -> None:
    summary = json.loads((comparison / "summary.json").read_text())
    config = summary["config"]["data"]
    data = ValidationSet(TokenStore(store, "validation"), config["sequence_length"], config["final_eval_tokens"])
    lines = [
        (run["name"], run["seed"], kind, tokens, round(loss, 5))
        for run in track(summary["runs"], "models")
        for kind, (tokens, loss) in losses(comparison / "runs" / run["directory"] / "model", data).items()
    ]
    write_rows(out / "copying.csv", ("name", "seed", "kind", "tokens", "loss"), lines)


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    if not (Path(__file__).parent / sys.argv[-1]).is_dir():
        sys.exit(f"results has no folder {sys.argv[-1]}; collect it first (python -m results.collect)")
    main(Path(sys.argv[1]), Path(sys.argv[2]), Path(__file__).parent / sys.argv[3])
