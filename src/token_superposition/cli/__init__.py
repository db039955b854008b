"""The command ``tst``: one module per command, imported when it is called."""

from __future__ import annotations

import errno
import importlib
import os
import signal
import sys
import threading
from collections.abc import Sequence

from token_superposition.experiment.terminal import is_closed, leave_terminal

COMMANDS = {
    "demo": "train a small model with and without TST on this machine's own text, and show the difference",
    "prepare": "turn text, code, JSON lines or Parquet into a token store",
    "verify": "read data and runs again from end to end and name every damaged file",
    "plan": "what a run would cost, and what the paper's results say about it",
    "train": "train one model from a TOML file or a preset",
    "compare": "train a baseline and TST at equal compute, and write the report",
    "sweep": "try bag sizes, ratios, place weights, schedules and learning rates, and find the best",
    "eval": "loss and bits per byte of a model on held-out text, and benchmark tasks",
    "export": "write a run's model as a directory that stock transformers loads",
    "generate": "continue a prompt with a trained model",
    "report": "write the report of a comparison or a sweep again",
}

WRITE_ERRORS = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.ENOTDIR,
    errno.ENAMETOOLONG,
    errno.EEXIST,
    errno.EISDIR,
)

HELP = f"""\
tst: Token-Superposition Training (arXiv 2605.06546)

usage: tst COMMAND [OPTIONS]

commands:
{chr(10).join(f"  {name:<10} {what}" for name, what in COMMANDS.items())}

start here:
  tst demo                                        ten minutes, no configuration, no network
  tst prepare docs/ 'src/**/*.py' --out data      your own text
  tst verify data                                 is every file whole?
  tst compare config.toml --out comparison        with and without TST, on your text
  tst sweep config.toml --sweep.bag-sizes 2 4 8 --sweep.ratios 0.2 0.3 0.4 --out sweep
  tst train config.toml --superposition.bag-size 8 --out run
  tst plan 600m --gpus 64                         the paper's models: 270m, 600m, 3b, 10b-a1b
  tst generate run/model "def main("
  tst eval run/model --data data                  loss, perplexity, bits per byte
  tst export run my-model --dtype bfloat16        for stock transformers, with a model card

tst COMMAND --help explains every option.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command. Exit status: 0 done, 1 failed, 2 unusable input (one line says what to do), 130 interrupted,
    141 nobody reads what is printed (``tst ... | head``), 143 terminated (tst train has
    saved a checkpoint)."""
    try:
        try:
            return _main(list(sys.argv[1:] if argv is None else argv))
        finally:
            sys.stdout.flush()
    except (BrokenPipeError, SystemExit) as e:
        if isinstance(e, SystemExit) and not isinstance(e.__context__, BrokenPipeError):  # which rich turns into one
            raise
        closed = [stream for stream in (sys.stdout, sys.stderr) if is_closed(stream)]
        if isinstance(e, BrokenPipeError) and not closed:
            raise
        for stream in closed:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # for what is left to be written
        return 141


def _end_by_signals() -> None:
    """So that whatever was started is stopped, too. Under nohup SIGHUP is ignored, and stays so."""

    def hang_up(*_: object) -> None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # shell and terminal send one each
        leave_terminal()
        sys.exit(143)

    for s in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(s, lambda *_: sys.exit(143))
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        signal.signal(signal.SIGHUP, hang_up)


def _main(args: list[str]) -> int:
    if not args or args[0] in ("-h", "--help", "help"):
        print(HELP, end="")
        return 0 if args else 2
    if args[0] in ("-V", "--version"):
        from importlib.metadata import version

        print(f"tst {version('token-superposition')}")
        return 0
    command, rest = args[0], args[1:]
    if command not in COMMANDS:
        import difflib

        near = difflib.get_close_matches(command, COMMANDS, 1)
        hint = f"did you mean {near[0]}?" if near else f"the commands are {', '.join(COMMANDS)}"
        return _fail(f"unknown command {command}; {hint}")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    if threading.current_thread() is threading.main_thread():
        _end_by_signals()
    try:
        importlib.import_module(f"token_superposition.cli.{command}").run(rest)
    except KeyboardInterrupt:
        print(f"tst {command}: interrupted", file=sys.stderr)
        return 130
    except Exception as e:
        message = _explain(e)
        if message is None:
            raise
        return _fail(message)
    return 0


def _explain(e: Exception) -> str | None:
    """The line for the user, if the error is of the input or of the machine rather than of this program."""
    from token_superposition.errors import TokenSuperpositionError, errno_in

    if isinstance(e, TokenSuperpositionError):
        return str(e).rpartition("TokenSuperpositionError: ")[2].strip()  # a worker of a loader adds its traceback
    if isinstance(e, OSError) and e.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"cannot read or write {e.filename} ({e.strerror}); change its permissions or give another place"
    if isinstance(e, OSError) and e.errno in WRITE_ERRORS:
        return f"cannot write {e.filename or 'the output'} ({e.strerror}); free the disk or choose another --out"
    if (number := errno_in(e)) in WRITE_ERRORS:
        return f"cannot write the output ({os.strerror(number)}); free the disk or choose another --out"
    return None


def _fail(message: str) -> int:
    print(f"tst: error: {message}", file=sys.stderr)
    return 2
