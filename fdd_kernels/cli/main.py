"""The command `fdd-kernels`. Its parsers need no torch; each subcommand imports its modules when it
runs.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from fdd_kernels.cli.cache_options import CacheOptions
from fdd_kernels.cli.distill.options import DistillOptions, former_defaults
from fdd_kernels.cli.evaluate.options import EvaluateOptions
from fdd_kernels.cli.parsing import (
    Parser,
    add_options,
    described,
    did_you_mean,
    given_options,
    in_flags,
    size,
    with_hyphens,
)
from fdd_kernels.cli.plan import add_plan
from fdd_kernels.common.errors import SaidElsewhere, UserError
from fdd_kernels.common.heartbeat import Heartbeat
from fdd_kernels.objectives.fdd.options import FDDConfig
from fdd_kernels.objectives.option_checks import require_divergence
from fdd_kernels.version import __version__

# Fields of the loss that the Trainer sets.
# Fields of a config that are no options: without a meaning for the training of causal LMs.
NOT_OPTIONS = (
    *("ignore_index", "shift", "reduction"),
    *("pooling", "encoder_weight", "encoder_trajectory"),
)
MODEL = {"teacher": (str, "DIR_OR_NAME"), "student": (str, "DIR_OR_NAME")}
FOLDERS = {
    "output": (Path, "DIR"),
    "teacher_cache": (Path, "DIR"),
    "teacher_offload_folder": (Path, "DIR"),
}
TEACHER = ("teacher_dtype", "teacher_quantization", "teacher_device_map", "teacher_offload_folder")
INPUTS = ("student", "data", "eval_data", "output")
SPELLINGS = {
    "learning_rate": ("--lr",),
    "max_steps": ("--steps",),
    "gradient_accumulation": ("--gradient-accumulation-steps",),
}


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of the whole command; each subcommand sets `run` to its function."""
    parser = Parser(
        prog="fdd-kernels", description="Feature Dynamics Distillation of language models."
    )
    parser.add_argument("--version", action="version", version=f"fdd_kernels {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    _add_demo(commands)
    _add_distill(commands)
    _add_cache_teacher(commands)
    _add_evaluate(commands)
    _add_doctor(commands)
    add_plan(commands)
    parser.commands = commands.choices
    return parser


def _add_demo(commands) -> None:
    demo = commands.add_parser(
        "demo",
        help="distil a small teacher on the Python standard library's source and report",
        description=run_demo.__doc__,
    )
    demo.add_argument(
        "--output",
        type=Path,
        default=Path("runs/demo"),
        metavar="DIR",
        help="the directory for the report (%(default)s)",
    )
    demo.add_argument("--quick", action="store_true", help="fewer steps")
    source = demo.add_mutually_exclusive_group()
    source.add_argument(
        "--teacher",
        type=Path,
        metavar="DIR",
        help="the demo's teacher (default: the one in the repository)",
    )
    source.add_argument(
        "--retrain-teacher",
        action="store_true",
        help="train the teacher again (over an hour; minutes with --quick)",
    )
    demo.add_argument("--seeds", type=int, default=None, metavar="N", help="number of seeds")
    demo.add_argument(
        "--objective",
        action="append",
        metavar="NAME",
        help="train only a student of this objective; may repeat; beside the default five there "
        'are "KD + derivative" and "KD + weighted derivative"',
    )
    demo.set_defaults(run=run_demo)


def _add_distill(commands) -> None:
    distill = commands.add_parser(
        "distill",
        help="distil your own teacher into your own student on your own text",
        description=run_distill.__doc__,
        usage="%(prog)s (--teacher DIR_OR_NAME --data PATH | --teacher-cache DIR) --student "
        "DIR_OR_NAME --output DIR [options]",
    )
    needed = distill.add_argument_group("inputs and output")
    source = needed.add_mutually_exclusive_group(required=True)
    add_options(source, DistillOptions, ("teacher", "teacher_cache"), kinds=MODEL | FOLDERS)
    add_options(
        needed, DistillOptions, INPUTS, kinds=MODEL | FOLDERS, required=("student", "output")
    )
    training = distill.add_argument_group("training")
    length = training.add_mutually_exclusive_group()
    add_options(length, DistillOptions, ("epochs", "max_steps"), aliases=SPELLINGS)
    rest = ("teacher", "teacher_cache", "epochs", "max_steps", *INPUTS, *TEACHER)
    add_options(training, DistillOptions, skip=rest, aliases=SPELLINGS)
    for name, dtype in (("--bf16", "bfloat16"), ("--fp16", "float16")):
        text = f"--dtype {dtype}" if dtype == "bfloat16" else argparse.SUPPRESS
        training.add_argument(
            name,
            dest="dtype",
            action="store_const",
            const=dtype,
            default=argparse.SUPPRESS,
            help=text,
        )
    add_options(distill.add_argument_group("the teacher"), DistillOptions, TEACHER, kinds=FOLDERS)
    add_options(
        distill.add_argument_group("loss and layers (defaults: as FDDConfig())"),
        FDDConfig,
        skip=NOT_OPTIONS,
    )
    distill.set_defaults(run=run_distill, options=(DistillOptions, FDDConfig))


def _add_cache_teacher(commands) -> None:
    cache = commands.add_parser(
        "cache-teacher",
        help="run a teacher over your text once, to distil without it",
        description=run_cache_teacher.__doc__,
        usage="%(prog)s --teacher DIR_OR_NAME --data PATH --output DIR [options]",
    )
    add_options(
        cache,
        CacheOptions,
        kinds=MODEL | FOLDERS | {"shard_size": (size, "SIZE")},
        required=("output",),
    )
    cache.set_defaults(run=run_cache_teacher, options=(CacheOptions,))


def _add_evaluate(commands) -> None:
    evaluate = commands.add_parser(
        "evaluate",
        help="compare models on a held-out text: loss, accuracy, KL to a teacher, ROUGE-L",
        description=run_evaluate.__doc__,
        usage="%(prog)s --model DIR_OR_NAME [--model ...] [--teacher DIR_OR_NAME] --data PATH "
        "[--json FILE] [--html FILE] [options]",
    )
    evaluate.add_argument(
        "--model",
        action="append",
        required=True,
        metavar="DIR_OR_NAME",
        help=described(EvaluateOptions)["model"].removesuffix("."),
    )
    files = {"json": (Path, "FILE"), "html": (Path, "FILE")}
    add_options(
        evaluate,
        EvaluateOptions,
        skip=("model",),
        kinds=MODEL | FOLDERS | files,
        required=("data",),
    )
    evaluate.set_defaults(run=run_evaluate, options=(EvaluateOptions,))


def _add_doctor(commands) -> None:
    doctor = commands.add_parser(
        "doctor",
        help="show what is installed and which backends work here",
        description=run_doctor.__doc__,
    )
    doctor.add_argument("--json", action="store_true", help="print JSON")
    doctor.set_defaults(run=run_doctor)


def run_demo(arguments: argparse.Namespace) -> None:
    """Train students of one size and budget under several objectives and compare them."""
    with (
        Heartbeat(lambda seconds: print(f"loading PyTorch: {seconds:.0f} s", file=sys.stderr)),
        _needs("transformers", "tokenizers", "rich", "matplotlib"),
    ):
        from fdd_kernels.demo.run import run_demo as run
    try:
        run(
            arguments.output,
            arguments.quick,
            arguments.retrain_teacher,
            arguments.seeds,
            arguments.teacher,
            arguments.objective,
        )
    except (ValueError, OSError) as error:
        raise UserError(str(error)) from error


def run_distill(arguments: argparse.Namespace) -> None:
    """Distil a teacher into a student with the FDD loss. An interrupted run resumes from its last
    checkpoint.
    """
    with _needs("transformers", "accelerate", "safetensors", "rich"):
        given = given_options(arguments, DistillOptions)
        former = former_defaults(given["output"]) if given.get("resume", True) else {}
        try:
            config = FDDConfig(**(former | given_options(arguments, FDDConfig)))
            # Distances of embeddings are for models that the command does not take.
            require_divergence("output_divergence", config.output_divergence)
        except (TypeError, ValueError) as error:
            raise UserError(str(error)) from error
        options = DistillOptions(config=config, **given)
        from fdd_kernels.cli.distill.run import distill
    distill(options)


def run_cache_teacher(arguments: argparse.Namespace) -> None:
    """Store the hidden states of a teacher's sampled layers over a text, and its head, to distil
    without the teacher.
    """
    given = given_options(arguments, CacheOptions)
    alone = given.keys() == {"output", "verify"}
    for name in ("teacher", "data"):
        if name not in given and not alone:
            raise UserError(
                f"--{name} is missing; only --verify with --output alone works without it"
            )
    options = None if alone else CacheOptions(**given)
    with _needs("transformers", "safetensors", "rich"):
        from fdd_kernels.cli.cache_teacher import cache_teacher, verify_cache
    if alone:
        verify_cache(arguments.output)
    else:
        cache_teacher(options)


def run_evaluate(arguments: argparse.Namespace) -> None:
    """Compare models on the same held-out text: loss, perplexity, token accuracy, bits per byte; KL
    to a teacher at the output and by layer; ROUGE-L of generated answers.
    """
    options = EvaluateOptions(**given_options(arguments, EvaluateOptions))
    with _needs("transformers", "safetensors", "rich", "jinja2"):
        from fdd_kernels.cli.evaluate.run import evaluate
    evaluate(options)


def run_doctor(arguments: argparse.Namespace) -> int:
    """Print versions, processor, GPU, and for each backend whether it works here. The exit code is
    1 if a backend that should work does not.
    """
    with _needs("torch", "numpy"):
        from fdd_kernels.cli.doctor import examine, print_findings

    return print_findings(examine(), as_json=arguments.json)


@contextlib.contextmanager
def _needs(*packages: str) -> Iterator[None]:
    """Turn a missing package into one line with its remedy."""
    try:
        yield
    except ModuleNotFoundError as error:
        name = (error.name or "").split(".")[0]
        if name not in (*packages, "torch"):
            raise
        alone = name in ("torch", "numpy", "matplotlib")
        remedy = f"pip install {name}" if alone else 'pip install "fdd_kernels[hf]"'
        raise UserError(f"this command needs {error.name}: {remedy}") from error


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the arguments; exit with code 2 and a suggestion for an unknown one."""
    parser = build_parser()
    argv = with_hyphens(sys.argv[1:] if argv is None else argv)
    if argv and not argv[0].startswith("-") and argv[0] not in parser.commands:
        parser.error(f"there is no command {argv[0]}{did_you_mean(argv[0], parser.commands)}")
    if argv and argv[0] in parser.commands:
        parser.commands[argv[0]].check(argv[1:])
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        The exit code: 0; 2 for an error that the user can fix (one line on stderr); 1 for a run
        whose loss is not finite (one line too) and for a finding of doctor or plan; 130 for an
        interrupt.
    """
    arguments = _parse(argv)
    command: Callable[[argparse.Namespace], int | None] = arguments.run
    try:
        return command(arguments) or 0
    except SaidElsewhere as error:
        return error.exit_status
    except UserError as error:
        message = in_flags(str(error), *getattr(arguments, "options", ()))
        print(f"fdd-kernels {arguments.command}: {message}", file=sys.stderr)
        return error.exit_status
    except KeyboardInterrupt:
        print(f"fdd-kernels {arguments.command}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the program that our output is piped into has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
