"""The cached-logits path: gradients formed in forward, while a row block's logits are at hand.

Both heads are then multiplied once instead of twice. One path for CPU and GPU: it takes the
objective's closed-form upstream gradients and waits for no device.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from fdd_kernels.backends import BACKENDS
from fdd_kernels.engine import ops
from fdd_kernels.engine.autograd import (
    all_reduced,
    as_backward_result,
    refuse_batches,
    save,
    saved,
    unflatten,
)
from fdd_kernels.engine.objective import Objective
from fdd_kernels.lens.inputs import LensInputs
from fdd_kernels.lens.layout import Statistics
from fdd_kernels.lens.spec import LensSpec


def row_block(objective: Objective, inputs: LensInputs, backend: str) -> int:
    """Choose the rows per block of the cached-logits path; 0 if it is slower or cannot run."""
    if backend == "reference" or not objective.known_upstream:
        return 0
    student = (*inputs.student_hidden, inputs.student_weight, inputs.student_bias)
    needed = [t is not None and t.requires_grad for t in student]
    return cached_rows(backend, inputs, objective.spec, needed)


def cached_rows(backend: str, inputs: LensInputs, spec: LensSpec, needed: list[bool]) -> int:
    """Ask the backend for its rows per block.

    Returns 0 for tensor subclasses and dispatch modes as well: `stats_and_grad` is called directly,
    which no dispatcher sees.
    """
    if BACKENDS[backend].stats_and_grad is None or not torch.is_grad_enabled():
        return 0
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return 0
    tensors = (*inputs.student_hidden, *inputs.teacher_hidden, *inputs[1:3], *inputs[4:])
    if any(t is not None and type(t) not in (Tensor, torch.nn.Parameter) for t in tensors):
        return 0
    return BACKENDS[backend].cached_rows(inputs, spec, needed)


_BEFORE = 5  # arguments of `OutputsAndGradients` in front of the tensors


class OutputsAndGradients(torch.autograd.Function):
    """The outputs of an objective, with the gradients of the first one formed in forward.

    Those gradients are for an upstream gradient of 1. The first backward scales them in place and
    releases them; a second backward recomputes them. Where scaling would round 16-bit gradients a
    second time they are recomputed with the upstream gradient in them: on a CPU alone, since
    looking at its value is a host sync elsewhere. Upstream gradients of other outputs go through
    the two operations. All processes of a `shard` must take the same blocks and the same backward
    passes.
    """

    @staticmethod
    def forward(ctx, objective: Objective, backend: str, shard, block_rows: int, layers, *tensors):
        inputs = unflatten(layers, tensors)
        ctx.needed = list(ctx.needs_input_grad[_BEFORE : _BEFORE + layers + 2])
        ctx.compute = functools.partial(
            outputs_and_gradients, objective, backend, shard, block_rows, ctx.needed
        )
        ctx.objective, ctx.backend, ctx.shard, ctx.layers = objective, backend, shard, layers
        save(ctx, *tensors)
        ctx.set_materialize_grads(False)
        outputs, ctx.gradients = ctx.compute(inputs)
        # Of a shard's process, gradients of the hidden states alone are the same everywhere.
        common = ctx.gradients if shard is None else ctx.gradients[: sum(ctx.needed[:-2])]
        ctx.has_16_bits = any(gradient.dtype.itemsize == 2 for gradient in common)
        constants = [o for o, computed in zip(outputs, objective.is_computed) if not computed]
        ctx.mark_non_differentiable(*constants)
        return tuple(outputs)

    @staticmethod
    def backward(ctx, *upstream: Tensor | None):
        refuse_batches(*upstream)
        inputs = unflatten(ctx.layers, tuple(saved(ctx)))
        of_loss, *of_others = upstream
        gradients, ctx.gradients = ctx.gradients, None
        with torch.no_grad():
            if any(g is not None for g in of_others):
                del gradients
                found = _by_two_operations(ctx, inputs, upstream)
            elif of_loss is None:
                return (None,) * len(ctx.needs_input_grad)
            elif ctx.has_16_bits and not _scales_exactly(of_loss):
                del gradients
                found = rounded(ctx.compute(inputs, of_loss)[1], inputs, ctx.needed)
            else:
                found = scaled(gradients or ctx.compute(inputs)[1], of_loss)
                found = rounded(found, inputs, ctx.needed)
        return as_backward_result(ctx, _BEFORE, found, inputs, upstream)


def outputs_and_gradients(
    objective: Objective,
    backend: str,
    shard,
    block_rows: int,
    needed: list[bool],
    inputs: LensInputs,
    of_loss: Tensor | float = 1.0,
) -> tuple[tuple[Tensor, ...], list[Tensor]]:
    """Compute the outputs, and the gradients of `of_loss` * outputs[0] that `needed` marks.

    The gradients are in the dtypes in which the backend has them.
    """
    others = [None] * (len(objective.is_computed) - 1)
    upstream = objective.upstream((of_loss, *others), inputs.statistics_dtype)

    def upstream_of(rows: Tensor, *block: Tensor) -> tuple[Tensor, ...]:
        statistics = Statistics(*block)
        if shard is not None:
            statistics = shard.merged(inputs.at(rows), objective.spec, statistics)
        return *statistics, *upstream(statistics, rows)

    with (
        torch.autocast(inputs.device.type, enabled=False),
        torch.profiler.record_function("fdd_kernels::stats_and_grad"),
    ):
        found, statistics = BACKENDS[backend].stats_and_grad(
            inputs, objective.spec, block_rows, upstream_of, needed, shard is None
        )
    outputs = objective.outputs(Statistics(*statistics))
    return outputs, all_reduced(shard, found, needed)


def _by_two_operations(ctx, inputs: LensInputs, upstream: tuple) -> list[Tensor]:
    """Compute the gradients of any outputs, with both heads multiplied anew."""
    objective, backend, shard = ctx.objective, ctx.backend, ctx.shard
    spec = objective.spec.encode()
    if shard is None:
        statistics = Statistics(*ops.lens_stats(*inputs, *spec, backend))
    else:
        statistics = shard.statistics(inputs, objective.spec, backend)
    of_statistics = objective.upstream(upstream, inputs.statistics_dtype)(statistics, None)
    found = ops.lens_grad(*inputs, *spec, backend, *statistics, *of_statistics, ctx.needed)
    return all_reduced(shard, found, ctx.needed)


def _scales_exactly(of_loss: Tensor) -> bool:
    """Say whether `of_loss` is a power of two or 0, so that no gradient is rounded by it.

    True where the host would have to wait for the number.
    """
    return of_loss.device.type != "cpu" or abs(math.frexp(of_loss.item())[0]) in (0.0, 0.5)


def scaled(found: list[Tensor], of_loss: Tensor) -> list[Tensor]:
    """Multiply the gradients by the upstream gradient, in place."""
    if of_loss.device.type != "cpu" or of_loss != 1:
        for gradient in found:
            gradient.mul_(of_loss)
    return found


def rounded(found: list[Tensor], inputs: LensInputs, needed: list[bool]) -> list[Tensor]:
    """Convert gradients to their tensors' dtypes, one by one, so that wider ones are freed."""
    sources = (*inputs.student_hidden, inputs.student_weight, inputs.student_bias)
    for i, source in enumerate([source for source, need in zip(sources, needed) if need]):
        found[i] = found[i].to(source.dtype)
    return found
