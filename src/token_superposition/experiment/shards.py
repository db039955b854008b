"""The pickles in torch's checkpoints: data is read, code is not, also where torch itself would not look."""

from __future__ import annotations

import os
import pickle
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from token_superposition.errors import TokenSuperpositionError

ALLOWED = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size", *(name for name in dir(torch) if isinstance(getattr(torch, name), torch.dtype))},
    "pathlib": {"PosixPath", "WindowsPath"},
    "pathlib._local": {"PosixPath", "WindowsPath"},  # of Python 3.13
}


FORCE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"


@contextmanager
def weights_only() -> Generator[None, None, None]:
    """Every ``torch.load`` inside is one of tensors and plain values, whatever it was told.

    That of torch's sharded checkpoints is told to load anything.
    """
    before = os.environ.get(FORCE)
    os.environ[FORCE] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[FORCE]
        else:
            os.environ[FORCE] = before


class _Metadata(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str) -> Any:
        if global_name not in ALLOWED.get(module_name, ()):
            raise pickle.UnpicklingError(f"{module_name}.{global_name}")
        return super().find_class(module_name, global_name)


def check_shards(checkpoint: Path) -> None:
    """Raises ``TokenSuperpositionError`` for metadata of shards that name anything but torch's own descriptions.

    torch reads them with ``pickle.load``, which would run what they name.
    """
    for path in checkpoint.rglob(".metadata"):
        with path.open("rb") as f:
            try:
                _Metadata(f).load()
            except Exception as e:  # whatever a forged pickle makes of its own classes
                raise TokenSuperpositionError(f"{path} is not what torch writes ({e}); nothing of it was run") from None
