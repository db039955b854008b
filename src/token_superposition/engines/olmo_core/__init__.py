"""Token superposition for OLMo-core (``pip install 'token-superposition[olmo]'``).

The command: ``torchrun --nproc-per-node 8 -m token_superposition.engines.olmo_core CONFIG.toml --out run``.
In a training script of your own, the names below take the places of OLMo-core's: ``PlannedDataLoader`` reads the plan,
``TSTTrainModule`` is a ``TransformerTrainModule`` that trains on bags, ``TSTLMHeadConfig`` a ``LMHeadConfig``.

The names are loaded when they are first used, so that a missing or wrong OLMo-core is one clear error.
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from token_superposition.errors import TokenSuperpositionError

if TYPE_CHECKING:
    from token_superposition.engines.olmo_core.data import PlannedDataLoader
    from token_superposition.engines.olmo_core.export import export_model, load_weights
    from token_superposition.engines.olmo_core.model import TSTLMHead, TSTLMHeadConfig, transformer_config
    from token_superposition.engines.olmo_core.module import PlannedWSD, TSTSpeedMonitor, TSTTrainModule
    from token_superposition.engines.olmo_core.train import train

__all__ = [
    "PlannedDataLoader",
    "PlannedWSD",
    "TSTLMHead",
    "TSTLMHeadConfig",
    "TSTSpeedMonitor",
    "TSTTrainModule",
    "export_model",
    "load_weights",
    "train",
    "transformer_config",
]

_HOME = {
    "data": ("PlannedDataLoader",),
    "export": ("export_model", "load_weights"),
    "model": ("TSTLMHead", "TSTLMHeadConfig", "transformer_config"),
    "module": ("PlannedWSD", "TSTSpeedMonitor", "TSTTrainModule"),
    "train": ("train",),
}


def require_engine() -> None:
    """Raise ``TokenSuperpositionError`` unless the OLMo-core that this adapter is written for is installed."""
    try:
        found = version("ai2-olmo-core")
    except PackageNotFoundError:
        found = None
    if found is None or found.split(".")[:2] != ["3", "0"]:
        have = "it is not installed" if found is None else f"{found} is installed"
        raise TokenSuperpositionError(
            f"the OLMo-core engine needs ai2-olmo-core>=3.0,<3.1, {have}; pip install 'token-superposition[olmo]'"
        )


def __getattr__(name: str) -> object:
    for module, names in _HOME.items():
        if name in names:
            require_engine()
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
