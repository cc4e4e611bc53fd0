"""Objectives of the logits themselves, one row block after another (`lens/row_blocks.py`).

One operator computes values and, for an upstream gradient that is known, gradients with them: each
GEMM then runs once. Where the upstream gradient is known in backward alone, the operator runs
again. A row function that is not registered is called past the operator, which the compiler cannot
record.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import NamedTuple

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


class Extra(NamedTuple):
    """What a row function takes beside logits: tensors (R, ...), and tensors for all rows."""

    per_row: Sequence[Tensor] = ()
    shared: Sequence[Tensor] = ()


@torch.library.custom_op(
    "fdd_kernels::row_blocks",
    mutates_args=(),
    schema="(Tensor[] student_hidden, Tensor student_weight, Tensor? student_bias, "
    "Tensor[] teacher_hidden, Tensor? teacher_weight, Tensor? teacher_bias, Tensor? valid, "
    "Tensor? labels, Tensor[] per_row, Tensor[] shared, str structure, Tensor numbers, "
    "SymInt columns, SymInt outputs, str backend, Tensor? upstream, bool[] needed) -> Tensor[]",
)
def row_blocks(*arguments):
    """Values (R, outputs) of a row function; with `upstream` (R, outputs) also the gradients that
    `needed` marks of [student_hidden, student_weight, student_bias], in the dtype of sums.
    """
    return _run(*arguments)


def _run(*arguments):
    inputs, (per_row, shared, *encoded) = LensInputs(*arguments[:_FIELDS]), arguments[_FIELDS:]
    *encoded, backend, upstream, needed = encoded
    with torch.autocast(inputs.device.type, enabled=False):
        return BACKENDS[backend].row_blocks(
            inputs, per_row, shared, RowSpec.decode(*encoded), upstream, needed
        )


def _compute(inputs: LensInputs, extra: Extra, encoded: tuple, *arguments) -> list[Tensor]:
    """Call the operator, or what it calls where it cannot take the row function."""
    if isinstance(encoded[0], str):
        return row_blocks(*inputs, *extra, *encoded, *arguments)
    # The compiler looks into a backward pass that runs within a function that it has compiled.
    run = torch.compiler.disable(_run) if "torch._dynamo" in sys.modules else _run
    return run(*inputs, *extra, *encoded, *arguments)


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


def row_values(spec: RowSpec, inputs: LensInputs, extra: Extra, backend: str) -> Tensor:
    """Compute the values of all rows, (R, outputs), differentiable once."""
    if not asks_for_gradient(inputs):
        return _compute(inputs, extra, spec.encode(), backend, None, [False] * 3)[0]
    arguments = (*spec.encode(), backend, *map(len, extra))
    return _RowValues.apply(*arguments, *flatten(inputs), *extra.per_row, *extra.shared)


def row_sum(
    spec: RowSpec, inputs: LensInputs, extra: Extra, backend: str, weights: Tensor
) -> Tensor:
    """Compute sum(weights * values), weights (R, outputs), with its gradients formed in forward."""
    arguments = (*spec.encode(), backend, *map(len, extra), weights)
    return _RowSum.apply(*arguments, *flatten(inputs), *extra.per_row, *extra.shared)


def asks_for_gradient(inputs: LensInputs) -> bool:
    """Say whether a gradient may be asked for."""
    student = (*inputs.student_hidden, inputs.student_weight, inputs.student_bias)
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in student)


def _unpack(counts: tuple[int, int], tensors: tuple) -> tuple[LensInputs, Extra]:
    """Split the tensors of an autograd Function; `counts` are those of `Extra`."""
    per_row, shared = counts
    first, second = len(tensors) - per_row - shared, len(tensors) - shared
    extra = Extra(list(tensors[first:second]), list(tensors[second:]))
    return unflatten(1, tuple(tensors[:first])), extra


# Arguments in front of the tensors; of the module, since Dynamo traces no attribute of a Function.
_BEFORE_VALUES, _BEFORE_SUM = 7, 8


class _RowValues(torch.autograd.Function):
    """See `row_values`. Saves the inputs alone, and computes every block again in backward."""

    @staticmethod
    def forward(ctx, structure, numbers, columns, outputs, backend, per_row, shared, *tensors):
        ctx.counts = per_row, shared
        inputs, extra = _unpack(ctx.counts, tensors)
        ctx.structure, ctx.columns, ctx.outputs = structure, columns, outputs
        ctx.backend = backend
        ctx.needed = list(ctx.needs_input_grad[_BEFORE_VALUES : _BEFORE_VALUES + 3])
        save(ctx, numbers, *tensors)
        spec = structure, numbers, columns, outputs
        return _compute(inputs, extra, spec, backend, None, [False] * 3)[0]

    @staticmethod
    def backward(ctx, upstream: Tensor):
        refuse_batches(upstream)
        numbers, *tensors = saved(ctx)
        inputs, extra = _unpack(ctx.counts, tuple(tensors))
        spec = ctx.structure, numbers, ctx.columns, ctx.outputs
        with torch.no_grad():
            _, *found = _compute(inputs, extra, spec, ctx.backend, upstream, ctx.needed)
            found = rounded(found, inputs, ctx.needed)
        return as_backward_result(ctx, _BEFORE_VALUES, found, inputs, (upstream,))


class _RowSum(torch.autograd.Function):
    """See `row_sum`. Gradients wait in the dtype of sums and are rounded once, in backward.

    The first backward scales them in place and releases them; a second one forms them again.
    Compiled code has its own way to release them.
    """

    @staticmethod
    def forward(
        ctx, structure, numbers, columns, outputs, backend, per_row, shared, weights, *tensors
    ):
        ctx.counts = per_row, shared
        inputs, extra = _unpack(ctx.counts, tensors)
        needed = list(ctx.needs_input_grad[_BEFORE_SUM : _BEFORE_SUM + 3])
        spec = structure, numbers, columns, outputs
        values, *found = _compute(inputs, extra, spec, backend, weights, needed)
        ctx.structure, ctx.columns, ctx.outputs = structure, columns, outputs
        ctx.backend, ctx.needed = backend, needed
        # The compiler may also meet the backward pass of a forward pass that it did not record.
        ctx.gradients, ctx.is_compiled = None, torch.compiler.is_compiling()
        if ctx.is_compiled:
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
            if ctx.is_compiled:
                split = len(tensors) - sum(ctx.needed)
                inputs, _ = _unpack(ctx.counts, tuple(tensors[:split]))
                found = [gradient * upstream for gradient in tensors[split:]]
            else:
                *tensors, numbers, weights = tensors
                inputs, extra = _unpack(ctx.counts, tuple(tensors))
                found, ctx.gradients = ctx.gradients, None
                if found is None:
                    spec = ctx.structure, numbers, ctx.columns, ctx.outputs
                    _, *found = _compute(inputs, extra, spec, ctx.backend, weights, ctx.needed)
                found = scaled(found, upstream)
            found = rounded(found, inputs, ctx.needed)
        return as_backward_result(ctx, _BEFORE_SUM, found, inputs, (upstream,))
