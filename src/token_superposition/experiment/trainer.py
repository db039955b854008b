"""``TSTTrainer`` as ``tst train`` runs it: checkpoints are written aside and renamed, bad gradients change nothing."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

from accelerate.utils import gather_object
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.utils.data import DataLoader

from token_superposition.engines.transformers import TSTTrainer
from token_superposition.errors import TokenSuperpositionError, errno_in
from token_superposition.experiment.checkpoints import ASIDE, checkpoints_in, checksums, commit, damage, rotate
from token_superposition.experiment.health import GradientGuard
from token_superposition.experiment.metrics import MetricsWriter
from token_superposition.experiment.preempt import SIGNALS
from token_superposition.schedule import Schedule

T = TypeVar("T")
PENDING = "pending_loss.json"
"""In a checkpoint: what the next log will tell of the steps before it, the losses by process; the time they took."""
OF_THE_RUN = ("initial_lr", "betas", "weight_decay")
"""Of a group of the optimizer, beside the learning rate: what the configuration says, whatever a checkpoint has."""


class RunTrainer(TSTTrainer):
    """Writes each checkpoint into a directory aside, with all its processes, then checksums it and renames it.

    ``facts`` go into its manifest; all but the newest ``keep`` and those of ``kept_steps`` are removed. ``guard`` sees
    the norm of every step's gradient before the optimizer does; ``metrics`` has the time of the steps. A checkpoint
    that cannot be written is removed and raises ``TokenSuperpositionError``.
    """

    OVERRIDDEN = (
        *TSTTrainer.OVERRIDDEN,
        "_get_grad_norm",
        "_get_output_dir",
        "_load_optimizer_and_scheduler",
        "_load_rng_state",
        "_save_checkpoint",
        "_save_rng_state",
    )

    def __init__(
        self,
        *args: Any,
        guard: GradientGuard,
        metrics: MetricsWriter,
        facts: dict[str, Any],
        keep: int = 0,
        kept_steps: tuple[int, ...] = (),
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        self.guard, self.metrics = guard, metrics
        self.facts, self.keep, self.kept_steps = facts, keep, kept_steps
        self.checkpoints = Path(str(self.args.output_dir))
        self._aside: Path | None = None

    def _check_model(self, model: nn.Module, schedule: Schedule) -> None:
        self._check_bags(model, schedule)  # build_model has seen to the rest, before there was a directory

    def check(self, checkpoint: Path) -> str | None:
        """``damage``, for which the processes share the reading."""
        part, parts = self.args.process_index, self.args.world_size
        found: list[str | None] = gather_object([damage(checkpoint, part=part, parts=parts)])
        return next((problem for problem in found if problem), None)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:  # from which Trainer has taken the sum of the losses by tr_loss -= tr_loss: nan stays nan
            cast(Tensor, self._tr_loss).zero_()
        super().log(logs, start_time)

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._aside) if self._aside is not None else super()._get_output_dir(trial)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        target = self.checkpoints / f"checkpoint-{self.state.global_step}"
        aside = self.checkpoints / ASIDE
        written = aside / target.name

        def write() -> None:
            aside.mkdir(exist_ok=True)
            self._aside = aside
            try:
                super(RunTrainer, self)._save_checkpoint(model, trial)
            finally:
                self._aside = None

        def rename() -> None:
            if self.is_world_process_zero():
                files = {name: entry for share in shares for name, entry in share.items()}
                commit(written, target, files, self.facts)
                rotate(target, self.keep, self.kept_steps)

        self._together(write)
        shares = self._together(lambda: checksums(written, self.args.process_index, self.args.world_size))
        self._together(rename)

    def _together(self, work: Callable[[], T]) -> list[T]:
        """``work()`` of every process; if it could not write in one of them, all raise."""
        result, problem = None, None
        try:
            result = work()
        except (OSError, RuntimeError, SafetensorError, CheckpointException) as e:
            problem = write_failure(e)
            if problem is None:
                raise
        outcomes: list[tuple[Any, str | None]] = gather_object([(result, problem)])
        problems = [p for _, p in outcomes if p]
        if not problems:
            return [r for r, _ in outcomes]
        if self.is_world_process_zero():
            shutil.rmtree(self.checkpoints / ASIDE, ignore_errors=True)
        there = checkpoints_in(self.checkpoints)
        newest = f"the newest is {there[-1].name}" if there else "there is none yet"
        raise TokenSuperpositionError(
            f"cannot write checkpoint-{self.state.global_step} to {self.checkpoints} ({problems[0]}); {newest}: "
            "make room there and give the same command again"
        )

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        losses: list[float] = gather_object([cast(Tensor, self._tr_loss).item()])
        if self.args.should_save:
            content = {"since": self._globalstep_last_logged, "losses": losses, "skipped": self.guard.skipped}
            (Path(output_dir) / PENDING).write_text(
                json.dumps(content | {"seconds": self.metrics.seconds}), encoding="utf-8"
            )

    def _load_rng_state(self, checkpoint: str | None) -> None:
        super()._load_rng_state(checkpoint)
        if checkpoint is None:
            return
        pending = json.loads((Path(checkpoint) / PENDING).read_text(encoding="utf-8"))
        losses: list[float] = pending["losses"]
        same = len(losses) == self.args.world_size
        self._tr_loss += losses[self.args.process_index] if same else sum(losses) / len(losses)
        self._globalstep_last_logged = int(pending["since"])
        self.guard.skipped[:] = pending["skipped"]
        self.metrics.go_on_from(pending["seconds"])

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Moments and step are the checkpoint's; learning rate, betas and weight decay are those of this run, which may
        branch off another one."""
        optimizer, scheduler = cast(Any, self.optimizer), cast(Any, self.lr_scheduler)
        ours = [{name: g[name] for name in OF_THE_RUN if name in g} for g in optimizer.param_groups]
        base = scheduler.base_lrs
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        rates = [lr * factor(scheduler.last_epoch) for lr, factor in zip(base, scheduler.lr_lambdas, strict=True)]
        scheduler.base_lrs, scheduler._last_lr = base, rates
        for group, settings, rate in zip(optimizer.param_groups, ours, rates, strict=True):
            group.update(settings, lr=rate)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm)
        if isinstance(norm, Tensor):
            self.guard.check(norm, cast(Any, self.optimizer), model.parameters())
        return norm

    def get_train_dataloader(self) -> DataLoader[Any]:
        return _sheltered(super().get_train_dataloader())

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        return _sheltered(super().get_eval_dataloader(eval_dataset))


def _sheltered(loader: Any) -> Any:
    """``loader``, whose processes leave SIGTERM and Ctrl-C to this one, where the whole group gets them."""
    base = getattr(loader, "base_dataloader", loader)  # of which accelerate's is a shell
    if base.num_workers:
        base.worker_init_fn = partial(_ignore_signals, base.worker_init_fn)
    return loader


def _ignore_signals(then: Callable[[int], None] | None, worker: int) -> None:
    for s in (*SIGNALS, signal.SIGINT):
        signal.signal(s, signal.SIG_IGN)
    if then is not None:
        then(worker)


def write_failure(e: BaseException) -> str | None:
    """Why the file system did not take something, if that is what an error says; each library says it in its way."""
    if isinstance(e, CheckpointException):
        return next((p for error, _ in e.failures.values() if (p := write_failure(error))), None)
    if isinstance(e, OSError):
        return e.strerror or str(e)
    if number := errno_in(e):
        return os.strerror(number)
    if "inline_container" in str(e) or "PytorchStreamWriter" in str(e) or "basic_ios" in str(e):
        return "the file system took no more"
    return None
