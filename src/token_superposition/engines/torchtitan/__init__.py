"""Token superposition for torchtitan.

``python -m torchtitan.train --module token_superposition.engines.torchtitan --config tst_600m`` trains a preset; see
``config_registry``. Nothing in torchtitan is patched: the trainer, the loader, the embedding, the loss and the metrics
are subclasses that its configuration tree names.
"""

from importlib.metadata import PackageNotFoundError, version

from token_superposition.errors import TokenSuperpositionError

REQUIRED = "0.3.0"  # its interfaces change with every release

try:
    installed = version("torchtitan")
except PackageNotFoundError:
    installed = None
if installed != REQUIRED:
    raise TokenSuperpositionError(
        f"the torchtitan engine needs torchtitan=={REQUIRED}, {installed or 'none'} is installed; "
        "pip install 'token-superposition[torchtitan]'"
    )

from token_superposition.engines.torchtitan.trainer import TSTTrainer  # noqa: E402

__all__ = ["TSTTrainer"]
