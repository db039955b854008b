"""Token-Superposition Training for anyone's model and training loop (arXiv 2605.06546).

Letters used in shapes: B batch, L latent positions of a sequence, s bag size, N rows (B * L), d width, V vocabulary.
Ids of shape (B, L) are ordinary; ids of shape (B, L, s) are bags.

The names below are loaded when they are first used, so that ``tst --help`` need not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from token_superposition.bags import fold, ragged_fold, span
    from token_superposition.embedding import bag_embedding, superpose, unsuperpose
    from token_superposition.errors import TokenSuperpositionError
    from token_superposition.loss import linear_multi_hot_cross_entropy, multi_hot_cross_entropy
    from token_superposition.schedule import WSD, Phase, Schedule
    from token_superposition.weights import place_weights

__version__ = "0.1.0"

__all__ = [
    "WSD",
    "Phase",
    "Schedule",
    "TokenSuperpositionError",
    "bag_embedding",
    "fold",
    "linear_multi_hot_cross_entropy",
    "multi_hot_cross_entropy",
    "place_weights",
    "ragged_fold",
    "span",
    "superpose",
    "unsuperpose",
]

_HOME = {
    "bags": ("fold", "ragged_fold", "span"),
    "embedding": ("bag_embedding", "superpose", "unsuperpose"),
    "errors": ("TokenSuperpositionError",),
    "loss": ("linear_multi_hot_cross_entropy", "multi_hot_cross_entropy"),
    "schedule": ("WSD", "Phase", "Schedule"),
    "weights": ("place_weights",),
}


def __getattr__(name: str) -> object:
    for module, names in _HOME.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
