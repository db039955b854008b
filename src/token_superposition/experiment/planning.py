"""``tst plan``: what a run costs, what the paper's results say about it, and what to change before it is started."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from token_superposition.data.store import Meta
from token_superposition.errors import TokenSuperpositionError, require_int
from token_superposition.experiment.budget import (
    GPUS,
    USABLE,
    Cost,
    GpuType,
    Memory,
    Shape,
    cost_of,
    memory_of,
    micro_batch_of,
    shape_of,
)
from token_superposition.experiment.config import Config, load_preset
from token_superposition.experiment.published import (
    Cell,
    PublishedRun,
    baseline_hours,
    nearest_runs,
    nearest_table,
    outside,
)
from token_superposition.experiment.superposition import BASELINE, UNREAD

LLAMA3_VOCAB = 128_256
OPTIMISTIC = 1.5  # times the paper's own utilisation
SAME_SIZE = 0.1  # a published run of a size within this share tells at what utilisation the paper trained the model


@dataclass(frozen=True)
class Published:
    """What the paper's tables favour for a run like this one."""

    table: str
    """Model, steps and weighting of the table nearest in size, then in length."""
    baseline_loss: float
    best: Cell
    frugal: Cell
    """Reads the least text among the runs about as good as the best."""
    within_data: Cell | None
    """The best that reads no more than the tokens available; None if there are none or no number was given."""
    bag_size: int
    """This run's, the largest."""
    ratio: float
    """This run's share of superposed steps."""
    gain: float | None
    """The table's gain at this run's s and r, interpolated; None outside of the table."""
    outside: dict[str, float]
    """By what factor the run lies outside of the published range; empty inside."""
    runs: list[PublishedRun]
    """The paper's main runs of the nearest model."""
    run_gains: list[float | None]
    """Their gain over the baseline of as many steps, nats; None without such a baseline."""
    baseline_hours: list[tuple[float, float | None] | None]
    """B200-hours between which the baseline comes down to their loss: see ``published.baseline_hours``."""
    mfu: list[float | None]
    """Utilisation of B200s which their hours mean by our formula for the paper's model, where this one has its size."""


@dataclass(frozen=True)
class Plan:
    """Everything that ``tst plan`` prints."""

    vocab_size: int
    vocab_source: str
    shape: Shape
    latent_tokens_per_step: int
    flops_per_step: float
    run: Cost
    baseline: Cost
    """The same run without superposition."""
    gpus: int
    gpu_type: GpuType
    mfu: float
    micro_batch: int
    memory: Memory
    memory_limit: int
    """Bytes of a GPU that can be used."""
    checkpoint_bytes: int
    checkpoints: int
    """That stay until the end."""
    baseline_checkpoints: int
    tokens_available: int | None
    published: Published
    warnings: list[str]
    """What does not fit, and what to change."""
    advice: list[str]
    """Where the data would repeat: what reads no more than there is."""


def plan(
    config: Config,
    *,
    gpus: int = 8,
    gpu_type: GpuType = "H100",
    mfu: float = 0.4,
    tokens_available: int | None = None,
    vocab_size: int | None = None,
) -> Plan:
    """Plan a run. Vocabulary and tokens come from the prepared data where there is some and nothing else is said.

    Raises ``TokenSuperpositionError`` for a configuration that cannot be trained anywhere; what does not fit these
    GPUs or this much data is in ``warnings``.
    """
    replace(config, train=replace(config.train, compile=False)).check()  # the compiler is another machine's
    require_int("gpus", gpus, 1)
    if not 0 < mfu <= 1:
        raise TokenSuperpositionError(f"mfu is {mfu}; give the share of the GPU's peak that is used, such as 0.4")
    source = "given"
    directory = Path(config.data.path)
    if (directory / "meta.json").exists():
        meta = Meta.load(directory)
        tokens_available = meta.train.tokens if tokens_available is None else tokens_available
        if vocab_size is None:
            vocab_size, source = meta.vocab_size, f"of {directory}"
    if vocab_size is None:
        vocab_size, source = LLAMA3_VOCAB, f"Llama 3's; no data in {directory}/"
    for name, value in (("vocab-size", vocab_size), ("tokens-available", tokens_available)):
        if value is not None:
            require_int(name, value, 1)

    if config.model.path is not None:
        source = f"of {config.model.path}"
    shape = shape_of(config, vocab_size)
    length, micro = config.data.sequence_length, micro_batch_of(config, gpus)
    run = cost_of(config, shape, gpus, gpu_type, mfu)
    baseline = cost_of(replace(config, superposition=BASELINE), shape, gpus, gpu_type, mfu)
    memory = memory_of(shape, gpus, micro * length)
    limit = int(USABLE * GPUS[gpu_type].memory)
    published = _published(config, shape, run, tokens_available)
    per_step = config.train.batch_size * length
    return Plan(
        vocab_size=shape.vocab_size,
        vocab_source=source,
        shape=shape,
        latent_tokens_per_step=per_step,
        flops_per_step=float(shape.flops_per_token(length, config.superposition.trained_heads)) * per_step,
        run=run,
        baseline=baseline,
        gpus=gpus,
        gpu_type=gpu_type,
        mfu=mfu,
        micro_batch=micro,
        memory=memory,
        memory_limit=limit,
        checkpoint_bytes=shape.checkpoint_bytes,
        checkpoints=_checkpoints(config),
        baseline_checkpoints=_checkpoints(replace(config, superposition=BASELINE)),
        tokens_available=tokens_available,
        published=published,
        warnings=[
            *_batch_warnings(config, gpus, micro),
            *_memory_warnings(config, shape, gpus, gpu_type, micro, limit),
            *_data_warnings(run, tokens_available),
            *_speed_warnings(run, mfu, gpu_type, published),
            *_range_warnings(config, published),
        ],
        advice=_advice(config, run, per_step, tokens_available, published),
    )


def _checkpoints(config: Config) -> int:
    steps, every, keep = config.train.steps, config.train.save_every, config.train.keep
    kept = {step for step in config.kept_steps if step <= steps}
    ordinary = -(-steps // every) - sum(s == steps or s % every == 0 for s in kept) if every else 0  # one at the end
    return len(kept) + (min(ordinary, keep) if keep else ordinary)


def _published(config: Config, shape: Shape, run: Cost, tokens_available: int | None) -> Published:
    wanted = config.superposition
    table = nearest_table(shape.body_parameters, run.steps, wanted.weighting)
    best = table.best()
    assert best is not None
    runs = nearest_runs(shape.body_parameters, shape.experts_per_token > 0)
    same_size = abs(shape.body_parameters / runs[0].body_parameters - 1) < SAME_SIZE
    baselines = {r.steps: r.final_loss for r in runs if r.superposed_steps == 0}
    preset = load_preset(runs[0].model.lower())  # the paper's model, whatever this run's vocabulary and length are
    flops = shape_of(preset, LLAMA3_VOCAB).flops_per_token(preset.data.sequence_length) if same_size else 0
    peak = GPUS["B200"].flops * 3600
    in_table = wanted.sides == "both" and not wanted.anneal
    return Published(
        table=f"{table.model}, {table.steps:,} steps, {table.weighting} weights",
        baseline_loss=table.baseline,
        best=best,
        frugal=table.frugal(),
        within_data=table.best(tokens_available / run.latent_tokens) if tokens_available is not None else None,
        bag_size=max(max(p.input_bag, p.output_bag) for p in config.schedule.phases),
        ratio=run.superposed_steps / run.steps,
        gain=table.gain(wanted.ratio, wanted.bag_size) if in_table else None,
        outside=outside(table, shape.body_parameters, run.steps, run.latent_tokens // run.steps),
        runs=runs,
        run_gains=[
            round(baselines[r.steps] - r.final_loss, 3) if r.superposed_steps and r.steps in baselines else None
            for r in runs
        ],
        baseline_hours=[baseline_hours(r, runs) for r in runs],
        mfu=[flops * r.steps * r.latent_tokens / (peak * r.b200_hours) if same_size else None for r in runs],
    )


def _batch_warnings(config: Config, gpus: int, micro: int) -> list[str]:
    batch = config.train.batch_size
    if batch % (micro * gpus) == 0:
        return []
    fitting = [n for n in range(1, batch // micro + 1) if batch % (micro * n) == 0]
    near = [*[n for n in fitting if n < gpus][-1:], *[n for n in fitting if n > gpus][:1]]
    gpu_remedy = f"{' or '.join(map(str, near))} GPUs" if near else ""
    smaller = next((m for m in range(micro - 1, 0, -1) if batch % (m * gpus) == 0), None)
    micro_remedy = f"--train.micro-batch-size {smaller}" if smaller else ""
    size = max(round(batch / (micro * gpus)), 1) * micro * gpus
    remedies = [x for x in (gpu_remedy, micro_remedy, f"--train.batch-size {size}") if x]
    return [
        f"train.batch_size {batch} is not a multiple of {gpus} GPUs x micro-batch {micro}; use {', or '.join(remedies)}"
    ]


def _memory_warnings(config: Config, shape: Shape, gpus: int, gpu_type: GpuType, micro: int, limit: int) -> list[str]:
    batch, length = config.train.batch_size, config.data.sequence_length
    need = memory_of(shape, gpus, micro * length)
    again = config.train.activation_checkpointing

    def total(memory: Memory) -> int:
        return memory.total_checkpointed if again else memory.total

    if total(need) <= limit:
        return []
    remedies: list[str] = []
    for m in range(micro - 1, 0, -1):
        if batch % (m * gpus) == 0 and total(memory_of(shape, gpus, m * length)) <= limit:
            remedies.append(f"--train.micro-batch-size {m}")
            break
    if not again and need.total_checkpointed <= limit:
        remedies.append(f"activation checkpointing ({need.total_checkpointed / 1e9:.0f} GB, a third more FLOPs)")
    for n in range(gpus + 1, batch // micro + 1):
        if batch % (micro * n) == 0 and total(memory_of(shape, n, micro * length)) <= limit:
            remedies.append(f"{n} GPUs")
            break
    larger = [g for g in GPUS if GPUS[g].memory > GPUS[gpu_type].memory and total(need) <= USABLE * GPUS[g].memory]
    remedies += [f"{larger[0]} GPUs"] if larger else []
    return [
        f"{total(need) / 1e9:.0f} GB are needed on each GPU, "
        f"{limit / 1e9:.0f} GB can be used ({USABLE:.0%} of the {gpu_type}'s); "
        + (
            f"use {', or '.join(remedies)}"
            if remedies
            else "use a smaller model, or shard it by tensor parallelism too"
        )
    ]


def _data_warnings(run: Cost, available: int | None) -> list[str]:
    if available is None or run.raw_tokens <= available:
        return []
    return [
        f"data repeats: the run reads {run.raw_tokens:,} raw tokens, {run.raw_tokens / available:.3g} x the "
        f"{available:,} available, and TST pays for speed with fresh text"
    ]


def _advice(config: Config, run: Cost, tokens_per_step: int, available: int | None, published: Published) -> list[str]:
    if available is None or run.raw_tokens <= available:
        return []
    lines: list[str] = []
    if cell := published.within_data:
        lines.append(
            f"--superposition.bag-size {cell.bag_size} --superposition.ratio {cell.ratio:g} reads "
            f"{round(cell.raw_per_latent * run.latent_tokens):,} raw tokens: of the table's runs the best that fits, "
            f"gain {cell.gain:.4f}"
        )
    if run.latent_tokens <= available:
        unread = [n for n in UNREAD["output"] if getattr(config.superposition, n) != getattr(BASELINE, n)]
        without = f", without {', '.join(unread)}," if unread else ""
        lines.append(
            f"--superposition.sides output{without} reads {run.latent_tokens:,} tokens, no more than the baseline; "
            "it gains less than bags on both sides, and the tables do not have it"
        )
    steps, baseline_steps = int(available * run.steps / run.raw_tokens), available // tokens_per_step
    sizes = (config.train.batch_size, config.data.sequence_length)
    while steps and config.superposition.schedule(steps).raw_tokens(*sizes) > available:  # the switch is rounded
        steps -= 1
    if not baseline_steps:
        return [f"the data is not enough for one step, of {tokens_per_step:,} tokens or more; prepare more text"]
    ours = f"--train.steps {steps}" if steps else "no step of this run"
    lines.append(
        f"read once, the data is enough for {ours}, or for {baseline_steps:,} steps of the baseline; "
        "at equal data the baseline wins (3B, 105B tokens: 2.640, TST 2.676)"
    )
    return lines


def _speed_warnings(run: Cost, mfu: float, gpu_type: GpuType, published: Published) -> list[str]:
    measured = [x for x in published.mfu if x is not None]
    if not measured or mfu <= OPTIMISTIC * measured[-1]:
        return []
    return [
        f"mfu {mfu:g} is {mfu / measured[-1]:.2g} x what the paper's B200-hours for this size mean by this formula "
        f"({measured[-1]:.0%}); at that, {run.gpu_hours * mfu / measured[-1]:,.0f} {gpu_type}-hours"
    ]


def _range_warnings(config: Config, published: Published) -> list[str]:
    lines = [
        f"outside the published tables: {name}, "
        + (f"{factor:.3g} x the largest" if factor > 1 else f"{1 / factor:.3g} x less than the smallest")
        for name, factor in published.outside.items()
    ]
    wanted = config.superposition
    if wanted.sides != "both" or wanted.anneal:
        lines.append("the published tables have bags of one size, on both sides: they say nothing of this run's gain")
    elif published.gain is None:
        lines.append(
            f"the published table has no s = {wanted.bag_size} with r = {wanted.ratio:g}: it says nothing of this "
            "run's gain"
        )
    elif published.gain < 0:
        lines.append(f"s = {wanted.bag_size}, r = {wanted.ratio:g} ended above the baseline in the published table")
    return lines
