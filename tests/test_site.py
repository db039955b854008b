"""The documentation site is built without a warning and fetches nothing; its tutorial runs as it stands."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from mkdocs.commands.build import build
from mkdocs.config import load_config

from tests.conftest import tst
from tests.processes import command_with_forks

ROOT = Path(__file__).parent.parent
TUTORIAL = (ROOT / "docs/tutorial.md").read_text()


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("site")
    build(load_config(str(ROOT / "mkdocs.yml"), strict=True, site_dir=str(directory)))
    return directory


def test_every_page_is_there_and_fetches_nothing(site: Path, caplog: pytest.LogCaptureFixture) -> None:
    pages = list(site.glob("**/index.html"))
    expected = {p.relative_to(ROOT / "docs").with_suffix("").as_posix() for p in (ROOT / "docs").glob("**/*.md")}
    assert {p.parent.relative_to(site).as_posix() for p in pages} == expected - {"index"} | {".", "log"}
    for page in pages:
        content = page.read_text()
        assert not re.findall(r'<(?:script|img|iframe)[^>]*src="?(?:https?:)?//', content), page
        assert not re.findall(r'<link[^>]*rel="?(?:stylesheet|preconnect)"?[^>]*href="?(?:https?:)?//', content), page
        for image in re.findall(r"<img[^>]*>", content):
            assert re.search(r'alt="[^"]{20,}"', image), image
    for sheet in site.glob("**/*.css"):
        assert not re.search(r"(?:url\(|@import)[\"' ]*(?:https?:)?//", sheet.read_text()), sheet


def test_links_inside_the_site_lead_somewhere(site: Path) -> None:
    for page in site.glob("**/index.html"):
        for target in re.findall(r'(?:href|src)="([^"#:]+)(?:#[^"]*)?"', page.read_text()):
            there = (page.parent / target).resolve()
            assert there.is_file() or (there / "index.html").is_file(), (page, target)


def test_the_reference_has_what_is_public(site: Path) -> None:
    import token_superposition

    content = (site / "reference/index.html").read_text()
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("*.py")]
    imported = r"^[ +]*from token_superposition[\w.]* import (?:\(([^)]*)\)|(.*))$"
    texts = [a or b for page in pages for a, b in re.findall(imported, page.read_text(), re.M)]
    names = {name for text in texts for name in re.findall(r"\w+", text)}
    assert {"TSTTrainer", "export_model"} <= names
    for name in names.union(token_superposition.__all__):
        assert re.search(rf'<h[3-5] id="token_superposition\.[\w.]*{name}"', content), name
    (signature,) = re.findall(r"<code>.*?PlannedDataset</span>.*?</code>", content.replace("\n", " "))[:1]
    assert "sequence_length" in signature  # arguments are seen without unfolding the source
    assert "&gt;&gt;&gt;" in content and "<blockquote>" not in content  # examples are code


def test_the_search_finds_pages(site: Path) -> None:
    index = json.loads((site / "search/search_index.json").read_text())
    assert {"tutorial/", "log/", "reference/"} <= {d["location"] for d in index["docs"]}


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}[^\n]*\n(.*?)```", TUTORIAL, re.S)


def commands(settings: str) -> Iterator[list[str]]:
    """What the shell makes of the page's commands with other settings in its first block."""
    first, *rest = blocks("bash")
    names = re.findall(r"(?m)^(\w+)=", first)
    assert names == re.findall(r"(?m)^(\w+)=", settings)
    script = "tst() { printf '%s\\037' \"$@\"; printf '\\036'; }\n" + settings + "\n".join(rest)
    done = subprocess.run(["bash", "-euc", script], capture_output=True, text=True, check=True)
    for command in done.stdout.split("\036")[:-1]:
        yield command.split("\037")[:-1]


def test_tutorial(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "`STEPS=4`" in TUTORIAL and "with 4 steps and a small folder" in TUTORIAL
    monkeypatch.chdir(tmp_path)
    (title,) = re.findall(r'```toml title="(.+)"', TUTORIAL)
    (configuration,) = blocks("toml")
    Path(title).write_text(configuration)
    ran: list[str] = []
    for command in commands(f"SOURCE='{prepared.parent}/text'\nSTEPS=4\n"):
        before = set(tmp_path.iterdir())
        done = tst(*command, target=command_with_forks)
        ran.append(command[0])
        if "--dry-run" in command:
            assert set(tmp_path.iterdir()) == before and "Nothing was written" in done.stdout
        if command[0] == "generate":
            assert done.stdout.startswith("def main(")
    assert ran == ["prepare", "compare", "compare", "generate", "train"]
    summary = json.loads(Path("comparison/summary.json").read_text())
    runs = {r["name"]: r for r in summary["runs"]}
    assert runs["tst"]["steps"] == 4 and runs["tst"]["flops"] == runs["baseline"]["flops"]
    assert Path("comparison/report.html").exists() and (tmp_path / "run/model/model.safetensors").exists()
    for block in blocks("python"):
        exec(block, {})
