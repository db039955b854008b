"""What is exported is the trained model, bit for bit, in a directory that has nothing of this package."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, GPTNeoConfig, PreTrainedModel

from tests.conftest import VOCAB, text
from token_superposition import TokenSuperpositionError
from token_superposition.cli import main
from token_superposition.data.prepare import PrepareOptions, prepare
from token_superposition.experiment.config import load_config
from token_superposition.experiment.export import export
from token_superposition.experiment.files import read_metrics
from token_superposition.experiment.model import load_exactly
from token_superposition.experiment.run import train
from token_superposition.experiment.verify import verify_run

STOCK = {
    "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    "README.md",
}  # fmt: skip
IDS = torch.arange(40)[None] * 7 % VOCAB


def test_stock_transformers_loads_it_and_nothing_of_ours_is_in_it(finished_run: Path, tmp_path: Path) -> None:
    for dtype in ("float32", "bfloat16"):
        assert main(["export", str(finished_run), str(tmp_path / dtype), "--dtype", dtype]) == 0
        assert {p.name for p in (tmp_path / dtype).iterdir()} == STOCK
        settings = json.loads((tmp_path / dtype / "config.json").read_text())
        assert settings["architectures"] == ["Gemma3ForCausalLM"] and settings["dtype"] == dtype
        assert "auto_map" not in settings
        assert {t.dtype for t in load_file(tmp_path / dtype / "model.safetensors").values()} == {getattr(torch, dtype)}
    script = (
        "import sys; sys.modules['token_superposition'] = None\n"
        "import torch; from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        f"ids = torch.arange(40)[None] * 7 % {VOCAB}\n"
        "for dtype in ('float32', 'bfloat16'):\n"
        "    model = AutoModelForCausalLM.from_pretrained(dtype).eval()\n"
        "    assert AutoTokenizer.from_pretrained(dtype).decode([65, 66])\n"
        "    torch.save(model(ids).logits, dtype + '.pt')\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=200, cwd=tmp_path)
    trained = AutoModelForCausalLM.from_pretrained(finished_run / "model").eval()
    exact, rounded = (torch.load(tmp_path / f"{d}.pt", weights_only=True) for d in ("float32", "bfloat16"))
    assert torch.equal(exact, trained(IDS).logits)
    torch.testing.assert_close(rounded.float(), exact, rtol=0.05, atol=0.05)


def test_a_checkpoint_is_the_model_of_its_step(finished_run: Path, tmp_path: Path) -> None:
    export(finished_run, tmp_path / "twelve", checkpoint=12)
    export(finished_run, tmp_path / "eight", checkpoint=8)
    final = load_file(finished_run / "model/model.safetensors")
    for name, weight in load_file(tmp_path / "twelve/model.safetensors").items():
        assert torch.equal(weight, final[name]), name
    then = load_file(finished_run / "checkpoints/checkpoint-8/model.safetensors")
    now = load_file(tmp_path / "eight/model.safetensors")
    assert all(torch.equal(now[name], then[name]) for name in then)
    assert any(not torch.equal(now[name], final[name]) for name in final)


def test_the_model_card_has_the_figures_of_the_run(finished_run: Path, tmp_path: Path) -> None:
    result = json.loads((finished_run / "run.json").read_text())
    export(finished_run, tmp_path / "whole")
    card = ModelCard.load(tmp_path / "whole/README.md")  # parsed as the hub does
    assert card.data.library_name == "transformers" and card.data.pipeline_tag == "text-generation"
    losses = {e.metric_type: e.metric_value for e in card.data.eval_results}
    assert losses == {"loss": result["val_loss"], "bits_per_byte": result["val_bpb"]}
    for told in (
        f"| {result['val_loss']:.4f} |",
        f"| {result['val_bpb']:.4f} |",
        f"| {result['latent_tokens']:,} |",
        f"| {result['raw_tokens']:,} |",
        f"| {result['flops']:.3e} |",
        "6 steps that read bags of 4 and predict bags of 4, then 6 steps on ordinary tokens",
        f"| transformers | {result['versions']['transformers']} |",
        "SHA-256 of the data",
        "bag_size = 4",
        'path = "data"',
    ):
        assert told in card.text, told
    assert str(tmp_path.parent) not in card.text  # no path of this machine

    export(finished_run / "checkpoints/checkpoint-8", tmp_path / "eight")
    card = ModelCard.load(tmp_path / "eight/README.md")
    (line,) = [m for m in read_metrics(finished_run / "metrics.jsonl") if m["step"] == 8 and "val_loss" in m]
    assert (
        f"| steps | 8 of 12 |\n| next-token loss on held-out text, nats per token | {line['val_loss']:.4f} |"
        in card.text
    )


def test_the_card_of_a_checkpoint_tells_what_it_was_trained_on(finished_run: Path, tmp_path: Path) -> None:
    """Of the run's 6 steps on bags and 6 on ordinary tokens."""
    for step, trained, whole in (
        (4, "TST): 4 steps that read bags of 4 and predict bags of 4. It was\nstopped before", False),
        (6, "TST): 6 steps that read bags of 4 and predict bags of 4. It was\nstopped before", False),
        (8, "predict bags of 4, then 2 steps on ordinary tokens. Nothing of that remains", True),
    ):
        export(finished_run, tmp_path / str(step), checkpoint=step)
        card = (tmp_path / str(step) / "README.md").read_text()
        assert trained in card and ("Nothing of that remains" in card) == whole, step
        assert verify_run(tmp_path / str(step))[1] == []
    (tmp_path / "8/model.safetensors").unlink()
    assert ["model.safetensors is missing" in line for line in verify_run(tmp_path / "8")[1]] == [True]
    (tmp_path / "8").rename(tmp_path / "model")  # no run's: no config.toml is beside it
    assert ["model.safetensors is missing" in line for line in verify_run(tmp_path / "model")[1]] == [True]
    shutil.copy(tmp_path / "6/model.safetensors", tmp_path / "model/model.fp16.safetensors")
    assert verify_run(tmp_path / "model")[1] == []
    (tmp_path / "model/model.fp16.safetensors").rename(tmp_path / "model/pytorch_model.bin")  # which is not read
    assert verify_run(tmp_path / "model")[1] == []


def test_the_card_of_a_baseline_does_not_speak_of_superposition(finished_run: Path, tmp_path: Path) -> None:
    superposed = (tmp_path / "tst", 0.5), (tmp_path / "baseline", 0.0)
    for out, ratio in superposed:
        run = shutil.copytree(finished_run, tmp_path / f"run{ratio}")
        content = (run / "config.toml").read_text()
        (run / "config.toml").write_text(content.replace("ratio = 0.5", f"ratio = {ratio}"))
        export(run, out)
    cards = [ModelCard.load(out / "README.md") for out, _ in superposed]
    assert "pre-trained with\n[Token-Superposition Training]" in cards[0].text
    assert cards[0].data.tags == ["token-superposition-training"]
    assert "pre-trained: 12 steps on ordinary tokens. It loads in stock transformers." in cards[1].text
    assert "(TST)" not in cards[1].text and not cards[1].data.tags


def test_a_checkpoint_between_two_logged_steps_has_no_figures_of_another(
    write_config: Callable[..., Path], tmp_path: Path
) -> None:
    """Losses that were not taken at its step are left out; tokens and FLOPs are those of its step."""
    config = write_config(log_every=4, eval_every=4, save_every=5)
    train(load_config(config), tmp_path / "run")
    for step, raw in ((5, 5 * 4), (10, 6 * 4 + 4)):  # of 6 steps on bags of 4
        export(tmp_path / "run", tmp_path / f"{step}", checkpoint=step)
        card = ModelCard.load(tmp_path / f"{step}/README.md")
        assert card.data.eval_results is None and "held-out text, nats" not in card.text
        (flops,) = {m["flops"] / m["step"] for m in read_metrics(tmp_path / "run/metrics.jsonl")}
        for told in (
            f"| steps | {step} of 12 |\n",
            f"| latent tokens (positions computed) | {step * 4 * 16:,} |",
            f"| raw tokens (text read) | {raw * 4 * 16:,} |",
            f"| FLOPs of training | {flops * step:.3e} |",
        ):
            assert told in card.text, told


@pytest.mark.parametrize("checkpoint", [None, 8])
def test_data_that_is_not_found_is_said(
    checkpoint: int | None, finished_run: Path, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where it was looked for; also where other data lies there, which is not told as this run's."""
    shutil.copytree(finished_run, tmp_path / "run")
    path = tmp_path / "run/config.toml"
    path.write_text(path.read_text().replace(f'"{prepared}"', '"data"'))
    monkeypatch.chdir(tmp_path)
    with pytest.warns(UserWarning, match=f"looked for at {tmp_path / 'data'} .data holds no prepared data"):
        export(tmp_path / "run", tmp_path / "a", checkpoint=checkpoint)
    assert "SHA-256 of the data" not in (tmp_path / "a/README.md").read_text()
    (tmp_path / "other.txt").write_text("\n\n".join(text(40)))
    (tmp_path / "more.txt").write_text("held out")
    files = [str(tmp_path / "other.txt"), str(tmp_path / "more.txt")]
    prepare(files, tmp_path / "data", PrepareOptions(vocab_size=300, validation_share=0.5))
    with pytest.warns(UserWarning, match="other data than the run read"):
        export(tmp_path / "run", tmp_path / "b", checkpoint=checkpoint)
    assert "SHA-256 of the data" not in (tmp_path / "b/README.md").read_text()
    monkeypatch.chdir(prepared.parent)
    export(tmp_path / "run", tmp_path / "c", checkpoint=checkpoint)
    assert "SHA-256 of the data" in (tmp_path / "c/README.md").read_text()


def test_what_cannot_be_exported(finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "there").mkdir()
    for arguments, message in (
        ([tmp_path / "nowhere", tmp_path / "out"], "holds no model/ and no checkpoint; name the --out of a tst train"),
        (
            [finished_run, tmp_path / "out", "--checkpoint", "5"],
            "no checkpoint of step 5; it has those of steps 4, 6, 8, 12",
        ),
        ([finished_run, tmp_path / "there"], "exists; choose another OUT"),
    ):
        assert main(["export", *map(str, arguments)]) == 2
        assert message in capsys.readouterr().err
    (tmp_path / "olmo/checkpoints/step4").mkdir(parents=True)
    with pytest.raises(TokenSuperpositionError, match="finish it with the command that started it"):
        export(tmp_path / "olmo", tmp_path / "out")

    broken = tmp_path / "broken/model"
    broken.mkdir(parents=True)
    for file in (finished_run / "model").iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    weights = load_file(broken / "model.safetensors")
    save_file(
        {k: v for k, v in weights.items() if "layers.1.mlp" not in k}, broken / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(TokenSuperpositionError, match=r"has not the weights of its config.json: model.layers.1.mlp"):
        export(tmp_path / "broken", tmp_path / "out")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*partial"))


def lack(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: v for k, v in weights.items() if "layers.1.mlp" not in k}


def add(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return weights | {"score.weight": torch.zeros(2, 32)}


def reshape(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return weights | {"model.norm.weight": torch.zeros(16)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lack, "model.layers.1.mlp.down_proj.weight is missing, "),
        (add, "config.json: score.weight is left over; save or fetch it again"),
        (reshape, "config.json: model.norm.weight has shape (16,), not (32,); save or fetch it again"),
        (None, "holds no causal LM that can be loaded (Error while deserializing header"),
    ],
)
@pytest.mark.parametrize("command", ["eval", "generate", "train", "export"])
def test_no_command_runs_on_weights_that_are_not_there(
    command: str,
    change: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None,
    message: str,
    finished_run: Path,
    prepared: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """``None``: half of the file."""
    model = tmp_path / "run/model"
    shutil.copytree(finished_run / "model", model)
    weights = model / "model.safetensors"
    if change is None:
        weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    else:
        save_file(change(load_file(weights)), weights, {"format": "pt"})
    out = str(tmp_path / "out")
    arguments = {
        "eval": [str(model), "--data", str(prepared)],
        "generate": [str(model), "The river"],
        "train": [str(finished_run / "config.toml"), "--model.path", str(model), "--out", out],
        "export": [str(tmp_path / "run"), out],
    }[command]
    assert main([command, *arguments]) == 2
    told = capsys.readouterr()
    assert f"{model} h" in told.err and message in told.err and told.err.count("\n") == 1, told.err
    assert not told.out and not Path(out).exists()


def test_causal_masks_that_old_files_have_are_no_weights(tmp_path: Path) -> None:
    """As published files of GPT-Neo, such as those of TinyStories, have them."""
    settings = GPTNeoConfig(vocab_size=VOCAB, hidden_size=32, num_layers=2, num_heads=2,
                            attention_types=[[["global", "local"], 1]], max_position_embeddings=64)  # fmt: skip
    model = AutoModelForCausalLM.from_config(settings)
    model.save_pretrained(tmp_path)
    masks = {
        f"transformer.h.{i}.attn.attention.{name}": torch.zeros(shape)
        for i in range(2)
        for name, shape in (("bias", (1, 1, 64, 64)), ("masked_bias", ()))
    }
    weights = load_file(tmp_path / "model.safetensors")
    save_file(weights | masks, tmp_path / "model.safetensors", {"format": "pt"})
    assert torch.equal(load_exactly(tmp_path).lm_head.weight, model.lm_head.weight)


def test_a_model_that_is_written_otherwise_does_not_appear(
    finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of an architecture whose weights transformers converts when it saves them, and not back."""
    save = PreTrainedModel.save_pretrained

    def other(model: Any, *args: Any, **options: Any) -> None:
        weight = model.get_output_embeddings().weight
        kept = weight.data.clone()
        weight.data.mul_(1.01)
        save(model, *args, **options)
        weight.data.copy_(kept)

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", other)
    with pytest.raises(TokenSuperpositionError, match="gives other logits than it"):
        export(finished_run, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_damaged_checkpoint_is_not_exported(finished_run: Path, tmp_path: Path) -> None:
    run = shutil.copytree(finished_run, tmp_path / "run")
    weights = run / "checkpoints/checkpoint-8/model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(TokenSuperpositionError, match=r"was altered.*take another checkpoint"):
        export(run, tmp_path / "out", checkpoint=8)
    assert not (tmp_path / "out").exists()
