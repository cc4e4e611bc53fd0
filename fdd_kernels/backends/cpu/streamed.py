"""The two operations one after the other: logits are computed tile by tile, in each of them.

Rows are cut into blocks and the vocabulary into panels of tiles. The head rows of a panel are
converted to float32 and packed once for all rows and layers; then row blocks run in parallel. GEMMs
and sums are float32 whatever the inputs are (bf16 operands stay bf16 where the processor has
instructions for them). Buffers that grow with the problem are allocated here, not in C++.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fdd_kernels.backends import torch_stream
from fdd_kernels.backends.call_shape import FLOAT
from fdd_kernels.backends.cpu import extension, tiling
from fdd_kernels.backends.cpu.problem import (
    F32,
    low_halves,
    new_gradients,
    place,
    problem_of,
    valid_rows,
    wanted,
    zero_statistics,
)
from fdd_kernels.lens.inputs import LensInputs
from fdd_kernels.lens.layout import Statistics
from fdd_kernels.lens.spec import LensSpec


def _streamed_problem(inputs: LensInputs, spec: LensSpec, rows: Tensor, *, backward: bool):
    student_width = inputs.student_hidden[0].shape[1]
    teacher_width = (
        inputs.teacher_hidden[0].shape[1]
        if spec.needs_teacher and inputs.teacher_weight is not None
        else 0
    )
    tiles = tiling.choose_tiles(
        inputs.depths,
        len(rows),
        spec.columns,
        student_width * (2 if backward else 1) + teacher_width,
        torch.get_num_threads(),
        backward=backward,
    )
    return problem_of(inputs, spec, rows, tiles)


def stats(inputs: LensInputs, spec: LensSpec) -> Statistics:
    """Compute the statistics of all rows; 0 where a row is not valid."""
    if inputs.statistics_dtype == torch.float64:
        return torch_stream.stats(inputs, spec)
    statistics = zero_statistics(inputs, spec)
    problem = _streamed_problem(inputs, spec, valid_rows(inputs), backward=False)
    extension.kernels.stats(problem, *statistics)
    return statistics


def grad(
    inputs: LensInputs, spec: LensSpec, per_row: tuple[Tensor, ...], needed: list[bool]
) -> list[Tensor]:
    """Compute gradients of [*student_hidden, student_weight, student_bias] marked in `needed`.

    Rows are taken in sets whose float32 sums fit the budget. The head's gradient is rounded once:
    that of several sets is summed in float32 or, where this sum does not fit, computed in a second
    walk over all rows.
    """
    if inputs.statistics_dtype == torch.float64:
        return torch_stream.grad(inputs, spec, per_row, needed)
    per_row = tuple(t.contiguous() for t in per_row)
    *needs_hidden, needs_weight, needs_bias = needed
    rows, layers = valid_rows(inputs), len(inputs.student_hidden)
    width = inputs.student_hidden[0].shape[1]
    grad_hidden, grad_weight, grad_bias = new_gradients(inputs, spec, needed, rows)

    if not len(rows):
        return wanted(inputs, grad_hidden, grad_weight, grad_bias)

    def walk(
        some_rows: Tensor,
        sums: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        low: Tensor | None = None,
        first: bool = True,
        last: bool = True,
    ) -> None:
        problem = _streamed_problem(inputs, spec, some_rows, backward=True)
        extension.kernels.grad(problem, *per_row, sums, weight, bias, low, first, last)

    def walk_sets(weight: Tensor | None, bias: Tensor | None) -> None:
        low = low_halves(weight) if len(row_sets) > 1 else None
        for some_rows in row_sets:
            sums = torch.zeros(layers, len(some_rows), width, **F32)
            first, last = some_rows is row_sets[0], some_rows is row_sets[-1]
            walk(some_rows, sums, weight, bias, low, first, last)
            place(sums, some_rows, grad_hidden)

    most_rows = max(1, tiling.HIDDEN_BYTES // (FLOAT * layers * width))
    row_sets = rows.split(most_rows) if any(needs_hidden) else ()
    if not row_sets:
        if needs_weight or needs_bias:
            walk(rows, None, grad_weight, grad_bias)
    elif (
        not needs_weight
        or grad_weight.dtype == torch.float32
        or len(row_sets) == 1
        or tiling.HALF * grad_weight.numel() <= tiling.head_sum_limit()
    ):
        walk_sets(grad_weight, grad_bias)
    else:
        walk_sets(None, None)
        walk(rows, None, grad_weight, grad_bias)
    return wanted(inputs, grad_hidden, grad_weight, grad_bias)
