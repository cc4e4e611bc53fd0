"""The command line: parsing, errors of one line, exit codes."""

import argparse
import ast
import importlib.util
import subprocess
import sys
import types
from dataclasses import fields
from pathlib import Path

import pytest

from fdd_kernels import FDDConfig
from fdd_kernels.cli.cache_options import STORED, CacheOptions
from fdd_kernels.cli.distill.options import DistillOptions
from fdd_kernels.cli.main import NOT_OPTIONS, main
from fdd_kernels.cli.parsing import add_options, described, in_flags
from fdd_kernels.common.errors import UserError
from fdd_kernels.teacher_cache.codec import CODECS
from fdd_kernels.version import __version__

COMMANDS = ("demo", "distill", "cache-teacher", "doctor", "plan")
NEEDED = ["--teacher", "t", "--student", "s", "--data", "d.txt", "--output", "o"]
# Run the following code in a Python without torch and its dependents.
WITHOUT_TORCH = """
import contextlib, io, sys
HEAVY = "torch numpy triton transformers accelerate safetensors tokenizers rich"
for name in HEAVY.split():
    sys.modules[name] = None
from fdd_kernels.cli.main import main

def run(line):
    out, status = io.StringIO(), None
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try:
            status = main(line.split())
        except SystemExit as stop:
            status = stop.code
    return status or 0, out.getvalue()
"""


@pytest.fixture
def fake_module(monkeypatch):
    """Replace a module by one with the given attributes."""

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
    for command in COMMANDS:
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


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], (Path("runs/demo"), False, False, None, None, None)),
        (["--teacher", "t"], (Path("runs/demo"), False, False, None, Path("t"), None)),
        (
            ["--output", "x", "--quick", "--retrain-teacher", "--seeds", "3"],
            (Path("x"), True, True, 3, None, None),
        ),
        (
            ["--objective", "output KD", "--objective", "full FDD"],
            (Path("runs/demo"), False, False, None, None, ["output KD", "full FDD"]),
        ),
    ],
)
def test_demo_passes_its_options_on(fake_module, arguments, expected):
    calls = []
    fake_module("fdd_kernels.demo.run", run_demo=lambda *args: calls.append(args))
    assert main(["demo", *arguments]) == 0
    assert calls == [expected]


def run_distill(fake_module, *arguments):
    calls = []
    fake_module("fdd_kernels.cli.distill.run", distill=calls.append)
    assert main(["distill", *NEEDED, *arguments]) == 0
    return calls[0]


def test_distill_defaults_are_those_of_the_options(fake_module):
    expected = DistillOptions(teacher="t", student="s", data=Path("d.txt"), output=Path("o"))
    assert run_distill(fake_module) == expected
    assert expected.config == FDDConfig()


def test_a_run_of_an_earlier_release_resumes_with_the_derivative_that_it_had(fake_module, tmp_path):
    (tmp_path / "run.json").write_text('{"config.derivative": "cosine", "config.alpha": 0.5}')
    output = ("--output", str(tmp_path))
    assert run_distill(fake_module, *output).config == FDDConfig(derivative="cosine")
    assert run_distill(fake_module, *output, "--no-resume").config == FDDConfig()
    given = run_distill(fake_module, *output, "--derivative", "mse").config
    assert given == FDDConfig(derivative="mse")
    for other in ('{"config.derivative": "weighted_cosine"}', "[]", "{", "{}"):
        (tmp_path / "run.json").write_text(other)
        assert run_distill(fake_module, *output).config == FDDConfig()


def test_distill_passes_training_options_on(fake_module):
    options = run_distill(
        fake_module,
        "--max-steps",
        "7",
        "--learning-rate",
        "3e-4",
        "--batch-size",
        "2",
        "--gradient-accumulation",
        "4",
        "--max-length",
        "64",
        "--dtype",
        "bfloat16",
        "--seed",
        "5",
        "--eval-fraction",
        "0.1",
        "--lora-rank",
        "8",
        "--gradient-checkpointing",
        "--save-steps",
        "9",
        "--log-steps",
        "2",
        "--no-resume",
        "--warmup",
        "0.1",
        "--weight-decay",
        "0.2",
        "--scheduler",
        "linear",
        "--lora-alpha",
        "4",
        "--lora-targets",
        "q_proj,v_proj",
        "--report-to",
        "tensorboard",
        "--teacher-dtype",
        "float32",
        "--teacher-device-map",
        "auto",
        "--teacher-offload-folder",
        "away",
    )
    assert (options.warmup, options.weight_decay, options.scheduler, options.lora_alpha) == (
        0.1,
        0.2,
        "linear",
        4.0,
    )
    assert (options.lora_targets, options.report_to) == (("q_proj", "v_proj"), ("tensorboard",))
    assert (options.teacher_dtype, options.teacher_device_map, options.teacher_offload_folder) == (
        "float32",
        "auto",
        Path("away"),
    )
    assert (
        options.max_steps,
        options.learning_rate,
        options.batch_size,
        options.gradient_accumulation,
    ) == (7, 3e-4, 2, 4)
    assert (
        options.max_length,
        options.dtype,
        options.seed,
        options.eval_fraction,
        options.lora_rank,
    ) == (64, "bfloat16", 5, 0.1, 8)
    assert (
        options.gradient_checkpointing,
        options.save_steps,
        options.log_steps,
        options.resume,
    ) == (True, 9, 2, False)


def test_what_people_try(fake_module):
    options = run_distill(
        fake_module,
        "--lr",
        "2e-4",
        "--steps",
        "7",
        "--bf16",
        "--eval-data",
        "e.txt",
        "--batch_size=2",
    )
    assert (options.learning_rate, options.max_steps, options.dtype) == (2e-4, 7, "bfloat16")
    assert (options.eval_data, options.eval_fraction, options.batch_size) == (Path("e.txt"), 0.0, 2)


def test_every_option_has_a_help_text():
    """The docstring of the dataclass describes each option, under Args."""
    for cls, skipped in ((DistillOptions, ()), (CacheOptions, ()), (FDDConfig, NOT_OPTIONS)):
        missing = {f.name for f in fields(cls)} - described(cls).keys() - {*skipped, "config"}
        assert not missing, (
            f"{cls.__name__}: document {missing} under Args in the docstring of {cls.__name__} or "
            "its base"
        )
    assert tuple(CODECS) == STORED


def test_options_of_unknown_kind_are_not_dropped():
    """Every field of an options dataclass is an option; another type needs a parser in
    `parsing.KINDS`.
    """
    for cls, skipped in (
        (DistillOptions, {"config"}),
        (CacheOptions, set()),
        (FDDConfig, set(NOT_OPTIONS)),
    ):
        parser = argparse.ArgumentParser()
        add_options(parser, cls)
        assert {f.name for f in fields(cls)} - skipped <= {
            action.dest for action in parser._actions
        }


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("batch_size=0 must be at least 1", "--batch-size 0 must be at least 1"),
        ("trajectory='x' is not one of 'kl'", "--trajectory x is not one of 'kl'"),
        ('backend="triton" cannot run', "--backend triton cannot run"),
        ("train_head=False, then scale_by_t2=True", "--no-train-head, then --scale-by-t2"),
        ("layer_weights=(1.0, 2.0) has", "--layer-weights 1.0,2.0 has"),
        ("trajectory='jsd:2' has beta 2", "--trajectory jsd:2 has beta 2"),
        ("set FDDConfig(vocab_size=N) with N <= 3", "set --vocab-size N with N <= 3"),
        (
            "student_layers and teacher_layers must be given",
            "--student-layers and --teacher-layers must be given",
        ),
        ("d/max_steps.txt: not UTF-8", "d/max_steps.txt: not UTF-8"),
        ("the teacher has alpha channels", "the teacher has alpha channels"),
    ],
)
def test_messages_name_options_as_they_are_typed(message, shown):
    assert in_flags(message, FDDConfig, CacheOptions) == shown


def test_cache_teacher_passes_its_options_on(monkeypatch):
    from fdd_kernels.cli import cache_teacher as command

    calls = []
    monkeypatch.setattr(command, "cache_teacher", calls.append)
    needed = ["cache-teacher", "--teacher", "t", "--data", "d.txt", "--output", "o"]
    assert main(needed) == 0
    assert calls.pop() == command.CacheOptions(teacher="t", data=Path("d.txt"), output=Path("o"))
    values = {
        "kind": "states",
        "num_layers": 3,
        "layer_grid": "linspace",
        "teacher_layers": (2, 4),
        "apply_final_norm": False,
        "dtype": "int8",
        "teacher_dtype": "bfloat16",
        "max_length": 64,
        "batch_size": 2,
        "eval_fraction": 0.1,
        "seed": 5,
        "shard_size": 3 * 2**20,
        "resume": False,
        "verify": True,
        "teacher_device_map": "disk",
        "teacher_offload_folder": Path("away"),
    }
    of_statistics = {
        "kind": "statistics",
        "student": "s",
        "temperature": 2.0,
        "derivative_temperature": 1.5,
        "output_temperature": 3.0,
        "output_in_dynamics": True,
        "vocab_size": 100,
    }
    known = {f.name for f in fields(command.CacheOptions)}
    assert (
        values.keys() | of_statistics.keys() | {"teacher", "data", "output", "teacher_quantization"}
        == known
    )
    flags = [
        *needed,
        "--no-apply-final-norm",
        "--no-resume",
        "--verify",
        "--shard-size",
        "3MiB",
        "--teacher-layers",
        "2,4",
    ]
    for name in (
        "kind",
        "num_layers",
        "layer_grid",
        "dtype",
        "teacher_dtype",
        "max_length",
        "batch_size",
        "eval_fraction",
        "seed",
        "teacher_device_map",
        "teacher_offload_folder",
    ):
        flags += [f"--{name.replace('_', '-')}", str(values[name])]
    assert main(flags) == 0
    assert calls.pop() == command.CacheOptions(
        teacher="t", data=Path("d.txt"), output=Path("o"), **values
    )
    flags = [*needed, "--output-in-dynamics"]
    for name in of_statistics.keys() - {"output_in_dynamics"}:
        flags += [f"--{name.replace('_', '-')}", str(of_statistics[name])]
    assert main(flags) == 0
    assert calls.pop() == command.CacheOptions(
        teacher="t", data=Path("d.txt"), output=Path("o"), **of_statistics
    )


STAGES = "a=3:output_temperature=3;b:output_temperature=1"
VALUES = {
    "alpha": ("0.5", 0.5),
    "beta": ("0", 0.0),
    "output_kd_weight": ("2", 2.0),
    "ce_weight": ("0.1", 0.1),
    "trajectory": ("jsd:0.1", "jsd:0.1"),
    "derivative": ("none", None),
    "output_divergence": ("alpha_beta:0.2,0.7", "alpha_beta:0.2,0.7"),
    "layer_weights": ("1,0.5,0", (1.0, 0.5, 0.0)),
    "derivative_layers": ("0,1,1", (0, 1, 1)),
    "temperature": ("2", 2.0),
    "derivative_temperature": ("1.5", 1.5),
    "output_temperature": ("1", 1.0),
    "teacher_mix": ("1", 1.0),
    "scale_by_t2": (None, True),
    "student_softcap": ("30", 30.0),
    "teacher_softcap": ("20", 20.0),
    "student_logit_scale": ("0.5", 0.5),
    "teacher_logit_scale": ("0.25", 0.25),
    "output_in_dynamics": (None, True),
    "vocab_size": ("100", 100),
    "backend": ("torch", "torch"),
    "num_layers": ("3", 3),
    "layer_grid": ("linspace", "linspace"),
    "apply_final_norm": (False, False),
    "train_head": (False, False),
    "schedules": ("teacher_mix=linear:1,1,0,9", "teacher_mix=linear:1,1,0,9"),
    "stages": (STAGES, STAGES),
    "gradient_balance": ("output_kd=1,ce=2;every=5", "ce=2,output_kd=1;every=5"),
}
# Those that do not go with the others' `derivative_layers`.
ALIGNMENT = {
    "layer_alignment": ("sinkhorn", "sinkhorn"),
    "alignment_every": ("50", 50),
    "alignment_epsilon": ("0.5", 0.5),
    "num_teacher_layers": ("6", 6),
}
# Those of feature space, which compares no distributions.
FEATURES = {
    "space": ("feature", "feature"),
    "trajectory": ("mse", "mse"),
    "projection": ("linear", "linear"),
    "rows": ("deviation", "deviation"),
}


def test_every_field_of_the_config_is_a_flag(fake_module):
    flags = []
    for name, (given, _) in VALUES.items():
        flag = name.replace("_", "-")
        flags += (
            [f"--no-{flag}"]
            if given is False
            else [f"--{flag}"]
            if given is None
            else [f"--{flag}", given]
        )
    flags += ["--student-layers", "1,2", "--teacher-layers", "3,5"]
    config = run_distill(fake_module, *flags).config
    expected = {name: value for name, (_, value) in VALUES.items()} | {
        "student_layers": (1, 2),
        "teacher_layers": (3, 5),
    }
    named = expected.keys() | ALIGNMENT.keys() | FEATURES.keys()
    assert {f.name for f in fields(FDDConfig)} - set(NOT_OPTIONS) == named
    for name, value in expected.items():
        assert getattr(config, name) == value, name
    for group in (ALIGNMENT, FEATURES):
        flags = [f"--{name.replace('_', '-')}={given}" for name, (given, _) in group.items()]
        config = run_distill(fake_module, *flags).config
        assert {name: (given, getattr(config, name)) for name, (given, _) in group.items()} == group


def test_weights_of_pairs_have_a_row_for_each_layer_of_the_student(fake_module):
    layers = ["--student-layers", "1,2", "--teacher-layers", "1,2,3"]
    options = run_distill(fake_module, *layers, "--layer-weights", "1,0,0;0,0.5,0.5")
    assert options.config.layer_weights == ((1.0, 0.0, 0.0), (0.0, 0.5, 0.5))
    layers[1] = "1"
    options = run_distill(fake_module, *layers, "--layer-weights", "1,0,2;")
    assert options.config.layer_weights == ((1.0, 0.0, 2.0),)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--trajectory", "wasserstein"], "--trajectory wasserstein is not one of"),
        (["--temperature", "0"], "--temperature 0.0 must be finite and greater than 0"),
        (
            ["--trajectory", "jsd:2"],
            "--trajectory jsd:2 has beta 2, which is not in [0, 1]",
        ),
        (
            ["--trajectory", "alpha_beta:0.2"],
            "--trajectory alpha_beta:0.2 gives 1 parameter(s), and alpha_beta takes 2: write "
            "alpha_beta[:alpha,beta]",
        ),
        (["--trajectory", "jsd:x"], "--trajectory jsd:x has a parameter that is no number"),
        (["--output-divergence", "mse"], "--output-divergence mse is not one of kl, reverse_kl"),
        (
            ["--layer-weights", "1,2"],
            "--layer-weights 1.0,2.0 has 2 entries and the trajectory 4 layers: give one for each",
        ),
        (["--layer-weights", "1,1,1,-1"], "--layer-weights entry=-1.0 must be finite"),
        (["--layer-alignment", "best"], "--layer-alignment best is not one of 'rank', 'argmin'"),
        (
            ["--layer-alignment", "emd", "--alignment-epsilon", "0.1"],
            "--alignment-epsilon 0.1 has no effect on --layer-alignment emd: leave it at None, or "
            "use --layer-alignment attention or",
        ),
        (
            ["--num-teacher-layers", "6"],
            "--num-layers 4 and --num-teacher-layers 6 are unequal numbers of layers",
        ),
        (
            ["--layer-weights", "1,0;0,1"],
            "--layer-weights has shape (2, 2), but the trajectory has 4 layers of the student",
        ),
        (["--layer-weights", "1,0;0"], "--layer-weights row 1 has 1 numbers and row 0 2"),
        (["--derivative-layers", "0,2,1,3"], "--derivative-layers 0,2,1,3 must not decrease"),
        (["--derivative-temperature", "0"], "--derivative-temperature 0.0 must be finite"),
        (["--teacher-mix", "1.5"], "--teacher-mix 1.5 must be in [0, 1]"),
        (
            ["--teacher-mix", "0.5", "--trajectory", "jsd:0.1"],
            "--teacher-mix 0.5 mixes the target of KL, but --trajectory jsd:0.1: use --trajectory "
            "kl, a weight of 0 for that term, or --teacher-mix 1",
        ),
        (
            ["--derivative", "weighted"],
            "--derivative weighted is not one of 'cosine', 'centered_cosine', 'weighted_cosine'",
        ),
        (
            ["--student-layers", "1,2"],
            "--student-layers and --teacher-layers must be given together",
        ),
        (
            ["--schedules", "alpha=linear:0,1"],
            "schedules: alpha: 'linear:0,1' is no WeightSchedule: write linear:initial,final,start",
        ),
        (
            ["--schedules", "alpha=linear:0,1,0,9", "--alpha", "0.3"],
            "--alpha 0.3 was given beside a schedule of alpha, which would override it",
        ),
        (
            ["--stages", "a=2:alpha=1;b:alpha=0", "--output-kd-weight", "0", "--beta", "0"],
            "at step 2 the schedule gives --output-kd-weight 0, --alpha 0",
        ),
        (
            ["--gradient-balance", "ce=1"],
            "--gradient-balance ce=1 names ce, which has no weight at any step: leave it out, or",
        ),
        (["--dtype", "float8"], "--dtype float8 is not one of auto, float32, bfloat16"),
        (
            ["--fp16"],
            "--dtype float16 has not been tried with this command: use bfloat16 (--bf16) or "
            "float32",
        ),
        (["--eval-fraction", "1"], "--eval-fraction 1.0 must be"),
        (
            ["--eval-fraction", "0.1", "--eval-data", "e.txt"],
            "--eval-fraction 0.1 was given beside --eval-data",
        ),
        (["--batch-size", "0"], "--batch-size 0 must be at least 1"),
        (["--learning-rate", "nan"], "--learning-rate nan must be greater than 0"),
        (["--weight-decay", "-1"], "--weight-decay -1.0 must be at least 0"),
        (["--scheduler", "cosin"], "--scheduler cosin is not one of cosine, linear"),
        (["--lora-alpha", "8"], "--lora-alpha 8.0 is for LoRA: give --lora-rank too"),
        (
            ["--teacher-quantization", "bnb3"],
            "--teacher-quantization bnb3 is not one of bnb4, bnb8, torchao-int8",
        ),
        (["--teacher-device-map", "nowhere"], "--teacher-device-map nowhere is not one of auto"),
        (
            ["--teacher-device-map", "disk"],
            "--teacher-device-map disk needs --teacher-offload-folder",
        ),
        (
            ["--teacher-offload-folder", "x"],
            "--teacher-offload-folder without --teacher-device-map has no effect",
        ),
        (
            ["--alpha", "0", "--beta", "0", "--output-kd-weight", "0"],
            "there is nothing to learn; give one of them a weight",
        ),
        (
            ["--num-layers", "1", "--alpha", "0", "--output-kd-weight", "0"],
            "--beta 1 alone needs two layers",
        ),
        (
            ["--num-layers", "0", "--output-kd-weight", "0"],
            "needs two layers to compare a change between, and there are 0",
        ),
    ],
)
def test_options_that_make_no_sense_are_one_line(arguments, message, capsys):
    assert main(["distill", *NEEDED, *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("fdd-kernels distill: ")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("raised", "code", "text"),
    [(UserError("no such file"), 2, "no such file"), (KeyboardInterrupt(), 130, "interrupted")],
)
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
    for name in (
        "fdd_kernels.demo.run",
        "fdd_kernels.demo.corpus",
        "fdd_kernels.demo.report",
        "fdd_kernels.demo.students",
    ):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "rich.console", None)
    assert main(["demo"]) == 2
    assert 'needs rich.console: pip install "fdd_kernels[hf]"' in capsys.readouterr().err


@pytest.mark.parametrize("library", ["bitsandbytes", "torchao"])
def test_quantisation_without_its_library_is_refused(monkeypatch, capsys, library):
    own = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == library else own(name)
    )
    kind = {"bitsandbytes": "bnb8", "torchao": "torchao-int8"}[library]
    assert main(["distill", *NEEDED, "--teacher-quantization", kind]) == 2
    assert (
        f"--teacher-quantization {kind} needs {library}: pip install {library}"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["distil"], "there is no command distil: did you mean distill?"),
        (
            ["distill", "--num-train-epochs", "3"],
            "there is no option --num-train-epochs: did you mean --epochs?",
        ),
        (
            ["distill", *NEEDED, "--leraning-rate=3"],
            "there is no option --leraning-rate: did you mean --learning-rate?",
        ),
        (["distill", *NEEDED, "--per_device_train_batch_size", "3"], "did you mean --batch-size?"),
        (["distill", *NEEDED, "--zzz"], "there is no option --zzz; see --help"),
        (
            ["distill", *NEEDED, "--student-layers", "a,b"],
            "argument --student-layers: 'a,b' must be numbers separated by commas",
        ),
        (
            ["distill", *NEEDED, "--batch-size", "many"],
            "argument --batch-size: 'many' is not a whole number",
        ),
        (
            ["cache-teacher", "--output", "o", "--shard-size", "lots"],
            "argument --shard-size: 'lots' is not an amount of memory",
        ),
    ],
)
def test_usage_errors_suggest_what_was_meant(capsys, arguments, hint):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert hint in capsys.readouterr().err


def test_help_version_and_usage_errors_need_no_torch():
    lines = [
        "--help",
        "--version",
        "nonsense",
        *(f"{name} --help" for name in COMMANDS),
        "distill --epochs x",
        "distill",
        "plan",
        "cache-teacher",
        "demo --seeds x",
    ]
    code = (
        WITHOUT_TORCH + "found = [run(line) for line in "
        f"{lines!r}]\nfound.append(run('doctor'))\nprint(repr(found))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    *found, doctor = ast.literal_eval(done.stdout)
    for line, (status, text) in zip(lines, found, strict=True):
        assert status == (0 if "--" in line and " x" not in line else 2), (line, text)
        assert "Traceback" not in text
        assert text.startswith("fdd_kernels" if line == "--version" else "usage: fdd-kernels"), text
    assert doctor == (2, "fdd-kernels doctor: this command needs torch: pip install torch\n")
