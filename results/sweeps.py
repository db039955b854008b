"""A sweep on the findings page: its question, the sentences, table and pictures of its report."""

from __future__ import annotations

import tomllib
from pathlib import Path

from results.kept import kept_at
from token_superposition.report.sweep import about, headers, read_sweep, sentences, sweep_rows
from token_superposition.report.sweep_figures import sweep_pictures


def section(folder: Path, docs: Path) -> str:
    """In Markdown; the pictures are written into ``docs``."""
    contents = read_sweep(folder)
    question = tomllib.loads((folder / "about.toml").read_text())
    made = dict(about(contents))
    lines = [
        f"### {folder.name}: {question['question']}",
        "",
        f"Text: {question['text']}. {made['Model']}; each run {made['Each run']}.",
        "",
        *(f"- {what}: {text}" for what, text in sentences(contents)),
        "",
        row(headers(contents)),
        row(["---"] * len(headers(contents))),
        *map(row, sweep_rows(contents)),
        "",
    ]
    for number, picture in enumerate(sweep_pictures(contents), 1):
        name = f"findings_{folder.name}_{number}.svg"
        (docs / name).write_text(picture.svg)
        lines += [f"![{picture.alt}]({name})", "", f"*{picture.title}.*", ""]
    lines += [
        f"`{question['command']}`{kept_at(question)}; {made['Hardware']}; {made['Versions']}; "
        f"[results/{folder.name}](../results/{folder.name}).",
        "",
        *((question["note"], "") if "note" in question else ()),
    ]
    return "\n".join(lines)


def row(cells: list[str] | tuple[str, ...]) -> str:
    return f"| {' | '.join(cells)} |"
