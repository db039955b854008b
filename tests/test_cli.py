"""The command line: what a user types wrong has one line and exit code 2; comparison, report and samples are real."""

from __future__ import annotations

import io
import json
import logging
import math
import re
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import CONFIG, TINY, once, tiny, toml, tst
from tests.processes import call, command_on_a_full_disk, command_with_forks
from token_superposition import TokenSuperpositionError
from token_superposition.cli import COMMANDS, main
from token_superposition.cli.quiet import quiet
from token_superposition.experiment.checkpoints import newest_whole
from token_superposition.experiment.config import Config, load_config, save_config
from token_superposition.experiment.files import read_metrics
from token_superposition.experiment.generate import generate, load_model
from token_superposition.experiment.summary import equal_loss, loss_at
from token_superposition.experiment.tree import from_dict


def test_importing_the_core_loads_torch_and_nothing_above_it() -> None:
    script = (
        "import sys, token_superposition as t\n"
        "for name in t.__all__: getattr(t, name)\n"
        "above = {'transformers', 'accelerate', 'tokenizers', 'pyarrow', 'tyro', 'rich', 'matplotlib', 'jinja2'}\n"
        "assert 'torch' in sys.modules and not above & sys.modules.keys(), above & sys.modules.keys()\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_help_needs_no_heavy_import() -> None:
    script = (
        "import sys\nfrom token_superposition.cli import main\nassert main(['--help']) == 0\n"
        "assert not {'torch', 'transformers', 'tyro', 'numpy'} & sys.modules.keys()\n"
    )
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert all(command in done.stdout for command in COMMANDS)


def test_what_is_loaded_is_set_aside_once_and_garbage_is_collected_again() -> None:
    script = (
        "import gc\nfrom token_superposition.cli.loading import loading\n"
        "try:\n    with loading():\n        inside = gc.isenabled(); raise ImportError\nexcept ImportError:\n    pass\n"
        "assert not inside and gc.isenabled() and (count := gc.get_freeze_count()) > 1000\n"
        "later = [[] for _ in range(1000)]\nwith loading():\n    pass\n"
        "assert gc.isenabled() and gc.get_freeze_count() < count + 100\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_teaches(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    out = capsys.readouterr().out
    assert stop.value.code == 0 and "Example" in out
    if command == "train":
        assert "--superposition.bag-size" in out and "Contiguous tokens in a bag" in out


MISTAKES = [
    ({"bag_size": 0}, "bag_size is 0; give a whole number of at least 1"),
    ({"bag_size": 2.5}, "superposition: bag_size is 2.5; give int"),
    ({"ratio": 1.0}, "ratio is 1.0; give a share of the steps in"),
    ({"ratio": -0.1}, "ratio is -0.1"),
    ({"steps": 0}, "train.steps is 0"),
    ({"warmup_steps": 50}, "do not fit in 12 steps"),
    ({"sequence_length": 1}, "data.sequence_length is 1"),
    ({"sequence_length": 100_000}, "one block needs"),
    ({"architecture": "lama"}, "model.architecture is 'lama'; did you mean llama?"),
    ({"hidden_size": 31}, "model llama cannot be built"),
    ({"learning_rate": 0}, "learning_rate is 0.0"),
    ({"batch_size": "many"}, "batch_size is 'many'; give int"),
    ({"path": "nowhere"}, "nowhere holds no prepared data"),
]


@pytest.mark.parametrize(("changes", "message"), MISTAKES)
def test_a_wrong_value_has_one_line(
    changes: dict[str, object], message: str, write_config: Callable[..., Path], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert main(["train", str(write_config(**changes)), "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("tst: error: ") and error.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(torch.accelerator.is_available(), reason="only a CPU needs a C++ compiler")
def test_compiling_without_a_compiler_has_one_line(
    write_config: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setenv("CXX", "no-compiler")
    config = write_config(append="compile = true\n")
    assert main(["compare", str(config), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "no-compiler is not there" in error and "--train.no-compile" in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("append", "message"),
    [
        ("stepps = 3\n", "unknown key stepps; did you mean steps?"),
        ("[superpositon]\nbag_size = 2\n", "unknown key superpositon; did you mean superposition?"),
        ("[train\n", "is not a TOML file"),
        ("[[compare.variants]]\nname = 'tst'\n", "give each its own plain name"),
        ("[[compare.variants]]\nname = 'baseline-ema'\n", "no baseline..., and no ...-seed0"),
        ("[[compare.variants]]\nname = 'ema-seed1'\n", "no baseline..., and no ...-seed0"),
        ("[[compare.variants]]\nname = '_hidden'\n", "give each its own plain name"),
        (f"[[compare.variants]]\nname = '{'long' * 16}'\n", "at most 60 letters"),
        ("[compare]\nbaseline_lengths = [0]\n", "baseline_lengths are (0.0,); give numbers above 0"),
        ("[compare]\nbaseline_lengths = [inf]\n", "baseline_lengths are (inf,); give numbers above 0"),
        ("[compare]\nbaseline_lengths = [1.0, 0.04]\n", "has 0.04, of 12 steps not one; give at least 0.0833"),
        ("[compare]\nbaseline_lengths = [1.5, 1.501]\n", "of 12 steps; give lengths that differ by a step"),
        ("[compare]\nseeds = [-1]\n", "compare.seeds is -1"),
        ("[compare]\nseeds = 3\n", "compare: seeds is 3; give a list, in brackets"),
    ],
)
def test_a_wrong_file_has_one_line(
    append: str, message: str, write_config: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", str(write_config(append=append)), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "unknown command trian; did you mean train?"),
        (["train", "missing.toml"], "missing.toml does not exist"),
        (["train", "--train.steps", "2", "c.toml"], "c.toml, which comes first: tst train c.toml [OPTIONS]; see tst"),
        (["generate", "nowhere", "x"], "nowhere is no file or folder, nor a causal LM of the hub that can be loaded"),
        (["generate", "nowhere", "caf\udce9"], "not UTF-8: character 4 is '\\udce9'; give it in UTF-8"),
        (["report", "nowhere"], "nowhere holds no finished comparison"),
        (["demo", "--minutes", "-1", "--out", "d"], "minutes is -1.0"),
    ],
)
def test_a_wrong_argument_has_one_line(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not list(tmp_path.iterdir())


def test_what_is_looked_for_on_the_hub_in_vain_prints_nothing_of_its_own() -> None:
    """Its client tells of every attempt, beside our one line."""
    import huggingface_hub

    client = logging.getLogger("huggingface_hub.utils._http")
    huggingface_hub.logging.set_verbosity_warning()
    assert client.isEnabledFor(logging.WARNING)
    quiet()
    assert not client.isEnabledFor(logging.WARNING)


def test_unknown_options_of_the_model_and_small_vocabulary(
    write_config: Callable[..., Path], prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config()
    unknown = tmp_path / "unknown.toml"
    unknown.write_text(config.read_text().replace("hidden_size", "hidden_sise"))
    assert main(["train", str(unknown), "--out", str(tmp_path / "run")]) == 2
    assert "did you mean hidden_size?" in capsys.readouterr().err
    unknown.write_text("\ufeff" + config.read_text().replace("hidden_size = 32", "layer_types = ['attention']"))
    assert main(["train", str(unknown), "--out", str(tmp_path / "run")]) == 2
    assert "a model that needs more, save with transformers and name in model.path" in capsys.readouterr().err
    tiny("llama", vocab_size=64).save_pretrained(tmp_path / "small")
    content = config.read_text().replace("[model]", f"[model]\npath = '{tmp_path / 'small'}'")
    config.write_text(content)
    assert main(["train", str(config), "--out", str(tmp_path / "run")]) == 2
    assert "64 token embeddings, the data's vocabulary has 320" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_code_in_the_directory_of_a_model_is_not_run(
    write_config: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory, ran = tmp_path / "model", tmp_path / "ran"
    directory.mkdir()
    (directory / "code.py").write_text(f"open({str(ran)!r}, 'w')\n")
    names = {"AutoConfig": "code.Settings", "AutoModelForCausalLM": "code.Model"}
    (directory / "config.json").write_text(json.dumps({"model_type": "of-its-own", "auto_map": names}))
    config = write_config()
    config.write_text(config.read_text().replace("[model]", f"[model]\npath = '{directory}'"))
    assert main(["train", str(config), "--out", str(tmp_path / "run")]) == 2
    assert "cannot be built" in capsys.readouterr().err
    assert not ran.exists() and not (tmp_path / "run").exists()


def test_a_full_disk_while_training(write_config: Callable[..., Path], tmp_path: Path) -> None:
    arguments = ("train", str(write_config()), "--out", str(tmp_path / "run"))
    done = call(command_on_a_full_disk, 8192, *arguments)
    errors = [line for line in done.stderr.splitlines() if line.startswith("tst: error")]
    assert done.returncode == 2 and len(errors) == 1 and "cannot write" in errors[0], done.stderr
    assert not (tmp_path / "run/run.json").exists() and not (tmp_path / "run/model").exists()


def test_a_run_is_not_overwritten_by_another(write_config: Callable[..., Path], tmp_path: Path) -> None:
    out = tmp_path / "run"
    tst("train", write_config(save_every=4), "--out", out)
    again = tst("train", write_config(save_every=4), "--out", out, check=False)
    assert again.returncode == 2 and "holds a finished run" in again.stderr
    (out / "run.json").unlink()
    other = tst("train", write_config(save_every=4, learning_rate=1.0), "--out", out, check=False)
    assert other.returncode == 2 and "learning_rate 0.003 -> 1.0" in other.stderr


def test_configuration_survives_the_file(write_config: Callable[..., Path], tmp_path: Path) -> None:
    extra = "[compare]\nseeds = [1, 2]\n[[compare.variants]]\nname = 's2'\n"
    extra += "superposition = {bag_size = 2, anneal = [4, 2]}\n"
    config = load_config(write_config(append=extra))
    save_config(config, tmp_path / "copy.toml")
    assert load_config(tmp_path / "copy.toml") == config
    assert config.compare.variants[0].superposition.anneal == (4, 2)
    assert from_dict(Config, {}, "empty") == Config()


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
KEYS = st.sampled_from(
    ["model", "data", "superposition", "train", "compare", "steps", "seeds", "variants", "bag_size", "x"]
)


@given(st.dictionaries(KEYS, VALUES | st.dictionaries(KEYS, VALUES)))
def test_any_table_is_a_configuration_or_one_clear_error(content: dict[str, object]) -> None:
    try:
        from_dict(Config, content, "file").check()
    except TokenSuperpositionError as e:
        assert str(e)


@pytest.fixture(scope="module")
def comparison(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished comparison. Other workers read it, too: a test that changes it takes a copy."""
    options = "\n".join(f"{k} = {toml(v)}" for k, v in TINY["llama"].items())
    content = CONFIG.format(architecture="llama", options=options, data=prepared)
    content += "[compare]\nbaseline_lengths = [1.5]\n[[compare.variants]]\nname = 'input'\n"
    content += "superposition = {bag_size = 4, ratio = 0.5, sides = 'input'}\n"

    def make(root: Path) -> None:
        (root / "config.toml").write_text(content)
        tst("compare", root / "config.toml", "--out", root / "out")

    return once(tmp_path_factory, "comparison", make) / "out"


def test_compare_writes_what_it_promises(comparison: Path) -> None:
    summary = json.loads((comparison / "summary.json").read_text())
    runs = {r["name"]: r for r in summary["runs"]}
    assert list(runs) == ["baseline", "tst", "input", "baseline-x1.5"]
    for name, run in runs.items():
        assert (comparison / "runs" / run["directory"] / "model/model.safetensors").exists()
        assert (comparison / "runs" / run["directory"] / "metrics.jsonl").exists(), name
    assert runs["tst"]["flops"] == runs["baseline"]["flops"] == runs["input"]["flops"]
    assert runs["tst"]["raw_tokens"] == 2.5 * runs["baseline"]["raw_tokens"]
    assert runs["tst"]["latent_tokens"] == runs["baseline"]["latent_tokens"] == 12 * 4 * 16
    result = summary["comparison"]
    assert result["delta_val_loss"] == runs["tst"]["val_loss"] - runs["baseline"]["val_loss"]
    assert result["variants"]["input"]["delta_val_loss"] == runs["input"]["val_loss"] - runs["baseline"]["val_loss"]
    assert result["equal_data"]["baseline_steps"] == 30
    assert {s["name"] for s in summary["samples"]} == {"baseline", "tst", "input"}


def test_a_branch_off_the_longer_baseline_is_the_short_run(comparison: Path, tmp_path: Path) -> None:
    """The shared part is trained once; the result is the run that was trained alone, to the bit."""
    branched = comparison / "runs/baseline"
    config = tmp_path / "alone.toml"
    shutil.copy(branched / "config.toml", config)
    tst("train", config, "--out", tmp_path / "alone", OMP_NUM_THREADS="1")
    weights = [p / "model/model.safetensors" for p in (branched, tmp_path / "alone")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    lines = [
        [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in (p / "metrics.jsonl").open()]
        for p in (branched, tmp_path / "alone")
    ]
    assert lines[0] == lines[1]


def test_compare_goes_on_with_what_is_not_done(comparison: Path, tmp_path: Path) -> None:
    comparison = shutil.copytree(comparison, tmp_path / "copy")
    before = {p: p.stat().st_mtime_ns for p in comparison.glob("runs/*/run.json")}
    (comparison / "runs/input/run.json").unlink()
    shutil.rmtree(comparison / "runs/input/model")
    tst("compare", comparison / "config.toml", "--out", comparison, target=command_with_forks)
    after = {p: p.stat().st_mtime_ns for p in comparison.glob("runs/*/run.json")}
    assert {p.parent.name for p in before if after[p] != before[p]} == {"input"}


def test_the_report_is_one_whole_file_without_network(comparison: Path, tmp_path: Path) -> None:
    comparison = shutil.copytree(comparison, tmp_path / "copy")
    (comparison / "report.html").unlink()
    done = tst("report", comparison)
    assert "equal FLOPs" in done.stdout and "tst" in done.stdout
    page = (comparison / "report.html").read_text()
    assert page.count("<svg") == 3 and page.count("</html>") == 1
    loaded = re.findall(r'(?:src|href)="(?!#)([^"]*)"', page.replace("xlink:href", "href"))
    assert not [url for url in loaded if not url.startswith("#")]
    assert "<script" not in page and "url(http" not in page and "@import" not in page
    for expected in ("Equal FLOPs", "Loss against time", "raw tokens read", "equal loss", "equal data", "Hardware"):
        assert expected in page
    assert tomllib.loads((comparison / "config.toml").read_text())["train"]["steps"] == 12


def test_generate_continues_the_prompt_and_repeats_itself(comparison: Path) -> None:
    model = comparison / "runs/tst/model"
    first = tst("generate", model, "The river", "--max-new-tokens", "5").stdout
    assert first.startswith("The river") and len(first) > len("The river\n")
    assert tst("generate", model, "The river", "--max-new-tokens", "5").stdout == first


def test_a_prompt_may_come_from_standard_input(
    comparison: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = str(comparison / "runs/tst/model")

    def continued(prompt: str, given: bytes = b"") -> str:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(given)))
        main(["generate", model, prompt, "--max-new-tokens", "5"])
        return "".join(capsys.readouterr())

    assert continued("-", "Où\nva le fleuve ?\n".encode()) == continued("Où\nva le fleuve ?")
    assert "the prompt is not UTF-8: character 2 is" in continued("-", b"a\xff")


def test_top_p_alone_decides_from_how_many_tokens_is_drawn(comparison: Path) -> None:
    model, tokenizer = load_model(comparison / "runs/tst/model")
    told = {generate(model, tokenizer, "The", 1, temperature=1e4, top_p=1.0, seed=seed) for seed in range(200)}
    assert len(told) > 60  # of 320
    assert len({generate(model, tokenizer, "The", 1, temperature=1e4, top_p=0.01, seed=seed) for seed in range(99)}) < 5


def test_a_terminated_comparison_leaves_no_run_behind(write_config: Callable[..., Path], tmp_path: Path) -> None:
    """The runs are told, save a checkpoint each, also without save_every, and end."""
    out = tmp_path / "terminated"
    command = [sys.executable, "-m", "token_superposition", "compare", write_config(steps=100_000), "--out", out]

    def training() -> list[Path]:
        """Processes whose command line names the output: the comparison and its runs."""
        lines = list(Path("/proc").glob("[0-9]*/cmdline"))
        return [p for p in lines if p.exists() and str(out).encode() in p.read_bytes()]

    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL)
    try:
        wait_for(lambda: any(read_metrics(p) for p in out.glob("runs/*/metrics.jsonl")))
        assert len(training()) >= 2
    finally:
        process.terminate()
    assert process.wait(120) == 143
    wait_for(lambda: not training())
    begun = [p.parent for p in out.glob("runs/*/metrics.jsonl") if read_metrics(p)]
    assert begun and all(newest_whole(run / "checkpoints") for run in begun)


def wait_for(condition: Callable[[], bool], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_equal_loss_is_read_off_the_baselines() -> None:
    curve = [(500, 3.4), (1000, 3.2), (2000, 3.0)]
    assert equal_loss(curve, 3.1, 1000).baseline_steps == 1414  # pyright: ignore  # half-way in log steps
    inside, below = equal_loss(curve, 3.1, 1000), equal_loss(curve, 2.9, 1000)
    assert inside is not None and inside.how == "interpolated" and inside.speedup == pytest.approx(2**0.5, rel=1e-3)
    assert below is not None and below.how == "at least" and below.baseline_steps == 2000
    short = equal_loss(curve[:2], 3.1, 1000)
    assert short is not None and short.how == "extrapolated" and short.baseline_steps == 1414
    above = equal_loss(curve, 3.5, 1000)
    assert above is not None and (above.how, above.baseline_steps) == ("at most", 500)
    assert equal_loss(curve[:1], 3.1, 1000) is None and equal_loss(curve, math.nan, 1000) is None
    assert loss_at(curve, 1000) == (3.2, "measured")
    value, how = loss_at(curve, 1414)
    assert value == pytest.approx(3.1, abs=1e-4) and how == "interpolated"
    assert loss_at(curve, 4000) == loss_at(curve, 400) == (None, "not run")
