"""``tst eval``: the figure of the run, the figure of whole logits in float64, benchmark tasks with local data."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tokenizers import processors
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.conftest import tiny
from tests.processes import TIMEOUT
from token_superposition import TokenSuperpositionError
from token_superposition.cli import main
from token_superposition.data.prepare import PrepareOptions, prepare
from token_superposition.experiment.config import DataConfig, load_config
from token_superposition.experiment.evaluate import Loss, StridedText, evaluate_text, length_of, total_loss
from token_superposition.experiment.generate import generate, load_model
from token_superposition.experiment.run import train

TEXT = "The river carries boats to the sea; naïve façades, Ünicode 🎒 and tabs\t are text as well.\n" * 2


def test_held_out_text_gives_the_figure_of_the_run(
    finished_run: Path, prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "e.json"
    given = ["eval", str(finished_run / "model"), "--data", str(prepared), "--max-tokens", "512", "--out", str(out)]
    assert main([*given, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads(out.read_text())
    (loss,), result = printed["losses"], json.loads((finished_run / "run.json").read_text())
    assert loss["tokens"] == 512 and loss["sequence_length"] == 16  # the model has 16 positions
    assert loss["loss"] == pytest.approx(result["val_loss"], rel=1e-6)
    assert loss["bits_per_byte"] == pytest.approx(result["val_bpb"], rel=1e-6)
    assert loss["perplexity"] == pytest.approx(math.exp(result["val_loss"]), rel=1e-6)
    assert main(given) == 0
    assert f"{result['val_loss']:.4f}" in capsys.readouterr().out


def test_a_run_is_evaluated_as_it_was_validated_whatever_its_model_could_read(
    write_config: Callable[..., Path], prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Sequences of the run's length and as many tokens as its last validation; elsewhere all positions of the model."""
    config = load_config(write_config())
    options = config.model.options | {"max_position_embeddings": 64}
    result = train(replace(config, model=replace(config.model, options=options)), tmp_path / "run")
    shutil.copytree(tmp_path / "run/model", tmp_path / "moved")
    (tmp_path / "a.txt").write_text(TEXT)
    given = ["--data", str(prepared), "--text", str(tmp_path / "a.txt"), "--json"]

    def evaluated(*arguments: str) -> list[dict[str, Any]]:
        assert main(["eval", *arguments, *given]) == 0
        return json.loads(capsys.readouterr().out)["losses"]

    for named in ("run", "run/model"):
        data, text = evaluated(str(tmp_path / named))
        assert data["tokens"] == 512 and data["sequence_length"] == text["sequence_length"] == 16
        assert data["loss"] == pytest.approx(result.val_loss, rel=1e-6)
    assert [x["sequence_length"] for x in evaluated(str(tmp_path / "run"), "--sequence-length", "32")] == [32, 32]
    data, text = evaluated(str(tmp_path / "moved"))
    assert data["tokens"] > 512 and data["sequence_length"] == text["sequence_length"] == 64
    assert data["loss"] != pytest.approx(result.val_loss, rel=1e-6)
    assert main(["eval", str(tmp_path / "run"), *given[:2]]) == 0
    printed = capsys.readouterr().out
    assert "sequence" in printed and re.search(rf"│ 512 +│ 16 +│ {result.val_loss:.4f} +│", printed), printed
    assert main(["generate", str(tmp_path / "run"), "The river", "--max-new-tokens", "2"]) == 0


def test_text_is_read_whole_or_said_to_be_cut(
    finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """However long: more than the tokens that are read of data by default. What was not read is not named."""
    model, tokenizer = load_model(finished_run)
    files = [tmp_path / name for name in ("a.txt", "b.txt", "c.txt")]
    for file in files:
        file.write_text(TEXT)
    each = len(tokenizer(TEXT, add_special_tokens=False)["input_ids"])  # pyright: ignore
    copies = math.ceil(DataConfig.final_eval_tokens / each) + 1
    (tmp_path / "long.txt").write_text(TEXT * copies)
    given = ["--text", str(files[0]), str(tmp_path / "long.txt"), "--stride", "16", "--batch-size", "1024"]
    assert main(["eval", str(finished_run), *given, "--json"]) == 0
    (loss,) = json.loads(capsys.readouterr().out)["losses"]
    assert loss["tokens"] > DataConfig.final_eval_tokens and loss["text"] == "a.txt, long.txt"
    assert loss["bytes"] == (1 + copies) * len(TEXT.encode())
    for most, told in (
        (each - 1, f"a.txt (cut after {each - 1} tokens)"),
        (each, f"a.txt (cut after {each} tokens)"),
        (each + 1, f"a.txt, b.txt (cut after {each + 1} tokens)"),
        (3 * each, "a.txt, b.txt, c.txt"),
    ):
        loss = evaluate_text(model, tokenizer, files, max_tokens=most)
        assert loss.text == told and loss.tokens == most


def test_text_is_read_in_windows_that_each_predict_what_is_new(finished_run: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(finished_run / "model").double().eval()
    tokenizer = AutoTokenizer.from_pretrained(finished_run / "model")
    files = [tmp_path / "a.txt", tmp_path / "b.txt"]
    files[0].write_text(TEXT)
    files[1].write_text("short")
    loss = evaluate_text(model, tokenizer, files, stride=4, batch_size=3)
    nats, tokens = 0.0, 0
    for file in files:
        ids = [tokenizer.bos_token_id, *tokenizer(file.read_text(), add_special_tokens=False)["input_ids"]]
        for i in range(1, len(ids)):  # every token alone, with the context that its window has
            window = max(math.ceil((i - 16) / 4), 0)
            with torch.no_grad():
                logits = model(torch.tensor([ids[window * 4 : i]])).logits[0, -1]
            nats, tokens = nats + cross_entropy(logits, torch.tensor(ids[i])).item(), tokens + 1
    assert loss.tokens == tokens and loss.bytes == len(TEXT.encode()) + 5
    assert loss.loss == pytest.approx(nats / tokens, rel=1e-12)
    assert loss.bits_per_byte == pytest.approx(nats / math.log(2) / loss.bytes, rel=1e-12)
    cut = evaluate_text(model, tokenizer, files, max_tokens=40)
    kept = tokenizer.decode(tokenizer(TEXT, add_special_tokens=False)["input_ids"][:40])
    assert cut.tokens == 40 and cut.bytes == len(kept.encode())


@pytest.mark.parametrize("architecture", ["gemma2", "bert", "mamba"])
def test_any_head(architecture: str) -> None:
    """A soft cap, whole logits, no attention."""
    model = tiny(architecture).double().eval()
    generator = torch.Generator().manual_seed(0)
    ids, targets = (torch.randint(320, (5, 16), generator=generator) for _ in range(2))
    targets[1:3, 4:] = -100
    nats, tokens = total_loss(
        model,
        [{"input_ids": i, "shift_labels": t} for i, t in zip(ids, targets, strict=True)],
        2,  # pyright: ignore
    )
    logits = model(ids).logits
    assert nats == pytest.approx(
        cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum").item(),
        rel=1e-7,  # Mamba has float32 logits
    )
    assert tokens == (targets != -100).sum()
    assert length_of(model, None) == 64 and length_of(model, 48) == 48


@pytest.mark.parametrize("stride", [1, 4, 5, 8])
def test_every_token_is_predicted_once_and_no_window_predicts_nothing(stride: int) -> None:
    for n in range(1, 30):
        text = StridedText(torch.arange(n + 1), 8, stride)
        predicted = [[t for t in text[i]["shift_labels"].tolist() if t != -100] for i in range(len(text))]
        assert all(predicted) and [t for window in predicted for t in window] == list(range(1, n + 1))


def test_a_model_that_was_left_in_training_is_evaluated_without_dropout() -> None:
    model = tiny("gpt2", embd_pdrop=0.5, resid_pdrop=0.5)
    samples: Any = [{"input_ids": torch.arange(16), "shift_labels": torch.arange(1, 17)}]
    expected = total_loss(model.eval(), samples, 1)
    assert total_loss(model.train(), samples, 1) == expected


def test_without_a_length_it_is_that_of_the_model_up_to_4096() -> None:
    for positions, length in ((4096, 4096), (100_000, 4096)):
        assert length_of(tiny("llama", max_position_embeddings=positions), None) == length
    model = tiny("mamba")
    del model.config.max_position_embeddings  # as it is of a recurrence
    assert length_of(model, None) == 1024 and length_of(model, None, 200) == 200


def test_a_run_that_was_trained_beyond_the_positions_that_its_model_names_is_read_so() -> None:
    model = tiny("llama")
    assert length_of(model, None, 100) == length_of(model, 100, 100) == 100
    with pytest.raises(TokenSuperpositionError, match="sequence-length is 101; the model has 64 positions"):
        length_of(model, 101, 100)


def test_a_loss_whose_perplexity_is_no_float_is_told() -> None:
    loss = Loss.of("a text", 8000.0, 10, 40.0, 16, 16)
    assert loss.loss == 800 and loss.perplexity == math.exp(700)


def test_a_text_begins_with_the_token_that_begins_one(finished_run: Path, tmp_path: Path) -> None:
    """That the tokenizer itself begins one with, as in the data; else with the one that ends a text."""
    tokenizer: Any
    model, tokenizer = load_model(finished_run / "model")
    (tmp_path / "a.txt").write_text("short")

    def nats(first: int) -> float:
        ids = torch.tensor([first, *tokenizer("short", add_special_tokens=False)["input_ids"]])
        with torch.no_grad():
            return cross_entropy(model(ids[None, :-1]).logits[0], ids[1:]).item()

    def continued(first: int) -> str:
        out = model.generate(torch.tensor([[first]]), max_new_tokens=12, do_sample=False, pad_token_id=0)
        return tokenizer.decode(out[0, 1:], skip_special_tokens=True)

    tokenizer.bos_token, other = "e", tokenizer.convert_tokens_to_ids("e")
    ending = tokenizer.eos_token_id
    assert nats(other) != pytest.approx(nats(ending), rel=1e-5) and continued(other) != continued(ending)
    for first in (ending, other):
        assert evaluate_text(model, tokenizer, [tmp_path / "a.txt"]).loss == pytest.approx(nats(first), rel=1e-5)
        assert generate(model, tokenizer, "", 12, temperature=0) == continued(first)
        begin: Any = [("e", other)]
        template = processors.TemplateProcessing(single="e $A", special_tokens=begin)
        tokenizer.backend_tokenizer.post_processor = template


def test_a_special_token_that_a_text_spells_is_text(finished_run: Path, tmp_path: Path) -> None:
    """As tst prepare takes it; a byte-order mark is none."""
    model, tokenizer = load_model(finished_run / "model")
    (tmp_path / "a.txt").write_text("a<|endoftext|>b", encoding="utf-8-sig")
    loss = evaluate_text(model, tokenizer, [tmp_path / "a.txt"])
    assert loss.bytes == 15 and loss.tokens > 3
    assert tokenizer("a<|endoftext|>b", add_special_tokens=False)["input_ids"][1] == tokenizer.eos_token_id


def test_what_cannot_be_evaluated(
    finished_run: Path, prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = str(finished_run / "model")
    other = tmp_path / "other"
    (tmp_path / "text.txt").write_text(TEXT * 20)
    (tmp_path / "more.jsonl").write_text("".join(json.dumps({"text": TEXT + str(i)}) + "\n" for i in range(40)))
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\x00")
    prepare([str(tmp_path / "more.jsonl")], other, PrepareOptions(vocab_size=300, validation_share=0.5))
    for arguments, message in (
        ([model], "give --data, --text or --tasks"),
        ([str(tmp_path), "--data", str(prepared)], "holds no causal LM"),
        ([model, "--data", str(other)], "prepared with another tokenizer than the model's"),
        ([model, "--data", str(prepared), "--sequence-length", "17"], "the model has 16 positions"),
        ([model, "--text", str(tmp_path / "bytes.txt")], "cannot be read as UTF-8"),
        ([model, "--text", str(other)], "other cannot be read as UTF-8 text (Is a directory); name files of text"),
        ([model, "--text", str(tmp_path / "text.txt"), "--stride", "20"], "stride 20 would leave out text"),
        ([model, "--text", str(tmp_path / "text.txt"), "--max-tokens", "0"], "max-tokens is 0"),
        ([model, "--data", str(prepared), "--stride", "8"], "stride is 8, which only --text has"),
        ([model, "--data", str(prepared), "--limit", "8"], "limit is 8, which only --tasks has"),
        ([model, "--tasks", "x", "--sequence-length", "8"], "sequence-length is 8, which only --data and --text have"),
        ([model, "--tasks", "x", "--max-tokens", "None"], "max-tokens is None, which only --data and --text have"),
    ):
        assert main(["eval", *arguments]) == 2
        assert message in capsys.readouterr().err, message


def test_a_benchmark_task_with_local_data(
    finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Accuracies are those of the choices' log-probabilities, and of these by length, taken by hand."""
    questions = [
        {"question": "The river carries", "choices": [" boats to the sea", " the", " x"], "answer": 0},
        {"question": "Bag 3 holds", "choices": [" return", " tokens 9", " sea"], "answer": 1},
        {"question": "return", "choices": [" sea.", " x + 1"], "answer": 0},
    ]
    (tmp_path / "questions.json").write_text("".join(json.dumps(q) + "\n" for q in questions))
    (tmp_path / "local.yaml").write_text(
        "task: local_questions\ndataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {tmp_path / 'questions.json'}}}}}\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: '{{question}}'\n"
        "doc_to_choice: '{{choices}}'\ndoc_to_target: answer\ntarget_delimiter: ''\n"
        "metric_list: [{metric: acc}, {metric: acc_norm}]\n"
    )
    given = ["eval", str(finished_run / "model"), "--tasks", str(tmp_path / "local.yaml"), "--out"]
    assert main([*given, str(tmp_path / "scores.json")]) == 0
    scores = json.loads((tmp_path / "scores.json").read_text())["tasks"]
    assert "acc_norm" in capsys.readouterr().out

    model = AutoModelForCausalLM.from_pretrained(finished_run / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(finished_run / "model")
    right = {"acc": 0, "acc_norm": 0}
    for q in questions:
        sums: list[float] = []
        for choice in q["choices"]:
            context = tokenizer(str(q["question"]), add_special_tokens=False)["input_ids"]
            ids = tokenizer(f"{q['question']}{choice}", add_special_tokens=False)["input_ids"]
            with torch.no_grad():
                logits = model(torch.tensor([ids])).logits[0].double()
            part = slice(len(context) - 1, len(ids) - 1)
            sums.append(-cross_entropy(logits[part], torch.tensor(ids[len(context) :]), reduction="sum").item())
        by_length = [x / len(choice) for x, choice in zip(sums, q["choices"], strict=True)]
        right["acc"] += sums.index(max(sums)) == q["answer"]
        right["acc_norm"] += by_length.index(max(by_length)) == q["answer"]
    assert scores == {"local_questions": {name: pytest.approx(n / 3) for name, n in right.items()}}

    assert main([*given[:3], str(tmp_path / "none.yaml")]) == 2
    assert "there is no task" in capsys.readouterr().err


def test_the_papers_eight_tasks_on_data_of_their_form(finished_run: Path, tmp_path: Path) -> None:
    """The harness's own definitions; the datasets are directories of the hub's names where the command is run."""
    choices = {"text": [" boats", " the sea", " bags"], "label": ["A", "B", "C"]}
    subjects = [f.stem.removeprefix("mmlu_") for f in harness_tasks("mmlu/default").glob("mmlu_*.yaml")]
    assert len(subjects) == 57
    for name, configurations, row in (
        (
            "allenai/ai2_arc",
            ["ARC-Easy", "ARC-Challenge"],
            {"question": "What does the river carry?", "choices": choices, "answerKey": "A"},
        ),
        ("aps/super_glue", ["boolq"], {"passage": "It carries boats.", "question": "does it", "label": 1}),
        (
            "Rowan/hellaswag",
            ["default"],
            {"ctx_a": "The", "ctx_b": "river", "activity_label": "Boats", "endings": list("abcd"), "label": "1"},
        ),
        ("allenai/openbookqa", ["main"], {"question_stem": "It carries", "choices": choices, "answerKey": "B"}),
        ("baber/piqa", ["default"], {"goal": "cross it", "sol1": "a boat", "sol2": "a bag", "label": 0}),
        (
            "allenai/winogrande",
            ["winogrande_xl"],
            {"sentence": "The boat passed the bag as _ was fast.", "option1": "it", "option2": "that", "answer": "1"},
        ),
        ("cais/mmlu", subjects, {"question": "What is carried?", "choices": list("wxyz"), "answer": 2}),
    ):
        save_dataset(tmp_path / name, configurations, row)
    model = finished_run / "model"
    done = subprocess.run(
        [sys.executable, "-m", "token_superposition", "eval", model, "--tasks", "paper", "--json"],
        cwd=tmp_path,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )
    assert done.returncode == 0, done.stderr
    both, one = {"acc", "acc_norm"}, {"acc"}
    scores = json.loads(done.stdout)["tasks"]
    assert {task: set(metrics) for task, metrics in scores.items()} == {
        "arc_easy": both,
        "arc_challenge": both,
        "boolq": one,
        "hellaswag": both,
        "mmlu": one,
        "openbookqa": both,
        "piqa": both,
        "winogrande": one,
    }
    assert all(value in (0, 1) for metrics in scores.values() for value in metrics.values())  # one question each
    assert scores["arc_easy"] == scores["arc_challenge"]  # the same question


def harness_tasks(folder: str) -> Path:
    import lm_eval.tasks

    return Path(lm_eval.tasks.__path__[0]) / folder


def save_dataset(folder: Path, configurations: Sequence[str], row: dict[str, Any]) -> None:
    """As the hub keeps it: a card that lists the files of every configuration and split, here the same of all."""
    folder.mkdir(parents=True)
    splits = [{"split": split, "path": f"{split}.jsonl"} for split in ("train", "validation", "test", "dev")]
    for split in splits:
        (folder / split["path"]).write_text(json.dumps(row) + "\n")
    card = {"configs": [{"config_name": name, "data_files": splits} for name in configurations]}
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump(card)}---\n")


def test_tasks_without_the_extra(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.evaluator", None)
    monkeypatch.delitem(sys.modules, "token_superposition.experiment.tasks", raising=False)
    assert main(["eval", "nowhere", "--tasks", "paper"]) == 2
    assert "pip install 'token-superposition[eval]'" in capsys.readouterr().err


@pytest.mark.parametrize("architecture", ["cohere", "llama"])
def test_a_scale_and_a_bias_of_the_head_are_in_the_figure(architecture: str) -> None:
    model: Any = tiny(architecture)
    if architecture == "llama":
        model.lm_head = torch.nn.Linear(32, 320)  # with a bias
    model = model.double().eval()
    ids, targets = (torch.randint(320, (2, 16), generator=torch.Generator().manual_seed(i)) for i in range(2))
    samples: Any = [{"input_ids": i, "shift_labels": t} for i, t in zip(ids, targets, strict=True)]
    expected = cross_entropy(model(ids).logits.flatten(0, 1), targets.flatten(), reduction="sum").item()
    assert total_loss(model, samples, 2)[0] == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("most", [5, 6, 7, 8])
def test_a_text_is_cut_between_characters(most: int, prepared: Path, tmp_path: Path) -> None:
    """Of a letter that is several tokens none is left: its bytes would count whole."""
    tokenizer = AutoTokenizer.from_pretrained(prepared / "tokenizer")
    path = tmp_path / "a.txt"
    path.write_text("\U0001d518\U0001d52b\U0001d526" * 3, encoding="utf-8")
    assert len(tokenizer(path.read_text())["input_ids"]) == 36  # four bytes a letter
    loss = evaluate_text(tiny("llama"), tokenizer, [path, path], sequence_length=16, max_tokens=most)
    assert loss.tokens == loss.bytes == most // 4 * 4 and f"cut after {loss.tokens} tokens" in loss.text


def test_a_sequence_of_one_token_has_a_stride(prepared: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(TEXT, encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(prepared / "tokenizer")
    assert evaluate_text(tiny("llama"), tokenizer, [tmp_path / "a.txt"], sequence_length=1).stride == 1
