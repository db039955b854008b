"""Keep a finished comparison or sweep: ``python -m results.collect DIRECTORY NAME QUESTION TEXT``.

    python -m results.collect proof proof-cpu "Does TST win on two cores?" "python, 2,048 tokens"

Writes results/NAME: config.toml (``tst compare results/NAME/config.toml`` does it again), summary.json without the
samples of text, curves.csv with every logged loss (of a sweep: sweep.json and sweep.csv), and about.toml with the
question, the text, the command and the commit; a ``note`` added there by hand, such as what is to be mistrusted, stands
below the table on the page. Collected again, a folder keeps what was added to about.toml, and loses copying.csv and
strings.csv, which are of the runs before.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Generator
from pathlib import Path
from typing import Any

import tomli_w

from results.kept import write_rows
from token_superposition.experiment.files import CONFIG, SWEEP
from token_superposition.experiment.sweep import TABLE
from token_superposition.experiment.tree import without_none
from token_superposition.report.page import is_sweep

HERE = Path(__file__).parent
COLUMNS = ("step", "input_bag", "output_bag", "raw_tokens", "seconds", "loss", "val_loss")


def collect(directory: Path, name: str, question: str, text: str, into: Path = HERE) -> Path:
    """Returns the new folder, which appears when it is whole."""
    partial = into / f".{name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    if is_sweep(directory):
        for file in (CONFIG, SWEEP, TABLE):
            shutil.copyfile(directory / file, partial / file)
    else:
        summary: dict[str, Any] = json.loads((directory / "summary.json").read_text())
        summary.pop("samples")
        # Of what the summary is of: config.toml may be that of a larger one, which was interrupted.
        (partial / CONFIG).write_text(tomli_w.dumps(without_none(summary["config"])))
        (partial / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
        write_rows(partial / "curves.csv", ("name", "seed", *COLUMNS), curves(directory, summary["runs"]))
    command = f"tst {'sweep' if is_sweep(directory) else 'compare'} results/{name}/config.toml --out {name}"
    before = into / name / "about.toml"
    added = tomllib.loads(before.read_text()) if before.exists() else {}
    about = added | {"question": question, "text": text, "command": command} | commit()
    (partial / "about.toml").write_text(tomli_w.dumps(about))
    shutil.rmtree(into / name, ignore_errors=True)
    return partial.rename(into / name)


def commit() -> dict[str, str]:
    """Of this repository, since a command may read its text otherwise, or not run, with another version."""
    found = subprocess.run(("git", "rev-parse", "--short", "HEAD"), cwd=HERE, capture_output=True, text=True)
    return {"commit": found.stdout.strip()} if found.returncode == 0 else {}


def curves(comparison: Path, runs: list[dict[str, Any]]) -> Generator[tuple[object, ...]]:
    """Rows of all runs: name, seed, step, bags, raw tokens, seconds, and training or validation loss."""
    for run in runs:
        for line in (comparison / "runs" / run["directory"] / "metrics.jsonl").read_text().splitlines():
            content = json.loads(line)
            rounded = {k: round(v, 5) if k.endswith("loss") else v for k, v in content.items()}
            yield run["name"], run["seed"], *(rounded.get(c, "") for c in COLUMNS)


if __name__ == "__main__":
    if len(sys.argv) != 5:
        sys.exit(__doc__)
    print(collect(Path(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4]))
