"""The autograd Function over the two operations, and what every Function of the engine needs.

With a `shard` (`vocab_parallel.py`) heads, bias, labels and spec are this process's part of the
vocabulary. Statistics are merged right after `lens_stats`, and gradients of the hidden states are
all-reduced right after `lens_grad`; nothing else depends on the rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fdd_kernels.engine import ops
from fdd_kernels.lens.inputs import LensInputs
from fdd_kernels.lens.spec import LensSpec


class NoDoubleBackward(torch.autograd.Function):
    """Identity on the first `count` tensors whose backward raises: blocks double backward.

    torch's `once_differentiable` is not enough. It takes gradients for constants where the upstream
    gradient is one (a loss that is linear in the statistics), and second derivatives through the
    rest of a model are then silently wrong.
    """

    @staticmethod
    def forward(ctx, count: int, *tensors: Tensor):
        return tuple([t.view_as(t) for t in tensors[:count]])

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(
            "the loss can be differentiated once: for second derivatives (create_graph=True) "
            'use backend="reference", which keeps dense tensors'
        )


def flatten(inputs: LensInputs) -> tuple[Tensor | None, ...]:
    """List the tensors one by one, in the order of `LensInputs`: student_hidden first."""
    return (
        *inputs.student_hidden,
        *inputs[1:3],
        *inputs.teacher_hidden,
        *inputs[4:],
    )


def unflatten(layers: int, tensors: tuple[Tensor | None, ...]) -> LensInputs:
    """Invert `flatten` for `layers` hidden states of the student; the teacher may have none."""
    student, (weight, bias, *rest) = list(tensors[:layers]), tensors[layers:]
    return LensInputs(student, weight, bias, rest[:-4], *rest[-4:])


def save(ctx, *tensors: Tensor | None) -> None:
    """Save tensors for backward, also those made under `torch.inference_mode`.

    Nobody can change or hook the latter; autograd would refuse them.
    """
    ctx.of_inference = {}
    if not torch.compiler.is_compiling():
        ctx.of_inference = {
            i: t for i, t in enumerate(tensors) if t is not None and t.is_inference()
        }
    ctx.save_for_backward(*[None if i in ctx.of_inference else t for i, t in enumerate(tensors)])


def saved(ctx) -> list[Tensor | None]:
    """Return the tensors that `save` saved."""
    return [ctx.of_inference.get(i, t) for i, t in enumerate(ctx.saved_tensors)]


def refuse_batches(*upstream: Tensor | None) -> None:
    """Refuse upstream gradients that stand for a batch of them.

    Raises:
        RuntimeError: under `is_grads_batched=True` or a vmap of a backward pass.
    """
    if torch.compiler.is_compiling():
        return
    functorch = torch._C._functorch
    batched = functorch.is_batchedtensor, functorch.is_legacy_batchedtensor
    if any(g is not None and is_one(g) for g in upstream for is_one in batched):
        raise RuntimeError(
            "the loss cannot be differentiated for a batch of upstream gradients at once "
            "(is_grads_batched=True, vmap of a backward pass): ask for them one after another, or "
            'use backend="reference"'
        )


def block_double_backward(found: list[Tensor], *sources: Tensor | None) -> list[Tensor]:
    """Return the gradients `found` such that differentiating them again raises.

    `sources` are the tensors that they depend on.
    """
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return found  # compiled code refuses by itself
    return list(NoDoubleBackward.apply(len(found), *found, *[t for t in sources if t is not None]))


def all_reduced(shard, found: list[Tensor], needed: list[bool]) -> list[Tensor]:
    """Sum a shard's gradients of hidden states over its group; return all gradients."""
    return found if shard is None else shard.sum_gradients(found, sum(needed[:-2]))


def as_backward_result(
    ctx, before: int, found: list[Tensor], inputs: LensInputs, upstream: tuple
) -> tuple[Tensor | None, ...]:
    """Put the gradients `found` in the places of forward's arguments.

    `before` counts the arguments in front of the tensors, `ctx.needed` marks the gradients of
    [*student_hidden, student_weight, student_bias], which `found` has one after another.
    """
    student = (*inputs.student_hidden, inputs.student_weight, inputs.student_bias)
    found = iter(block_double_backward(found, *student, *upstream))
    gradients = [next(found) if need else None for need in ctx.needed]
    after = len(ctx.needs_input_grad) - before - len(gradients)
    return (None,) * before + tuple(gradients) + (None,) * after


# Arguments in front of the tensors; of the module, since Dynamo traces no attribute of a Function.
_BEFORE = 6


class LensStatistics(torch.autograd.Function):
    """Row statistics, differentiable once in the student's hidden states, weight and bias.

    Saves its inputs and the statistics, nothing that grows with rows x vocabulary. The teacher
    receives no gradient.
    """

    @staticmethod
    def forward(ctx, structure, numbers, columns, backend: str, shard, layers: int, *tensors):
        inputs, spec = unflatten(layers, tensors), (structure, numbers, columns)
        if shard is None:
            statistics = ops.lens_stats(*inputs, *spec, backend)
        else:
            statistics = shard.statistics(inputs, LensSpec.decode(*spec), backend)
        ctx.structure, ctx.columns, ctx.layers = structure, columns, layers
        ctx.backend, ctx.shard = backend, shard
        ctx.needed = list(ctx.needs_input_grad[_BEFORE : _BEFORE + layers + 2])
        save(ctx, numbers, *tensors, *statistics)
        ctx.mark_non_differentiable(statistics[0])
        return tuple(statistics)

    @staticmethod
    def backward(ctx, _grad_shifts, grad_requests, grad_moments):
        refuse_batches(grad_requests, grad_moments)
        numbers, *tensors = saved(ctx)
        *tensors, shifts, requests, moments = tensors
        inputs, upstream = unflatten(ctx.layers, tuple(tensors)), (grad_requests, grad_moments)
        with torch.no_grad():
            spec, per_row = (ctx.structure, numbers, ctx.columns), (shifts, requests, moments)
            found = ops.lens_grad(*inputs, *spec, ctx.backend, *per_row, *upstream, ctx.needed)
            found = all_reduced(ctx.shard, found, ctx.needed)
        return as_backward_result(ctx, _BEFORE, found, inputs, upstream)
