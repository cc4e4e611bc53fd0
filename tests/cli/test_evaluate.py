"""`fdd-kernels evaluate` end to end on tiny models: numbers, files, and bad input."""

import importlib.util
import json
import math
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments

from fdd_kernels import FDDConfig
from fdd_kernels.cli.evaluate.options import EvaluateOptions
from fdd_kernels.cli.evaluate.prepare import names_of
from fdd_kernels.cli.evaluate.run import evaluate
from fdd_kernels.cli.main import main
from fdd_kernels.common.errors import UserError
from fdd_kernels.data import load_windows, pad_windows
from fdd_kernels.evaluation.compare import ModelComparison
from fdd_kernels.integrations import FDDTrainer
from tests.support.commands import NUMBERS, quiet
from tests.support.hf_models import tiny_model, tiny_tokenizer

LENGTH = 24


@pytest.fixture(scope="module")
def folder(inputs, tmp_path_factory):
    """Further models beside those of `inputs`, and questions with answers."""
    folder = tmp_path_factory.mktemp("evaluate")
    tokenizer = tiny_tokenizer()
    deep = tiny_model("gpt2", depth=5, vocab_size=len(tokenizer) + 3, seed=9)  # a padded head
    deep.save_pretrained(folder / "deep")  # and no tokenizer of its own
    tiny_model("gpt2", depth=3, vocab_size=len(tokenizer), seed=8).save_pretrained(folder / "other")
    odd = tiny_tokenizer().train_new_from_iterator([["x y z w " * 9]], 290)
    odd.save_pretrained(folder / "other")
    rows = [
        {"prompt": f"{a} and {b} is ", "completion": f"{c}, the word"}
        for a in NUMBERS
        for b in ("one", "four")
        for c in ("a", "word")
    ]
    for name, changes in (("questions", {}), ("weighted", {"token_weights": 0.5})):
        lines = "".join(json.dumps(row | changes) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(lines)
    return folder


def options(inputs, folder, **changes):
    defaults = {
        "model": (str(inputs / "student"), str(folder / "deep")),
        "teacher": str(inputs / "teacher"),
        "data": folder / "questions.jsonl",
        "max_length": LENGTH,
        "batch_size": 4,
        "dtype": "float32",
    }
    return EvaluateOptions(**(defaults | changes))


@pytest.fixture(scope="module")
def whole(inputs, folder):
    """The record of two models and a teacher, what was printed, and the folder of its files."""
    table, files = quiet(), folder / "files"
    chosen = options(
        inputs,
        folder,
        generate=True,
        seeds=(0, 1),
        max_new_tokens=4,
        questions=5,
        json=files / "found.json",
        html=files / "found.html",
    )
    record = evaluate(chosen, quiet(), table)
    return record, table.file.getvalue(), files


def by_name(record):
    return {model["name"]: model for model in record["models"]}


def test_numbers_are_those_of_the_trainer(inputs, folder, whole):
    """And those of the models' own logits."""
    tokenizer = AutoTokenizer.from_pretrained(inputs / "student")
    windows = load_windows(
        folder / "questions.jsonl", tokenizer, max_length=LENGTH, eval_fraction=0.0, seed=0
    ).train
    found = by_name(whole[0])
    assert list(found) == ["student", "deep", "teacher"]
    teacher = AutoModelForCausalLM.from_pretrained(inputs / "teacher")
    for name, path in (("student", inputs / "student"), ("deep", folder / "deep")):
        student = AutoModelForCausalLM.from_pretrained(path)
        run = FDDTrainer(
            student,
            TrainingArguments(str(folder / "run"), report_to="none", use_cpu=True),
            teacher=teacher,
            fdd_config=FDDConfig(num_layers=2, vocab_size=len(tokenizer)),
            eval_dataset=windows,
            data_collator=pad_windows,
        )
        metrics, model = run.evaluate(), found[name]
        layers = {f"kl_layer_{layer['student_layer']}": layer for layer in model["layers"]}
        for metric in ("perplexity", "accuracy", "kl", "agreement", *layers):
            value, expected = {**model["metrics"], **layers}[metric], metrics[f"eval_{metric}"]
            assert value["mean"] == pytest.approx(expected, rel=1e-5), (name, metric)
        assert layers.keys() == {key.removeprefix("eval_") for key in metrics if "layer" in key}
        batch = pad_windows(windows[:])
        with torch.no_grad():
            loss = student(**{k: v for k, v in batch.items() if k != "token_weights"}).loss
        assert model["metrics"]["loss"]["mean"] == pytest.approx(float(loss), rel=1e-5)
        predicted = [[t for t in w["labels"][1:] if t != -100] for w in windows]
        size = sum(len(tokenizer.decode(t, skip_special_tokens=True).encode()) for t in predicted)
        bits = float(loss) * sum(map(len, predicted)) / math.log(2) / size
        assert model["metrics"]["bits_per_byte"]["mean"] == pytest.approx(bits, rel=1e-5)
    assert set(found["teacher"]["metrics"]) == {
        "loss",
        "perplexity",
        "accuracy",
        "bits_per_byte",
        "rouge_l",
    }


def test_intervals_and_differences(whole):
    found = by_name(whole[0])
    for model in found.values():
        for name, value in model["metrics"].items():
            assert value["low"] <= value["mean"] <= value["high"], name
    assert "minus_first" not in found["student"]
    difference = found["deep"]["minus_first"]["kl"]
    means = [found[name]["metrics"]["kl"]["mean"] for name in ("deep", "student")]
    assert difference["mean"] == pytest.approx(means[0] - means[1], abs=1e-12)


def test_generated_answers(whole):
    record = whole[0]
    assert (record["questions"], record["seeds"]) == (5, [0, 1])
    for model in record["models"]:
        by_seed = model["answers"]["rouge_l_by_seed"]
        assert len(by_seed) == 2
        assert model["metrics"]["rouge_l"]["mean"] == pytest.approx(sum(by_seed) / 2)
    sample = record["samples"][0]
    assert (sample["prompt"], sample["reference"]) == ("one and one is ", "a, the word")
    assert list(sample["answers"]) == ["student", "deep", "teacher"]


def test_what_is_printed_and_written(whole):
    record, printed, files = whole
    for text in ("student", "deep", "KL to teacher", "ROUGE-L by pass", "(2 / 2)", "seed 1"):
        assert text in printed, text
    written = json.loads((files / "found.json").read_text())
    assert written == json.loads(json.dumps(record))
    assert (written["format"], written["version"]) == ("fdd_kernels evaluation", 1)
    assert {"torch", "rouge-score"} <= written["versions"].keys()
    assert written["options"]["batch_size"] == 4
    assert written["data"]["windows"] == 12

    class Tags(HTMLParser):
        open, seen = [], set()

        def handle_starttag(self, tag, attributes):
            assert not {"src", "href"} & dict(attributes).keys()  # nothing outside of the page
            self.seen.add(tag)
            if tag not in ("meta", "br"):
                self.open.append(tag)

        def handle_startendtag(self, tag, attributes):
            self.seen.add(tag)

        def handle_endtag(self, tag):
            assert self.open.pop() == tag

    page = (files / "found.html").read_text()
    tags = Tags()
    tags.feed(page)
    assert not tags.open
    assert {"table", "svg", "rect", "line", "pre"} <= tags.seen
    assert "one and one is" in page


def test_without_a_teacher(inputs, folder):
    chosen = options(inputs, folder, model=(str(inputs / "student"),), teacher=None, max_windows=5)
    record = evaluate(chosen, quiet(), quiet())
    (model,) = record["models"]
    assert set(model["metrics"]) == {"loss", "perplexity", "accuracy", "bits_per_byte"}
    assert (record["sequences"], model["layers"], record["samples"]) == (5, [], [])


def test_weights_of_documents_weigh_their_tokens(inputs, folder, whole):
    """All have the same: means stay. The loss of a byte of text is no longer known."""
    chosen = options(
        inputs, folder, data=folder / "weighted.jsonl", student_layers=(2,), teacher_layers=(1,)
    )
    found = by_name(evaluate(chosen, quiet(), quiet()))
    for name, expected in by_name(whole[0]).items():
        assert "bits_per_byte" not in found[name]["metrics"]
        for metric in found[name]["metrics"]:
            assert found[name]["metrics"][metric]["mean"] == pytest.approx(
                expected["metrics"][metric]["mean"], rel=1e-6
            )
    assert [(one["student_layer"], one["teacher_layer"]) for one in found["deep"]["layers"]] == [
        (2, 1)
    ]


BAD = {
    "no such file": ({"data": "absent.jsonl"}, "absent.jsonl: no such file"),
    "no such model": ({"model": ("/absent/model",)}, "/absent/model: no such directory"),
    "text without answers": (
        {"data": "data.txt", "generate": True},
        "none of 1 documents has a prompt with one",
    ),
    "layers": (
        {"student_layers": (1, 9), "teacher_layers": (1, 2)},
        r"student_layers=\[1, 9\] must be increasing layers between 0",
    ),
    "too many layers": ({"num_layers": 7}, "num_layers=7 .* needs a deeper model"),
    "another vocabulary": ({"teacher": "other"}, "the tokenizers of teacher .* differ"),
    "another model's": (
        {"model": ("student", "other"), "teacher": None},
        "the tokenizers of model student .* and model other .* compare the bits per byte",
    ),
    "a folder": ({"html": Path("/")}, "html=/ is a directory: give a file"),
    "half of the layers": ({"student_layers": (1,)}, "must be given together"),
    "no positions": (
        {"generate": True, "max_new_tokens": 64},
        "12 of 12 prompts with max_new_tokens=64 exceed the positions of a model: give fewer",
    ),
    "long windows": ({"max_length": 65}, "max_length=65, but the .* has only 64 positions"),
    "twice": ({"model": ("student", "student")}, "model=.*student was given twice: give each"),
    "twice, by two paths": (
        {"model": ("student", "student/")},
        r"model=.*student/ was given twice \(it is .*student\): give each model once",
    ),
    "layers without a teacher": ({"teacher": None, "num_layers": 1}, "give --teacher too"),
    "seeds alone": ({"seeds": (0,)}, r"seeds=\(0,\) is for generated answers"),
    "greedy temperature": (
        {"generate": True, "temperature": 0.5},
        "temperature=0.5 is for sampling: give seeds too",
    ),
    "equal seeds": ({"generate": True, "seeds": (1, 1)}, "must be different numbers"),
    "top_p": ({"generate": True, "seeds": (1,), "top_p": 1.5}, "top_p=1.5 must be"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_before_any_model_runs(case, inputs, folder, monkeypatch):
    def fail(*_, **__):
        raise AssertionError("a model has run")

    monkeypatch.setattr(ModelComparison, "__call__", fail)
    changes, message = BAD[case]
    paths = {"student": inputs, "other": folder, "data.txt": inputs, "absent.jsonl": folder}
    paths["student/"] = inputs

    def placed(value):
        return f"{paths[value]}/{value}" if value in paths else value

    changes = {
        name: tuple(map(placed, value)) if name == "model" else placed(value)
        for name, value in changes.items()
    }
    with pytest.raises(UserError, match=message):
        evaluate(options(inputs, folder, **changes), quiet(), quiet())


def test_names_are_as_few_last_parts_of_paths_as_tell_them_apart(tmp_path, monkeypatch):
    for name in ("kd/0/student", "kd/1/student", "fdd/0/student", "teacher", "x"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "kd")
    given = ("0/student/", "1/student", "../fdd/0/student", "../teacher", "../x/.", "org/gpt2")
    names = ("kd/0/student", "1/student", "fdd/0/student", f"{tmp_path.name}/teacher", "x", "gpt2")
    assert names_of(given) == dict(zip(names, given))
    (tmp_path / "kd" / "a" / "student").mkdir(parents=True)
    assert list(names_of(("0/student", "b/student", "a/student"))) == [
        "0/student",
        "b/student",
        "a/student",
    ]
    assert list(names_of(("student",))) == ["student"]


def test_a_lack_of_memory_is_one_line(inputs, folder, monkeypatch):
    def fail(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(ModelComparison, "__call__", fail)
    with pytest.raises(UserError, match=r"CUDA out of memory. Give a smaller batch_size"):
        evaluate(options(inputs, folder, max_windows=2), quiet(), quiet())


def test_rouge_score_may_be_missing(inputs, folder, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r'pip install "fdd_kernels\[evaluate\]"'):
        options(inputs, folder, generate=True)


def test_the_command(inputs, folder, capsys, tmp_path):
    """Options in flags, the table on stdout, progress on stderr, errors of one line."""
    models = ["--model", str(inputs / "student"), "--teacher", str(inputs / "teacher")]
    data = ["--data", str(folder / "questions.jsonl"), "--max-length", "24", "--max-windows", "3"]
    assert main(["evaluate", *models, *data, "--json", str(tmp_path / "new" / "a.json")]) == 0
    shown = capsys.readouterr()
    assert "KL to the teacher by layer" in shown.out
    assert "12 held-out windows of at most 24 tokens" in shown.err
    assert json.loads((tmp_path / "new" / "a.json").read_text())["sequences"] == 3
    assert main(["evaluate", *models, *data, "--top-p", "0.5"]) == 2
    message = capsys.readouterr().err
    assert message == (
        "fdd-kernels evaluate: --top-p 0.5 is for generated answers: give --generate too\n"
    )
