"""Files of text are UTF-8 wherever they are written and read, whatever the locale of the machine."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import token_superposition

PACKAGE = Path(token_superposition.__file__).parent


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_every_file_of_text_is_opened_as_utf8(path: Path) -> None:
    """Ruff's PLW1514 (in preview) sees the encoding of those files alone whose type it infers."""
    for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute | ast.Name)):
            continue
        name = call.func.attr if isinstance(call.func, ast.Attribute) else call.func.id
        line = ast.unparse(call)
        binary = {"rb", "wb", "ab"} & {a.value for a in call.args if isinstance(a, ast.Constant)}
        if name in ("read_text", "write_text", "open") and not binary and not line.startswith("os.open("):
            assert "encoding='utf-8" in line, f"{path}:{call.lineno}: {line}"
