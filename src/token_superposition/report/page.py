"""``report.html``: one file, no network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from token_superposition.experiment.files import SWEEP, write_whole
from token_superposition.report.cautions import ARM_HEADERS, arms, cautions, versions_of
from token_superposition.report.contents import HEADERS, interval_table, read, rows
from token_superposition.report.verdicts import bottom_line, verdicts


def write_report(directory: str | Path) -> Path:
    """Write ``report.html`` of a comparison or a sweep from what its directory holds; returns its path.

    Raises ``TokenSuperpositionError`` if ``directory`` holds neither, finished.
    """
    directory = Path(directory)
    import jinja2

    loader = jinja2.PackageLoader("token_superposition", "report")
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined)
    if is_sweep(directory):
        page = environment.get_template("sweep.html.j2").render(**_sweep(directory))
    else:
        page = environment.get_template("comparison.html.j2").render(**_comparison(directory))
    path = directory / "report.html"
    write_whole(path, page)
    return path


def is_sweep(directory: Path) -> bool:
    return (directory / SWEEP).exists()


def _comparison(directory: Path) -> dict[str, Any]:
    from token_superposition.report.figures import pictures

    contents = read(directory)
    first = contents.runs[0]
    return {
        "title": "comparison",
        "pictures": pictures(contents),
        "headers": HEADERS,
        "rows": rows(contents),
        "arm_headers": ARM_HEADERS,
        "arms": arms(contents.runs),
        "intervals": interval_table(contents),
        "bottom_line": bottom_line(contents),
        "verdicts": verdicts(contents),
        "cautions": cautions(contents),
        "note": contents.summary["note"],
        "samples": contents.summary["samples"],
        "config": contents.config_text,
        "hardware": "; ".join(dict.fromkeys(r.hardware for r in contents.runs)),
        "versions": "; ".join(dict.fromkeys(map(versions_of, contents.runs))),
        "parameters": first.parameters,
        "data": contents.summary["data"],
        "flops": first.flops,
    }


def _sweep(directory: Path) -> dict[str, Any]:
    from token_superposition.report.sweep import about, headers, read_sweep, sentences, sweep_rows
    from token_superposition.report.sweep_figures import sweep_pictures

    contents = read_sweep(directory)
    return {
        "title": "sweep",
        "pictures": sweep_pictures(contents),
        "headers": headers(contents),
        "rows": sweep_rows(contents),
        "sentences": sentences(contents),
        "about": about(contents),
        "config": contents.config_text,
    }
