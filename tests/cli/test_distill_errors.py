"""Errors of `fdd-kernels distill`: bad input, losses that are not finite, several processes."""

import json
import shutil

import pytest
import torch

from fdd_kernels.cli.distill.processes import Processes
from fdd_kernels.cli.distill.run import distill
from fdd_kernels.cli.main import main
from fdd_kernels.common.errors import SaidElsewhere, UserError
from fdd_kernels.integrations.checkpoints import checkpoints
from tests.support.commands import command, options, quiet
from tests.support.hf_models import tiny_model, tiny_tokenizer


def test_an_error_of_one_process_is_said_once(monkeypatch):
    """A failure in the first process, or in one of several, ends all with one message."""

    class Arguments:
        device, world_size, process_index = torch.device("cpu"), 2, 0

    def fail():
        raise UserError("no such file")

    sent = []

    def broadcast(shared, **where):
        if sent:
            shared[:] = sent
        sent[:] = shared

    def gather(found, own):
        found[:] = [False, True]

    monkeypatch.setattr(torch.distributed, "broadcast_object_list", broadcast)
    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    first, second = (
        Processes(Arguments),
        Processes(type("Second", (Arguments,), {"process_index": 1})),
    )
    assert [first.first(lambda: {"steps": 3}), second.first(lambda: pytest.fail("not here"))] == [
        {"steps": 3}
    ] * 2
    sent.clear()
    with pytest.raises(UserError, match="no such file"):
        first.first(fail)
    with pytest.raises(SaidElsewhere):
        second.first(lambda: pytest.fail("not here"))
    with pytest.raises(UserError, match="no such file"):
        second.all(fail)
    with pytest.raises(SaidElsewhere):
        first.all(lambda: 1)


@pytest.mark.parametrize("variable", ["ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"])
def test_sharded_models_are_refused_by_name(inputs, tmp_path, monkeypatch, variable):
    monkeypatch.setenv(variable, "true")
    with pytest.raises(
        UserError, match=r"(FSDP|DeepSpeed) shards the model, which this command does not do"
    ):
        distill(options(inputs, tmp_path), quiet())


def refuse_constant(name):
    raise AssertionError(f"{name} is not JSON")


def test_a_loss_that_is_no_number_ends_the_run(inputs, tmp_path, capsys):
    """At the first such step, with exit status 1 and no student; every file is JSON."""
    output = tmp_path / "run"
    assert main(command(inputs, output, "--learning-rate", "1e12", "--save-steps", "1")) == 1
    errors = capsys.readouterr().err
    assert "is not finite (loss " in errors
    assert "nothing was saved before" in errors
    assert "learning rate" in errors
    assert "Traceback" not in errors
    assert not (output / "student").exists()
    assert not (output / "metrics.json").exists()
    # Without a validation split only the next loss shows it.
    assert (
        main(
            command(
                inputs,
                output,
                "--no-resume",
                "--learning-rate",
                "1e12",
                "--save-steps",
                "1",
                "--eval-fraction",
                "0",
            )
        )
        == 1
    )
    assert not checkpoints(output)
    for file in output.rglob("*.json"):
        json.loads(file.read_text("utf-8"), parse_constant=refuse_constant)
    assert main(command(inputs, output, "--no-resume")) == 0
    assert not list(output.glob("*not-finite"))
    json.loads((output / "metrics.json").read_text("utf-8"), parse_constant=refuse_constant)


def test_unequal_padding_of_the_heads_is_found_out(inputs, tmp_path):
    padded = tiny_model("llama", depth=3, vocab_size=320)
    padded.save_pretrained(tmp_path / "student")
    metrics = distill(
        options(inputs, tmp_path / "run", student=str(tmp_path / "student"), max_steps=1), quiet()
    )
    assert metrics["vocab_size"] == len(tiny_tokenizer()) < 320


class TestBadInput:
    """Print one line on stderr, exit with 2, leave nothing like a result."""

    def fails(self, capsys, arguments, message):
        assert main(arguments) == 2
        error = capsys.readouterr().err
        last = error.strip().splitlines()[-1]
        assert last.startswith("fdd-kernels distill: "), error
        assert message in last, error
        assert "Traceback" not in error

    def replaced(self, inputs, output, **changes):
        arguments = command(inputs, output)
        for name, value in changes.items():
            arguments[arguments.index(f"--{name}") + 1] = str(value)
        return arguments

    def test_missing_teacher(self, inputs, tmp_path, capsys):
        self.fails(
            capsys,
            self.replaced(inputs, tmp_path / "o", teacher=tmp_path / "none"),
            "no such directory",
        )

    def test_unknown_name_offline(self, inputs, tmp_path, capsys):
        self.fails(
            capsys,
            self.replaced(inputs, tmp_path / "o", student="no-such-model-here"),
            "student no-such-model-here",
        )

    @pytest.mark.parametrize(
        ("architecture", "kind", "task"),
        [
            ("BertForMaskedLM", "bert", "masked_lm"),
            ("T5ForConditionalGeneration", "t5", "seq2seq_lm"),
            ("GPT2ForSequenceClassification", "gpt2", "sequence_classification"),
        ],
    )
    @pytest.mark.parametrize("role", ["student", "teacher"])
    def test_models_of_another_task(self, inputs, tmp_path, capsys, role, architecture, kind, task):
        shutil.copytree(inputs / role, tmp_path / role)
        config = {"model_type": kind, "architectures": [architecture]}
        (tmp_path / role / "config.json").write_text(json.dumps(config))
        self.fails(
            capsys,
            self.replaced(inputs, tmp_path / "o", **{role: tmp_path / role}),
            f"the {role} is of the task {task} ({architecture}), and the command line",
        )

    def test_truncated_weights(self, inputs, tmp_path, capsys):
        shutil.copytree(inputs / "student", tmp_path / "student")
        with (tmp_path / "student" / "model.safetensors").open("r+b") as file:
            file.truncate(1000)
        self.fails(
            capsys,
            self.replaced(inputs, tmp_path / "o", student=tmp_path / "student"),
            "cannot load the student",
        )

    def test_remote_code_is_never_run(self, inputs, tmp_path, capsys):
        shutil.copytree(inputs / "student", tmp_path / "student")
        config = json.loads((tmp_path / "student" / "config.json").read_text())
        config |= {
            "model_type": "mine",
            "auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"},
        }
        (tmp_path / "student" / "config.json").write_text(json.dumps(config))
        (tmp_path / "student" / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
        self.fails(
            capsys,
            self.replaced(inputs, tmp_path / "o", student=tmp_path / "student"),
            "cannot load the",
        )
        assert not (tmp_path / "ran").exists()

    def test_corrupt_line(self, inputs, tmp_path, capsys):
        (tmp_path / "d.jsonl").write_text('{"text": "fine"}\n{"text": "cut\n')
        self.fails(
            capsys,
            self.replaced(inputs, tmp_path / "o", data=tmp_path / "d.jsonl"),
            f"{tmp_path / 'd.jsonl'}:2: not valid JSON",
        )

    def test_missing_data(self, inputs, tmp_path, capsys):
        self.fails(
            capsys,
            self.replaced(inputs, tmp_path / "o", data=tmp_path / "d.jsonl"),
            "no such file or directory",
        )

    def test_another_tokenizer(self, inputs, tmp_path, capsys):
        shutil.copytree(inputs / "student", tmp_path / "student")
        text = (tmp_path / "student" / "tokenizer.json").read_text()
        (tmp_path / "student" / "tokenizer.json").write_text(text.replace('"!":', '"!!":'))
        changed = self.replaced(inputs, tmp_path / "o", student=tmp_path / "student")
        self.fails(capsys, changed, "is '!' to the teacher and '!!' to the student")

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--vocab-size", "5", "--ce-weight", "1"], "--vocab-size 5"),
            (
                ["--lora-rank", "2", "--lora-targets", "no_such_layer"],
                "cannot add LoRA adapters to the student",
            ),
            (["--report-to", "nowhere"], "--report-to nowhere is not one of"),
            (
                ["--report-to", "comet_ml"],
                "--report-to comet_ml needs comet_ml, which is not installed: pip install comet_ml",
            ),
            (["--eval-data", "none.txt", "--eval-fraction", "0"], "none.txt"),
            (["--student-layers", "1,9", "--teacher-layers", "1,2"], "9"),
        ],
    )
    def test_options_that_do_not_go_with_the_models(
        self, inputs, tmp_path, capsys, arguments, message
    ):
        self.fails(capsys, [*command(inputs, tmp_path / "o"), *arguments], message)

    def test_no_tokenizer(self, inputs, tmp_path, capsys):
        changed = self.replaced(inputs, tmp_path / "o", teacher=inputs / "bare")
        self.fails(capsys, changed, "has no tokenizer")

    def test_too_many_layers(self, inputs, tmp_path, capsys):
        self.fails(
            capsys,
            self.replaced(inputs, tmp_path / "o", **{"num-layers": 9}),
            "needs a deeper model",
        )

    def test_too_long_windows(self, inputs, tmp_path, capsys):
        self.fails(
            capsys,
            self.replaced(inputs, tmp_path / "o", **{"max-length": 65}),
            "has only 64 positions",
        )

    def test_unavailable_backend(self, inputs, tmp_path, capsys):
        from fdd_kernels.backends import why_unavailable

        if why_unavailable("triton", torch.device("cpu")) is None:
            pytest.skip("triton runs here")
        self.fails(
            capsys,
            [*command(inputs, tmp_path / "o"), "--backend", "triton"],
            "--backend triton cannot run",
        )

    def test_output_that_is_a_file(self, inputs, tmp_path, capsys):
        (tmp_path / "o").write_text("")
        self.fails(capsys, command(inputs, tmp_path / "o"), "cannot be made a directory")
