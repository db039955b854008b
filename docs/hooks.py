"""What the site does to the pages: the log of experiments becomes one, and links to files that the site does not hold
become their paths in the repository."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s#]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: Any) -> Files:
    files.append(File.generated(config, "log.md", content=(ROOT / "LOG.md").read_text()))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    source = "LOG.md" if page.file.src_uri == "log.md" else f"docs/{page.file.src_uri}"
    here = posixpath.dirname(page.file.src_uri)

    def link(found: re.Match[str]) -> str:
        image, text, target, anchor = found.groups()
        if ":" in target:
            return found[0]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        if path == "LOG.md" or path.startswith("docs/"):
            inside = "log.md" if path == "LOG.md" else path.removeprefix("docs/")
            return f"{image}[{text}]({posixpath.relpath(inside, here or '.')}{anchor or ''})"
        return text if path in text else f"{text} (`{path}`)"

    return LINK.sub(link, markdown)
