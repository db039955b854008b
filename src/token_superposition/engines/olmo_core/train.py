"""One training run on OLMo-core: the same configuration, directory and files as ``tst train``."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from olmo_core.config import DType
from olmo_core.distributed.parallel import DataParallelType
from olmo_core.distributed.utils import get_rank, get_world_size
from olmo_core.optim import AdamWConfig, OptimGroupOverride
from olmo_core.train import (
    Duration,
    Trainer,
    TrainerConfig,
    prepare_training_environment,
    teardown_training_environment,
)
from olmo_core.train.callbacks import Callback, CheckpointerCallback, ConsoleLoggerCallback
from olmo_core.train.train_module.transformer import (
    TransformerActivationCheckpointingConfig,
    TransformerDataParallelConfig,
    TransformerTensorParallelConfig,
)
from olmo_core.utils import prepare_cli_environment, seed_all
from transformers import PretrainedConfig, PreTrainedModel

from token_superposition.data.plan import PlannedDataset, ValidationSet
from token_superposition.data.store import Meta, TokenStore
from token_superposition.data.tokenizer import load_tokenizer
from token_superposition.engines.olmo_core.callbacks import MetricsWriter, Validation
from token_superposition.engines.olmo_core.data import PlannedDataLoader
from token_superposition.engines.olmo_core.export import export_model, load_weights
from token_superposition.engines.olmo_core.model import transformer_config
from token_superposition.engines.olmo_core.module import PlannedWSD, TSTSpeedMonitor, TSTTrainModule
from token_superposition.errors import TokenSuperpositionError, require_int
from token_superposition.experiment.config import Config
from token_superposition.experiment.files import METRICS, MODEL, RESULT, write_json
from token_superposition.experiment.launch import Launch
from token_superposition.experiment.model import build_model
from token_superposition.experiment.result import RunResult, StepTimes
from token_superposition.experiment.run import begin, prepare_directory


@dataclass(frozen=True)
class Layout:
    """How the processes share the work: ``data`` groups of ``tensor`` processes, ``micro`` sequences at a time."""

    data: int
    tensor: int
    micro: int

    @classmethod
    def of(cls, config: Config, hf: PretrainedConfig, processes: int, tensor: int) -> Layout:
        """Raises ``TokenSuperpositionError`` for what does not divide."""
        require_int("tensor_parallel", tensor, 1)
        if processes % tensor:
            raise TokenSuperpositionError(
                f"--tensor-parallel {tensor} does not divide {processes} processes; "
                f"start a multiple of {tensor} (torchrun --nproc-per-node)"
            )
        data, batch = processes // tensor, config.train.batch_size
        micro = config.train.micro_batch_size or max(batch // data, 1)
        if batch % (micro * data):
            raise TokenSuperpositionError(
                f"train.batch_size {batch} is not a multiple of {data} data-parallel processes x micro-batch {micro}; "
                "change train.batch_size, train.micro_batch_size or the number of processes"
            )
        h: Any = hf
        sizes = {
            "the vocabulary": (h.vocab_size, f"set model.options.vocab_size to {-(-h.vocab_size // tensor) * tensor}"),
            "data.sequence_length": (config.data.sequence_length, "change it"),
            "num_attention_heads": (h.num_attention_heads, "change the model"),
            "num_key_value_heads": (h.num_key_value_heads, "change the model"),
            "intermediate_size": (h.intermediate_size, "change the model"),
        }
        for name, (size, remedy) in sizes.items():
            if size % tensor:
                raise TokenSuperpositionError(
                    f"{name}, {size}, is not a multiple of --tensor-parallel {tensor}; "
                    f"{remedy}, or lower --tensor-parallel"
                )
        return cls(data, tensor, micro)


def train(
    config: Config, out: str | Path, *, tensor_parallel: int = 1, callbacks: Mapping[str, Callback] | None = None
) -> RunResult:
    """Train one run into ``out``, on as many processes as torchrun started; continues from its newest checkpoint.

    FSDP2 over the processes, or over the groups of ``tensor_parallel`` processes that share a model. ``callbacks`` are
    added to the trainer's. ``run.json`` and ``model/`` appear when the run is finished.
    Raises ``TokenSuperpositionError`` before any process group starts for a configuration that cannot be trained.
    """
    config.check()
    config.superposition.refuse_variants("OLMo-core")
    config.train.refuse_unsupported("OLMo-core")
    out = Path(out)
    store = TokenStore(config.data.path)
    start = initial_model(config, store.meta)
    model_config = transformer_config(start.config, config.superposition.weighting, config.train.seed)
    processes = int(os.environ.get("WORLD_SIZE", 1))
    layout = Layout.of(config, start.config, processes, tensor_parallel)
    first = os.environ.get("RANK", "0") == "0"
    with warnings.catch_warnings():
        warnings.simplefilter("default" if first else "ignore")
        length, batch = config.data.sequence_length, config.train.batch_size
        plan = PlannedDataset(store, config.schedule, length, batch, config.train.seed)
    validation = TokenStore(config.data.path, "validation")
    evaluation = Validation(
        held_out=ValidationSet(validation, config.data.sequence_length, config.data.eval_tokens),
        final=ValidationSet(validation, config.data.sequence_length, config.data.final_eval_tokens),
        rows=layout.micro,
        eval_interval=config.train.eval_every,
    )
    if first:
        prepare_directory(config, out)
        begin(config, out)

    if processes > 1:
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        timeout = timedelta(minutes=config.train.timeout_minutes)
        prepare_training_environment(seed=config.train.seed, backend=backend, timeout=timeout, shared_filesystem=True)
    else:
        prepare_cli_environment()
        seed_all(config.train.seed)
    module = train_module(config, model_config.build(init_device="meta"), layout)
    if config.model.path is not None:
        load_weights(module.model, start)
    bits_per_byte = validation.split.bits_per_nat
    metrics = MetricsWriter(path=out / METRICS, train=config.train, bits_per_byte=bits_per_byte)
    own: dict[str, Callback] = {"metrics": metrics, "validation": evaluation}
    trainer = build_trainer(config, out, module, plan, own | dict(callbacks or {}))
    try:
        trainer.fit()
    except RuntimeError as e:
        if "loss encountered at step" not in (told := str(e.__cause__ or e)):
            raise
        raise TokenSuperpositionError(f"{told}; lower train.learning_rate or change the model") from e
    if trainer.global_step < plan.schedule.total_steps:
        saved = config.train.save_every or config.train.save_at
        goes_on = "the same command goes on from the newest checkpoint"
        then = goes_on if saved else "nothing was saved, since --train.save-every is 0"
        raise TokenSuperpositionError(
            f"the run was stopped after step {trainer.global_step} of {plan.schedule.total_steps}; {then}"
        )
    export_model(module.model, start.config, out / MODEL, load_tokenizer(str(store.directory / "tokenizer")))
    result = RunResult.of(
        config,
        plan,
        flops=metrics.flops(plan.schedule.total_steps),
        train_seconds=metrics.seconds,
        times=StepTimes.of(out, plan.schedule.starts, plan.schedule.total_steps),
        val_loss=evaluation.final_loss,
        bits_per_byte=bits_per_byte,
        parameters=module.model.num_params,
        precision=Launch().precision(config.train.precision),
        engine="ai2-olmo-core",
    )
    if get_rank() == 0:
        write_json(out / RESULT, asdict(result))
    if processes > 1:
        teardown_training_environment()
    return result


def initial_model(config: Config, meta: Meta) -> PreTrainedModel:
    """The transformers model to start from: with its weights if ``model.path`` names one, else without any."""
    if config.model.path is not None:
        return build_model(config, meta)
    with torch.device("meta"):
        return build_model(config, meta)


def train_module(config: Config, model: Any, layout: Layout) -> TSTTrainModule:
    t, length = config.train, config.data.sequence_length
    low = Launch().bfloat16(t.precision)
    distributed = layout.data * layout.tensor > 1
    overrides = [OptimGroupOverride(["*norm.weight"], {"weight_decay": 0.0})]
    if t.embedding_lr_factor != 1:
        rate = t.learning_rate * t.embedding_lr_factor
        overrides.append(OptimGroupOverride(["embeddings.weight"], {"lr": rate}))
    return TSTTrainModule(
        model=model,
        optim=AdamWConfig(
            lr=t.learning_rate,
            betas=(t.beta1, t.beta2),
            weight_decay=t.weight_decay,
            group_overrides=overrides,
        ),
        rank_microbatch_size=layout.micro * length,
        max_sequence_length=length,
        compile_model=t.compile,
        dp_config=TransformerDataParallelConfig(
            name=DataParallelType.fsdp, param_dtype=DType.bfloat16 if low else None, reduce_dtype=DType.float32
        )
        if distributed
        else None,
        tp_config=TransformerTensorParallelConfig(degree=layout.tensor) if layout.tensor > 1 else None,
        ac_config=TransformerActivationCheckpointingConfig() if t.activation_checkpointing else None,  # every block
        autocast_precision=torch.bfloat16 if low and not distributed else None,
        max_grad_norm=t.max_grad_norm or math.inf,  # measured also where it is not clipped
        scheduler=PlannedWSD(total_steps=t.steps, warmup_steps=t.warmup_steps, decay_ratio=t.decay_ratio),
    )


def build_trainer(
    config: Config, out: Path, module: TSTTrainModule, plan: PlannedDataset, callbacks: dict[str, Callback]
) -> Trainer:
    t, group = config.train, module.dp_process_group
    saves = bool(t.save_every or t.save_at)
    trainer = TrainerConfig(
        save_folder=str(out / "checkpoints"),
        save_overwrite=True,  # what a killed run left behind
        max_duration=Duration.steps(t.steps),
        metrics_collect_interval=t.log_every,
        cancel_check_interval=1,  # torchrun waits 30 s after SIGTERM
        no_checkpoints=not saves,
    )
    trainer.add_callbacks(
        {
            "checkpointer": CheckpointerCallback(
                save_interval=t.save_every or None,
                fixed_steps=list(t.save_at),
                pre_train_checkpoint=False,
                max_checkpoints=None,
                # In the background each rank records its duration when it is done. Where that falls between two
                # collections of metrics, OLMo-core 3.0 reduces tensors of different shapes and hangs.
                save_async=False,
            ),
            "console_logger": ConsoleLoggerCallback(log_interval=t.log_every),
            "speed_monitor": TSTSpeedMonitor(),
            **callbacks,
        }
    )
    data_rank, data_ranks = get_rank(group), get_world_size(group)
    return trainer.build(module, PlannedDataLoader(plan, out, data_ranks, data_rank, t.loader_workers))
