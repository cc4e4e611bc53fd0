"""The autograd Function over the two operations."""

from __future__ import annotations

import torch
from torch import Tensor

from fdd_kernels import ops


class _Once(torch.autograd.Function):
    """The first `count` tensors as they are, as a function of all of them that cannot be differentiated.

    torch's `once_differentiable` is not enough: it takes gradients for constants where the upstream gradient is one (a
    loss that is linear in the statistics), and second derivatives through the rest of a model are then silently wrong.
    """

    @staticmethod
    def forward(ctx, count: int, *tensors: Tensor):
        return tuple([t.view_as(t) for t in tensors[:count]])

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(
            "fused_fdd_loss can be differentiated once: for second derivatives (create_graph=True) use "
            'backend="reference", which keeps dense tensors'
        )


class LensStatistics(torch.autograd.Function):
    """Statistics of `spec.py`, differentiable once in the student's hidden states, weight and bias.

    `spec` is an encoded `LensSpec`; `hidden` are the L states of the student, then those of the teacher. Saves its
    inputs and the statistics, nothing that grows with rows x columns. The teacher receives no gradient.
    """

    @staticmethod
    def forward(ctx, spec: tuple, backend: str, valid, labels, teacher_weight, teacher_bias, weight, bias, *hidden: Tensor):
        count = len(hidden) // 2
        student = (list(hidden[:count]), weight, bias)
        teacher = (list(hidden[count:]), teacher_weight, teacher_bias)
        statistics = ops.lens_stats(*student, *teacher, valid, labels, *spec, backend)
        ctx.spec, ctx.backend, ctx.count = spec, backend, count
        ctx.save_for_backward(valid, labels, teacher_weight, teacher_bias, weight, bias, *statistics, *hidden)
        ctx.mark_non_differentiable(statistics[0])
        return statistics

    @staticmethod
    def backward(ctx, _grad_pivots, grad_reads, grad_moments):
        valid, labels, teacher_weight, teacher_bias, weight, bias, *saved = ctx.saved_tensors
        statistics, hidden = saved[:3], saved[3:]
        student = (hidden[: ctx.count], weight, bias)
        teacher = (hidden[ctx.count :], teacher_weight, teacher_bias)
        # needs_input_grad follows forward's arguments: six that never need one, weight, bias, then the hidden states.
        needed = [*ctx.needs_input_grad[8 : 8 + ctx.count], *ctx.needs_input_grad[6:8]]
        with torch.no_grad():
            found = ops.lens_grad(
                *student, *teacher, valid, labels, *ctx.spec, ctx.backend, *statistics, grad_reads, grad_moments, needed
            )
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # compiled code refuses by itself
            inputs = [t for t in (weight, bias, *student[0]) if t is not None]
            found = _Once.apply(len(found), *found, *inputs, grad_reads, grad_moments)
        found = iter(found)
        *grad_hidden, grad_weight, grad_bias = [next(found) if need else None for need in needed]
        return (None,) * 6 + (grad_weight, grad_bias, *grad_hidden) + (None,) * ctx.count
