"""The examples in the help of every command are commands."""

from __future__ import annotations

import importlib
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from token_superposition import TokenSuperpositionError
from token_superposition.cli import COMMANDS, HELP, main
from token_superposition.cli.arguments import parse


class Parsed(Exception):
    """The command was understood; it is not run."""


def stop_after_parsing(*args: Any, **kwargs: Any) -> None:
    raise Parsed(parse(*args, **kwargs))


def examples(command: str) -> list[str]:
    """Lines of its help that begin with the command, and one for each line of further options below it."""
    module = importlib.import_module(f"token_superposition.cli.{command}")
    text = getattr(module, f"{command.title()}Command").__doc__.partition("Example")[2]
    found = re.findall(rf"tst {command} (?:\S+ ?)+", text)  # up to a comment, which two spaces set off
    further = re.findall(r"(?m)^ +(--\S+(?: [^ -]\S*)*) {2,}\S", text)
    found = [line.partition(" && ")[0] for line in found]
    return [*found, *(f"tst {command} config.toml {options}" for options in further)]


@pytest.mark.parametrize("command", COMMANDS)
def test_examples_of_a_command(
    command: str, write_config: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_config()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(f"token_superposition.cli.{command}.parse", stop_after_parsing)
    lines = examples(command)
    assert lines
    for line in lines:
        with pytest.raises(Parsed):
            main(shlex.split(line)[1:])


def test_examples_of_the_first_page(
    write_config: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_config()
    monkeypatch.chdir(tmp_path)
    lines = re.findall(r"(?m)^  (tst \w+.*)", HELP)
    assert len(lines) >= 6
    for line in lines:
        words = shlex.split(line.partition("   ")[0])
        monkeypatch.setattr(f"token_superposition.cli.{words[1]}.parse", stop_after_parsing)
        with pytest.raises(Parsed):
            main(words[1:])


@pytest.mark.parametrize(
    ("said", "expected"),
    [("", "the arguments do not fit"), ("unknown\n", "unknown"), ("Error\n-----\n", "Error -----")],
)
def test_what_tyro_says_without_a_box_is_told_as_it_is(
    said: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        print(said, end="", file=sys.stderr)
        raise SystemExit(2)

    monkeypatch.setattr("tyro.cli", refuse)
    with pytest.raises(TokenSuperpositionError, match=f"^{expected}; see tst x --help$"):
        parse(Parsed, "x", ["--y"])


def test_a_wrong_example_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("token_superposition.cli.report.parse", stop_after_parsing)
    assert main(["report", "comparison", "--no-such-option"]) == 2
