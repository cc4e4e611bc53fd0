"""The configuration file of a recipe: its sections, checked before any work."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from dolly import DataOptions

from fdd_kernels import FDDConfig
from fdd_kernels.cli.distill.options import DistillOptions
from fdd_kernels.cli.evaluate.options import EvaluateOptions
from fdd_kernels.cli.parsing import did_you_mean
from fdd_kernels.common.errors import UserError

# What each objective changes in the section `loss`.
OBJECTIVES: dict[str, dict[str, float]] = {
    "kd": {"alpha": 0.0, "beta": 0.0},
    "trajectory": {"beta": 0.0},
    "derivative": {"alpha": 0.0},
    "fdd": {},
}
TRAININGS = ("sft_teacher", "sft_student", "distill")
# Options of a command that follow from the stage, or stand elsewhere in the file.
_OF_THE_STAGE = ("teacher", "data", "max_length")
_NOT_IN_TRAININGS = (*_OF_THE_STAGE, "student", "eval_data", "eval_fraction", "output", "config")
_NOT_IN_TRAININGS += ("teacher_cache", "seed", "gradient_accumulation", "resume")
_LAYERS = ("num_layers", "layer_grid", "student_layers", "teacher_layers", "apply_final_norm")
_NOT_IN_EVALUATE = (*_OF_THE_STAGE, *_LAYERS, "model", "json", "html", "generate")
_SOMEWHERE = Path("-")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """The content of a configuration file.

    Args:
        teacher, student: names or directories of the pretrained models.
        seed: of the splits and of every training.
        data: see `DataOptions`.
        sft_teacher, sft_student, distill: options of `DistillOptions`, and `windows_per_step`, the
            windows of an optimizer step in all processes.
        loss: options of `FDDConfig`, for the objective "fdd".
        evaluate: options of `EvaluateOptions`, of the answers above all.
    """

    teacher: str
    student: str
    seed: int
    data: DataOptions
    sft_teacher: dict[str, Any]
    sft_student: dict[str, Any]
    distill: dict[str, Any]
    loss: dict[str, Any]
    evaluate: dict[str, Any]

    def config(self, objective: str) -> FDDConfig:
        """Return layers and loss of an objective.

        Raises:
            UserError: an option of `loss` is wrong.
        """
        with _section("loss"):
            return FDDConfig.paper(**(self.loss | OBJECTIVES[objective]))

    def training(self, section: str, processes: int = 1, **more: Any) -> DistillOptions:
        """Return the options of a training: those of its section, and `more`.

        Raises:
            UserError: a value is wrong, or a step's windows cannot be divided among the processes.
        """
        given = dict(getattr(self, section))
        with _section(section):
            windows, size = given.pop("windows_per_step"), given["batch_size"] * processes
            if windows % size:
                raise UserError(
                    f"windows_per_step={windows} must be a multiple of "
                    f"batch_size={given['batch_size']} times {processes} processes: change "
                    "batch_size, which changes memory and time alone"
                )
            given |= {"seed": self.seed, "max_length": self.data.max_length, **more}
            return DistillOptions(gradient_accumulation=windows // size, **given)

    def evaluation(self, **more: Any) -> EvaluateOptions:
        """Return the options of the evaluation: those of its section, the layers of `loss`, `more`.

        Raises:
            UserError: a value is wrong.
        """
        layers = {name: value for name, value in self.loss.items() if name in _LAYERS}
        given = self.evaluate | layers | {"max_length": self.data.max_length, **more}
        with _section("evaluate"):
            return EvaluateOptions(generate=True, **given)


def load_recipe(file: Path, data: str | None = None, **models: str | None) -> Recipe:
    """Load a configuration file; `data`, `teacher` and `student` replace its own if not None.

    Raises:
        UserError: the file, a section, a name or a value is missing or wrong.
    """
    with _section(str(file)):
        content = _checked(yaml.safe_load(file.read_text("utf-8")), Recipe)
        content |= {role: name for role, name in models.items() if name is not None}
    with _section("data"):
        content["data"] = DataOptions(**_checked(content["data"], DataOptions))
        if data is not None:
            content["data"] = dataclasses.replace(content["data"], file=data)
    for section in TRAININGS:
        with _section(section):
            needed = ("windows_per_step", "batch_size")
            content[section] = _checked(content[section], DistillOptions, needed, _NOT_IN_TRAININGS)
    with _section("loss"):
        content["loss"] = _checked(content["loss"], FDDConfig, ())
    with _section("evaluate"):
        needed = ("seeds",)
        content["evaluate"] = _checked(
            content["evaluate"], EvaluateOptions, needed, _NOT_IN_EVALUATE
        )
    recipe = Recipe(**content)
    for section in TRAININGS:
        recipe.training(section, teacher="-", student="-", data=_SOMEWHERE, output=_SOMEWHERE)
    recipe.evaluation(teacher="-", model=("-",), data=_SOMEWHERE)
    for objective in OBJECTIVES:
        recipe.config(objective)
    return recipe


@contextlib.contextmanager
def _section(name: str) -> Iterator[None]:
    """Name the section in errors about its values."""
    try:
        yield
    except (UserError, TypeError, ValueError, OSError, yaml.YAMLError) as error:
        raise UserError(f"{name}: {error}") from error


def _checked(
    content: Any,
    cls: type,
    needed: Sequence[str] | None = None,
    elsewhere: Sequence[str] = (),
) -> dict[str, Any]:
    """Return a section with tuples for its lists.

    Args:
        cls: the dataclass whose fields are the names that the section may have.
        needed: names that it must have; None: all fields.
        elsewhere: fields that it may not have.

    Raises:
        UserError: it has a name that is not known, or lacks one, or has a number as text.
    """
    if not isinstance(content, dict):
        raise UserError(f"expected names with values, got {content!r}")
    fields = [field.name for field in dataclasses.fields(cls) if field.name not in elsewhere]
    needed = fields if needed is None else needed
    known = {*fields, *needed}
    for name in content:
        if name not in known:
            raise UserError(f"there is no {name!r}{did_you_mean(str(name), known)}")
        if _is_number(content[name]):
            raise UserError(
                f"{name}={content[name]!r} is text: YAML wants a point in such a number, as in "
                "1.0e-3"
            )
    for name in needed:
        if name not in content:
            raise UserError(f"{name} is missing")
    return {name: tuple(v) if isinstance(v, list) else v for name, v in content.items()}


def _is_number(value: Any) -> bool:
    """Whether a value is the text of a number."""
    try:
        return isinstance(value, str) and math.isfinite(float(value))
    except ValueError:
        return False
