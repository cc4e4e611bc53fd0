"""The autograd Functions over the two operations, of whole heads or of one process's shard of a
vocabulary.

With a `shard` (`vocab_parallel.py`) heads, bias, labels and spec are of this process's columns. The
statistics become those of all columns as soon as they are taken, and the hidden states' gradients
are summed over the group once they are formed; all that lies between is the same for one process
and for many.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fdd_kernels.backends import BACKENDS
from fdd_kernels.engine import ops
from fdd_kernels.lens.inputs import LensInputs
from fdd_kernels.lens.layout import LSE_S
from fdd_kernels.lens.spec import NLL, LensSpec, Request
from fdd_kernels.objectives.fdd.options import FDDLossTerms
from fdd_kernels.objectives.fdd.plan import Plan
from fdd_kernels.objectives.fdd.reference import dense_logits
from fdd_kernels.objectives.fdd.terms import (
    combine,
    row_terms_from_statistics,
    static_deltas,
    term_weights,
    upstream_gradients,
)


class _Once(torch.autograd.Function):
    """The first `count` tensors as they are, as a function of all of them that cannot be
    differentiated.

    torch's `once_differentiable` is not enough: it takes gradients for constants where the upstream
    gradient is one (a loss that is linear in the statistics), and second derivatives through the
    rest of a model are then silently wrong.
    """

    @staticmethod
    def forward(ctx, count: int, *tensors: Tensor):
        return tuple([t.view_as(t) for t in tensors[:count]])

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(
            "fused_fdd_loss can be differentiated once: for second derivatives (create_graph=True) "
            "use "
            'backend="reference", which keeps dense tensors'
        )


def _save(ctx, *tensors: Tensor | None) -> None:
    """`save_for_backward` that takes tensors made under `torch.inference_mode` too: nobody can
    change them, nor hook them.
    """
    ctx.of_inference = {}
    if not torch.compiler.is_compiling():
        ctx.of_inference = {
            i: t for i, t in enumerate(tensors) if t is not None and t.is_inference()
        }
    ctx.save_for_backward(*[None if i in ctx.of_inference else t for i, t in enumerate(tensors)])


def _saved(ctx) -> list[Tensor | None]:
    """What `_save` saved."""
    return [ctx.of_inference.get(i, t) for i, t in enumerate(ctx.saved_tensors)]


def _refuse_batches(*upstream: Tensor | None) -> None:
    if torch.compiler.is_compiling():
        return
    functorch = torch._C._functorch
    batched = functorch.is_batchedtensor, functorch.is_legacy_batchedtensor
    if any(g is not None and is_one(g) for g in upstream for is_one in batched):
        raise RuntimeError(
            "fused_fdd_loss cannot be differentiated for a batch of upstream gradients at once "
            "(is_grads_batched=True, vmap of "
            'a backward pass): ask for them one after another, or use backend="reference"'
        )


class LensStatistics(torch.autograd.Function):
    """Statistics of `spec.py`, differentiable once in the student's hidden states, weight and bias.

    The first three arguments are an encoded `LensSpec`; `hidden` are the L states of the student,
    then those of the teacher. Saves its inputs and the statistics, nothing that grows with rows x
    columns. The teacher receives no gradient.
    """

    @staticmethod
    def forward(
        ctx,
        structure: str,
        numbers: Tensor,
        columns: int,
        backend: str,
        shard,
        valid,
        labels,
        teacher_weight,
        teacher_bias,
        weight,
        bias,
        *hidden: Tensor,
    ):
        inputs = _inputs(valid, labels, teacher_weight, teacher_bias, weight, bias, *hidden)
        statistics = _statistics((structure, numbers, columns), backend, shard, inputs)
        ctx.structure, ctx.columns, ctx.backend, ctx.shard = structure, columns, backend, shard
        ctx.needed = _needed(ctx, len(hidden))
        _save(
            ctx,
            numbers,
            valid,
            labels,
            teacher_weight,
            teacher_bias,
            weight,
            bias,
            *hidden,
            *statistics,
        )
        ctx.mark_non_differentiable(statistics[0])
        return statistics

    @staticmethod
    def backward(ctx, _grad_shifts, grad_requests, grad_moments):
        _refuse_batches(grad_requests, grad_moments)
        numbers, *saved, shifts, requests, moments = _saved(ctx)
        inputs, upstream = _inputs(*saved), (grad_requests, grad_moments)
        spec = (ctx.structure, numbers, ctx.columns)
        with torch.no_grad():
            found = ops.lens_grad(
                *inputs, *spec, ctx.backend, shifts, requests, moments, *upstream, ctx.needed
            )
            found = _complete(ctx.shard, found, ctx.needed)
        return _returned(ctx, found, inputs, upstream)


class LossAndGradient(torch.autograd.Function):
    """The terms of the loss, with the gradients of `loss` formed in forward, `block_rows` rows
    after another.

    For backends that keep a block's values between the two operations, which spares the backward
    pass both heads' products. Those gradients are for an upstream gradient of 1: the first backward
    pass scales them in place, which nobody else can see, and hands them over; a second one forms
    them anew. Where scaling would round gradients of 16 bits a second time, they are formed anew
    with the upstream gradient in them; but on a CPU alone, since to look at it is a host sync
    elsewhere. Upstream gradients of other terms go through the two operations. `normaliser` divides
    the sums over rows; None: nothing does. All processes of a `shard` must take the same rows at a
    time, and the same backward passes.
    """

    @staticmethod
    def forward(
        ctx,
        plan: Plan,
        block_rows: int,
        shard,
        normaliser,
        valid,
        labels,
        teacher_weight,
        teacher_bias,
        weight,
        bias,
        *hidden: Tensor,
    ):
        tensors = (valid, labels, teacher_weight, teacher_bias, weight, bias, *hidden)
        ctx.needed = _needed(ctx, len(hidden))
        ctx.compute = functools.partial(
            _loss_and_gradient, plan, block_rows, shard, normaliser, ctx.needed
        )
        ctx.plan, ctx.shard, ctx.normaliser = plan, shard, normaliser
        _save(ctx, *tensors)
        ctx.set_materialize_grads(False)
        terms, ctx.gradients = ctx.compute(_inputs(*tensors))
        # of all its processes
        in_common = ctx.gradients if shard is None else ctx.gradients[: sum(ctx.needed[:-2])]
        ctx.of_16_bits = any(gradient.dtype.itemsize == 2 for gradient in in_common)
        computed = (
            True,
            plan.output_kd is not None,
            plan.trajectory,
            plan.derivative,
            plan.ce is not None,
        )
        ctx.mark_non_differentiable(
            *[term for term, is_computed in zip(terms, computed) if not is_computed]
        )
        return terms

    @staticmethod
    def backward(ctx, *upstream: Tensor | None):
        _refuse_batches(*upstream)
        inputs = _inputs(*_saved(ctx))
        of_loss, *of_terms = upstream
        gradients, ctx.gradients = ctx.gradients, None
        with torch.no_grad():
            if all(g is None for g in of_terms):
                if of_loss is None:
                    return (None,) * len(ctx.needs_input_grad)
                if ctx.of_16_bits and not _scales_exactly(of_loss):
                    del gradients
                    found = ctx.compute(inputs, of_loss)[1]
                else:
                    found = _scaled(gradients or ctx.compute(inputs)[1], of_loss)
                found = _rounded(found, inputs, ctx.needed)
            else:
                del gradients
                spec, backend = ctx.plan.spec.encode(), ctx.plan.backend
                statistics = _statistics(spec, backend, ctx.shard, inputs)
                weights = term_weights(ctx.plan, ctx.normaliser, upstream, inputs.statistics_dtype)
                static = static_deltas(ctx.plan, inputs.student_hidden, inputs.teacher_hidden)
                of_statistics = upstream_gradients(
                    ctx.plan, *statistics, inputs.valid, weights, static
                )
                found = ops.lens_grad(
                    *inputs, *spec, backend, *statistics, *of_statistics, ctx.needed
                )
                found = _complete(ctx.shard, found, ctx.needed)
        return _returned(ctx, found, inputs, upstream)


def _statistics(
    spec: tuple, backend: str, shard, inputs: LensInputs
) -> tuple[Tensor, Tensor, Tensor]:
    """The statistics of all columns; `spec` is an encoded `LensSpec`."""
    if shard is None:
        return ops.lens_stats(*inputs, *spec, backend)
    return shard.statistics(inputs, LensSpec.decode(*spec), backend)


def _complete(shard, found: list[Tensor], needed: list[bool]) -> list[Tensor]:
    """The gradients `found`, marked in `needed`; a shard has a share of the hidden states', summed
    over the group in place.
    """
    if shard is not None:
        shard.sum_gradients(found[: sum(needed[:-2])])
    return found


def rows_to_keep(plan: Plan, normaliser, *tensors: Tensor | None) -> int:
    """Rows a block where `LossAndGradient` is the faster way for these arguments of it, 0 where it
    is not or cannot run.

    It runs outside of the dispatcher, so eagerly and on plain tensors alone, and needs a reduction:
    with one value per row the upstream gradients are not known in forward.
    """
    if plan.backend == "reference" or plan.options.reduction == "none":
        return 0
    if isinstance(normaliser, Tensor) and normaliser.requires_grad:
        return 0
    inputs = _inputs(*tensors)
    student = (*inputs.student_hidden, inputs.student_weight, inputs.student_bias)
    return _kept_rows(
        plan.backend, inputs, plan.spec, [t is not None and t.requires_grad for t in student]
    )


def _kept_rows(backend: str, inputs: LensInputs, spec: LensSpec, needed: list[bool]) -> int:
    """Rows a block that the backend would keep; 0 also where `stats_and_grad`, which no dispatcher
    sees, cannot stand in.
    """
    if BACKENDS[backend].stats_and_grad is None or not torch.is_grad_enabled():
        return 0
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return 0
    tensors = (*inputs.student_hidden, *inputs.teacher_hidden, *inputs[1:3], *inputs[4:])
    if any(t is not None and type(t) not in (Tensor, torch.nn.Parameter) for t in tensors):
        return 0
    return BACKENDS[backend].cached_rows(inputs, spec, needed)


def _loss_and_gradient(
    plan: Plan,
    block_rows: int,
    shard,
    normaliser,
    needed: list[bool],
    inputs: LensInputs,
    of_loss: Tensor | float = 1.0,
) -> tuple[FDDLossTerms, list[Tensor]]:
    """The terms, and the gradients of `of_loss` * loss marked in `needed`, in the dtypes in which
    the backend has them.
    """
    weights = term_weights(
        plan, normaliser, (of_loss, None, None, None, None), inputs.statistics_dtype
    )
    static = static_deltas(plan, inputs.student_hidden, inputs.teacher_hidden)

    def upstream_of(rows: Tensor, *statistics: Tensor) -> tuple[Tensor, ...]:
        if shard is not None:
            statistics = shard.merged(inputs.at(rows), plan.spec, statistics)
        of_block = None if static is None else static[..., rows]
        return *statistics, *upstream_gradients(plan, *statistics, None, weights, of_block)

    with (
        torch.autocast(inputs.device.type, enabled=False),
        torch.profiler.record_function("fdd_kernels::stats_and_grad"),
    ):
        found, statistics = BACKENDS[plan.backend].stats_and_grad(
            inputs, plan.spec, block_rows, upstream_of, needed, shard is None
        )
    terms = combine(
        row_terms_from_statistics(plan, *statistics, static),
        plan.options,
        inputs.valid,
        (),
        normaliser,
    )
    return terms, _complete(shard, found, needed)


def _scales_exactly(of_loss: Tensor) -> bool:
    """Whether it is a power of two (or 0), so that no gradient is rounded by it; True where the
    host would have to wait.
    """
    return of_loss.device.type != "cpu" or abs(math.frexp(of_loss.item())[0]) in (0.0, 0.5)


def _scaled(found: list[Tensor], of_loss: Tensor) -> list[Tensor]:
    """The gradients times the upstream gradient, in place."""
    if of_loss.device.type != "cpu" or of_loss != 1:
        for gradient in found:
            gradient.mul_(of_loss)
    return found


def _rounded(found: list[Tensor], inputs: LensInputs, needed: list[bool]) -> list[Tensor]:
    """The gradients in the dtypes of what they are of; one after another, so that each wider one is
    freed.
    """
    sources = (*inputs.student_hidden, inputs.student_weight, inputs.student_bias)
    for i, source in enumerate([source for source, need in zip(sources, needed) if need]):
        found[i] = found[i].to(source.dtype)
    return found


class LogSumExps(torch.autograd.Function):
    """Log-sum-exps of the student's logits, (L, R): one for each of `hidden`; differentiable once,
    in `hidden` alone.

    Their gradients, the head's rows averaged under the softmax, are formed in forward and are all
    that is saved.
    """

    @staticmethod
    def forward(ctx, spec: LensSpec, backend: str, block_rows: int, weight, bias, *hidden: Tensor):
        labels = torch.zeros(len(hidden[0]), dtype=torch.int64, device=weight.device)
        inputs = LensInputs(list(hidden), weight, bias, list(hidden), None, None, None, labels)
        needed = [*ctx.needs_input_grad[-len(hidden) :], False, False]

        def upstream_of(
            _rows, shifts: Tensor, requests: Tensor, moments: Tensor
        ) -> tuple[Tensor, ...]:
            of_requests = torch.zeros_like(requests)
            of_requests[:, LSE_S] = 1.0
            return shifts, requests, moments, of_requests, torch.zeros_like(moments)

        if block_rows:
            with torch.autocast(inputs.device.type, enabled=False):
                slopes, statistics = BACKENDS[backend].stats_and_grad(
                    inputs, spec, block_rows, upstream_of, needed, False
                )
        else:
            arguments = (*inputs, *spec.encode(), backend)
            statistics = ops.lens_stats(*arguments)
            slopes = (
                ops.lens_grad(*arguments, *upstream_of(None, *statistics), needed)
                if any(needed)
                else []
            )
        shifts, requests, _ = statistics
        found = torch.stack(
            [
                shifts[0, request.student_layer] / request.temperature + of_request[LSE_S]
                for request, of_request in zip(spec.requests, requests)
            ]
        )
        ctx.needed = needed
        ctx.save_for_backward(*hidden, *slopes)
        return found

    @staticmethod
    def backward(ctx, grad_found: Tensor):
        count = len(ctx.needed) - 2
        hidden, slopes = ctx.saved_tensors[:count], ctx.saved_tensors[count:]
        needed = [i for i in range(count) if ctx.needed[i]]
        with torch.no_grad():
            found = [grad_found[i, :, None] * slope for i, slope in zip(needed, slopes)]
        found = dict(zip(needed, _refusing_second_derivatives(found, *hidden, grad_found)))
        return (None,) * 5 + tuple(found.get(i) for i in range(count))


def log_sum_exps(plan: Plan, hidden: list[Tensor], weight: Tensor, bias: Tensor | None) -> Tensor:
    """For each request of the plan the log-sum-exp of the student's logits / temperature: (reads,
    R).

    `hidden` are the states (R, Ds) of the plan's layers; the head is a constant without soft cap.
    Float32 or wider.
    """
    pairs = list(
        dict.fromkeys(
            (request.student_layer, request.temperature) for request in plan.spec.requests
        )
    )
    wide = torch.promote_types(torch.promote_types(hidden[0].dtype, weight.dtype), torch.float32)
    if not pairs:
        return hidden[0].new_zeros((0, len(hidden[0])), dtype=wide)
    states = [hidden[layer].to(wide) for layer, _ in pairs]
    scale = plan.options.student_logit_scale
    if plan.backend == "reference":
        logits = [dense_logits(h, weight, bias, scale, None, plan.spec.columns) for h in states]
        found = torch.stack(
            [(u / temperature).logsumexp(-1) for u, (_, temperature) in zip(logits, pairs)]
        )
    else:
        requests = tuple(
            Request(i, i, temperature, NLL) for i, (_, temperature) in enumerate(pairs)
        )
        spec = LensSpec(plan.spec.columns, requests, (), 1.0, scale, None, 1.0, None)
        inputs = LensInputs(states, weight, bias, states, None, None, None, None)
        rows = _kept_rows(
            plan.backend, inputs, spec, [*(h.requires_grad for h in states), False, False]
        )
        found = LogSumExps.apply(spec, plan.backend, rows, weight, bias, *states)
    return torch.stack(
        [
            found[pairs.index((request.student_layer, request.temperature))]
            for request in plan.spec.requests
        ]
    )


def _refusing_second_derivatives(found: list[Tensor], *sources: Tensor | None) -> Sequence[Tensor]:
    """The gradients `found`, such that differentiating them again with respect to what they come
    from raises.
    """
    # compiled code refuses by itself
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return found
    return _Once.apply(len(found), *found, *[t for t in sources if t is not None])


def tensors_of(plan: Plan, inputs: LensInputs) -> tuple[Tensor | None, ...]:
    """What the plan reads of `inputs`, which have the states of every layer, in the order in which
    the Functions take it.
    """
    labels = None if plan.ce is None else inputs.labels
    hidden = [
        states[layer]
        for states in (inputs.student_hidden, inputs.teacher_hidden)
        for layer in plan.layers
    ]
    heads = (inputs.teacher_weight, inputs.teacher_bias, inputs.student_weight, inputs.student_bias)
    return (inputs.valid, labels, *heads, *hidden)


def _inputs(
    valid, labels, teacher_weight, teacher_bias, weight, bias, *hidden: Tensor
) -> LensInputs:
    """LensInputs from the order in which the Functions take them; None for what was None when it
    was saved.
    """
    count = len(hidden) // 2
    student, teacher = list(hidden[:count]), list(hidden[count:])
    return LensInputs(student, weight, bias, teacher, teacher_weight, teacher_bias, valid, labels)


def _needed(ctx, hidden: int) -> list[bool]:
    """Which of [*student_hidden, student_weight, student_bias] need a gradient; `hidden` counts
    both models' states.
    """
    *_, weight, bias = ctx.needs_input_grad[:-hidden]
    return [*ctx.needs_input_grad[-hidden : -(hidden // 2)], weight, bias]


def _returned(ctx, found: list[Tensor], inputs: LensInputs, upstream) -> tuple[Tensor | None, ...]:
    """The gradients `found` in the order of forward's arguments, and such that differentiating them
    again raises.
    """
    sources = (inputs.student_weight, inputs.student_bias, *inputs.student_hidden, *upstream)
    found = iter(_refusing_second_derivatives(found, *sources))
    *grad_hidden, grad_weight, grad_bias = [next(found) if need else None for need in ctx.needed]
    before = len(ctx.needs_input_grad) - 2 * len(grad_hidden) - 2
    return (None,) * before + (grad_weight, grad_bias, *grad_hidden) + (None,) * len(grad_hidden)
