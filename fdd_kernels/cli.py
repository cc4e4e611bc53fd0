"""The command `fdd-kernels`; each subcommand imports what it needs when it runs."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from fdd_kernels.planner.command import add_plan, parse_size
from fdd_kernels.user_error import UserError
from fdd_kernels.version import __version__

# Options of FDDConfig that are flags of `distill`; what they mean is checked by FDDConfig itself.
_NUMBERS = {
    "alpha": "weight of the trajectory",
    "beta": "weight of the derivative",
    "output-kd-weight": "weight of KL(teacher || student) at the output",
    "ce-weight": "weight of cross-entropy on the text itself",
    "temperature": "divides the logits of trajectory and derivative",
    "output-temperature": "divides the logits of the output KD",
    "student-softcap": "soft cap of the student's logits, if not its own",
    "teacher-softcap": "soft cap of the teacher's logits, if not its own",
    "student-logit-scale": "scale of the student's logits, if not its own",
    "teacher-logit-scale": "scale of the teacher's logits, if not its own",
}
_INTEGERS = {
    "num-layers": "how many layers to compare",
    "vocab-size": "compare only the first tokens (found out where heads are padded unequally)",
}
_WORDS = {
    "trajectory": "kl, reverse_kl, jsd, skew_kl, mse or cosine",
    "derivative": "cosine, centered_cosine, mse or none",
    "layer-grid": "floor (the paper's) or linspace",
    "backend": "auto, torch, cpu, triton or reference",
}
_SWITCHES = {
    "scale-by-t2": "multiply the output KD by its temperature squared",
    "output-in-dynamics": "count the output among the layers of trajectory and derivative",
    "apply-final-norm": "read layers through the final norm and head, as the output is",
    "train-head": "let the loss train the student's head",
}
_LAYERS = {"student-layers": "layers of the student, as in 2,4,6", "teacher-layers": "layers of the teacher, paired by rank"}


def _layers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def _word(text: str) -> str | None:
    return None if text.lower() == "none" else text


def _name(flag: str) -> str:
    return flag.replace("-", "_")


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command; each subcommand sets `run` to its function."""
    parser = argparse.ArgumentParser(prog="fdd-kernels", description="Feature Dynamics Distillation of language models.")
    parser.add_argument("--version", action="version", version=f"fdd_kernels {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    _add_demo(commands)
    _add_distill(commands)
    _add_cache_teacher(commands)
    _add_doctor(commands)
    add_plan(commands)
    return parser


def _add_demo(commands) -> None:
    demo = commands.add_parser(
        "demo", help="distil a small teacher on the Python standard library's source and report", description=run_demo.__doc__
    )
    demo.add_argument("--output", type=Path, default=Path("runs/demo"), metavar="DIR", help="where to write (%(default)s)")
    demo.add_argument("--quick", action="store_true", help="fewer steps, one seed")
    demo.add_argument("--retrain-teacher", action="store_true", help="train the teacher again instead of the shipped one")
    demo.add_argument("--seeds", type=int, default=None, metavar="N", help="how many seeds")
    demo.set_defaults(run=run_demo)


def _add_distill(commands) -> None:
    distill = commands.add_parser(
        "distill", help="distil your own teacher into your own student on your own text", description=run_distill.__doc__
    )
    needed = distill.add_argument_group("what")
    source = needed.add_mutually_exclusive_group(required=True)
    source.add_argument("--teacher", metavar="DIR_OR_NAME", help="a transformers causal LM")
    source.add_argument("--teacher-cache", type=Path, metavar="DIR", help="or what cache-teacher wrote, text included")
    needed.add_argument("--student", required=True, metavar="DIR_OR_NAME", help="another; only config.json: random weights")
    needed.add_argument("--data", type=Path, metavar="PATH", help="files, a directory of them, or a data set, for --teacher")
    needed.add_argument("--output", required=True, type=Path, metavar="DIR", help="checkpoints, student/ and metrics.json")
    training = distill.add_argument_group("training")
    length = training.add_mutually_exclusive_group()
    length.add_argument("--epochs", type=float, help="passes over the data (1)")
    length.add_argument("--max-steps", type=int, metavar="N", help="optimizer steps")
    training.add_argument("--learning-rate", type=float, metavar="RATE", help="its peak (1e-4)")
    training.add_argument("--batch-size", type=int, metavar="N", help="windows in a batch (8)")
    training.add_argument("--gradient-accumulation", type=int, metavar="N", help="batches in a step (1)")
    training.add_argument("--max-length", type=int, metavar="N", help="tokens in a window (512, or what the models have)")
    training.add_argument("--dtype", metavar="DTYPE", help="auto, float32 or bfloat16")
    training.add_argument("--seed", type=int, metavar="N", help="of everything random (0)")
    training.add_argument("--eval-fraction", type=float, metavar="PART", help="part of the windows held out (0.05)")
    training.add_argument("--lora-rank", type=int, metavar="N", help="train LoRA adapters of this rank (0: all weights)")
    training.add_argument("--gradient-checkpointing", action="store_true", default=None, help="less memory, more time")
    training.add_argument("--save-steps", type=int, metavar="N", help="steps between checkpoints and evaluations (100)")
    training.add_argument("--log-steps", type=int, metavar="N", help="steps between reports of the loss (10)")
    training.add_argument(
        "--resume", action=argparse.BooleanOptionalAction, default=None,
        help="go on with the same run in --output, which is the default; --no-resume removes it and starts again",
    )  # fmt: skip
    loss = distill.add_argument_group("loss and layers (defaults: the paper's)")
    for options, kind, shown in (
        (_NUMBERS, float, "X"),
        (_INTEGERS, int, "N"),
        (_WORDS, _word, "NAME"),
        (_LAYERS, _layers, "N,N"),
    ):
        for flag, text in options.items():
            loss.add_argument(f"--{flag}", type=kind, metavar=shown, default=argparse.SUPPRESS, help=text)
    for flag, text in _SWITCHES.items():
        loss.add_argument(f"--{flag}", action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=text)
    distill.set_defaults(run=run_distill)


def _add_cache_teacher(commands) -> None:
    cache = commands.add_parser(
        "cache-teacher", help="run a teacher over your text once, to distil without it", description=run_cache_teacher.__doc__
    )
    cache.add_argument("--teacher", metavar="DIR_OR_NAME", help="a transformers causal LM")
    cache.add_argument("--data", type=Path, metavar="PATH", help="files, a directory of them, or a data set")
    cache.add_argument("--output", required=True, type=Path, metavar="DIR", help="the cache")
    cache.add_argument("--kind", metavar="NAME", help="states, or statistics for the frozen head of --student (states)")
    cache.add_argument("--student", metavar="DIR_OR_NAME", help="for statistics: whose head")
    for flag in ("temperature", "output-temperature"):
        cache.add_argument(f"--{flag}", type=float, metavar="X", help=f"for statistics: {_NUMBERS[flag]}")
    cache.add_argument("--output-in-dynamics", action=argparse.BooleanOptionalAction, help="for statistics: "
                       + _SWITCHES["output-in-dynamics"])  # fmt: skip
    cache.add_argument("--vocab-size", type=int, metavar="N", help=f"for statistics: {_INTEGERS['vocab-size']}")
    cache.add_argument("--num-layers", type=int, metavar="N", help=f"{_INTEGERS['num-layers']} (4)")
    cache.add_argument("--layer-grid", metavar="NAME", help=_WORDS["layer-grid"])
    cache.add_argument("--teacher-layers", type=_layers, metavar="N,N", help="these layers instead, as in 4,8,12")
    cache.add_argument("--apply-final-norm", action=argparse.BooleanOptionalAction, help=_SWITCHES["apply-final-norm"])
    cache.add_argument("--dtype", metavar="DTYPE", help="of what is stored: float32, bfloat16, int8 or float8 (bfloat16)")
    cache.add_argument("--teacher-dtype", metavar="DTYPE", help="of the computation: auto, float32 or bfloat16 (auto)")
    cache.add_argument("--max-length", type=int, metavar="N", help="tokens in a window (512, or what the teacher has)")
    cache.add_argument("--batch-size", type=int, metavar="N", help="windows in a batch (8)")
    cache.add_argument("--eval-fraction", type=float, metavar="PART", help="part of the windows held out (0.05)")
    cache.add_argument("--seed", type=int, metavar="N", help="of what is held out (0)")
    cache.add_argument("--shard-size", metavar="SIZE", help="of a file (512MiB)")
    cache.add_argument(
        "--resume", action=argparse.BooleanOptionalAction, default=None,
        help="go on with the same cache in --output, which is the default; --no-resume removes it and starts again",
    )  # fmt: skip
    cache.add_argument(
        "--verify", action="store_true", default=None,
        help="compare checksums at the end; with --output alone: of the cache that is there",
    )  # fmt: skip
    cache.set_defaults(run=run_cache_teacher)


def _add_doctor(commands) -> None:
    doctor = commands.add_parser(
        "doctor", help="what is installed and which backends work here", description=run_doctor.__doc__
    )
    doctor.add_argument("--json", action="store_true", help="print JSON")
    doctor.set_defaults(run=run_doctor)


def run_demo(arguments: argparse.Namespace) -> None:
    """Train students of one size and budget under five objectives and compare them."""
    with _needs("transformers", "tokenizers", "rich"):
        from fdd_kernels.demo.run import run_demo as run
    try:
        run(arguments.output, arguments.quick, arguments.retrain_teacher, arguments.seeds)
    except (ValueError, OSError) as error:
        raise UserError(str(error)) from error


def run_distill(arguments: argparse.Namespace) -> None:
    """Distil a teacher into a student with the FDD loss. A run that was interrupted goes on where it was last saved."""
    with _needs("transformers", "accelerate", "safetensors", "rich"):
        from fdd_kernels.distill_command.run import distill
        from fdd_kernels.distill_command.run_folder import DistillOptions
    from fdd_kernels.config import FDDConfig

    given = {name: value for name, value in vars(arguments).items() if name not in ("command", "run")}
    flags = [_name(flag) for group in (_NUMBERS, _INTEGERS, _WORDS, _SWITCHES, _LAYERS) for flag in group]
    loss = {name: given.pop(name) for name in flags if name in given}
    try:
        config = FDDConfig(**loss)
    except (TypeError, ValueError) as error:
        raise UserError(str(error)) from error
    distill(DistillOptions(config=config, **{name: value for name, value in given.items() if value is not None}))


def run_cache_teacher(arguments: argparse.Namespace) -> None:
    """Store the hidden states of a teacher's sampled layers over a text, and its head: what distilling from it needs."""
    with _needs("transformers", "safetensors", "rich"):
        from fdd_kernels.teacher_cache.command import CacheOptions, cache_teacher, verify_cache

    given = {n: value for n, value in vars(arguments).items() if n not in ("command", "run") and value is not None}
    if given.keys() == {"output", "verify"}:
        verify_cache(arguments.output)
        return
    for name in ("teacher", "data"):
        if name not in given:
            raise UserError(f"--{name} is missing; only --verify does without it, with --output alone")
    if "shard_size" in given:
        given["shard_size"] = parse_size(given["shard_size"])
    cache_teacher(CacheOptions(**given))


def run_doctor(arguments: argparse.Namespace) -> int:
    """Print versions, processor, GPU, and for each backend whether it works here; exit code 1 if one that should does not."""
    from fdd_kernels.doctor import examine, print_findings

    return print_findings(examine(), as_json=arguments.json)


@contextlib.contextmanager
def _needs(*packages: str) -> Iterator[None]:
    """Turn a missing package of the Hugging Face extra into one line."""
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in packages:
            raise
        raise UserError(f'this command needs {error.name}: pip install "fdd_kernels[hf]"') from error


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code: 0, 2 for what the user can put right (one line on stderr), 1 for a run whose loss
    is no number (one line too), 130 interrupted.
    """
    arguments = build_parser().parse_args(argv)
    command: Callable[[argparse.Namespace], int | None] = arguments.run
    try:
        return command(arguments) or 0
    except UserError as error:
        print(f"fdd-kernels {arguments.command}: {error}", file=sys.stderr)
        return error.exit_status
    except KeyboardInterrupt:
        print(f"fdd-kernels {arguments.command}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
