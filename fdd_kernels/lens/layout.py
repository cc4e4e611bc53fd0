"""The layout of row statistics: index names shared by the engine and every backend.

csrc/layout.h repeats them for C++; a test compares the two.

Per request, `REQUEST_STATS` numbers a row:
    LSE_S, LSE_T   log-sum-exp of the student's and the teacher's z
    VALUE          the divergence; for NLL the student's cross-entropy at the label
    GRAD_SUM       sum over the vocabulary of the divergence's `grad`; its gradient is not taken

Per pair of vectors s and t with d = s - t, `MOMENT_STATS` numbers a row:
    COUNT, MEAN_S, MEAN_T and the sums of squares about the means M_SS, M_TT, M_ST, M_DD.
M_DD is summed on its own: M_SS + M_TT - 2 M_ST loses every digit where the models nearly agree.

Of weighted moments the sums have the normalised weights w = e^(z_t - COUNT), and
    COUNT          the log of the sum of e^z_t of the tokens that are not left out (-inf without
                   one), z_t relative to the shift of the pair's second layer
    TOP_S, TOP_T   s and t of the likeliest token, minus the means
TOP stands for s - MEAN_S of a token with w > CERTAIN: where one token has nearly all the weight
this is a small number, of which the rounding of the mean would leave nothing. Without weights both
are 0.
CERTAIN is above 1/2, so that rounding never makes it true of two tokens with half the weight each.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fdd_kernels.lens.spec import PairMoments, of_pair

LSE_S, LSE_T, VALUE, GRAD_SUM = range(4)
REQUEST_STATS = 4
COUNT, MEAN_S, MEAN_T, M_SS, M_TT, M_ST, M_DD, TOP_S, TOP_T = range(9)
MOMENT_STATS = 9
CERTAIN = 0.625


class Statistics(NamedTuple):
    """Row statistics of L layers of each model and R rows, in float32 or float64.

    `shifts` (2, L, R): per model and layer the number that logits are relative to; without meaning
    at the layers that a model with fewer of them lacks.
    `requests` (requests, REQUEST_STATS, R) and `moments` (pairs, MOMENT_STATS, R) as above.
    """

    shifts: Tensor
    requests: Tensor
    moments: Tensor


def merge_moments(a: Tensor, b: Tensor, weighted: bool = False) -> Tensor:
    """Merge the moments of two disjoint sets of tokens, (MOMENT_STATS, r) each, by Chan, Golub and
    LeVeque's update.
    """
    if weighted:
        total = torch.logaddexp(a[COUNT], b[COUNT])
        part_a, part_b = (_share(part[COUNT], total) for part in (a, b))
        out, cross, weight_b = part_a * _finite(a) + part_b * _finite(b), part_a * part_b, part_b
    else:
        total = a[COUNT] + b[COUNT]
        weight_b = b[COUNT] / total.clamp(min=1)
        out, cross = a + b, a[COUNT] * weight_b
    delta_s, delta_t = b[MEAN_S] - a[MEAN_S], b[MEAN_T] - a[MEAN_T]
    out[COUNT] = total
    out[MEAN_S], out[MEAN_T] = a[MEAN_S] + delta_s * weight_b, a[MEAN_T] + delta_t * weight_b
    out[M_SS] += cross * delta_s * delta_s
    out[M_TT] += cross * delta_t * delta_t
    out[M_ST] += cross * delta_s * delta_t
    out[M_DD] += cross * (delta_s - delta_t).square()
    if weighted:  # of the heavier set: no other has a token with more than half the weight
        for top, delta in ((TOP_S, delta_s), (TOP_T, delta_t)):
            of_b = b[top] + part_a * delta
            out[top] = torch.where(part_b > part_a, of_b, a[top] - part_b * delta)
    return out


def has_token(moments: Tensor, pair: PairMoments) -> Tensor:
    """Say whether a pair's moments (..., MOMENT_STATS, R) are of any token: (..., R)."""
    return moments[..., COUNT, :] > (-torch.inf if pair.weighted else 0)


def lower_shifts(moments: Tensor, pair: PairMoments, by: Tensor) -> None:
    """Restate a pair's moments (..., MOMENT_STATS, R) about shifts that are lower by `by`
    (..., 2, L, R), in place; the means of no token stay 0.
    """
    of_vectors = of_pair(by, pair) / pair.temperature
    any_token = has_token(moments, pair)[..., None, :]
    moments[..., MEAN_S : MEAN_T + 1, :] += torch.where(any_token, of_vectors, 0.0)
    if pair.weighted:
        moments[..., COUNT, :] += by[..., 1, pair.second.teacher, :] / pair.temperature


def _share(count: Tensor, total: Tensor) -> Tensor:
    """Compute a set's share of the weight; 0 for one without a token."""
    return torch.where(count == -torch.inf, 0.0, (count - total).exp())


def _finite(moments: Tensor) -> Tensor:
    """Clear COUNT, which may be -inf, before the moments are multiplied."""
    moments = moments.clone()
    moments[COUNT] = 0.0
    return moments
