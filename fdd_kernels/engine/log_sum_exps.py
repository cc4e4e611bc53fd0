"""Log-sum-exps of a student's logits alone, differentiable in its hidden states."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fdd_kernels.backends import BACKENDS
from fdd_kernels.engine import ops
from fdd_kernels.engine.autograd import block_double_backward
from fdd_kernels.engine.cached_logits import cached_rows
from fdd_kernels.lens.inputs import LensInputs
from fdd_kernels.lens.layout import LSE_S
from fdd_kernels.lens.spec import NLL, LensSpec, Request


def log_sum_exps(
    hidden: Sequence[Tensor],
    temperatures: Sequence[float],
    weight: Tensor,
    bias: Tensor | None,
    *,
    logit_scale: float,
    columns: int,
    backend: str,
) -> Tensor:
    """Compute logsumexp(logit_scale * (h W^T + b) / temperature) per state and row, (n, R).

    Args:
        hidden: n tensors (R, D), each with its temperature.
        weight, bias: the head (V, D), (V,); a constant, without soft cap.
        columns: how many tokens of the vocabulary are summed over.
        backend: a key of `BACKENDS`.
    """
    # A cross-entropy request looks at the student alone, and its log-sum-exp comes with it. Which
    # label it is asked for does not matter.
    requests = tuple([Request(i, i, t, NLL) for i, t in enumerate(temperatures)])
    spec = LensSpec(columns, requests, (), logit_scale, None, 1.0, None)
    labels = torch.zeros(len(hidden[0]), dtype=torch.int64, device=weight.device)
    inputs = LensInputs(list(hidden), weight, bias, list(hidden), None, None, None, labels)
    needed = [*(h.requires_grad for h in hidden), False, False]
    block_rows = cached_rows(backend, inputs, spec, needed)
    return _LogSumExps.apply(spec, backend, block_rows, inputs, *hidden)


class _LogSumExps(torch.autograd.Function):
    """See `log_sum_exps`; differentiable once, in `hidden` alone.

    The gradients, the head's rows averaged under the softmax, are formed in forward and are all
    that is saved.
    """

    @staticmethod
    def forward(ctx, spec: LensSpec, backend: str, block_rows: int, inputs, *hidden: Tensor):
        inputs = inputs._replace(student_hidden=list(hidden), teacher_hidden=list(hidden))
        needed = [*ctx.needs_input_grad[-len(hidden) :], False, False]

        def upstream_of(_rows, shifts: Tensor, requests: Tensor, moments: Tensor):
            of_requests = torch.zeros_like(requests)
            of_requests[:, LSE_S] = 1.0
            return shifts, requests, moments, of_requests, torch.zeros_like(moments)

        if block_rows:
            with torch.autocast(inputs.device.type, enabled=False):
                gradients, statistics = BACKENDS[backend].stats_and_grad(
                    inputs, spec, block_rows, upstream_of, needed, False
                )
        else:
            arguments = (*inputs, *spec.encode(), backend)
            statistics = ops.lens_stats(*arguments)
            per_row = upstream_of(None, *statistics)
            gradients = ops.lens_grad(*arguments, *per_row, needed) if any(needed) else []
        shifts, requests, _ = statistics
        ctx.needed = needed
        ctx.save_for_backward(*hidden, *gradients)
        return torch.stack(
            [
                shifts[0, request.student_layer] / request.temperature + found[LSE_S]
                for request, found in zip(spec.requests, requests)
            ]
        )

    @staticmethod
    def backward(ctx, grad_found: Tensor):
        count = len(ctx.needed) - 2
        hidden, gradients = ctx.saved_tensors[:count], ctx.saved_tensors[count:]
        needed = [i for i in range(count) if ctx.needed[i]]
        with torch.no_grad():
            found = [grad_found[i, :, None] * grad for i, grad in zip(needed, gradients)]
        found = dict(zip(needed, block_double_backward(found, *hidden, grad_found)))
        return (None,) * 4 + tuple(found.get(i) for i in range(count))
