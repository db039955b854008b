"""The registry that ``torchtitan.train --module token_superposition.engines.torchtitan --config NAME`` reads.

``tst_*`` are the paper's models, ``baseline_*`` the same without a superposition phase. Every field is also a flag,
such as ``--dataloader.dataset_path data --superposition.bag_size 8 --parallelism.tensor_parallel_degree 2``.
"""

from __future__ import annotations

import math
from dataclasses import replace
from math import ceil, gcd
from pathlib import Path

from torchtitan.components.checkpointer import CheckpointManager
from torchtitan.components.loss import ChunkedLossWrapper
from torchtitan.components.optimizer import LRSchedulersContainer, ParamGroupConfig
from torchtitan.components.validate import Validator
from torchtitan.config import CommConfig, CompileConfig, DebugConfig, ParallelismConfig, TrainingConfig
from torchtitan.distributed.activation_checkpoint import FullAC

from token_superposition.engines.torchtitan.data import HeldOutLoader, PlannedLoader
from token_superposition.engines.torchtitan.loss import BagLoss
from token_superposition.engines.torchtitan.metrics import BagMetrics
from token_superposition.engines.torchtitan.optimizer import EMBEDDINGS, StageOptimizers
from token_superposition.engines.torchtitan.trainer import TSTTrainer
from token_superposition.errors import TokenSuperpositionError
from token_superposition.experiment.config import Config, load_config
from token_superposition.experiment.superposition import BASELINE


def tst_270m() -> TSTTrainer.Config:
    return trainer_config(load_config("270m"), "tst_270m")


def tst_600m() -> TSTTrainer.Config:
    return trainer_config(load_config("600m"), "tst_600m")


def tst_3b() -> TSTTrainer.Config:
    return trainer_config(load_config("3b"), "tst_3b")


def tst_10b_a1b() -> TSTTrainer.Config:
    return trainer_config(load_config("10b-a1b"), "tst_10b_a1b")


def baseline_270m() -> TSTTrainer.Config:
    return trainer_config(replace(load_config("270m"), superposition=BASELINE), "baseline_270m")


def baseline_600m() -> TSTTrainer.Config:
    return trainer_config(replace(load_config("600m"), superposition=BASELINE), "baseline_600m")


def baseline_3b() -> TSTTrainer.Config:
    return trainer_config(replace(load_config("3b"), superposition=BASELINE), "baseline_3b")


def baseline_10b_a1b() -> TSTTrainer.Config:
    return trainer_config(replace(load_config("10b-a1b"), superposition=BASELINE), "baseline_10b_a1b")


def trainer_config(config: Config, name: str) -> TSTTrainer.Config:
    """Our configuration of a run as torchtitan's, writing into ``./outputs/NAME``.

    Raises ``TokenSuperpositionError`` for a value that cannot be trained with.
    """
    config.check()
    t, data = config.train, config.data
    t.refuse_unsupported("torchtitan")
    if t.save_at:
        raise TokenSuperpositionError(
            f"train.save_at is {t.save_at}; torchtitan saves at multiples of train.save_every only"
        )
    adamw = {"lr": t.learning_rate, "betas": (t.beta1, t.beta2), "eps": 1e-8}
    decayed = adamw | {"weight_decay": t.weight_decay}
    groups = [(r"norm\.weight$|\.bias$", adamw | {"weight_decay": 0.0}), (r".*", decayed)]
    if t.embedding_lr_factor != 1:
        groups.insert(1, (EMBEDDINGS, decayed | {"lr": t.learning_rate * t.embedding_lr_factor}))
    start = config.model.path
    return TSTTrainer.Config(
        model=config.model,
        superposition=config.superposition,
        dump_folder=f"./outputs/{name}",
        hf_assets_path=str(Path(data.path) / "tokenizer"),
        dataloader=PlannedLoader.Config(dataset_path=data.path, seed=t.seed, num_workers=t.loader_workers),
        training=TrainingConfig(
            steps=t.steps,
            global_batch_size=t.batch_size,
            local_batch_size=t.micro_batch_size or -1,
            seq_len=data.sequence_length,
            max_norm=t.max_grad_norm or math.inf,  # 0 would be the norm of every gradient
            mixed_precision_param="float32" if t.precision == "float32" else "bfloat16",
        ),
        optimizer=StageOptimizers.Config(
            param_groups=[
                ParamGroupConfig(pattern=pattern, optimizer_name="AdamW", optimizer_kwargs=settings)
                for pattern, settings in groups
            ]
        ),
        lr_scheduler=LRSchedulersContainer.Config(
            warmup_steps=t.warmup_steps, decay_ratio=t.decay_ratio, decay_type="linear", min_lr_factor=0.0
        ),
        loss=ChunkedLossWrapper.Config(num_chunks=gcd(8, data.sequence_length), loss_fn=BagLoss.Config()),
        metrics=BagMetrics.Config(log_freq=t.log_every),
        parallelism=ParallelismConfig(),
        activation_checkpoint=FullAC.Config() if t.activation_checkpointing else None,
        compile=CompileConfig(enable=t.compile, components=["model"]),
        checkpoint=CheckpointManager.Config(
            enable=t.save_every > 0 or start is not None,
            interval=t.save_every or t.steps,
            last_save_model_only=False,
            keep_latest_k=0,
            initial_load_path=None if start is None else str(Path(start).resolve()),
            initial_load_in_hf=start is not None,
        ),
        validator=Validator.Config(
            enable=True,
            freq=t.eval_every,
            steps=1,
            dataloader=HeldOutLoader.Config(tokens=data.eval_tokens, final_tokens=data.final_eval_tokens),
        ),
        comm=CommConfig(train_timeout_seconds=ceil(60 * t.timeout_minutes)),
        debug=DebugConfig(seed=t.seed),
    )
