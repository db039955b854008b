"""Another user: the super-user, as whom tests often run, may read and write every file."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def without_privileges(directory: Path) -> Iterator[None]:
    """Be nobody for a while, who may come to ``directory``; who is not the super-user stays who they are."""
    for parent in (directory, *directory.parents):  # pytest's own are of the user alone
        if parent.owner() == directory.owner() and parent.stat().st_mode & 0o777 == 0o700:
            parent.chmod(0o755)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)
