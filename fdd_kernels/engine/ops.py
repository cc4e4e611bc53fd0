"""The two operations as PyTorch operators: schemas, fakes for tracing, and dispatch to a backend by
name.

`lens_stats` returns every statistic of `spec.py`; `lens_grad` returns, given upstream gradients of
those statistics, the gradients of the student's hidden states, weight and bias. Rows that are not
`valid` are never multiplied, and their statistics and gradients are 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fdd_kernels.backends import BACKENDS
from fdd_kernels.lens.inputs import LensInputs
from fdd_kernels.lens.layout import MOMENT_STATS, REQUEST_STATS
from fdd_kernels.lens.spec import LensSpec, count_parts

# LensInputs, an encoded LensSpec, a key of BACKENDS.
_ARGUMENTS = (
    "Tensor[] student_hidden, Tensor student_weight, Tensor? student_bias, Tensor[] "
    "teacher_hidden, Tensor? teacher_weight, Tensor? teacher_bias, Tensor? valid, Tensor? labels, "
    "str structure, Tensor numbers, SymInt columns, str backend"
)
_STATISTICS = "Tensor shifts, Tensor requests, Tensor moments"


def _unpack(arguments: tuple) -> tuple[LensInputs, LensSpec, str, tuple]:
    """Inputs, spec, backend and the rest of an operator's arguments."""
    count = len(LensInputs._fields)
    structure, numbers, columns, backend, *rest = arguments[count:]
    return (
        LensInputs(*arguments[:count]),
        LensSpec.decode(structure, numbers, columns),
        backend,
        tuple(rest),
    )


@torch.library.custom_op(
    "fdd_kernels::lens_stats", mutates_args=(), schema=f"({_ARGUMENTS}) -> ({_STATISTICS})"
)
def lens_stats(*arguments):
    """Statistics: shifts (2, L, R), requests (requests, 4, R), moments (moments, 9, R)."""
    inputs, spec, backend, _ = _unpack(arguments)
    # The operations choose the precision of their GEMMs themselves.
    with torch.autocast(inputs.device.type, enabled=False):
        return BACKENDS[backend].stats(inputs, spec)


@lens_stats.register_fake
def _(*arguments):
    inputs, structure = (
        LensInputs(*arguments[: len(LensInputs._fields)]),
        arguments[len(LensInputs._fields)],
    )
    requests, moments = count_parts(structure)

    def new(*shape: int) -> Tensor:
        return inputs.student_weight.new_empty((*shape, inputs.rows), dtype=inputs.statistics_dtype)

    return (
        new(2, len(inputs.student_hidden)),
        new(requests, REQUEST_STATS),
        new(moments, MOMENT_STATS),
    )


@torch.library.custom_op(
    "fdd_kernels::lens_grad",
    mutates_args=(),
    schema=f"({_ARGUMENTS}, {_STATISTICS}, Tensor grad_requests, Tensor grad_moments, bool[] "
    "needed) -> Tensor[]",
)
def lens_grad(*arguments):
    """Gradients of [*student_hidden, student_weight, student_bias], in this order, those marked in
    `needed` alone.
    """
    inputs, spec, backend, (*per_row, needed) = _unpack(arguments)
    with torch.autocast(inputs.device.type, enabled=False):
        return BACKENDS[backend].grad(inputs, spec, tuple(per_row), needed)


@lens_grad.register_fake
def _(*arguments):
    inputs, needed = LensInputs(*arguments[: len(LensInputs._fields)]), arguments[-1]
    outputs = (*inputs.student_hidden, inputs.student_weight, inputs.student_bias)
    return [
        torch.empty_like(t, memory_format=torch.contiguous_format)
        for t, n in zip(outputs, needed)
        if n
    ]
