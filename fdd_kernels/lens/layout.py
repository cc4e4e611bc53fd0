"""The layout of row statistics: index names shared by the engine and every backend.

csrc/layout.h repeats them for C++; a test compares the two.

Per request, `REQUEST_STATS` numbers a row:
    LSE_S, LSE_T   log-sum-exp of the student's and the teacher's z
    VALUE          the divergence; for NLL the student's cross-entropy at the label
    GRAD_SUM       sum over the vocabulary of the divergence's `grad`; its gradient is not taken

Per pair of vectors s and t with d = s - t, `MOMENT_STATS` numbers a row:
    COUNT, MEAN_S, MEAN_T and the sums of squares about the means M_SS, M_TT, M_ST, M_DD.
M_DD is summed on its own: M_SS + M_TT - 2 M_ST loses every digit where the models nearly agree.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

LSE_S, LSE_T, VALUE, GRAD_SUM = range(4)
REQUEST_STATS = 4
COUNT, MEAN_S, MEAN_T, M_SS, M_TT, M_ST, M_DD = range(7)
MOMENT_STATS = 7


class Statistics(NamedTuple):
    """Row statistics of L layers of each model and R rows, in float32 or float64.

    `shifts` (2, L, R): per model and layer the number that logits are relative to.
    `requests` (requests, REQUEST_STATS, R) and `moments` (pairs, MOMENT_STATS, R) as above.
    """

    shifts: Tensor
    requests: Tensor
    moments: Tensor


def merge_moments(a: Tensor, b: Tensor) -> Tensor:
    """Merge the moments of two disjoint sets of tokens, (MOMENT_STATS, r) each, by Chan, Golub and
    LeVeque's update.
    """
    count = a[COUNT] + b[COUNT]
    weight_b = b[COUNT] / count.clamp(min=1)
    cross = a[COUNT] * weight_b
    delta_s, delta_t = b[MEAN_S] - a[MEAN_S], b[MEAN_T] - a[MEAN_T]
    out = a + b
    out[MEAN_S], out[MEAN_T] = a[MEAN_S] + delta_s * weight_b, a[MEAN_T] + delta_t * weight_b
    out[M_SS] += cross * delta_s * delta_s
    out[M_TT] += cross * delta_t * delta_t
    out[M_ST] += cross * delta_s * delta_t
    out[M_DD] += cross * (delta_s - delta_t).square()
    return out
