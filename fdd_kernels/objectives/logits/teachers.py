"""Several teachers of one call."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fdd_kernels.objectives.logits.arguments import LogitInputs, LogitOptions
from fdd_kernels.objectives.logits.call import LogitCall
from fdd_kernels.objectives.numbers import describe
from fdd_kernels.objectives.teacher_weights import check_teacher_weights, weights_of_rows
from fdd_kernels.objectives.tensors import FLOAT_DTYPES
from fdd_kernels.objectives.validation import check_places


def check_teachers(teachers: Sequence[tuple[Tensor, ...]], inputs: LogitInputs) -> None:
    """Refuse what is no list of teachers, or a teacher in `inputs` beside them.

    Raises:
        TypeError, ValueError: says which, and the remedy.
    """
    given = inputs.teacher_hidden, inputs.teacher_weight, inputs.teacher_bias
    if any(tensor is not None for tensor in given):
        raise ValueError(
            "teachers was given together with teacher_hidden, teacher_weight or teacher_bias: put "
            "that teacher among teachers"
        )
    if not isinstance(teachers, Sequence) or not teachers:
        raise ValueError("teachers must be a list of at least one (hidden, weight) or (..., bias)")
    for m, teacher in enumerate(teachers):
        if not isinstance(teacher, (tuple, list)) or len(teacher) not in (2, 3):
            raise TypeError(f"teachers[{m}] must be (hidden, weight) or (hidden, weight, bias)")


def call_of_teacher(
    name: str, teacher: tuple[Tensor, ...], inputs: LogitInputs, options: LogitOptions
) -> LogitCall:
    """Check the call of one teacher, called `name` in errors.

    Raises:
        TypeError, ValueError: as `LogitCall.of`.
    """
    hidden, weight, bias = (*teacher, None)[:3]
    own = {"teacher_hidden": hidden, "teacher_weight": weight, "teacher_bias": bias}
    try:
        return LogitCall.of(replace(inputs, **own), options)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{name}: {error}") from None


def log_weights_of(weights: Tensor | None, count: int, call: LogitCall) -> Tensor:
    """Return the logarithms of the teachers' weights over their sum, (R, M).

    Raises:
        TypeError, ValueError: weights of a wrong type, shape, device or range.
    """
    rows, dtype = call.rows, call.rows.statistics_dtype
    if weights is None:
        weights = torch.ones(count, dtype=dtype, device=rows.device)
    if not isinstance(weights, Tensor) or weights.dtype not in FLOAT_DTYPES:
        got = describe(weights) if isinstance(weights, Tensor) else type(weights).__name__
        raise TypeError(f"teacher_weights must be a tensor of floats, got {got}")
    check_places({"teacher_weights": weights}, "student_hidden", rows.student_hidden[0])
    check_teacher_weights(weights, [(count,), (count, *call.leading_shape)], rows.valid)
    weights = weights_of_rows(weights, rows.rows, dtype)
    return (weights / weights.sum(-1, keepdim=True)).log()


def heads_of(
    hidden: Sequence[Tensor], shared: Sequence[Tensor], has_bias: str
) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """Yield hidden states, head and bias or None of the teachers after the first.

    `shared` are heads, each followed by its bias where `has_bias` has a 1.
    """
    shared = iter(shared)
    for h, marked in zip(hidden, has_bias):
        yield h, next(shared), next(shared) if int(marked) else None
