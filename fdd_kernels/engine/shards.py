"""Statistics of the whole vocabulary from those of disjoint parts: the mathematics of shards.

With P_k and Q_k the teacher's and the student's probability of the tokens of part k:

    KL(p || q) = sum_k P_k KL_k + KL(P || Q)         the chain rule; no difference of large numbers
    -log q[label] = -log q_k[label] - log Q_k        of the part k that has the label
    moments: sums about the common mean from those about the parts' own (Chan, Golub and LeVeque)

Everything is merged in float64, whatever the parts' dtype is. Shape suffixes: N parts, L layers, n
requests, m pair moments, k numbers of one of them, R rows.
"""

from __future__ import annotations

import functools
from dataclasses import replace

import torch
from torch import Tensor

from fdd_kernels.lens.divergences import expectation_of, needs_second_pass
from fdd_kernels.lens.inputs import LensInputs
from fdd_kernels.lens.layout import (
    GRAD_SUM,
    LSE_S,
    LSE_T,
    MOMENT_STATS,
    REQUEST_STATS,
    VALUE,
    Statistics,
    has_token,
    lower_shifts,
    merge_moments,
)
from fdd_kernels.lens.spec import NLL, LensSpec, PairMoments, Request, of_request

# LSE_S, LSE_T and VALUE are exchanged; GRAD_SUM follows from VALUE.
SENT_REQUEST_STATS = 3


def second_pass_requests(spec: LensSpec) -> list[int]:
    """List the requests whose VALUE and GRAD_SUM need the whole vocabulary's log-sum-exps."""
    return [
        index
        for index, request in enumerate(spec.requests)
        if needs_second_pass(request.divergence)
    ]


def first_pass(spec: LensSpec) -> LensSpec:
    """Drop the second pass, which would be over a process's own tokens."""
    later = second_pass_requests(spec)
    requests = [
        request._replace(divergence=None, parameters=()) if index in later else request
        for index, request in enumerate(spec.requests)
    ]
    return replace(spec, requests=tuple(requests))


def part_statistics(inputs: LensInputs, spec: LensSpec, own: Statistics) -> Statistics:
    """Select the part of the local statistics that is all-gathered.

    VALUE is -inf for labels that another rank owns, and unused for two-pass divergences.
    """
    requests = own.requests[:, :SENT_REQUEST_STATS].clone()
    for index, request in enumerate(spec.requests):
        if request.divergence == NLL:
            requests[index, VALUE].masked_fill_(inputs.labels < 0, -torch.inf)
    return own._replace(requests=requests)


def merge_statistics(
    spec: LensSpec, shifts: Tensor, requests: Tensor, moments: Tensor
) -> Statistics:
    """Merge `part_statistics` of disjoint parts, stacked along a first dimension N.

    Those of the second pass are left at 0. A part whose tokens are all -inf is left out.
    """
    dtype = shifts.dtype
    shifts_N2LR, requests_NnkR, moments_NmkR = (t.double() for t in (shifts, requests, moments))
    common, offset = _common_shifts(spec, shifts_N2LR, requests_NnkR, moments_NmkR)
    rows = shifts.shape[-1]
    merged_requests = common.new_zeros((len(spec.requests), REQUEST_STATS, rows))
    merged_moments = common.new_zeros((len(spec.moments), MOMENT_STATS, rows))
    for index, request in enumerate(spec.requests):
        _merge_request(
            request,
            requests_NnkR[:, index],
            of_request(offset, request) / request.temperature,
            merged_requests[index],
        )
    for index, pair in enumerate(spec.moments):
        _merge_moments(pair, moments_NmkR[:, index], offset, merged_moments[index])
    return Statistics(common.to(dtype), merged_requests.to(dtype), merged_moments.to(dtype))


def _common_shifts(
    spec: LensSpec, shifts: Tensor, requests: Tensor, moments: Tensor
) -> tuple[Tensor, Tensor]:
    """Find the largest shift of the parts with a finite token.

    Returns it (2, L, R), and how far each part's lies above it (N, 2, L, R).
    """
    live = torch.zeros_like(shifts, dtype=torch.bool)
    for index, request in enumerate(spec.requests):
        live[:, 0, request.student_layer] |= requests[:, index, LSE_S] > -torch.inf
        if request.divergence != NLL:
            live[:, 1, request.teacher_layer] |= requests[:, index, LSE_T] > -torch.inf
    for index, pair in enumerate(spec.moments):
        any_token = has_token(moments[:, index], pair)
        for layers in pair.layers:
            live[:, 0, layers.student] |= any_token
            live[:, 1, layers.teacher] |= any_token
    common = shifts.where(live, -torch.inf).amax(0).where(live.any(0), 0.0)
    return common, (shifts - common).where(live, 0.0)


def _merge_request(request: Request, parts_NkR: Tensor, offset_N2R: Tensor, out_kR: Tensor) -> None:
    """Merge one request: its log-sum-exps, and with them its divergence."""
    parts_s = parts_NkR[:, LSE_S] + offset_N2R[:, 0]
    out_kR[LSE_S] = parts_s.logsumexp(0)
    log_q, value = parts_s - out_kR[LSE_S], parts_NkR[:, VALUE]
    if request.divergence == NLL:
        of_owner = torch.where(log_q == -torch.inf, torch.inf, value - log_q)
        out_kR[VALUE] = torch.where(value == -torch.inf, -torch.inf, of_owner).amax(0)
        return
    parts_t = parts_NkR[:, LSE_T] + offset_N2R[:, 1]
    out_kR[LSE_T] = parts_t.logsumexp(0)
    log_p = parts_t - out_kR[LSE_T]
    of = expectation_of(request.divergence)
    if of == "teacher":
        out_kR[VALUE], out_kR[GRAD_SUM] = _chain_rule(log_p, log_q, value), -1.0
    elif of == "student":
        out_kR[VALUE] = _chain_rule(log_q, log_p, value)
        out_kR[GRAD_SUM] = out_kR[VALUE] + 1.0


def _chain_rule(log_p_NR: Tensor, log_q_NR: Tensor, within_NR: Tensor) -> Tensor:
    """Compute KL(p || q) of the whole vocabulary, (R,).

    Takes the parts' probabilities and the divergences within them.
    """
    p = log_p_NR.exp()
    within = torch.where((p > 0) & (log_q_NR > -torch.inf), p * within_NR, 0.0)
    between = torch.where(p > 0, p * (log_p_NR - log_q_NR), 0.0)
    return (within + between).sum(0)


def _merge_moments(
    pair: PairMoments, parts_NkR: Tensor, offset_N2LR: Tensor, out_kR: Tensor
) -> None:
    """Merge one pair's moments, the parts' vectors restated about the common shifts."""
    parts_NkR = parts_NkR.clone()
    lower_shifts(parts_NkR, pair, offset_N2LR)
    merge = functools.partial(merge_moments, weighted=pair.weighted)
    out_kR.copy_(functools.reduce(merge, parts_NkR.unbind()))
