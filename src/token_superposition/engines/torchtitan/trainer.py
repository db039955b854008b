"""torchtitan's trainer, taught to train on bags."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, cast

import tyro
from torch import Tensor
from torchtitan.components.loss import ChunkedLossWrapper
from torchtitan.components.validate import Validator
from torchtitan.distributed.cudagraph import cudagraph_teardown, wrap_with_cuda_graph
from torchtitan.models.common.decoder import Decoder
from torchtitan.tools.logging import logger
from torchtitan.tools.utils import device_module
from torchtitan.trainer import Trainer

from token_superposition.data.store import Meta
from token_superposition.engines.torchtitan.balance import BalancedRouter
from token_superposition.engines.torchtitan.checks import (
    batch_sizes,
    data_parallel,
    expect,
    foreign,
    logits_divide,
    machine,
    model_divides,
    planned_steps,
    routers_balance,
)
from token_superposition.engines.torchtitan.data import HeldOutLoader, PlannedLoader
from token_superposition.engines.torchtitan.export import export_model
from token_superposition.engines.torchtitan.loss import BagLoss
from token_superposition.engines.torchtitan.metrics import BagMetrics
from token_superposition.engines.torchtitan.models import checked_settings, model_spec, with_bags
from token_superposition.errors import TokenSuperpositionError
from token_superposition.experiment.config import ModelConfig
from token_superposition.experiment.files import MODEL
from token_superposition.experiment.superposition import SuperpositionConfig


class TSTTrainer(Trainer):
    """``Trainer`` whose batches may be bags; everything else is torchtitan's.

    The model is that of ``config.model_spec``, with our embedding, or else built from ``config.model`` and the
    vocabulary of the prepared data at ``dataloader.dataset_path``; the phase of a step follows from
    ``config.superposition`` and ``training.steps``. The labels that torchtitan counts (to normalise the loss, for tps,
    flops and ``n_tokens_seen``) are one for a latent position; the bags travel beside them. The finished model is
    written for transformers to ``<dump_folder>/model``.

    Raises ``TokenSuperpositionError`` before a process group starts for a configuration that cannot be trained.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(Trainer.Config):
        model: Annotated[ModelConfig, tyro.conf.Suppress] = field(default_factory=ModelConfig)
        """Architecture and fields of transformers; set by the registry. Not read where ``model_spec`` is given, but for
        the weights at its path."""
        superposition: SuperpositionConfig = field(default_factory=SuperpositionConfig)
        """The first phase."""

    def __init__(self, config: Config):
        training, parallelism = config.training, config.parallelism
        dataloader = expect("dataloader", config.dataloader, PlannedLoader.Config)
        loss = expect("loss", config.loss, ChunkedLossWrapper.Config)
        bag_loss = expect("loss.loss_fn", loss.loss_fn, BagLoss.Config)
        expect("metrics", config.metrics, BagMetrics.Config)
        machine()
        config.superposition.refuse_variants("torchtitan")
        foreign(Path(config.dump_folder), config.model.path)
        if config.debug.spmd_typechecking:
            raise TokenSuperpositionError(
                "debug.spmd_typechecking is set, and the loss of bags has no types for it; leave it out"
            )
        processes = self.data_processes = data_parallel(parallelism, int(os.environ.get("WORLD_SIZE", 1)))
        training.local_batch_size = batch_sizes(training.global_batch_size, training.local_batch_size, processes)
        whole = planned_steps(training.steps, config.lr_scheduler.total_steps)
        self.schedule = config.superposition.schedule(whole)
        self.store = Path(dataloader.dataset_path or "data")
        meta = Meta.load(self.store)
        self.settings = None
        if config.model_spec is None:
            known = (meta.vocab_size, meta.eos_id, training.seq_len, meta.bos_id)
            self.settings = checked_settings(config.model, *known)
            model_divides(self.settings, parallelism)
            if not routers_balance(self.settings, parallelism, config.compile.enable):
                logger.warning(
                    "Nothing balances the experts: model.options.output_router_logits is false, and with it the "
                    "auxiliary loss is off"
                )
            config.model_spec = model_spec(self.settings, training.seq_len, training.global_batch_size)
            if not training.disable_cuda_graphs and parallelism.expert_parallel_degree > 1:
                logger.warning("CUDA graphs are disabled: torchtitan has none for this expert parallelism")
                training.disable_cuda_graphs = True
        else:
            config.model_spec = with_bags(config.model_spec, meta.vocab_size)
        vocab_size = cast(Decoder.Config, config.model_spec.model).vocab_size
        logits_divide(vocab_size, parallelism, training.seq_len, loss.num_chunks)
        if Path(config.hf_assets_path).name == "tokenizer":  # the default, of torchtitan and of the registry
            config.hf_assets_path = str(self.store / "tokenizer")
        dataloader.schedule = self.schedule
        dataloader.global_batch_size = training.global_batch_size
        dataloader.plan(training.seq_len)
        bag_loss.weighting = config.superposition.weighting
        bag_loss.vocab_size = vocab_size
        self.bits_per_byte = None
        if isinstance(config.validator.dataloader, HeldOutLoader.Config):
            held_out = config.validator.dataloader
            held_out.dataset_path = held_out.dataset_path or str(self.store)
            held_out_text = Meta.load(Path(held_out.dataset_path)).validation
            self.validated = training.local_batch_size * processes
            config.validator.steps = held_out.steps(training.seq_len, self.validated)
            self.bits_per_byte = held_out_text.bits_per_nat
        super().__init__(config)
        for part in self.model_parts:
            BalancedRouter.link(part)

    def batch_generator(self, data_iterable: Iterable[tuple[dict[str, Tensor], Tensor]]) -> Iterator[Any]:
        """Gives torchtitan one label for each latent position, -100 where all of its bag is masked."""

        def one_label_a_position() -> Iterator[tuple[dict[str, Tensor], Tensor]]:
            for inputs, targets in data_iterable:
                yield {**inputs, "targets": targets}, targets if targets.dim() == 2 else targets.amax(-1)

        # torchtitan asks for the batches when it has loaded its checkpoint: self.step is where the run starts, also
        # where the state of the loader was left out of it.
        cast(PlannedLoader, self.dataloader).begin_at(self.step)
        training = self.config.training
        counts = (training.global_batch_size, training.seq_len)
        # Of one process; the checkpoint has it of another number of them where that has changed.
        self.ntokens_seen = self.step * training.global_batch_size * training.seq_len // self.data_processes
        cast(BagMetrics, self.metrics_processor).start(
            self.schedule, counts, self.step, training.steps, self.bits_per_byte, self.something_follows
        )
        return super().batch_generator(one_label_a_position())

    def post_dataloading_process(
        self, input_dict: dict[str, Tensor], labels: Tensor
    ) -> tuple[Tensor, Tensor, dict[str, Any]]:
        seen = self.ntokens_seen + labels.numel()
        inputs = {k: v for k, v in input_dict.items() if k != "targets"}
        result = super().post_dataloading_process(inputs, input_dict["targets"])
        self.ntokens_seen = seen
        return result

    def train_step(self, data_iterator: Iterator[tuple[dict[str, Tensor], Tensor]]) -> None:
        if self.step - 1 in self.schedule.switches:
            phase = self.schedule.at(self.step - 1)
            logger.info(f"Bags of {phase.input_bag} in, {phase.output_bag} out from step {self.step} on")
            if not self.config.training.disable_cuda_graphs:
                logger.info("The CUDA graph is captured again: its inputs have another shape")
                cudagraph_teardown()
                self.fwd_bwd_fn = wrap_with_cuda_graph(self._forward_backward_body)
        metrics = cast(BagMetrics, self.metrics_processor)
        metrics.step_begins()
        super().train_step(data_iterator)
        if self.something_follows(self.step):
            device_module.synchronize()  # what follows is not training
        metrics.step_ends()

    def something_follows(self, step: int) -> bool:
        """Whether a validation, a checkpoint or the end comes after it: none of a loss that is not finite."""
        checkpoint = self.config.checkpoint
        validates = self.config.validator.enable and self.validator.should_validate(step)
        saves = checkpoint.enable and step % checkpoint.interval == 0
        return validates or saves or step == self.config.training.steps

    def train(self) -> None:
        super().train()
        if self.config.validator.enable and isinstance(self.validator, Validator):
            self._validate_finally(self.validator)
        export_model(self, Path(self.config.dump_folder) / MODEL)

    def _validate_finally(self, validator: Validator) -> None:
        held_out = validator.dl_config
        if isinstance(held_out, HeldOutLoader.Config):
            validator.dl_config = final = replace(held_out, tokens=held_out.final_tokens)
            steps = final.steps(self.config.training.seq_len, self.validated)
            validator.config = replace(self.config.validator, steps=steps)
            validator.validate(self.model_parts, self.step)
