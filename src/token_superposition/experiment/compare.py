"""Baseline and variants at equal compute: same model, data, learning rate and number of steps, paired by seed.

Further lengths, of the baseline or of a variant, are there to count what a way of training is worth in steps.
"""

from __future__ import annotations

import math
import shutil
import warnings
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from token_superposition.data.store import Meta, TokenStore
from token_superposition.errors import TokenSuperpositionError, first_line
from token_superposition.experiment.config import Config, Variant, load_written, save_config
from token_superposition.experiment.files import CONFIG, MODEL, SUMMARY, SWEEP, write_json
from token_superposition.experiment.generate import generate, load_model
from token_superposition.experiment.jobs import Job, alone, check_directory, check_jobs, run_jobs
from token_superposition.experiment.summary import Run, comparison, load_runs
from token_superposition.experiment.superposition import BASELINE


def jobs_of(config: Config, out: Path | None = None) -> list[Job]:
    """The runs of a comparison, those that others branch off first.

    Without seeds a run has a directory without one. Either way, one that is in ``out`` already stays its own.
    """
    wanted = config.compare
    variants = (Variant("tst", config.superposition), *wanted.variants)
    config = alone(config)  # a run knows nothing of the others, so that a comparison of more finds it done
    lengths = sorted({1.0, *wanted.baseline_lengths}, reverse=True)
    jobs: list[Job] = []
    for seed in wanted.seeds or (config.train.seed,):

        def place(name: str, seed: int = seed) -> str:
            seeded = f"{name}-seed{seed}"
            if out is None:
                return seeded if wanted.seeds else name
            without, with_seed = (_seed_of(out / "runs" / x / CONFIG) == seed for x in (name, seeded))
            return seeded if with_seed or (wanted.seeds and not without) else name

        seeded = replace(config, train=replace(config.train, seed=seed))
        baselines: list[Job] = []
        for length in lengths:
            steps = round(length * config.train.steps)
            name = "baseline" if length == 1 else f"baseline-x{length:g}"
            run = replace(seeded, superposition=BASELINE, train=replace(seeded.train, steps=steps))
            baselines.append(Job(name, place(name), run, baselines[0].directory if baselines else None))
        save_at = tuple(b.branch_step for b in baselines[1:] if b.branch_step)
        longest = baselines[0]
        trunk = replace(longest.config, train=replace(longest.config.train, save_at=save_at))
        jobs += [replace(longest, config=trunk), *baselines[1:]]
        for v in variants:
            of_variant = replace(seeded.train, steps=v.steps(config.train.steps), **v.rates)
            jobs.append(Job(v.name, place(v.name), replace(seeded, superposition=v.superposition, train=of_variant)))
    return sorted(jobs, key=lambda j: j.trunk is not None)


def _seed_of(path: Path) -> int | None:
    return load_written(path).train.seed if path.exists() else None


def checked_jobs(config: Config, out: Path) -> list[Job]:
    """Raises ``TokenSuperpositionError`` for what cannot be trained, or not into ``out``."""
    config.check()
    Meta.load(Path(config.data.path))
    if (out / SWEEP).exists() or any(out.glob("runs/baseline-lr*")):
        raise TokenSuperpositionError(f"{out} holds a sweep; choose another --out for the comparison")
    for v in (Variant("tst", config.superposition), *config.compare.variants):
        s, steps = v.superposition, v.steps(config.train.steps)
        own = s.trained_heads or replace(config.train, **v.rates) != config.train
        if v.length == 1 and not any(p.is_superposed for p in s.schedule(steps).phases) and not own:
            raise TokenSuperpositionError(
                f"{v.name} superposes none of its {steps} steps (bag_size {s.bag_size}, ratio {s.ratio:g}): it would "
                "be the baseline again; give a bag_size of at least 2 and a ratio of at least one step"
            )
    check_directory(config, out)
    jobs = jobs_of(config, out)
    check_jobs(jobs, out)
    return jobs


def compare(config: Config, out: str | Path, console: Console, note: str | None = None) -> list[Run]:
    """Run what is not done yet, side by side where that is faster, and write ``summary.json``.

    Runs are resumed and finished ones kept, if their configuration is the same. ``note`` is shown in the report.
    Raises ``TokenSuperpositionError`` before any run for a configuration that cannot be trained.
    """
    out = Path(out)
    jobs = checked_jobs(config, out)
    out.mkdir(parents=True, exist_ok=True)
    save_config(config, out / CONFIG)
    run_jobs(jobs, out, config.compare.parallel, console)
    jobs.sort(key=lambda job: job.name.startswith("baseline-"))  # what is compared first, then the other lengths
    jobs.sort(key=lambda job: job.name != "baseline")
    runs = load_runs(out, [(job.name, job.directory) for job in jobs])
    write_summary(config, out, runs, note)
    for job in jobs:  # finished: only the models are of use
        shutil.rmtree(out / "runs" / job.directory / "checkpoints", ignore_errors=True)
    return runs


def write_summary(config: Config, out: Path, runs: list[Run], note: str | None = None) -> None:
    meta = Meta.load(Path(config.data.path))
    write_json(
        out / SUMMARY,
        {
            "format": 1,
            "runs": [asdict(r) for r in runs],
            "comparison": comparison(runs),
            "config": asdict(config),
            "data": {
                split: {
                    "tokens": s.tokens,
                    "documents": s.documents,
                    "bytes": s.bytes,
                    "bytes_per_token": s.bytes_per_token,
                }
                for split, s in (("train", meta.train), ("validation", meta.validation))
            }
            | {"vocab_size": meta.vocab_size},
            "samples": samples(config, out, runs),
            "note": note,
        },
    )


def samples(config: Config, out: Path, runs: list[Run], prompt_tokens: int = 24) -> list[dict[str, str]]:
    """What the baseline and each variant of the first seed make of the start of the held-out text."""
    length = config.data.sequence_length
    prompt_ids = TokenStore(config.data.path, "validation")[: min(prompt_tokens, length // 2)].tolist()
    result: list[dict[str, str]] = []
    for run in runs:
        directory = out / "runs" / run.directory / MODEL
        whole = directory.is_dir() and math.isfinite(run.val_loss)  # else it diverged, or was removed
        if whole and run.seed == runs[0].seed and not run.name.startswith("baseline-"):
            try:
                result.append({"name": run.name, **continued(directory, prompt_ids, length)})
            except Exception as e:  # of what the model's own code raises; the figures do not depend on it
                why = f"no text comes of its model ({first_line(e)})"
                warnings.warn(f"there is no sample of {run.directory}: {why}", stacklevel=1)
    return result


def continued(model: Path, prompt_ids: list[int], length: int) -> dict[str, str]:
    loaded, tokenizer = load_model(model)
    prompt, read = prompt_of(prompt_ids, tokenizer, length)
    text = generate(loaded, tokenizer, prompt, max_new_tokens=max(min(64, length - read), 1))
    return {"prompt": prompt, "text": text}


def prompt_of(ids: list[int], tokenizer: Any, length: int) -> tuple[str, int]:
    """The text of ``ids``, or of their beginning, and the number of its tokens, less than ``length``.

    Read again, a text has not always the same tokens, nor as many: a byte that is no character becomes a longer one.
    """
    while ids:
        text = str(tokenizer.decode(ids))
        if (read := len(tokenizer(text, add_special_tokens=False)["input_ids"])) < length:
            return text, read
        ids = ids[: len(ids) // 2]
    return "", 1  # the token that begins a document
