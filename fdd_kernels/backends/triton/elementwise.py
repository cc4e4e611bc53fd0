"""Per-element and per-row mathematics that the kernels of every strategy share, as device
functions.

p is the teacher's distribution, q the student's. The registry of the divergences is
`fdd_kernels/lens/divergences.py`; its formulas are spelled out again here: value(log_q, log_p)
summed over the vocabulary, slope its derivative with respect to log_q.

Elements come as tensors of any shape; what belongs to a row comes in a shape that broadcasts
against them: (r, 1) for a tile of rows, a scalar for a program that owns one row. AXIS is the axis
of the vocabulary in both cases. Functions that load per-row numbers take a pointer to the rows and
a row stride.

A token of probability zero contributes its limit, never NaN. Functions of the mathematical library
that Triton's interpreter does not know (expm1, log1p, tanh) are written out with full relative
accuracy near 0: models that nearly agree live there.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fdd_kernels.backends.triton.work_table import (
    KIND_KL,
    KIND_LSE,
    KIND_NLL,
    REQUEST_BEGIN,
    REQUEST_INDEX,
    REQUEST_KIND,
    table_entry,
)
from fdd_kernels.lens import divergences, layout

SKEW = tl.constexpr(divergences.SKEW)
REQUEST_FIELDS = tl.constexpr(layout.REQUEST_STATS)
MOMENT_FIELDS = tl.constexpr(layout.MOMENT_STATS)
LSE_S, LSE_T = tl.constexpr(layout.LSE_S), tl.constexpr(layout.LSE_T)
VALUE, GRAD_SUM = tl.constexpr(layout.VALUE), tl.constexpr(layout.GRAD_SUM)
COUNT, MEAN_S, MEAN_T = (
    tl.constexpr(layout.COUNT),
    tl.constexpr(layout.MEAN_S),
    tl.constexpr(layout.MEAN_T),
)
M_SS, M_ST, M_DD = tl.constexpr(layout.M_SS), tl.constexpr(layout.M_ST), tl.constexpr(layout.M_DD)


@triton.jit
def times(weight, factor):
    """weight * factor with 0 * anything = 0; a weight that is NaN shows."""
    return tl.where(weight == 0, 0.0, weight * factor)


@triton.jit
def weighted(weight, factor, FINITE: tl.constexpr):
    """weight * factor; `times`, unless the factor is known to be finite."""
    if FINITE:
        product = weight * factor
    else:
        product = times(weight, factor)
    return product


@triton.jit
def expm1_negative(y):
    """e^y - 1 for y <= 0: a Taylor polynomial (remainder below 2^-27) above -1/2."""
    series = 1.0 / 5040 + y * (1.0 / 40320)
    series = 1.0 / 720 + y * series
    series = 1.0 / 120 + y * series
    series = 1.0 / 24 + y * series
    series = 1.0 / 6 + y * series
    series = 0.5 + y * series
    series = 1.0 + y * series
    return tl.where(y > -0.5, y * series, tl.exp(y) - 1.0)


@triton.jit
def log1p_negative(w):
    """log(1 + w) for -1 < w <= 0: 2 atanh(w / (2 + w)) above -1/2, where its argument is above
    -1/3.
    """
    s = w / (2.0 + w)
    t = s * s
    series = 1.0 / 11.0 + t * (1.0 / 13.0)
    series = 1.0 / 9.0 + t * series
    series = 1.0 / 7.0 + t * series
    series = 1.0 / 5.0 + t * series
    series = 1.0 / 3.0 + t * series
    return tl.where(w > -0.5, 2.0 * s * (1.0 + t * series), tl.log(1.0 + w))


@triton.jit
def tanh(x):
    e = expm1_negative(-2.0 * tl.abs(x))
    magnitude = -e / (2.0 + e)
    return tl.where(x < 0, -magnitude, magnitude)


@triton.jit
def log_mixture(x, SHARE: tl.constexpr):
    """log((1 - SHARE) + SHARE e^x), accurate near 0 and free of overflow."""
    small = expm1_negative(-tl.abs(x))
    return tl.maximum(x, 0.0) + log1p_negative(
        tl.where(x > 0, (1.0 - SHARE) * small, SHARE * small)
    )


@triton.jit
def kl_of(p, r, x, FINITE: tl.constexpr):
    """What a token adds to KL(p || r), given x = log r - log p: p (e^x - 1 - x), never negative.

    Since sum(r - p) = 0 this is sum(-p x), without its cancellation where the two nearly agree.
    """
    series = 1.0 / 720 + x * (1.0 / 5040)
    series = 1.0 / 120 + x * series
    series = 1.0 / 24 + x * series
    series = 1.0 / 6 + x * series
    series = 0.5 + x * series  # the remainder is below 2^-24 of it
    return tl.where(tl.abs(x) < 0.3, (p * x) * (x * series), (r - p) - weighted(p, x, FINITE))


@triton.jit
def divergence_value(log_q, log_p, DIVERGENCE: tl.constexpr):
    p, q, x = tl.exp(log_p), tl.exp(log_q), log_q - log_p
    if DIVERGENCE == "kl":
        value = kl_of(p, q, x, False)
    elif DIVERGENCE == "reverse_kl":
        value = kl_of(q, p, -x, False)
    elif DIVERGENCE == "jsd":
        m = 0.5 * (p + q)
        value = 0.5 * (
            kl_of(p, m, log_mixture(x, 0.5), False) + kl_of(q, m, log_mixture(-x, 0.5), False)
        )
    else:
        tl.static_assert(DIVERGENCE == "skew_kl")
        value = kl_of(p, SKEW * p + (1.0 - SKEW) * q, log_mixture(x, 1.0 - SKEW), False)
    return value


@triton.jit
def divergence_grad(log_q, log_p, DIVERGENCE: tl.constexpr):
    if DIVERGENCE == "kl":
        slope = -tl.exp(log_p)
    elif DIVERGENCE == "reverse_kl":
        slope = times(tl.exp(log_q), log_q - log_p + 1.0)
    elif DIVERGENCE == "jsd":
        slope = -0.5 * times(tl.exp(log_q), log_mixture(log_p - log_q, 0.5))
    else:
        tl.static_assert(DIVERGENCE == "skew_kl")
        # (1 - SKEW)^2 q (q - p) / m, as in lens/divergences.py
        x = log_q - log_p
        gap = expm1_negative(-tl.abs(x))
        ratio = tl.where(x > 0, -gap / (1.0 + SKEW * gap), gap / (1.0 + (1.0 - SKEW) * gap))
        slope = (1.0 - SKEW) * (1.0 - SKEW) * times(tl.exp(log_q), ratio)
    return slope


# Above, the expectation of the first pass is as accurate: its error of some 1e-6 is absolute.
REFINED_BELOW = tl.constexpr(0.25)


@triton.jit
def exponential_sums(
    z, difference, AXIS: tl.constexpr, WITH_EXPECTATION: tl.constexpr, FINITE: tl.constexpr
):
    """Sums over the vocabulary of e^z and, if wanted, of e^z * difference; z are shifted so that
    none overflows.

    FINITE promises that no z is -inf.
    """
    weight = tl.exp(z)
    total = tl.sum(weight, AXIS)
    expectation = total
    if WITH_EXPECTATION:
        expectation = tl.sum(weighted(weight, difference, FINITE), AXIS)
    return total, expectation


@triton.jit
def second_moments(s, t, AXIS: tl.constexpr):
    """Sums over the vocabulary of s s, t t, s t and (s - t)^2."""
    d = s - t
    return tl.sum(s * s, AXIS), tl.sum(t * t, AXIS), tl.sum(s * t, AXIS), tl.sum(d * d, AXIS)


@triton.jit
def slot_coefficients(
    requests,
    grad_requests,
    stride,
    grad_stride,
    counts,
    table,
    table_width,
    slot,
    BLOCK_R: tl.constexpr,
):
    """What a slot's requests want of dL/dz, per row: the coefficients of q, p, the divergence's
    slope and the label's token.

    Returns them with both log-sum-exps and the value of KL, (BLOCK_R,) each; that is infinite
    without a request of KL. `requests` and `grad_reads` point at the rows; rows that do not count
    get coefficients of 0.
    """
    q_r = tl.zeros((BLOCK_R,), dtype=tl.float32)
    kl = q_r + float("inf")
    p_r, slope_r, label_r, lse_s, lse_t = q_r, q_r, q_r, q_r, q_r
    for entry in range(
        table_entry(table, table_width, REQUEST_BEGIN, slot),
        table_entry(table, table_width, REQUEST_BEGIN, slot + 1),
    ):
        kind = table_entry(table, table_width, REQUEST_KIND, entry)
        index = table_entry(table, table_width, REQUEST_INDEX, entry) * REQUEST_FIELDS
        request = requests + index * stride
        grad_request = grad_requests + index * grad_stride
        lse_s = tl.load(request + LSE_S * stride, mask=counts, other=0.0)
        q_r += tl.load(grad_request + LSE_S * grad_stride, mask=counts, other=0.0)
        if kind != KIND_LSE:
            upstream = tl.load(grad_request + VALUE * grad_stride, mask=counts, other=0.0)
            if kind == KIND_NLL:
                q_r += upstream
                label_r -= upstream
            else:
                q_r -= upstream * tl.load(request + GRAD_SUM * stride, mask=counts, other=0.0)
                if kind == KIND_KL:
                    p_r -= upstream
                    kl = tl.load(request + VALUE * stride, mask=counts, other=float("inf"))
                else:
                    slope_r += upstream
        if kind != KIND_NLL:
            lse_t = tl.load(request + LSE_T * stride, mask=counts, other=0.0)
    return q_r, p_r, slope_r, label_r, lse_s, lse_t, kl


@triton.jit
def moment_coefficients(moments, grad_moments, stride, grad_stride, counts):
    """The coefficients of dL/ds of a moment target per row: of 1, s - mean_s, t - mean_t, their
    difference; and the means.

    `moments` and `grad_moments` point at the rows of one target; rows that do not count get 0.
    """
    mean_s = tl.load(moments + MEAN_S * stride, mask=counts, other=0.0)
    mean_t = tl.load(moments + MEAN_T * stride, mask=counts, other=0.0)
    of_one = tl.load(grad_moments + MEAN_S * grad_stride, mask=counts, other=0.0)
    of_one /= tl.maximum(tl.load(moments + COUNT * stride, mask=counts, other=1.0), 1.0)
    of_s = 2.0 * tl.load(grad_moments + M_SS * grad_stride, mask=counts, other=0.0)
    of_t = tl.load(grad_moments + M_ST * grad_stride, mask=counts, other=0.0)
    of_d = 2.0 * tl.load(grad_moments + M_DD * grad_stride, mask=counts, other=0.0)
    return of_one, of_s, of_t, of_d, mean_s, mean_t


@triton.jit
def softmax_gradient(log_q, log_p, q, p, slope, TEACHER: tl.constexpr, DIVERGENCE: tl.constexpr):
    """dL/dz = q e^log_q + p e^log_p + slope * slope(log_q, log_p), but for the label's part."""
    grad = q * tl.exp(log_q)
    if TEACHER:
        grad += p * tl.exp(log_p)
        if DIVERGENCE != "kl":
            grad += slope * divergence_grad(log_q, log_p, DIVERGENCE)
    return grad


@triton.jit
def moment_gradient(s, t, of_one, of_s, of_t, of_d):
    """dL/ds of a moment target from s and t about their means."""
    return of_one + of_s * s + of_t * t + of_d * (s - t)
