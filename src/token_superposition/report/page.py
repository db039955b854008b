"""``report.html``: one file, no network."""

from __future__ import annotations

import importlib.resources
from pathlib import Path

from token_superposition.report.contents import HEADERS, INTERVAL_HEADERS, interval_rows, read, rows, verdicts


def write_report(directory: str | Path) -> Path:
    """Write ``report.html`` from ``summary.json`` and the runs' metrics; returns its path.

    Raises ``TokenSuperpositionError`` if ``directory`` holds no finished comparison.
    """
    directory = Path(directory)
    contents = read(directory)
    import jinja2

    from token_superposition.report.figures import pictures

    source = importlib.resources.files("token_superposition.report").joinpath("template.html.j2").read_text()
    template = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(source)
    first = contents.runs[0]
    page = template.render(
        pictures=pictures(contents),
        headers=HEADERS,
        rows=rows(contents),
        interval_headers=INTERVAL_HEADERS,
        interval_rows=interval_rows(contents),
        verdicts=verdicts(contents),
        note=contents.summary.get("note"),
        samples=contents.summary.get("samples", []),
        config=contents.config_text,
        hardware=first["hardware"],
        versions=first["versions"],
        parameters=first["parameters"],
        data=contents.summary["data"],
        flops=first["flops"],
    )
    path = directory / "report.html"
    partial = directory / ".report.html.partial"
    partial.write_text(page)
    partial.rename(path)
    return path
