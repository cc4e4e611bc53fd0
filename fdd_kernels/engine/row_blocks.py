"""Objectives of the logits themselves, one row block after another (`lens/row_blocks.py`).

One operator computes values and, for an upstream gradient that is known, gradients with them: each
GEMM then runs once. Where the upstream gradient is known in backward alone, the operator runs
again.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fdd_kernels.backends import BACKENDS
from fdd_kernels.engine.autograd import (
    as_backward_result,
    flatten,
    refuse_batches,
    save,
    saved,
    unflatten,
)
from fdd_kernels.engine.cached_logits import rounded, scaled
from fdd_kernels.lens.inputs import LensInputs
from fdd_kernels.lens.row_blocks import RowSpec

_FIELDS = len(LensInputs._fields)


@torch.library.custom_op(
    "fdd_kernels::row_blocks",
    mutates_args=(),
    schema="(Tensor[] student_hidden, Tensor student_weight, Tensor? student_bias, "
    "Tensor[] teacher_hidden, Tensor? teacher_weight, Tensor? teacher_bias, Tensor? valid, "
    "Tensor? labels, Tensor[] per_row, str structure, Tensor numbers, SymInt columns, "
    "SymInt outputs, str backend, Tensor? upstream, bool[] needed) -> Tensor[]",
)
def row_blocks(*arguments):
    """Values (R, outputs) of a row function; with `upstream` (R, outputs) also the gradients that
    `needed` marks of [student_hidden, student_weight, student_bias], in the dtype of sums.
    """
    inputs, (per_row, *encoded) = LensInputs(*arguments[:_FIELDS]), arguments[_FIELDS:]
    *encoded, backend, upstream, needed = encoded
    with torch.autocast(inputs.device.type, enabled=False):
        return BACKENDS[backend].row_blocks(
            inputs, per_row, RowSpec.decode(*encoded), upstream, needed
        )


@row_blocks.register_fake
def _(*arguments):
    inputs, (*_, outputs, _, upstream, needed) = LensInputs(*arguments[:_FIELDS]), arguments
    dtype = inputs.statistics_dtype
    values = inputs.student_weight.new_empty((inputs.rows, outputs), dtype=dtype)
    if upstream is None:
        return [values]
    student = (*inputs.student_hidden, inputs.student_weight, inputs.student_bias)
    return [
        values,
        *[
            torch.empty_like(t, dtype=dtype, memory_format=torch.contiguous_format)
            for t, need in zip(student, needed)
            if need
        ],
    ]


def row_values(spec: RowSpec, inputs: LensInputs, per_row: list[Tensor], backend: str) -> Tensor:
    """Compute the values of all rows, (R, outputs), differentiable once."""
    if not asks_for_gradient(inputs):
        return row_blocks(*inputs, per_row, *spec.encode(), backend, None, [False] * 3)[0]
    return _RowValues.apply(*spec.encode(), backend, len(per_row), *flatten(inputs), *per_row)


def row_sum(
    spec: RowSpec, inputs: LensInputs, per_row: list[Tensor], backend: str, weights: Tensor
) -> Tensor:
    """Compute sum(weights * values), weights (R, outputs), with its gradients formed in forward."""
    arguments = (*spec.encode(), backend, len(per_row), weights)
    return _RowSum.apply(*arguments, *flatten(inputs), *per_row)


def asks_for_gradient(inputs: LensInputs) -> bool:
    """Say whether a gradient may be asked for."""
    student = (*inputs.student_hidden, inputs.student_weight, inputs.student_bias)
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in student)


def _unpack(count: int, tensors: tuple) -> tuple[LensInputs, list[Tensor]]:
    """Split the tensors of an autograd Function: the inputs, and `count` tensors per row."""
    split = len(tensors) - count
    return unflatten(1, tuple(tensors[:split])), list(tensors[split:])


# Arguments in front of the tensors; of the module, since Dynamo traces no attribute of a Function.
_BEFORE_VALUES, _BEFORE_SUM = 6, 7


class _RowValues(torch.autograd.Function):
    """See `row_values`. Saves the inputs alone, and computes every block again in backward."""

    @staticmethod
    def forward(ctx, structure, numbers, columns, outputs, backend: str, count: int, *tensors):
        inputs, per_row = _unpack(count, tensors)
        ctx.structure, ctx.columns, ctx.outputs = structure, columns, outputs
        ctx.backend, ctx.count = backend, count
        ctx.needed = list(ctx.needs_input_grad[_BEFORE_VALUES : _BEFORE_VALUES + 3])
        save(ctx, numbers, *tensors)
        spec = structure, numbers, columns, outputs
        return row_blocks(*inputs, per_row, *spec, backend, None, [False] * 3)[0]

    @staticmethod
    def backward(ctx, upstream: Tensor):
        refuse_batches(upstream)
        numbers, *tensors = saved(ctx)
        inputs, per_row = _unpack(ctx.count, tuple(tensors))
        spec = ctx.structure, numbers, ctx.columns, ctx.outputs
        with torch.no_grad():
            _, *found = row_blocks(*inputs, per_row, *spec, ctx.backend, upstream, ctx.needed)
            found = rounded(found, inputs, ctx.needed)
        return as_backward_result(ctx, _BEFORE_VALUES, found, inputs, (upstream,))


class _RowSum(torch.autograd.Function):
    """See `row_sum`. Gradients wait in the dtype of sums and are rounded once, in backward.

    The first backward scales them in place and releases them; a second one forms them again.
    Compiled code has its own way to release them.
    """

    @staticmethod
    def forward(ctx, structure, numbers, columns, outputs, backend, count: int, weights, *tensors):
        inputs, per_row = _unpack(count, tensors)
        needed = list(ctx.needs_input_grad[_BEFORE_SUM : _BEFORE_SUM + 3])
        spec = structure, numbers, columns, outputs
        values, *found = row_blocks(*inputs, per_row, *spec, backend, weights, needed)
        ctx.structure, ctx.columns, ctx.outputs = structure, columns, outputs
        ctx.backend, ctx.count, ctx.needed = backend, count, needed
        ctx.gradients = None
        if torch.compiler.is_compiling():
            save(ctx, *tensors, *found)
        else:
            save(ctx, *tensors, numbers, weights)
            ctx.gradients = found
        return (values * weights).sum()

    @staticmethod
    def backward(ctx, upstream: Tensor):
        refuse_batches(upstream)
        tensors = saved(ctx)
        with torch.no_grad():
            if torch.compiler.is_compiling():
                split = len(tensors) - sum(ctx.needed)
                inputs, _ = _unpack(ctx.count, tuple(tensors[:split]))
                found = [gradient * upstream for gradient in tensors[split:]]
            else:
                *tensors, numbers, weights = tensors
                inputs, per_row = _unpack(ctx.count, tuple(tensors))
                found, ctx.gradients = ctx.gradients, None
                if found is None:
                    spec = ctx.structure, numbers, ctx.columns, ctx.outputs
                    _, *found = row_blocks(
                        *inputs, per_row, *spec, ctx.backend, weights, ctx.needed
                    )
                found = scaled(found, upstream)
            found = rounded(found, inputs, ctx.needed)
        return as_backward_result(ctx, _BEFORE_SUM, found, inputs, (upstream,))
