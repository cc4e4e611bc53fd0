"""Device functions that the kernels of every strategy share: elements of the vocabulary and rows.

p is the teacher's distribution, q the student's. Four formulas are those of
`fdd_kernels/lens/divergences.py`, spelled out again: `kl_of`, `log_mixture`, and the `value` and
`grad` of each divergence (`divergence_value`, `divergence_grad`). tests/kernels compares them with
the registry, in float64. The places of statistics are those of `fdd_kernels/lens/layout.py`.

Elements come as tensors of any shape. Numbers of a row come in a shape that broadcasts against
them: (r, 1) for a tile of rows, a scalar for a program that owns one row. AXIS is the axis of the
vocabulary. Functions that load or store numbers of rows take a pointer to the rows and the stride
from one statistic to the next.

A token of probability zero contributes its limit, never NaN. Triton's interpreter lacks expm1,
log1p and tanh: they are written out with full relative accuracy near 0, where models that nearly
agree live.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fdd_kernels.backends.triton.work_table import (
    KIND_KL,
    KIND_LSE,
    KIND_NLL,
    KIND_OTHER,
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
COUNT, MEAN_S = tl.constexpr(layout.COUNT), tl.constexpr(layout.MEAN_S)
MEAN_T, M_SS = tl.constexpr(layout.MEAN_T), tl.constexpr(layout.M_SS)
M_TT, M_ST = tl.constexpr(layout.M_TT), tl.constexpr(layout.M_ST)
M_DD = tl.constexpr(layout.M_DD)
# KL values below are summed once more by `kl_of`: the error of the first pass's difference of
# expectations, some 1e-6, is absolute.
REFINED_BELOW = tl.constexpr(0.25)


@triton.jit
def times(weight, factor):
    """Multiply with 0 * anything = 0; a weight of NaN gives NaN."""
    return tl.where(weight == 0, 0.0, weight * factor)


@triton.jit
def weighted(weight, factor, FINITE: tl.constexpr):
    """Multiply; by `times`, unless FINITE promises a finite factor."""
    if FINITE:
        product = weight * factor
    else:
        product = times(weight, factor)
    return product


@triton.jit
def expm1_negative(y):
    """Return e^y - 1 for y <= 0: a Taylor polynomial (remainder below 2^-27) above -1/2."""
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
    """Return log(1 + w) for -1 < w <= 0: above w = -1/2 by the series of 2 atanh(w / (2 + w))."""
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
    """Return tanh(x), with full relative accuracy near 0."""
    e = expm1_negative(-2.0 * tl.abs(x))
    magnitude = -e / (2.0 + e)
    return tl.where(x < 0, -magnitude, magnitude)


@triton.jit
def log_mixture(x, SHARE: tl.constexpr):
    """Return log((1 - SHARE) + SHARE e^x), accurate near 0 and free of overflow."""
    small = expm1_negative(-tl.abs(x))
    return tl.maximum(x, 0.0) + log1p_negative(
        tl.where(x > 0, (1.0 - SHARE) * small, SHARE * small)
    )


@triton.jit
def kl_of(p, r, x, FINITE: tl.constexpr):
    """Return a token's part of KL(p || r), given x = log r - log p: p (e^x - 1 - x) >= 0.

    Since sum(r - p) = 0 the sum is that of -p x, without its cancellation where p and r nearly
    agree.
    """
    series = 1.0 / 720 + x * (1.0 / 5040)
    series = 1.0 / 120 + x * series
    series = 1.0 / 24 + x * series
    series = 1.0 / 6 + x * series
    series = 0.5 + x * series  # the remainder is below 2^-24 of it
    return tl.where(tl.abs(x) < 0.3, (p * x) * (x * series), (r - p) - weighted(p, x, FINITE))


@triton.jit
def divergence_value(log_q, log_p, DIVERGENCE: tl.constexpr):
    """Return a token's part of the divergence."""
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
    """Return the derivative with respect to log_q, up to the registry's multiple of q."""
    if DIVERGENCE == "kl":
        grad = -tl.exp(log_p)
    elif DIVERGENCE == "reverse_kl":
        grad = times(tl.exp(log_q), log_q - log_p + 1.0)
    elif DIVERGENCE == "jsd":
        grad = -0.5 * times(tl.exp(log_q), log_mixture(log_p - log_q, 0.5))
    else:
        tl.static_assert(DIVERGENCE == "skew_kl")
        # (1 - SKEW)^2 q (q - p) / m, as in lens/divergences.py
        x = log_q - log_p
        gap = expm1_negative(-tl.abs(x))
        ratio = tl.where(x > 0, -gap / (1.0 + SKEW * gap), gap / (1.0 + (1.0 - SKEW) * gap))
        grad = (1.0 - SKEW) * (1.0 - SKEW) * times(tl.exp(log_q), ratio)
    return grad


@triton.jit
def exponential_sums(
    z, difference, AXIS: tl.constexpr, WITH_EXPECTATION: tl.constexpr, FINITE: tl.constexpr
):
    """Sum e^z over the vocabulary and, WITH_EXPECTATION, e^z * difference.

    The z are shifted: none overflows. FINITE promises that no z is -inf.
    """
    weight = tl.exp(z)
    total = tl.sum(weight, AXIS)
    expectation = total
    if WITH_EXPECTATION:
        expectation = tl.sum(weighted(weight, difference, FINITE), AXIS)
    return total, expectation


@triton.jit
def second_moments(s, t, AXIS: tl.constexpr):
    """Sum s s, t t, s t and (s - t)^2 over the vocabulary."""
    d = s - t
    return tl.sum(s * s, AXIS), tl.sum(t * t, AXIS), tl.sum(s * t, AXIS), tl.sum(d * d, AXIS)


@triton.jit
def is_finite_logit(s, t):
    """Tell which tokens a layer's moments are of: not those of -inf; NaN stays, and shows."""
    return (s != float("-inf")) & (t != float("-inf"))


@triton.jit
def load_moments(moments, stride, mask):
    """Load the seven moments of a pair per row, 0 where masked."""
    return (
        tl.load(moments + COUNT * stride, mask=mask, other=0.0),
        tl.load(moments + MEAN_S * stride, mask=mask, other=0.0),
        tl.load(moments + MEAN_T * stride, mask=mask, other=0.0),
        tl.load(moments + M_SS * stride, mask=mask, other=0.0),
        tl.load(moments + M_TT * stride, mask=mask, other=0.0),
        tl.load(moments + M_ST * stride, mask=mask, other=0.0),
        tl.load(moments + M_DD * stride, mask=mask, other=0.0),
    )


@triton.jit
def store_moments(moments, stride, mask, count, mean_s, mean_t, m_ss, m_tt, m_st, m_dd):
    """Store the seven moments of a pair per row; `mask` may be None."""
    tl.store(moments + COUNT * stride, count, mask=mask)
    tl.store(moments + MEAN_S * stride, mean_s, mask=mask)
    tl.store(moments + MEAN_T * stride, mean_t, mask=mask)
    tl.store(moments + M_SS * stride, m_ss, mask=mask)
    tl.store(moments + M_TT * stride, m_tt, mask=mask)
    tl.store(moments + M_ST * stride, m_st, mask=mask)
    tl.store(moments + M_DD * stride, m_dd, mask=mask)


@triton.jit
def store_request(
    request, stride, mask, kind, lse_s, lse_t, mean_s, mean_t, DIVERGENCE: tl.constexpr
):
    """Store the statistics of a request that one pass over the vocabulary gives, but NLL's value.

    `mean_s` is the expectation of z_s - z_t under q, `mean_t` that of z_t - z_s under p:
    KL(p || q) = mean_t + lse_s - lse_t, KL(q || p) = mean_s + lse_t - lse_s. A negative result is
    rounding of models that nearly agree. `mask` may be None.
    """
    tl.store(request + LSE_S * stride, lse_s, mask=mask)
    if kind != KIND_NLL:
        tl.store(request + LSE_T * stride, lse_t, mask=mask)
        if kind == KIND_KL:
            value = mean_t + (lse_s - lse_t)
            value = tl.where(value < 0, 0.0, value)
            tl.store(request + VALUE * stride, value, mask=mask)
            tl.store(request + GRAD_SUM * stride, -1.0, mask=mask)
        if DIVERGENCE == "reverse_kl" and kind == KIND_OTHER:
            value = mean_s + (lse_t - lse_s)
            value = tl.where(value < 0, 0.0, value)
            tl.store(request + VALUE * stride, value, mask=mask)
            tl.store(request + GRAD_SUM * stride, value + 1.0, mask=mask)


@triton.jit
def slot_coefficients(
    requests,
    grad_requests,
    stride,
    grad_stride,
    is_valid,
    table,
    table_width,
    slot,
    BLOCK_R: tl.constexpr,
):
    """Return per row the coefficients of a slot's dL/dz: of q, p, the divergence's grad, the label.

    With them come both log-sum-exps and the value of KL, infinite without a request of KL; all
    (BLOCK_R,). `requests` and `grad_requests` point at the rows. Invalid rows get 0.
    """
    q_r = tl.zeros((BLOCK_R,), dtype=tl.float32)
    kl = q_r + float("inf")
    p_r, grad_r, label_r, lse_s, lse_t = q_r, q_r, q_r, q_r, q_r
    for entry in range(
        table_entry(table, table_width, REQUEST_BEGIN, slot),
        table_entry(table, table_width, REQUEST_BEGIN, slot + 1),
    ):
        kind = table_entry(table, table_width, REQUEST_KIND, entry)
        index = table_entry(table, table_width, REQUEST_INDEX, entry) * REQUEST_FIELDS
        request = requests + index * stride
        grad_request = grad_requests + index * grad_stride
        lse_s = tl.load(request + LSE_S * stride, mask=is_valid, other=0.0)
        q_r += tl.load(grad_request + LSE_S * grad_stride, mask=is_valid, other=0.0)
        if kind != KIND_LSE:
            upstream = tl.load(grad_request + VALUE * grad_stride, mask=is_valid, other=0.0)
            if kind == KIND_NLL:
                q_r += upstream
                label_r -= upstream
            else:
                q_r -= upstream * tl.load(request + GRAD_SUM * stride, mask=is_valid, other=0.0)
                if kind == KIND_KL:
                    p_r -= upstream
                    kl = tl.load(request + VALUE * stride, mask=is_valid, other=float("inf"))
                else:
                    grad_r += upstream
        if kind != KIND_NLL:
            lse_t = tl.load(request + LSE_T * stride, mask=is_valid, other=0.0)
    return q_r, p_r, grad_r, label_r, lse_s, lse_t, kl


@triton.jit
def moment_coefficients(moments, grad_moments, stride, grad_stride, is_valid):
    """Return per row the coefficients of dL/ds of a pair: of 1, s - mean_s, t - mean_t, their
    difference; and both means.

    `moments` and `grad_moments` point at the rows of one pair. Invalid rows get 0.
    """
    mean_s = tl.load(moments + MEAN_S * stride, mask=is_valid, other=0.0)
    mean_t = tl.load(moments + MEAN_T * stride, mask=is_valid, other=0.0)
    of_one = tl.load(grad_moments + MEAN_S * grad_stride, mask=is_valid, other=0.0)
    of_one /= tl.maximum(tl.load(moments + COUNT * stride, mask=is_valid, other=1.0), 1.0)
    of_s = 2.0 * tl.load(grad_moments + M_SS * grad_stride, mask=is_valid, other=0.0)
    of_t = tl.load(grad_moments + M_ST * grad_stride, mask=is_valid, other=0.0)
    of_d = 2.0 * tl.load(grad_moments + M_DD * grad_stride, mask=is_valid, other=0.0)
    return of_one, of_s, of_t, of_d, mean_s, mean_t


@triton.jit
def softmax_gradient(log_q, log_p, a, b, d, TEACHER: tl.constexpr, DIVERGENCE: tl.constexpr):
    """Return dL/dz = a q + b p + d * divergence_grad(log_q, log_p), without the label's part."""
    grad = a * tl.exp(log_q)
    if TEACHER:
        grad += b * tl.exp(log_p)
        if DIVERGENCE != "kl":
            grad += d * divergence_grad(log_q, log_p, DIVERGENCE)
    return grad


@triton.jit
def moment_gradient(s, t, of_one, of_s, of_t, of_d):
    """Return dL/ds of a pair, from s and t about their means."""
    return of_one + of_s * s + of_t * t + of_d * (s - t)
