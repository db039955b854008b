"""Keep other libraries' chatter off the terminal; our own warnings become one line each."""

from __future__ import annotations

import os
import sys
import warnings


def quiet() -> None:
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    import huggingface_hub
    import transformers

    huggingface_hub.logging.set_verbosity_error()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", module=r"(torch|transformers|accelerate)\b.*")

    def show(message: Warning | str, category: type[Warning], filename: str, lineno: int, *rest: object) -> None:
        print(f"tst: warning: {message}", file=sys.stderr)

    warnings.showwarning = show
