"""The elementwise pair of each divergence, chosen by the constexpr DIVERGENCE; the registry is
`fdd_kernels/divergences.py`, whose formulas these are: p the teacher's distribution, q the student's,
value(log_q, log_p) summed over columns, slope its derivative with respect to log_q.

A column of probability zero contributes its limit, never NaN. Functions of the mathematical library that Triton's
interpreter does not know (expm1, log1p, tanh) are written out here, with full relative accuracy near 0: models that
nearly agree live there.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fdd_kernels import divergences

SKEW = tl.constexpr(divergences.SKEW)


@triton.jit
def times(weight, factor):
    """weight * factor with 0 * anything = 0."""
    return tl.where(weight > 0, weight * factor, 0.0)


@triton.jit
def expm1_negative(y):
    """e^y - 1 for y <= 0: a Taylor polynomial (remainder below 2^-27) above -1/2."""
    series = 1.0 + y / 8.0
    series = 1.0 + y / 7.0 * series
    series = 1.0 + y / 6.0 * series
    series = 1.0 + y / 5.0 * series
    series = 1.0 + y / 4.0 * series
    series = 1.0 + y / 3.0 * series
    series = 1.0 + y / 2.0 * series
    return tl.where(y > -0.5, y * series, tl.exp(y) - 1.0)


@triton.jit
def log1p_negative(w):
    """log(1 + w) for -1 < w <= 0: 2 atanh(w / (2 + w)) above -1/2, where its argument is above -1/3."""
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
def log_mean(x):
    """log((1 + e^x) / 2)."""
    return tl.maximum(x, 0.0) + log1p_negative(expm1_negative(-tl.abs(x)) * 0.5)


@triton.jit
def divergence_value(log_q, log_p, DIVERGENCE: tl.constexpr):
    x = log_q - log_p
    if DIVERGENCE == "kl":
        value = times(tl.exp(log_p), -x)
    elif DIVERGENCE == "reverse_kl":
        value = times(tl.exp(log_q), x)
    elif DIVERGENCE == "jsd":
        value = -0.5 * (times(tl.exp(log_p), log_mean(x)) + times(tl.exp(log_q), log_mean(-x)))
    else:
        tl.static_assert(DIVERGENCE == "skew_kl")
        # -p log(SKEW + (1 - SKEW) e^x), written about the larger of the two terms.
        small = expm1_negative(-tl.abs(x))
        small = tl.where(x > 0, SKEW * small, (1.0 - SKEW) * small)
        value = -times(tl.exp(log_p), tl.maximum(x, 0.0) + log1p_negative(small))
    return value


@triton.jit
def divergence_slope(log_q, log_p, DIVERGENCE: tl.constexpr):
    if DIVERGENCE == "kl":
        slope = -tl.exp(log_p)
    elif DIVERGENCE == "reverse_kl":
        slope = times(tl.exp(log_q), log_q - log_p + 1.0)
    elif DIVERGENCE == "jsd":
        slope = -0.5 * times(tl.exp(log_q), log_mean(log_p - log_q))
    else:
        tl.static_assert(DIVERGENCE == "skew_kl")
        # -p sigmoid(x + log((1 - SKEW) / SKEW))
        slope = -times(tl.exp(log_p), 1.0 / (1.0 + tl.exp(log_p - log_q) * (SKEW / (1.0 - SKEW))))
    return slope
