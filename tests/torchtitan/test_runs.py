"""The torchtitan engine against the transformers engine, on real processes."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.conftest import VOCAB
from tests.torchtitan.conftest import RUNS
from token_superposition.data.store import Meta
from token_superposition.engines.torchtitan.models import checked_settings, model_spec
from token_superposition.experiment.config import ModelConfig
from token_superposition.experiment.files import read_metrics

References = Callable[[str], list[dict[str, Any]]]


def column(lines: list[dict[str, Any]], key: str) -> dict[int, Any]:
    return {m["step"]: m[key] for m in lines if key in m}


def scalars(run: Path) -> Callable[[str], list[float]]:
    """torchtitan's own log of a run, as it writes it for TensorBoard."""
    log = EventAccumulator(str(next((run / "tb").iterdir())))
    log.Reload()
    return lambda name: [e.value for e in log.Scalars(name)]


@pytest.mark.parametrize("name", RUNS)
def test_curve_is_that_of_transformers(name: str, runs: Path, references: References) -> None:
    """Same weights, text and schedule: the same losses in both phases.

    Tolerances: 1e-5 for dense models; torchtitan computes experts in bfloat16 always, so 1e-3 for those.
    """
    ours, theirs = read_metrics(runs / name / "metrics.jsonl"), references(RUNS[name][0])
    experts = RUNS[name][0] in ("moe", "balanced")
    rel = 1e-3 if experts else 1e-5
    loss = column(ours, "loss")
    assert list(loss) == list(range(1, 13)) and loss[1] == pytest.approx(math.log(VOCAB), abs=0.1)
    if RUNS[name][0] != "balanced":  # transformers logs the auxiliary loss as part of the loss
        assert loss == pytest.approx(column(theirs, "loss"), rel=rel)
    norms, expected = column(ours, "grad_norm"), column(theirs, "grad_norm")
    assert norms[1] == pytest.approx(expected[1], rel=1e-3 if experts else 1e-4)
    if name != "balanced-ep":  # later one position that bfloat16 sends to another expert changes its gradient visibly
        assert norms == pytest.approx(expected, rel=5e-2 if experts else 1e-4)
    assert column(ours, "learning_rate") == pytest.approx(column(theirs, "learning_rate"), rel=1e-12)
    for key in ("input_bag", "output_bag", "latent_tokens", "raw_tokens"):
        assert column(ours, key) == {s: v for s, v in column(theirs, key).items() if s in loss}, key
        assert all(key in m for m in ours), key
    validation, expected = ([(m["step"], m["val_loss"]) for m in ms if "val_loss" in m] for ms in (ours, theirs))
    validation.pop(0)  # torchtitan's own, after the first step
    assert [s for s, _ in validation] == [s for s, _ in expected] == [4, 8, 12, 12]  # the last reads 21 sequences
    assert [v for _, v in validation] == pytest.approx([v for _, v in expected], rel=2 * rel)
    assert validation[-1][1] != validation[-2][1]
    bits, expected = ([m["val_bpb"] / m["val_loss"] for m in ms if "val_loss" in m] for ms in (ours, theirs))
    assert bits == pytest.approx([expected[0]] * 5, rel=1e-12)


@pytest.mark.parametrize("name", ["llama-fsdp", "moe-ep"])
def test_resume_across_the_switch_is_the_same_run(name: str, runs: Path) -> None:
    """Taken up after step 4, switched after step 6: equal bit for bit."""
    whole, resumed = (read_metrics(runs / n / "metrics.jsonl") for n in (name, f"{name}-resumed"))
    for key in ("loss", "grad_norm", "val_loss", "raw_tokens"):
        assert column(resumed, key) == column(whole, key), key
    assert column(resumed, "input_bag") == {s: 4 if s <= 6 else 1 for s in range(1, 13)}
    taken_up = scalars(runs / f"{name}-resumed")("n_tokens_seen")
    assert taken_up == [64.0 * s for s in range(5, 13)]
    a, b = (load_file(next((runs / n / "model").glob("*.safetensors"))) for n in (name, f"{name}-resumed"))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_the_step_alone_decides_the_samples(runs: Path) -> None:
    """Also where the state of the loader is not loaded: the phase does not begin anew while its counts go on."""
    whole, resumed = (read_metrics(runs / n / "metrics.jsonl") for n in ("llama-fsdp", "llama-weights"))
    for key in ("loss", "grad_norm", "input_bag"):
        assert column(resumed, key) == column(whole, key), key


def test_the_beginning_of_a_longer_run_has_its_phases(runs: Path) -> None:
    """As the learning rate's curve is that of all steps, so is the switch."""
    whole, beginning = (read_metrics(runs / n / "metrics.jsonl") for n in ("power-one", "beginning"))
    for key in ("loss", "learning_rate", "input_bag", "raw_tokens"):
        assert column(beginning, key) == {s: v for s, v in column(whole, key).items() if s <= 8}, key
    assert (runs / "beginning/model/config.json").is_file()


def test_a_finished_run_is_not_changed_by_its_command(runs: Path) -> None:
    again, before = (read_metrics(runs / n / "metrics.jsonl") for n in ("llama-finished", "llama-fsdp"))
    for m in (again[-1], before[-1]):
        del m["seconds"]
    assert again == before


def test_layouts_export_the_same_model(runs: Path) -> None:
    """Also where a process has a part of the layers or of each matrix; the weights differ by rounding."""
    whole, *others = (load_file(next((runs / f"llama-{n}/model").glob("*.safetensors"))) for n in ("fsdp", "tp", "pp"))
    for other in others:
        torch.testing.assert_close(other, whole, rtol=0, atol=1e-4)


def test_a_model_of_ones_own_is_exported_without_a_description(runs: Path) -> None:
    written = {p.name for p in (runs / "own-one/model").iterdir()}
    assert "config.json" not in written and "tokenizer.json" in written
    path = next((runs / "own-one/model").glob("*.safetensors"))
    assert load_file(path)["model.layers.1.mlp.gate_proj.weight"].dtype == torch.float32


def test_torchtitan_counts_latent_positions(runs: Path) -> None:
    for name, (_, processes, flags) in RUNS.items():
        log = scalars(runs / name)
        assert log("n_tokens_seen") == [64.0 * s for s in range(1, 13)]
        seconds, rate = log("time_metrics/end_to_end(s)"), log("throughput(tps)")
        devices = 2 if "tensor" in flags else processes
        per_step = statistics.median(s * r for s, r in zip(seconds, rate, strict=True))  # two readings of the clock
        assert per_step == pytest.approx(64 / devices, rel=0.1)
        flops = [f / r for f, r in zip(log("tflops"), rate, strict=True)]
        assert flops == pytest.approx([flops[0]] * 12, rel=1e-4) and flops[0] > 0
        written = column(read_metrics(runs / name / "metrics.jsonl"), "flops")
        assert [written[s] for s in range(1, 13)] == pytest.approx([flops[0] * 1e12 * 64 * s for s in range(1, 13)])


def test_seconds_count_steps_that_are_not_logged(runs: Path) -> None:
    """A log and a validation follow steps 1, 4, 8 and 12, whatever is asked for: torchtitan stops at losses that are
    not finite where it logs. A validation is not counted itself."""
    lines = read_metrics(runs / "sparse/metrics.jsonl")
    assert [m["step"] for m in lines if "loss" in m] == [1, 4, 8, 12]
    log = scalars(runs / "sparse")  # a step takes as long however many lie between two logs
    per_step = [s * r for s, r in zip(log("time_metrics/end_to_end(s)"), log("throughput(tps)"), strict=True)]
    assert statistics.median(per_step) == pytest.approx(64, rel=0.1)
    one, four, eight, twelve = ([m["seconds"] for m in lines if m["step"] == step] for step in (1, 4, 8, 12))
    assert max(one) < min(four) <= max(four) < min(eight) <= max(eight) < min(twelve)
    assert twelve[-1] == twelve[-2]  # both validations of the last step


@pytest.mark.parametrize("name", ["llama-fsdp", "power-one", "moe-ep"])
def test_stock_transformers_loads_the_export_with_equal_logits(
    name: str, runs: Path, configs: Path, prepared: Path
) -> None:
    path = runs / name / "model"
    exported = AutoModelForCausalLM.from_pretrained(path).eval()
    description = json.loads((path / "config.json").read_text())
    assert description["vocab_size"] == VOCAB and description["architectures"] == [type(exported).__name__]
    assert description["dtype"] == "float32"
    tokenizer = AutoTokenizer.from_pretrained(path)
    ids = torch.tensor([tokenizer("The river carries 7 boats to the sea.")["input_ids"][:16]])
    assert tokenizer.vocab_size == VOCAB and ids.shape[1] > 4
    if name == "power-one":  # no checkpoint: its weights are tied, which the file must not hide
        assert exported.lm_head.weight is exported.model.embed_tokens.weight
        return
    meta = Meta.load(prepared)
    settings = checked_settings(ModelConfig(path=str(configs / RUNS[name][0])), meta.vocab_size, meta.eos_id, 16)
    model = model_spec(settings, 16, 4).model.build().eval()
    model.init_states(buffer_device=torch.device("cpu"))
    state = model.state_dict()
    dcp.load(state, checkpoint_id=runs / name / "checkpoint/step-12", no_dist=True)
    model.load_state_dict(state)
    with torch.no_grad():
        logits, expected = exported(ids).logits, model(ids)
    assert expected.std() > 0.1
    torch.testing.assert_close(logits, expected, rtol=0, atol=5e-3 if name == "moe-ep" else 1e-5)
