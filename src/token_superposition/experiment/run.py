"""One training run: a directory with its configuration, metrics, checkpoints, finished model and result."""

from __future__ import annotations

import math
import os
import shlex
import shutil
import sys
import traceback
import warnings
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, cast

import torch
import torch.distributed as dist
from accelerate.utils import patch_environment, purge_accelerate_environment
from filelock import FileLock, Timeout
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    TrainingArguments,
    set_seed,
)

from token_superposition.data.boundaries import find_boundaries
from token_superposition.data.plan import PlannedDataset, ValidationSet
from token_superposition.data.store import TokenStore
from token_superposition.data.tokenizer import load_tokenizer
from token_superposition.engines.transformers.embedding_lr import scale_embedding_lr
from token_superposition.engines.transformers.mtp import MTPHeads, check_checkpoint
from token_superposition.engines.transformers.muon import MuonAdamW, split_parameters
from token_superposition.engines.transformers.switch import AtSwitch
from token_superposition.errors import TokenSuperpositionError, first_line
from token_superposition.experiment.checkpoints import checkpoints_in, damage, read_manifest, step_of
from token_superposition.experiment.config import Config, load_config, load_written, save_config
from token_superposition.experiment.files import (
    CONFIG,
    DIVERGED,
    METRICS,
    MODEL,
    RESULT,
    read_metrics,
    write_json,
    write_metrics,
)
from token_superposition.experiment.flops import flops_per_sequence
from token_superposition.experiment.health import Diverged, GradientGuard
from token_superposition.experiment.launch import Launch
from token_superposition.experiment.metrics import MetricsWriter, Report
from token_superposition.experiment.model import build_model, empty_model
from token_superposition.experiment.preempt import Preemption
from token_superposition.experiment.result import RunResult, StepTimes, result_json
from token_superposition.experiment.resume import (
    Resume,
    Start,
    changes,
    check_start,
    facts,
    model_digest,
    says_all,
)
from token_superposition.experiment.shards import weights_only
from token_superposition.experiment.tracking import (
    Rates,
    check_trackers,
    device_peak,
    report_arguments,
    report_variables,
)
from token_superposition.experiment.trainer import RunTrainer
from token_superposition.experiment.watchdog import Watchdog


@purge_accelerate_environment  # what transformers leaves there for accelerate would hold for the next run
def train(
    config: Config,
    out: str | Path,
    *,
    resume: Resume = "auto",
    branch_from: Path | None = None,
    report: Report = lambda lines: None,
) -> RunResult:
    """Train one run into ``out``; continues from its newest whole checkpoint, or from ``branch_from``, if there is one.

    ``resume`` "never" refuses a directory with checkpoints, a path is the checkpoint to go on from.
    ``run.json`` and ``model/`` appear when the run is finished, ``diverged.json`` when it diverged.
    No pickle is loaded but with ``weights_only``.
    Raises ``TokenSuperpositionError`` before any work for a configuration that cannot be trained, and where a
    checkpoint cannot be written or a gradient is not finite; ``SystemExit`` with status 143 after SIGTERM and 130 after
    Ctrl-C, for which a checkpoint is saved, and with status 1 where another process is gone.
    """
    config.check()
    launch = Launch.from_environment()
    launch.check(config)
    check_trackers(config.train)
    variables = launch.variables(config.train) | report_variables(config.train, Path(out))
    with patch_environment(**variables), ExitStack() as held:
        return _train(config, Path(out), launch, Start(Path(out) / "checkpoints", resume, branch_from), report, held)


def _train(config: Config, out: Path, launch: Launch, start: Start, report: Report, held: ExitStack) -> RunResult:
    store = TokenStore(config.data.path)
    validation = TokenStore(config.data.path, "validation")
    schedule, precision = config.schedule, launch.precision(config.train.precision)
    empty = empty_model(config, store.meta.vocab_size)
    parameters = sum(p.numel() for p in empty.parameters())
    mtp_heads(config, empty)
    launch.check_memory(sum(p.numel() for p in empty.parameters()))
    model_sha256 = model_digest(config.model.path)
    if (candidate := start.find(check=partial(damage, content=False))) is not None:
        launch.check_checkpoint(candidate)
        check_checkpoint(candidate, config.superposition.trained_heads)
        check_start(candidate, config, store.meta, precision, model_sha256)
    set_seed(config.train.seed)
    model = build_model(config, store.meta)
    mtp = mtp_heads(config, model)
    tokenizer = load_tokenizer(str(store.directory / "tokenizer"))
    data = (config.data.sequence_length, config.train.batch_size, config.train.seed)
    boundaries = find_boundaries(tokenizer, config.superposition.boundaries)
    plan = PlannedDataset(store, schedule, *data, shift=config.superposition.shift, boundaries=boundaries)
    held_out = ValidationSet(validation, config.data.sequence_length, config.data.eval_tokens)
    final = ValidationSet(validation, config.data.sequence_length, config.data.final_eval_tokens)
    bits_per_byte = validation.split.bits_per_nat
    prepare_directory(config, out)
    if int(os.environ.get("RANK", 0)) == 0:
        held.enter_context(_alone_in(out))
        begin(config, out)
    start.checkpoints.mkdir(exist_ok=True)
    args = training_arguments(config, out, launch)  # starts the process group
    if launch.sharded:  # FSDP moves the model to the device part by part; the FLOPs are counted without computing
        with FakeTensorMode(allow_non_fake_inputs=True):
            sequence_flops = flops_per_sequence(empty.bfloat16(), config.data.sequence_length)
    else:
        nn.Module.to(model, args.device)
        sequence_flops = flops_per_sequence(model, config.data.sequence_length)
    if mtp is not None:
        sequence_flops += mtp.flops_per_token * config.data.sequence_length
    step_flops = sequence_flops * config.train.batch_size
    guard = GradientGuard(config.train.on_nonfinite, partial(batch_of, plan, out))
    peak = device_peak()
    rates = Rates(step_flops, None if peak is None else peak * launch.processes)
    metrics = MetricsWriter(out / METRICS, bits_per_byte, step_flops, config.kept_steps, report, guard.skipped)
    preemption, watchdog = Preemption(launch.processes), Watchdog(60 * config.train.timeout_minutes, out)
    trainer = RunTrainer(
        model,
        args,
        train_dataset=plan,
        eval_dataset=held_out,
        processing_class=tokenizer,
        weighting=config.superposition.weighting,
        bag_loss=config.superposition.loss,
        input_weighting=config.superposition.input_weighting,
        place_signal=config.superposition.place_signal,
        mtp=mtp,
        lr_factor=config.wsd,
        metrics=metrics,
        figures=lambda step, latent, raw: rates.at(step, metrics.seconds, latent, raw),
        optimizers=(muon(config, model), None),
        callbacks=[metrics, *at_switch(config), preemption, watchdog, guard],
        guard=guard,
        facts=facts(config, store.meta, precision, model_sha256),
        keep=config.train.keep,
        kept_steps=config.kept_steps,
        embedding_lr_factor=config.train.embedding_lr_factor if config.train.optimizer == "adamw" else 1.0,
    )
    trainer.remove_callback(PrinterCallback)
    first = trainer.is_world_process_zero()
    checkpoint = start.find(warnings.warn if first else lambda line: None, trainer.check)
    if checkpoint is not None:
        check_start(checkpoint, config, store.meta, precision, model_sha256)
        if first and checkpoint.resolve().parent != (out / "checkpoints").resolve():
            take_over_metrics(checkpoint, out)

    def result(val_loss: float) -> RunResult:
        starts = [0, *schedule.switches[-1:]] if config.superposition.mixture else schedule.starts
        return RunResult.of(
            config,
            plan,
            flops=step_flops * schedule.total_steps,
            train_seconds=metrics.seconds,
            times=StepTimes.of(out, starts, schedule.total_steps),
            val_loss=val_loss,
            bits_per_byte=bits_per_byte,
            parameters=parameters,
            precision=precision,
        )

    with preemption, watchdog, lost_processes(launch), weights_only():
        try:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint is not None else None)
        except UnpicklingError:
            raise TokenSuperpositionError(
                f"{checkpoint} holds more than tensors and plain values, which is not loaded; take another checkpoint"
            ) from None
        except Exception as e:
            traceback.clear_frames(e.__traceback__)  # lets the loader go, whose processes do not end by SIGTERM
            if isinstance(e, Diverged) and first:
                write_json(out / DIVERGED, result_json(result(math.nan), model_sha256))
            raise
        if preemption.stopped:
            if first:
                print(f"tst: terminated after step {trainer.state.global_step}, saved in {out}", file=sys.stderr)
            raise SystemExit(preemption.status)
        val_loss = trainer.evaluate(cast(Any, final))["eval_loss"]
        save_model(trainer, out / MODEL)
    finished = result(val_loss)
    if first:
        write_json(out / RESULT, result_json(finished, model_sha256))
    return finished


def take_over_metrics(checkpoint: Path, out: Path) -> None:
    """Of the steps up to a ``checkpoint`` of elsewhere: its run's, or those of ``out`` where it was moved away."""
    step, every = step_of(checkpoint), read_manifest(checkpoint)["config"]["train"]["log_every"]
    beside = checkpoint.resolve().parent.parent / METRICS
    lines = read_metrics(beside if beside.exists() else out / METRICS, step)
    if step - (last := lines[-1]["step"] if lines else 0) >= every:
        warnings.warn(
            f"the metrics from step {last} to {step} are not beside {checkpoint}, so that {out / METRICS} lacks them; "
            "name it in the directory of its run",
            stacklevel=1,
        )
    write_metrics(out / METRICS, lines)


def batch_of(plan: PlannedDataset, out: Path, step: int) -> str:
    """What the step (1-based) read, and the command that trains it again."""
    first = (step - 1) * plan.batch_size
    whole = [c for c in checkpoints_in(out / "checkpoints") if step_of(c) < step]
    resume = ["--resume", str(whole[-1])] if whole else []
    command = shlex.join(["tst", "train", str(out / CONFIG), *resume, "--out", f"{out}-replay"])
    return f"samples {first} to {first + plan.batch_size - 1} of the plan; to see it again: {command}"


@contextmanager
def lost_processes(launch: Launch) -> Generator[None, None, None]:
    """An error that says that another process is gone, or waited for too long, is one line and status 1."""
    try:
        yield
    except RuntimeError as e:
        if launch.processes == 1 or not (isinstance(e, dist.DistError) or "gloo" in str(e)):
            raise
        reason = first_line(e)
        raise SystemExit(
            f"tst: error: another process of the run is gone or does not answer ({reason}); the same command goes on "
            "from the newest checkpoint"
        ) from None


def mtp_heads(config: Config, model: PreTrainedModel) -> MTPHeads | None:
    """The heads for further tokens that the configuration trains, added to the model."""
    heads = config.superposition.trained_heads
    return MTPHeads(model, heads, config.superposition.mtp_weight) if heads else None


def muon(config: Config, model: PreTrainedModel) -> MuonAdamW | None:
    """The optimizer of the configuration if the ``Trainer`` does not make it."""
    t = config.train
    if t.optimizer == "adamw":
        return None
    betas = (t.beta1, t.beta2)
    made = MuonAdamW(*split_parameters(model), lr=t.learning_rate, betas=betas, weight_decay=t.weight_decay)
    scale_embedding_lr(made, model, t.embedding_lr_factor)
    return made


def at_switch(config: Config) -> list[AtSwitch]:
    """What the configuration throws away at the last switch, if there is one."""
    wanted = config.superposition
    if not (wanted.reset_optimizer or wanted.reset_embeddings):
        return []
    settings = {"optimizer": wanted.reset_optimizer, "embeddings": wanted.reset_embeddings}
    return [AtSwitch(step, **settings) for step in config.schedule.switches[-1:]]


def training_arguments(config: Config, out: Path, launch: Launch) -> TrainingArguments:
    t = config.train
    micro = launch.micro_batch(config)
    cpu = not torch.accelerator.is_available()
    args = TrainingArguments(
        output_dir=str(out / "checkpoints"),
        max_steps=t.steps,
        per_device_train_batch_size=micro,
        per_device_eval_batch_size=micro,
        gradient_accumulation_steps=t.batch_size // (micro * launch.processes),
        learning_rate=t.learning_rate,
        weight_decay=t.weight_decay,
        adam_beta1=t.beta1,
        adam_beta2=t.beta2,
        max_grad_norm=t.max_grad_norm,
        bf16=launch.bfloat16(t.precision),
        activation_checkpointing=t.activation_checkpointing and not launch.sharded,
        torch_compile=t.compile,
        seed=t.seed,
        logging_steps=t.log_every,
        eval_strategy="steps",
        eval_steps=t.eval_every,
        save_strategy="steps" if t.save_every else "no",
        save_steps=t.save_every or t.steps,
        save_total_limit=None,
        dataloader_num_workers=t.loader_workers,
        dataloader_pin_memory=not cpu,
        accelerator_config={"non_blocking": not cpu},  # a batch is copied while the device computes
        prediction_loss_only=True,
        disable_tqdm=True,
        **report_arguments(t, out),
        log_level="error",
        logging_nan_inf_filter=False,
        use_cpu=cpu,
        ddp_timeout=math.ceil(60 * t.timeout_minutes),
    )
    # Else a process without a launcher takes all GPUs that it sees, by DataParallel.
    args._n_gpu = min(args.n_gpu, 1)  # pyright: ignore[reportPrivateUsage]
    return args


@contextmanager
def _alone_in(out: Path) -> Generator[None]:
    """Raises ``TokenSuperpositionError`` where another process trains into ``out``, such as one whose parent died."""
    lock = FileLock(out / ".lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise TokenSuperpositionError(
            f"another tst train is writing {out}; wait for it, stop it, or choose another --out"
        ) from None
    except NotImplementedError:  # a file system without locks
        yield
        return
    try:
        yield
    finally:
        (out / ".lock").unlink(missing_ok=True)
        lock.release()


def prepare_directory(config: Config, out: Path) -> None:
    """Make ``out``; refuse one that holds a run of another configuration. Of what is there it changes nothing."""
    if (out / "runs").is_dir():
        raise TokenSuperpositionError(f"{out} holds a comparison or a sweep; choose another --out for the run")
    if (out / RESULT).exists():
        raise TokenSuperpositionError(f"{out} holds a finished run; choose another --out or remove it")
    begun = any((out / name).exists() for name in ("checkpoints", METRICS))
    read = load_written if begun else load_config  # else it may be the user's own
    if (out / CONFIG).exists() and (differences := changes(read(out / CONFIG), config)):
        raise TokenSuperpositionError(
            f"{out} holds a run of another configuration ({'; '.join(differences)}); choose another --out"
        )
    path = config.model.path
    if path is not None and Path(path).resolve() == (out / MODEL).resolve():
        raise TokenSuperpositionError(
            f"model.path {path} lies where the finished model of --out {out} goes; choose another --out"
        )
    theirs = next((out / name for name in (MODEL, METRICS) if (out / name).exists()), None)
    if theirs is not None and not (out / CONFIG).exists():
        raise TokenSuperpositionError(f"{theirs} would be overwritten, and no run wrote it; choose another --out")
    if (out / CONFIG).exists() and not begun and not says_all(out / CONFIG, config):
        raise TokenSuperpositionError(f"{out / CONFIG} would be overwritten, and no run wrote it; choose another --out")
    out.mkdir(parents=True, exist_ok=True)


def begin(config: Config, out: Path) -> None:
    """Write down that the run is trained, once it is certain that no other process does."""
    (out / DIVERGED).unlink(missing_ok=True)  # it is tried again
    save_config(config, out / CONFIG)


def save_model(trainer: RunTrainer, path: Path) -> None:
    """Write the finished model aside, then rename it. Shards are gathered to one process."""
    partial = path.with_name(f".{path.name}.partial")
    if trainer.is_fsdp_enabled:
        cast(Any, trainer.accelerator.state).fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    trainer.save_model(str(partial))
    if trainer.is_world_process_zero():
        (partial / "training_args.bin").unlink(missing_ok=True)
        shutil.rmtree(path, ignore_errors=True)
        partial.rename(path)
