"""Files of a run: whole or not at all, and metrics that another process is still writing."""

from __future__ import annotations

import json
import resource
import signal
from pathlib import Path

from tests.processes import call
from token_superposition.experiment.config import Config, save_config
from token_superposition.experiment.files import NEWEST, GrowingMetrics, read_metrics, write_metrics


def _save_on_a_full_disk(path: str) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # writing beyond the limit is an error then
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
    try:
        save_config(Config(), Path(path))
    except OSError:
        raise SystemExit(7) from None


def test_a_configuration_on_a_full_disk_leaves_the_one_before(tmp_path: Path) -> None:
    """An empty one would be read as another configuration, and the comparison refused."""
    path = tmp_path / "config.toml"
    path.write_text("[train]\nsteps = 3\n")
    assert call(_save_on_a_full_disk, str(path)).returncode == 7
    assert path.read_text() == "[train]\nsteps = 3\n" and [p.name for p in tmp_path.iterdir()] == ["config.toml"]


def test_metrics_are_read_on_while_they_grow(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    growing = GrowingMetrics(path)
    assert growing.read() == []
    lines = [{"step": i, "loss": 1.0} for i in range(1, NEWEST + 50)]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    for end in (5, 400, 401, len(text) - 1, len(text)):  # in the middle of lines
        path.write_text(text[:end])
        assert growing.read()[-1:] == read_metrics(path)[-1:] or text[:end][-1:] != "\n"
    assert growing.read() == [lines[0], *lines[-NEWEST:]]
    write_metrics(path, lines[:3])  # the run goes on from a checkpoint
    assert growing.read() == lines[:3]
