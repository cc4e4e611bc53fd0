"""The gradients of a call: every tile's logits are computed again, and with them dL/dx."""

from __future__ import annotations

import torch
from torch import Tensor

from fdd_kernels.backends.torch_stream import tiling
from fdd_kernels.backends.torch_stream.problem import (
    TorchProblem,
    at_temperature,
    log_probabilities,
    pair_vectors,
)
from fdd_kernels.backends.torch_stream.running import shifts_of
from fdd_kernels.lens.divergences import DIVERGENCES
from fdd_kernels.lens.inputs import LensInputs
from fdd_kernels.lens.layout import (
    CERTAIN,
    COUNT,
    GRAD_SUM,
    LSE_S,
    M_DD,
    M_SS,
    M_ST,
    MEAN_S,
    MEAN_T,
    TOP_S,
    TOP_T,
    VALUE,
)
from fdd_kernels.lens.spec import NLL, LensSpec, PairMoments, Request


def grad(
    inputs: LensInputs, spec: LensSpec, per_row: tuple[Tensor, ...], needed: list[bool]
) -> list[Tensor]:
    """Compute gradients of [*student_hidden, student_weight, student_bias] marked in `needed`.

    `per_row` are the three statistics and the upstream gradients of the last two. The gradient of a
    low-precision head is accumulated in float32. Where neither that of the whole head nor that of
    all hidden states fits the accumulator budget, the vocabulary is walked twice, once for each.
    """
    problem = TorchProblem(inputs, spec)
    student_hidden, student_weight = inputs.student_hidden, inputs.student_weight
    *needs_hidden, needs_weight, needs_bias = needed
    grad_hidden = [
        torch.zeros_like(h, memory_format=torch.contiguous_format) if need else None
        for h, need in zip(student_hidden, needs_hidden)
    ]
    grad_weight = (
        torch.zeros_like(student_weight, memory_format=torch.contiguous_format)
        if needs_weight
        else None
    )
    grad_bias = torch.zeros_like(inputs.student_bias, dtype=problem.dtype) if needs_bias else None

    all_rows = max(problem.count, 1)
    resident = problem.tiles.resident_rows if any(needs_hidden) else all_rows
    # Written once per set of resident rows: with one set, or in a dtype wide enough, no accumulator
    # is needed.
    summed_in_place = (
        not needs_weight or problem.count <= resident or student_weight.dtype == problem.dtype
    )
    if summed_in_place:
        _accumulate(problem, per_row, grad_hidden, grad_weight, grad_bias, resident)
    elif student_weight.numel() * problem.dtype.itemsize <= tiling.ACCUMULATOR_BYTES:
        accumulator = torch.zeros_like(grad_weight, dtype=problem.dtype)
        _accumulate(problem, per_row, grad_hidden, accumulator, grad_bias, resident)
        grad_weight.copy_(accumulator)
    else:
        _accumulate(problem, per_row, grad_hidden, None, None, resident)
        _accumulate(problem, per_row, [], grad_weight, grad_bias, all_rows)
    if grad_bias is not None:
        grad_bias = grad_bias.to(inputs.student_bias.dtype)
    return [g for g in (*grad_hidden, grad_weight, grad_bias) if g is not None]


def _accumulate(
    problem: TorchProblem,
    per_row: tuple[Tensor, ...],
    grad_hidden: list[Tensor | None],
    grad_weight: Tensor | None,
    grad_bias: Tensor | None,
    resident_rows: int,
) -> None:
    """Add the gradients into the tensors given: one a layer, or an empty list, for the hidden
    states; None is not computed.

    For each set of resident rows the vocabulary is the outer loop. A tile of the head's gradient is
    then summed over these rows in the working dtype and written once.
    """
    student, teacher = problem.student, problem.teacher
    width = student.hidden[0].shape[-1]
    want_hidden = any(g is not None for g in grad_hidden)
    for start in range(0, problem.count, resident_rows):
        stop = min(start + resident_rows, problem.count)
        summed = None
        if want_hidden:
            summed = student.hidden[0].new_zeros(
                (len(student.hidden), stop - start, width), dtype=problem.dtype
            )
        for columns in problem.column_tiles():
            weight_cD = student.weight_tile(columns)
            teacher_cD = teacher.weight_tile(columns) if problem.spec.needs_teacher else None
            summed_cD = torch.zeros_like(weight_cD) if grad_weight is not None else None
            for rows, first, last in problem.row_blocks(problem.tiles.rows, start, stop):
                student_LrD = student.rows(rows)
                teacher_LrD = teacher.rows(rows) if problem.spec.needs_teacher else None
                grad_x = _tile_gradient(
                    problem, per_row, rows, columns, student_LrD, weight_cD, teacher_LrD, teacher_cD
                )
                if grad_bias is not None:
                    grad_bias[columns] += grad_x.sum((0, 1))
                flat = grad_x.reshape(-1, grad_x.shape[-1])
                if summed is not None:
                    summed[:, first - start : last - start] += (flat @ weight_cD).view(
                        len(summed), -1, width
                    )
                if summed_cD is not None:
                    summed_cD.addmm_(flat.T, student_LrD.reshape(-1, width))
            if grad_weight is not None:
                grad_weight[columns] += summed_cD
        if want_hidden:
            rows, _, _ = next(problem.row_blocks(stop - start, start, stop))
            for layer, out in enumerate(grad_hidden):
                if out is not None:
                    out[rows] = summed[layer].to(out.dtype)


def _tile_gradient(
    problem: TorchProblem,
    per_row: tuple[Tensor, ...],
    rows: Tensor | slice,
    columns: slice,
    student_LrD: Tensor,
    weight_cD: Tensor,
    teacher_LrD: Tensor | None,
    teacher_cD: Tensor | None,
) -> Tensor:
    """Compute dL/dx of one tile, x = h W^T + b of the student: (L, r, c)."""
    spec, student, teacher = problem.spec, problem.student, problem.teacher
    shifts, requests, moments, grad_requests, grad_moments = (stat[..., rows] for stat in per_row)
    logits_s = student.logits(student_LrD, weight_cD, columns)
    u_s = logits_s - shifts_of(logits_s, shifts[0])
    u_t = None
    if spec.needs_teacher:
        u_t = teacher.logits(teacher_LrD, teacher_cD, columns)
        u_t -= shifts_of(u_t, shifts[1])
    grad_u = torch.zeros_like(u_s)
    for index, request in enumerate(spec.requests):
        label = problem.label_columns(rows, columns) if request.divergence == NLL else None
        upstream, stat = grad_requests[index, ..., None], requests[index, ..., None]
        grad_z = _logit_gradient(request, u_s, u_t, upstream, stat, label)
        grad_u[request.student_layer].add_(grad_z, alpha=1 / request.temperature)
        del grad_z  # before the next one is formed
    live = problem.live_tile(columns) if spec.moments else None
    for index, pair in enumerate(spec.moments):
        upstream, stat = grad_moments[index, ..., None], moments[index, ..., None]
        grad_vector = _vector_gradient(pair, u_s, u_t, upstream, stat)
        if live is not None:
            grad_vector = torch.where(live, grad_vector, 0.0)
        grad_u[pair.second.student].add_(grad_vector, alpha=1 / pair.temperature)
        if pair.first is not None:
            grad_u[pair.first.student].sub_(grad_vector, alpha=1 / pair.temperature)
        del grad_vector
    return student.chain(grad_u, logits_s)


def _logit_gradient(
    request: Request,
    u_s: Tensor,
    u_t: Tensor | None,
    upstream: Tensor,
    stat: Tensor,
    label: tuple[Tensor, Tensor] | None,
) -> Tensor:
    """Compute dL/dz of the student of one request, (r, c).

    `label` is that of `TorchProblem.label_columns`, for NLL.
    """
    if request.divergence in (None, NLL):
        z_s = at_temperature(u_s[request.student_layer], request.temperature)
        q = (z_s - stat[LSE_S]).exp_()
        if label is None:
            return q.mul_(upstream[LSE_S])
        inside, at = label
        of_label = torch.where(inside[:, None], -upstream[VALUE], 0.0)
        return q.mul_(upstream[LSE_S] + upstream[VALUE]).scatter_add_(1, at[:, None], of_label)
    log_q, log_p = log_probabilities(request, u_s, u_t, stat[..., 0])
    grad_z = DIVERGENCES[request.divergence].grad(log_q, log_p, *request.parameters)
    del log_p
    q = log_q.exp_()
    grad_z = grad_z.sub_(q * stat[GRAD_SUM]).mul_(upstream[VALUE])
    return grad_z.add_(q.mul_(upstream[LSE_S]))


def _vector_gradient(
    pair: PairMoments, u_s: Tensor, u_t: Tensor, upstream: Tensor, stat: Tensor
) -> Tensor:
    """Compute dL/ds of one pair's vectors, (r, c), at all tokens."""
    s, t = pair_vectors(u_s, u_t, pair)
    s -= stat[MEAN_S]
    t -= stat[MEAN_T]
    weight, of_mean = None, upstream[MEAN_S]
    if pair.weighted:
        weight = at_temperature(u_t[pair.second.teacher], pair.temperature) - stat[COUNT]
        weight.exp_()
        s, t = (torch.where(weight > CERTAIN, stat[k], x) for k, x in ((TOP_S, s), (TOP_T, t)))
    else:
        of_mean = of_mean / stat[COUNT].clamp(min=1)
    grad_vector = ((2 * upstream[M_SS]) * s).add_(upstream[M_ST] * t).add_(of_mean)
    grad_vector += s.sub_(t).mul_(2 * upstream[M_DD])
    return grad_vector if weight is None else grad_vector.mul_(weight)
