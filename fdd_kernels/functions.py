"""The autograd Function over the two operations."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fdd_kernels import ops


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
    @once_differentiable
    def backward(ctx, _grad_pivots, grad_reads, grad_moments):
        valid, labels, teacher_weight, teacher_bias, weight, bias, *saved = ctx.saved_tensors
        statistics, hidden = saved[:3], saved[3:]
        student = (hidden[: ctx.count], weight, bias)
        teacher = (hidden[ctx.count :], teacher_weight, teacher_bias)
        # needs_input_grad follows forward's arguments: six that never need one, weight, bias, then the hidden states.
        needed = [*ctx.needs_input_grad[8 : 8 + ctx.count], *ctx.needs_input_grad[6:8]]
        found = iter(
            ops.lens_grad(
                *student, *teacher, valid, labels, *ctx.spec, ctx.backend, *statistics, grad_reads, grad_moments, needed
            )
        )
        *grad_hidden, grad_weight, grad_bias = [next(found) if need else None for need in needed]
        return (None,) * 6 + (grad_weight, grad_bias, *grad_hidden) + (None,) * ctx.count
