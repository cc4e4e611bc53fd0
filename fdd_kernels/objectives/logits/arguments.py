"""Arguments that the objectives of the logits share, and their checks."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

from torch import Tensor

from fdd_kernels.objectives.inputs import LossInputs
from fdd_kernels.objectives.option_checks import (
    REDUCTIONS,
    require_choice,
    require_head_options,
    require_number,
)
from fdd_kernels.objectives.tensors import require_float
from fdd_kernels.objectives.validation import check_heads


class Model(NamedTuple):
    """Arguments of one model, under their names in the public functions without its prefix."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None
    logit_scale: float = 1.0
    softcap: float | None = None


class Positions(NamedTuple):
    """Arguments of positions, under their names in the public functions."""

    labels: Tensor | None = None
    mask: Tensor | None = None
    token_weights: Tensor | None = None
    ignore_index: int = -100
    shift: bool = False


class Reduction(NamedTuple):
    """Arguments of the way from one value per position to the loss, under their names there."""

    reduction: str = "mean"
    num_items_in_batch: Tensor | float | None = None
    scale_by_t2: bool = False


@dataclass(frozen=True)
class LogitInputs(LossInputs):
    """The tensors of one call with one hidden state per model.

    Attributes:
        prefix: of the student's tensors in the public function.
        has_teacher: whether the objective compares with a teacher's logits.
    """

    prefix: str = "student_"
    has_teacher: bool = True

    def named_floats(self) -> dict[str, Tensor | None]:
        """Name every tensor of floating point as error messages do; None for one not given."""
        named = {
            f"{self.prefix}hidden": self.student_hidden[0],
            f"{self.prefix}weight": self.student_weight,
            f"{self.prefix}bias": self.student_bias,
        }
        if self.has_teacher:
            named |= {
                "teacher_hidden": self.teacher_hidden[0],
                "teacher_weight": self.teacher_weight,
                "teacher_bias": self.teacher_bias,
            }
        return named

    def without_teacher(self) -> LogitInputs:
        """Return the inputs of the student alone."""
        alone = {"teacher_hidden": (), "teacher_weight": None, "teacher_bias": None}
        return replace(self, **alone, has_teacher=False)

    def checked(self) -> LogitInputs:
        """Check hidden states and heads, and return them with the states as tuples.

        Raises:
            TypeError, ValueError: a wrong type, dtype, shape or device, or a teacher that asks for
                gradient.
        """
        found = {"student_hidden": (), "teacher_hidden": ()}
        models = {"student": self.prefix} | ({"teacher": "teacher_"} if self.has_teacher else {})
        for side, prefix in models.items():
            state, weight = getattr(self, f"{side}_hidden"), getattr(self, f"{side}_weight")
            require_float(f"{prefix}hidden", state)
            require_float(f"{prefix}weight", weight)
            if state.ndim < 1 or state.shape[-1] == 0:
                raise ValueError(
                    f"{prefix}hidden has shape {tuple(state.shape)}: it must be (..., width)"
                )
            found[f"{side}_hidden"] = (state,)
        inputs = replace(self, **found)
        check_heads(inputs, self.prefix, f"{self.prefix}hidden")
        return inputs


@dataclass(frozen=True)
class LogitOptions:
    """The options that the objectives of the logits share, as in `fused_fdd_loss`."""

    temperature: float = 1.0
    scale_by_t2: bool = False
    student_softcap: float | None = None
    teacher_softcap: float | None = None
    student_logit_scale: float = 1.0
    teacher_logit_scale: float = 1.0
    ignore_index: int = -100
    shift: bool = False
    reduction: str = "mean"
    vocab_size: int | None = None
    teacher_vocab_size: int | None = None
    backend: str = "auto"
    prefix: str = "student_"

    def __post_init__(self) -> None:
        require_number("temperature", self.temperature, positive=True)
        require_head_options(self, self.prefix)
        require_choice("reduction", self.reduction, REDUCTIONS)

    @property
    def factor(self) -> float:
        """Return the factor of the loss."""
        return self.temperature**2 if self.scale_by_t2 else 1.0


def logit_arguments(
    student: Model,
    teacher: Model | None,
    positions: Positions,
    reduction: Reduction,
    *,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    teacher_vocab_size: int | None = None,
    backend: str = "auto",
    prefix: str = "student_",
) -> tuple[LogitInputs, LogitOptions]:
    """Sort the arguments of a public function into tensors and options, which are checked.

    Without a `teacher` the objective compares with no teacher's logits. The student's arguments are
    named with `prefix`.

    Raises:
        TypeError, ValueError: an option of a wrong type or range.
    """
    of_teacher = Model(None, None) if teacher is None else teacher
    options = LogitOptions(
        temperature=temperature,
        scale_by_t2=reduction.scale_by_t2,
        student_softcap=student.softcap,
        teacher_softcap=of_teacher.softcap,
        student_logit_scale=student.logit_scale,
        teacher_logit_scale=of_teacher.logit_scale,
        ignore_index=positions.ignore_index,
        shift=positions.shift,
        reduction=reduction.reduction,
        vocab_size=vocab_size,
        teacher_vocab_size=teacher_vocab_size,
        backend=backend,
        prefix=prefix,
    )
    inputs = LogitInputs(
        student_hidden=student.hidden,
        student_weight=student.weight,
        teacher_hidden=of_teacher.hidden,
        teacher_weight=of_teacher.weight,
        labels=positions.labels,
        student_bias=student.bias,
        teacher_bias=of_teacher.bias,
        mask=positions.mask,
        num_items_in_batch=reduction.num_items_in_batch,
        token_weights=positions.token_weights,
        prefix=prefix,
    )
    return (inputs.without_teacher() if teacher is None else inputs), options
