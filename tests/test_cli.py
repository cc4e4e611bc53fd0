"""The command line: parsing, errors of one line, exit codes."""

import sys
import types
from dataclasses import fields
from pathlib import Path

import pytest

from fdd_kernels import FDDConfig
from fdd_kernels.cli import build_parser, main
from fdd_kernels.user_error import UserError
from fdd_kernels.version import __version__

NEEDED = ["--teacher", "t", "--student", "s", "--data", "d.txt", "--output", "o"]
# The Trainer's affair, not a user's.
NOT_FLAGS = {"ignore_index", "shift", "reduction"}


@pytest.fixture
def fake_module(monkeypatch):
    """Put a module with the given attributes in the place of a real one."""

    def install(name, **attributes):
        module = types.ModuleType(name)
        vars(module).update(attributes)
        monkeypatch.setitem(sys.modules, name, module)

    return install


def test_help_names_every_command(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    for command in ("demo", "distill", "cache-teacher", "doctor"):
        assert command in out


def test_version(capsys):
    with pytest.raises(SystemExit):
        main(["--version"])
    assert __version__ in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [[], ["nonsense"], ["distill"], ["demo", "--seeds", "many"]])
def test_wrong_usage_has_exit_code_2(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert "usage: fdd-kernels" in capsys.readouterr().err


@pytest.mark.parametrize(("arguments", "expected"), [
    ([], (Path("runs/demo"), False, False, None)),
    (["--output", "x", "--quick", "--retrain-teacher", "--seeds", "3"], (Path("x"), True, True, 3)),
])  # fmt: skip
def test_demo_passes_its_options_on(fake_module, arguments, expected):
    calls = []
    fake_module("fdd_kernels.demo.run", run_demo=lambda *args: calls.append(args))
    assert main(["demo", *arguments]) == 0
    assert calls == [expected]


def run_distill(fake_module, *arguments):
    calls = []
    fake_module("fdd_kernels.distill_command.run", distill=calls.append)
    assert main(["distill", *NEEDED, *arguments]) == 0
    return calls[0]


def test_distill_defaults_are_those_of_the_options(fake_module):
    from fdd_kernels.distill_command.run_folder import DistillOptions

    expected = DistillOptions(teacher="t", student="s", data=Path("d.txt"), output=Path("o"))
    assert run_distill(fake_module) == expected
    assert expected.config == FDDConfig()


def test_distill_passes_training_options_on(fake_module):
    options = run_distill(
        fake_module, "--max-steps", "7", "--learning-rate", "3e-4", "--batch-size", "2", "--gradient-accumulation", "4",
        "--max-length", "64", "--dtype", "bfloat16", "--seed", "5", "--eval-fraction", "0.1", "--lora-rank", "8",
        "--gradient-checkpointing", "--save-steps", "9", "--log-steps", "2", "--no-resume",
    )  # fmt: skip
    assert (options.max_steps, options.learning_rate, options.batch_size, options.gradient_accumulation) == (7, 3e-4, 2, 4)
    assert (options.max_length, options.dtype, options.seed, options.eval_fraction, options.lora_rank) == (
        64, "bfloat16", 5, 0.1, 8)  # fmt: skip
    assert (options.gradient_checkpointing, options.save_steps, options.log_steps, options.resume) == (True, 9, 2, False)


def test_cache_teacher_passes_its_options_on(monkeypatch):
    from fdd_kernels.teacher_cache import command

    calls = []
    monkeypatch.setattr(command, "cache_teacher", calls.append)
    needed = ["cache-teacher", "--teacher", "t", "--data", "d.txt", "--output", "o"]
    assert main(needed) == 0
    assert calls.pop() == command.CacheOptions(teacher="t", data=Path("d.txt"), output=Path("o"))
    values = {
        "kind": "states", "num_layers": 3, "layer_grid": "linspace", "teacher_layers": (2, 4), "apply_final_norm": False,
        "dtype": "int8", "teacher_dtype": "bfloat16", "max_length": 64, "batch_size": 2, "eval_fraction": 0.1, "seed": 5,
        "shard_size": 3 * 2**20, "resume": False, "verify": True,
    }  # fmt: skip
    of_statistics = {
        "kind": "statistics", "student": "s", "temperature": 2.0, "output_temperature": 3.0, "output_in_dynamics": True,
        "vocab_size": 100,
    }  # fmt: skip
    known = {f.name for f in fields(command.CacheOptions)}
    assert values.keys() | of_statistics.keys() | {"teacher", "data", "output"} == known
    flags = [*needed, "--no-apply-final-norm", "--no-resume", "--verify", "--shard-size", "3MiB", "--teacher-layers", "2,4"]
    for name in ("kind", "num_layers", "layer_grid", "dtype", "teacher_dtype", "max_length", "batch_size", "eval_fraction",
                 "seed"):  # fmt: skip
        flags += [f"--{name.replace('_', '-')}", str(values[name])]
    assert main(flags) == 0
    assert calls.pop() == command.CacheOptions(teacher="t", data=Path("d.txt"), output=Path("o"), **values)
    flags = [*needed, "--output-in-dynamics"]
    for name in ("kind", "student", "temperature", "output_temperature", "vocab_size"):
        flags += [f"--{name.replace('_', '-')}", str(of_statistics[name])]
    assert main(flags) == 0
    assert calls.pop() == command.CacheOptions(teacher="t", data=Path("d.txt"), output=Path("o"), **of_statistics)


VALUES = {
    "alpha": ("0.5", 0.5), "beta": ("0", 0.0), "output_kd_weight": ("2", 2.0), "ce_weight": ("0.1", 0.1),
    "trajectory": ("jsd", "jsd"), "derivative": ("none", None), "temperature": ("2", 2.0), "output_temperature": ("3", 3.0),
    "scale_by_t2": (None, True), "student_softcap": ("30", 30.0), "teacher_softcap": ("20", 20.0),
    "student_logit_scale": ("0.5", 0.5), "teacher_logit_scale": ("0.25", 0.25), "output_in_dynamics": (None, True),
    "vocab_size": ("100", 100), "backend": ("torch", "torch"), "num_layers": ("3", 3), "layer_grid": ("linspace", "linspace"),
    "apply_final_norm": (False, False), "train_head": (False, False),
}  # fmt: skip


def test_every_field_of_the_config_is_a_flag(fake_module):
    flags = []
    for name, (given, _) in VALUES.items():
        flag = name.replace("_", "-")
        flags += [f"--no-{flag}"] if given is False else [f"--{flag}"] if given is None else [f"--{flag}", given]
    flags += ["--student-layers", "1,2", "--teacher-layers", "3,5"]
    config = run_distill(fake_module, *flags).config
    expected = {name: value for name, (_, value) in VALUES.items()} | {"student_layers": (1, 2), "teacher_layers": (3, 5)}
    assert {f.name for f in fields(FDDConfig)} - NOT_FLAGS == expected.keys()
    for name, value in expected.items():
        assert getattr(config, name) == value, name


@pytest.mark.parametrize(("arguments", "message"), [
    (["--trajectory", "wasserstein"], "trajectory='wasserstein' is not one of"),
    (["--temperature", "0"], "temperature=0.0 must be finite and greater than 0"),
    (["--student-layers", "1,2"], "must be given together"),
    (["--dtype", "float8"], "dtype='float8' is not one of auto, float32, bfloat16"),
    (["--eval-fraction", "1"], "eval_fraction=1.0 must be"),
    (["--batch-size", "0"], "batch_size=0 must be at least 1"),
    (["--learning-rate", "nan"], "learning_rate=nan must be greater than 0"),
])  # fmt: skip
def test_options_that_make_no_sense_are_one_line(arguments, message, capsys):
    assert main(["distill", *NEEDED, *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("fdd-kernels distill: ")
    assert error.count("\n") == 1


@pytest.mark.parametrize(("raised", "code", "text"), [(UserError("no such file"), 2, "no such file"),
                                                      (KeyboardInterrupt(), 130, "interrupted")])  # fmt: skip
def test_exit_codes(fake_module, capsys, raised, code, text):
    def fail(*_):
        raise raised

    fake_module("fdd_kernels.demo.run", run_demo=fail)
    assert main(["demo"]) == code
    assert capsys.readouterr().err == f"fdd-kernels demo: {text}\n"


def test_a_bug_is_not_hidden(fake_module):
    def fail(*_):
        raise AssertionError("a bug")

    fake_module("fdd_kernels.demo.run", run_demo=fail)
    with pytest.raises(AssertionError):
        main(["demo"])


def test_a_missing_package_is_named(monkeypatch, capsys):
    for name in ("fdd_kernels.demo.run", "fdd_kernels.demo.corpus", "fdd_kernels.demo.report", "fdd_kernels.demo.students"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "rich.console", None)
    assert main(["demo"]) == 2
    assert 'needs rich.console: pip install "fdd_kernels[hf]"' in capsys.readouterr().err


def test_parsing_imports_no_models():
    """The parser works where transformers is not installed."""
    import subprocess

    code = "import sys; sys.modules['transformers'] = None; from fdd_kernels.cli import build_parser; build_parser()"
    assert subprocess.run([sys.executable, "-c", code], timeout=300).returncode == 0
    assert build_parser().parse_args(["doctor"]).command == "doctor"
