"""Distances between the predictions of all pairs of rows of a group, differentiable once."""

from __future__ import annotations

import torch
from torch import Tensor

from fdd_kernels.backends import torch_stream
from fdd_kernels.engine.autograd import (
    as_backward_result,
    flatten,
    refuse_batches,
    save,
    saved,
    unflatten,
)
from fdd_kernels.engine.cached_logits import rounded
from fdd_kernels.lens.inputs import LensInputs
from fdd_kernels.lens.spec import LensSpec

_BEFORE = 3  # arguments in front of the tensors


def pair_costs(
    inputs: LensInputs, spec: LensSpec, groups: list[Tensor], temperature: float
) -> list[Tensor]:
    """Compute W_ij, the sum over tokens of |q_i - p_j|, of each group: (b, b) each.

    `groups` are int64 positions of rows, q the student's and p the teacher's softmax at the
    temperature.
    """
    costs = _PairCosts.apply(spec, groups, temperature, *flatten(inputs))
    sizes = [len(rows) for rows in groups]
    parts = costs.split([size**2 for size in sizes])
    return [part.view(size, size) for part, size in zip(parts, sizes)]


class _PairCosts(torch.autograd.Function):
    """Saves its inputs and two log-sum-exps a row; logits are computed again in backward."""

    @staticmethod
    def forward(ctx, spec: LensSpec, groups: list[Tensor], temperature: float, *tensors):
        inputs = unflatten(1, tensors)
        ctx.call = spec, groups, temperature
        ctx.needed = list(ctx.needs_input_grad[_BEFORE : _BEFORE + 3])
        with torch.autocast(inputs.device.type, enabled=False):
            costs, lses = torch_stream.pair_costs(inputs, *ctx.call)
        save(ctx, *tensors, *lses)
        return costs

    @staticmethod
    def backward(ctx, upstream: Tensor):
        refuse_batches(upstream)
        tensors, count = saved(ctx), len(ctx.call[1])
        inputs, lses = unflatten(1, tuple(tensors[: len(tensors) - count])), tensors[-count:]
        with torch.no_grad(), torch.autocast(inputs.device.type, enabled=False):
            found = torch_stream.pair_cost_gradients(
                inputs, *ctx.call, lses if count else [], upstream, ctx.needed
            )
            found = rounded(found, inputs, ctx.needed)
        return as_backward_result(ctx, _BEFORE, found, inputs, (upstream,))
