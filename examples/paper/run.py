"""Run the published setting of Feature Dynamics Distillation, stage by stage; see docs/paper.md.

python examples/paper/run.py --config examples/paper/gpt2.yaml --stage sft-teacher

The same command resumes a stage that was stopped, and skips one that is complete. Each training is
one of `fdd-kernels distill`: its folder holds checkpoints, metrics.json, and in student/ the model
that was trained, also the fine-tuned teacher.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from dolly import is_prepared, prepare
from recipe import OBJECTIVES, Recipe, load_recipe
from rich.console import Console

from fdd_kernels import FDDConfig
from fdd_kernels.cli.distill.run import distill
from fdd_kernels.cli.distill.run_folder import METRICS_FILE, STUDENT_FOLDER
from fdd_kernels.cli.evaluate.run import evaluate
from fdd_kernels.cli.loading import load_vocabulary
from fdd_kernels.common.errors import SaidElsewhere, UserError

STAGES = ("data", "sft-teacher", "sft-student", "distill", "evaluate")
LABELS_ALONE = FDDConfig(output_kd_weight=0.0, alpha=0.0, beta=0.0, ce_weight=1.0, num_layers=0)
PROCESSES, RANK = (int(os.environ.get(name, n)) for name, n in (("WORLD_SIZE", 1), ("RANK", 0)))


def write_data(recipe: Recipe, output: Path, console: Console) -> None:
    """Write the splits of the data, unless they are there."""
    folder = output / "data"
    if is_prepared(folder, recipe.data, recipe.seed):
        console.print(f"{folder} is complete; nothing to do", soft_wrap=True)
        return
    alone("data")
    tokenizer = load_vocabulary(recipe.teacher, recipe.student).tokenizer
    prepare(folder, recipe.data, recipe.seed, tokenizer, console)


def fine_tune(role: str, recipe: Recipe, output: Path) -> None:
    """Fine-tune the teacher or the student on the labels alone.

    The command asks for a teacher, which no term of this loss needs and which never runs: the
    smaller model takes little memory in its place.
    """
    name = getattr(recipe, role)
    folder = output / f"sft-{role}"
    train(f"sft_{role}", recipe, output, folder, recipe.student, name, LABELS_ALONE)
    if RANK == 0:
        card = f"# {Path(name).name}, fine-tuned\n\nOn labels alone, without a teacher.\n"
        (folder / STUDENT_FOLDER / "README.md").write_text(card, "utf-8")


def distill_with(objective: str, recipe: Recipe, output: Path) -> None:
    """Distil the fine-tuned teacher into the fine-tuned student."""
    teacher, student = (trained(output, f"sft-{role}") for role in ("teacher", "student"))
    folder, config = output / f"distill-{objective}", recipe.config(objective)
    train("distill", recipe, output, folder, str(teacher), str(student), config)


def train(
    section: str,
    recipe: Recipe,
    output: Path,
    folder: Path,
    teacher: str,
    student: str,
    config: FDDConfig,
) -> None:
    """Train `student` into `folder`; resume what is there."""
    data = output / "data"
    if not is_prepared(data, recipe.data, recipe.seed):
        raise UserError(f"{data} holds no splits: run --stage data first")
    options = recipe.training(
        section,
        PROCESSES,
        teacher=teacher,
        student=student,
        data=data / "train.jsonl",
        eval_data=data / "validation.jsonl",
        output=folder,
        config=config,
    )
    distill(options)


def trained(output: Path, name: str) -> Path:
    """Return the folder of a trained model.

    Raises:
        UserError: the training is not complete.
    """
    folder = output / name
    if not (folder / METRICS_FILE).is_file():
        stage, _, objective = name.partition("distill-")
        stage = stage or f"distill --objective {objective}"
        raise UserError(f"{folder} is not complete: run --stage {stage} first")
    return folder / STUDENT_FOLDER


def alone(stage: str) -> None:
    """Raise UserError if there are several processes."""
    if PROCESSES > 1:
        raise UserError(f"run --stage {stage} in one process, without torchrun")


def compare(objectives: Sequence[str], recipe: Recipe, output: Path, console: Console) -> None:
    """Compare the student before and the distilled students with the teacher on the test split;
    write evaluation.json and evaluation.html, unless they are newer than the models.
    """
    alone("evaluate")
    teacher, *models = (
        trained(output, name)
        for name in ("sft-teacher", "sft-student", *(f"distill-{name}" for name in objectives))
    )
    file = output / "evaluation.json"
    options = recipe.evaluation(
        teacher=str(teacher),
        model=tuple(map(str, models)),
        data=output / "data" / "test.jsonl",
        json=file,
        html=file.with_suffix(".html"),
    )
    if file.is_file() and file.stat().st_mtime_ns > newest(teacher, *models):
        before = json.loads(file.read_text("utf-8"))["options"]
        if before == json.loads(json.dumps(dataclasses.asdict(options), default=str)):
            console.print(f"{file} is complete; nothing to do", soft_wrap=True)
            return
    evaluate(options, console)


def newest(*models: Path) -> int:
    """Return when the last of these trainings ended, in nanoseconds of the clock."""
    return max((folder.parent / METRICS_FILE).stat().st_mtime_ns for folder in models)


def run(arguments: argparse.Namespace) -> None:
    """Run the chosen stages in order."""
    recipe = load_recipe(
        arguments.config, arguments.data, teacher=arguments.teacher, student=arguments.student
    )
    output = arguments.output or Path("runs/paper") / arguments.config.stem
    objectives = arguments.objective or list(OBJECTIVES)
    console = Console(stderr=True, quiet=RANK > 0)
    for stage in arguments.stage or STAGES:
        console.rule(stage)
        if stage == "data":
            write_data(recipe, output, console)
        elif stage == "distill":
            for objective in objectives:
                console.print(f"objective {objective}")
                distill_with(objective, recipe, output)
        elif stage == "evaluate":
            compare(objectives, recipe, output, console)
        else:
            fine_tune(stage.removeprefix("sft-"), recipe, output)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code: 0, 2 for an error that the user can fix, 1 for a
    loss that is not finite, 130 for an interrupt.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, required=True, metavar="FILE", help="gpt2.yaml")
    parser.add_argument(
        "--stage", action="append", choices=STAGES, help="may repeat; all stages if not given"
    )
    parser.add_argument(
        "--objective",
        action="append",
        choices=OBJECTIVES,
        help="of distill and evaluate; may repeat; all four if not given",
    )
    parser.add_argument("--output", type=Path, metavar="DIR", help="runs/paper/NAME_OF_CONFIG")
    for name, text in (
        ("data", "your databricks-dolly-15k.jsonl, in place of the config's"),
        ("teacher", "a name or directory, in place of the config's"),
        ("student", "likewise"),
    ):
        parser.add_argument(f"--{name}", help=text)
    arguments = parser.parse_args(argv)
    try:
        run(arguments)
    except SaidElsewhere as error:
        return error.exit_status
    except UserError as error:
        print(f"run.py: {error}", file=sys.stderr)
        return error.exit_status
    except KeyboardInterrupt:
        print("run.py: interrupted; the same command resumes", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
