"""The likely mistakes and what ``tst`` and the library answer to each, as docs/mistakes.md shows them.

    python -m tests.reliability.mistakes > docs/mistakes.md

Every one is typed in a directory that holds ``config.toml`` (a run of 12 steps with bags of 4 on ``data``), ``data``
(prepared, a vocabulary of 320), ``text/`` (one document) and what else the mistake needs.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import nn

import token_superposition
from tests.conftest import CONFIG, TINY, prepare_text, tiny, toml
from token_superposition.cli import main
from token_superposition.data.plan import PlannedDataset
from token_superposition.errors import TokenSuperpositionError

PAGE = Path(__file__).parents[2] / "docs/mistakes.md"


@dataclass(frozen=True)
class Mistake:
    typed: str
    """Command line after ``tst``."""
    written: str = ""
    """Line of config.toml that is wrong: takes the place of the one with its key, or goes to the end."""
    prepare: Callable[[], object] = lambda: None
    """Makes what is wrong with the files."""
    what: str = ""
    """What is wrong, where neither shows it."""
    environment: dict[str, str] = field(default_factory=dict[str, str])
    without: str = ""
    """A package that is not installed."""
    others: bool = False
    """What stands in parentheses are another library's words, which change with its version."""


def train(written: str, what: str = "") -> Mistake:
    return Mistake("train config.toml", written, what=what)


def cut(path: str, length: int) -> Callable[[], object]:
    return lambda: os.truncate(path, length)


def write(path: str, content: str | bytes) -> Callable[[], object]:
    def do() -> None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_bytes(content.encode() if isinstance(content, str) else content)

    return do


def parquet() -> None:
    pq.write_table(pa.table({"body": ["x"], "id": [1]}), "pages.parquet")


def started(content: str) -> Callable[[], object]:
    """A run that was begun with another configuration."""
    return lambda: (Path("run").mkdir(), Path("run/config.toml").write_text(content))


MISTAKES: dict[str, list[Mistake]] = {
    "Commands and flags": [
        Mistake("trian config.toml"),
        Mistake("train config.toml --train.stepz 3"),
        Mistake("train config.toml --train.compile=true"),
        Mistake("train config.toml --train.steps many"),
        Mistake("train config.toml --train.steps 1.5"),
        Mistake("train config.toml --train.learning-rate fast"),
        Mistake("train config.toml --superposition.sides up"),
        Mistake("train config.toml --superposition.anneal 8 x"),
        Mistake("train config.toml other.toml"),
        Mistake("train missing.toml"),
        Mistake("plan 600n"),
        Mistake("generate run/model"),
        Mistake("report"),
    ],
    "The configuration file": [
        train("stepps = 3"),
        train("[superpositon]"),
        train("steps == 3"),
        train('batch_size = "many"'),
        train("bag_size = 2.5"),
        train("steps = true"),
        train("steps = [12]"),
        train('optimizer = "adam"'),
        Mistake("train config.toml", prepare=write("config.toml", "[train]\nsteps = 1 # \xe9".encode("latin-1")),
                what="it is not UTF-8"),
        Mistake("train text", what="a folder"),
    ],
    "Bags and schedule": [
        train("bag_size = 0"),
        train("ratio = 1.5"),
        train("ratio = -0.1"),
        train("ratio = nan"),
        train("steps = 0"),
        train("steps = -5"),
        train("warmup_steps = 50"),
        train("decay_ratio = 2.0"),
        Mistake("train config.toml --superposition.weighting linear"),
        Mistake("train config.toml --superposition.mixture 0.5"),
        Mistake("train config.toml --superposition.anneal 4 2 --superposition.mixture 2"),
        Mistake("train config.toml --superposition.anneal 4 0"),
        Mistake("train config.toml --superposition.loss sum-to-one --superposition.weighting power"),
        Mistake("train config.toml --superposition.place-signal 2"),
        Mistake("train config.toml --superposition.mtp-heads 16"),
    ],
    "Batches and optimizer": [
        train("batch_size = 0"),
        Mistake("train config.toml --train.micro-batch-size 3"),
        Mistake("train config.toml", environment={"WORLD_SIZE": "3"}, what="launched with 3 processes"),
        train("learning_rate = 0"),
        train("learning_rate = nan"),
        Mistake("train config.toml --train.weight-decay -1"),
        Mistake("train config.toml --train.beta2 1.0"),
        Mistake("train config.toml --train.max-grad-norm -1"),
        train("log_every = 0"),
        train("save_every = -1"),
        Mistake("train config.toml --train.save-at 6 99"),
        Mistake("train config.toml --train.seed -1"),
    ],
    "The model": [
        train('architecture = "lama"'),
        train("hidden_sise = 64"),
        Mistake("train config.toml", "hidden_size = 31", what="with 2 heads", others=True),
        Mistake("train config.toml --model.path nowhere", others=True),
        Mistake("train config.toml --model.path small",
                prepare=lambda: tiny("llama", vocab_size=64).save_pretrained("small"),
                what="a model with the tokenizer of other data"),
        Mistake("generate nowhere hello", others=True),
        Mistake("generate text hello", what="a folder without a model", others=True),
        Mistake("generate run/model hello --max-new-tokens 0"),
        Mistake("generate run/model hello --temperature -1"),
        Mistake("generate run/model hello --temperature nan"),
        Mistake("generate run/model hello --seed -1"),
    ],
    "Data to train on": [
        train('path = "nowhere"'),
        train('path = "text"', "text that is not prepared"),
        train("sequence_length = 1"),
        train("sequence_length = 100000"),
        Mistake("train config.toml --superposition.bag-size 1 --train.steps 3 --train.batch-size 1",
                "sequence_length = 3500",
                what="the held-out text is shorter"),
        Mistake("train config.toml --data.eval-tokens 0"),
        Mistake("train config.toml", prepare=cut("data/meta.json", 100), what="half of `data/meta.json`"),
        Mistake("train config.toml", prepare=cut("data/train-00000.npy", 999), what="half of `data/train-00000.npy`"),
        Mistake("train config.toml", prepare=write("data/tokenizer/tokenizer.json", "{}"),
                what="another `data/tokenizer`"),
        Mistake("verify nowhere"),
        Mistake("verify text", what="a folder that holds neither data nor a run"),
    ],
    "Text to prepare": [
        Mistake("prepare --out new"),
        Mistake("prepare notes --out new"),
        Mistake("prepare 'notes/*.txt' --out new", what="no such file"),
        Mistake("prepare empty --out new", prepare=lambda: Path("empty").mkdir(), what="a folder without text"),
        Mistake("prepare text --out data", what="`data` is there"),
        Mistake("prepare text --out new", what="one document"),
        Mistake("prepare text --out new --vocab-size 100"),
        Mistake("prepare text --out new --validation-share 1"),
        Mistake("prepare text --out new --max-bytes 0"),
        Mistake("prepare text --out new --seed 18446744073709551616"),
        Mistake("prepare text --out new --tokenizer gpt5", others=True),
        Mistake("prepare pages.tar.gz --out new", prepare=write("pages.tar.gz", b"\x1f\x8b")),
        Mistake("prepare pages.parquet --out new", prepare=parquet),
        Mistake("prepare text.parquet --out new", prepare=write("text.parquet", "text"),
                what="no Parquet", others=True),
        Mistake("prepare /dev/stdin --out new", what="a pipe"),
        Mistake("prepare hf:allenai/c4 --out new", without="datasets", what="`datasets` is not installed"),
    ],
    "Directories of runs": [
        Mistake("train config.toml", prepare=write("run/run.json", "{}"), what="`run` holds a finished run"),
        Mistake("train config.toml --train.learning-rate 1", prepare=started, what="`run` was begun with 3e-3"),
        Mistake("report text", what="a folder without a comparison"),
        Mistake("compare config.toml --compare.seeds 0 -1"),
        Mistake("compare config.toml --compare.seeds 0 0"),
        Mistake("compare config.toml --compare.seeds 4294967296"),
        Mistake("compare config.toml --compare.parallel -3"),
        Mistake("eval run/model --data data --out nowhere/eval.json"),
        Mistake("eval run/model --data data --limit 5"),
        Mistake("eval run/model --tasks arc_easy --max-tokens 100"),
        Mistake("compare config.toml --out config.toml", what="the output is a file"),
        Mistake("compare config.toml --out ."),
        Mistake("sweep config.toml --sweep.bag-sizes 2 4 --out ."),
        Mistake("train config.toml --out ."),
        Mistake("compare config.toml --train.save-at 6"),
        Mistake("compare config.toml --compare.baseline-lengths 0"),
        Mistake("compare config.toml --compare.seeds 0,1"),
        Mistake("compare config.toml --superposition.ratio 0"),
        Mistake("compare config.toml", "[[compare.variants]]\nname = 'cost in $'"),
        Mistake("compare config.toml --out done", prepare=write("done/sweep.json", "{}"), what="it holds a sweep"),
        Mistake("sweep config.toml --sweep.bag-sizes 2 4 --out done", prepare=write("done/summary.json", "{}"),
                what="it holds a comparison"),
        Mistake("sweep config.toml --sweep.bag-sizes 2 4 --out begun", prepare=write("begun/runs/baseline/log.txt", ""),
                what="it holds a comparison that was interrupted"),
        Mistake("train config.toml --out done", prepare=write("done/runs/tst/config.toml", ""),
                what="it holds a comparison"),
        Mistake("train config.toml --compare.seeds 0 1"),
        Mistake("compare config.toml --sweep.bag-sizes 2 4"),
        Mistake("compare config.toml --compare.seeds 0 1 --train.seed 7"),
        Mistake("sweep config.toml --sweep.bag-sizes 2 4 --compare.baseline-lengths 1 2"),
        Mistake("compare config.toml", "[[compare.variants]]\nname = 'tst'"),
        Mistake("compare config.toml", "[[compare.variants]]\nname = 'baseline-ema'"),
        Mistake("compare config.toml --data.path nowhere"),
        Mistake("sweep config.toml --sweep.bag-sizes 2 4 --sweep.keep 0"),
        Mistake("sweep config.toml --sweep.bag-sizes 2 0"),
        Mistake("sweep config.toml --sweep.ratios 0.3 1.5"),
        Mistake("sweep config.toml --sweep.bag-sizes 2 4 --compare.seeds 0 1 --sweep.selection-seeds 5"),
        Mistake("plan config.toml --gpus 0"),
        Mistake("demo --minutes -1"),
    ],
}  # fmt: skip


LIBRARY = [
    "fold(np.arange(20), 4, 4)",
    "fold(tokens[:30], 4, 4)",
    "fold(tokens, schedule.at(0))",
    "superpose(model)",
    "superpose(model, model.lm_head)",
    "superpose(model, model.wte.weight)",
    "superpose(model, model.wte, input_weighting='linear')",
    "bag_embedding(model.wte, bags.to(torch.uint16))",
    "linear_multi_hot_cross_entropy(hidden, model.lm_head, bags)",
    "linear_multi_hot_cross_entropy(hidden, model.lm_head.weight, bags.flatten(1))",
    "linear_multi_hot_cross_entropy(hidden, model.lm_head.weight, bags, 'exponential')",
    "linear_multi_hot_cross_entropy(hidden, model.lm_head.weight, bags, place_weights('exponential', 2))",
    "multi_hot_cross_entropy(model.lm_head(hidden), bags.to(torch.uint16))",
    "Schedule.two_phase(100, 4, 30)",
    "PlannedDataset(tokens, 8, 4, schedule)",
    "PlannedDataset(tokens.view(8, -1), schedule, 8, 4)",
    "PlannedDataset(tokens[:30], schedule, 8, 4)",
]
"""Typed where the other names are what they should be."""


def library_answers() -> Iterator[tuple[str, str]]:
    """Each of ``LIBRARY`` with the message of the error."""
    layers = {"wte": nn.Embedding(50, 8), "wpe": nn.Embedding(8, 8), "lm_head": nn.Linear(8, 50, bias=False)}
    model = nn.Module()
    for name, layer in layers.items():
        model.add_module(name, layer)
    known = {name: getattr(token_superposition, name) for name in token_superposition.__all__} | {
        "np": np,
        "torch": torch,
        "PlannedDataset": PlannedDataset,
        "tokens": torch.arange(1000) % 50,
        "schedule": token_superposition.Schedule.two_phase(100, 4, 0.3),
        "bags": torch.zeros(2, 8, 4, dtype=torch.long),
        "hidden": torch.zeros(2, 8, 8),
        "model": model,
    }
    for code in LIBRARY:
        try:
            eval(code, dict(known))
        except TokenSuperpositionError as e:
            yield code, str(e)
        else:
            raise AssertionError(f"{code} raised no error")


def answers(data: Path) -> Iterator[tuple[str, Mistake, str, int]]:
    """Group, mistake, all that was printed on stderr, and the exit status; ``data`` is prepared text."""
    options = "\n".join(f"{k} = {toml(v)}" for k, v in TINY["llama"].items())
    content = CONFIG.format(architecture="llama", options=options, data="data")
    for group, mistakes in MISTAKES.items():
        for mistake in mistakes:
            with tempfile.TemporaryDirectory() as directory, contextlib.chdir(directory):
                shutil.copytree(data, "data")
                Path("text").mkdir()
                Path("text/one.txt").write_text("one document")
                Path("config.toml").write_text(changed(content, mistake.written))
                if mistake.prepare is started:
                    started(content)()
                else:
                    mistake.prepare()
                before = sorted(Path().rglob("*"))
                error, status = answer(mistake)
                after = [p for p in sorted(Path().rglob("*")) if not p.name.endswith(".lock")]
                assert after == before, f"tst {mistake.typed} wrote {set(after) - set(before)}"
            yield group, mistake, error, status


def answer(mistake: Mistake) -> tuple[str, int]:
    error = io.StringIO()
    environment, module = dict(os.environ), sys.modules.get(mistake.without)
    os.environ.update(mistake.environment)
    if mistake.without:
        sys.modules[mistake.without] = None  # pyright: ignore
    try:
        with contextlib.redirect_stderr(error), contextlib.redirect_stdout(io.StringIO()):
            status = main(shlex.split(mistake.typed))
    finally:
        os.environ.clear()
        os.environ.update(environment)
        if mistake.without:
            sys.modules.pop(mistake.without)
            if module is not None:
                sys.modules[mistake.without] = module
    return error.getvalue(), status


def changed(content: str, written: str) -> str:
    """The configuration with one line in the place of that with the same key, or at the end."""
    key = re.match(r"\w+ =", written)
    old = key and re.search(rf"^{key[0].rstrip(' =')} =.*$", content, re.M)
    if old:
        return content.replace(old[0], written)
    if written == "hidden_sise = 64":
        return content.replace("hidden_size = 32", written)
    return content + written + "\n"


def page(found: list[tuple[str, Mistake, str, int]], library: list[tuple[str, str]]) -> str:
    """docs/mistakes.md"""
    lines = [
        "# What goes wrong, and what is said",
        "",
        f"The {len(found)} likeliest mistakes with `tst`. Each is answered in one line that names the value, the limit",
        "and the way out, with exit status 2, before anything is computed or written. A test holds this page, which",
        "`python -m tests.reliability.mistakes` writes, to what the program says.",
    ]
    group = ""
    for name, mistake, error, _ in found:
        if name != group:
            lines += ["", f"## {name}", "", "| mistake | answer |", "|---|---|"]
            group = name
        said = error.strip().removeprefix("tst: error: ").replace("|", "\\|")
        lines.append(f"| {cell(mistake)} | {re.sub(r'[(].*[)]', '(...)', said) if mistake.others else said} |")
    lines += [
        "",
        "## In a training loop of your own",
        "",
        "The library raises `TokenSuperpositionError`, a `ValueError`. `tokens` is a stream of ids, `schedule` has",
        "100 steps, 30 of them with bags of 4, `bags` has shape (B, L, 4), `hidden` (B, L, d), and `model` has the",
        "modules `wte`, `wpe` and `lm_head`. Three things the library cannot see: a model that was never given to",
        "`superpose` fails in torch at its first bags, one that still gets bags after the switch trains on them, and",
        "the stock `Trainer` fails on a plan, whose samples it shuffles and cannot stack.",
        "",
        "| mistake | answer |",
        "|---|---|",
        *(f"| `{code}` | {said} |" for code, said in library),
    ]
    return "\n".join(lines) + "\n"


def cell(mistake: Mistake) -> str:
    written = f"`{mistake.written}`".replace("\n", "` `") if mistake.written else ""
    shown = written if mistake.typed == "train config.toml" and written else f"`tst {mistake.typed}`"
    extra = "; ".join(x for x in ((written if shown != written else ""), mistake.what) if x)
    return f"{shown}{f' ({extra})' if extra else ''}"


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        prepare_text(Path(folder))
        print(page(list(answers(Path(folder) / "data")), list(library_answers())), end="")
