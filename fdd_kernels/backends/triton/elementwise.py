"""Device functions over elements of the vocabulary, which the kernels of every strategy share.

p is the teacher's distribution, q the student's. The formulas are those of
`fdd_kernels/lens/divergences.py`, spelled out again: `kl_of`, `log_mixture`, and the `value` and
`grad` of each divergence (`divergence_value`, `divergence_grad`). tests/kernels compares them with
the registry, in float64.

Elements come as tensors of any shape. Numbers of a row come in a shape that broadcasts against
them: (r, 1) for a tile of rows, a scalar for a program that owns one row. AXIS is the axis of the
vocabulary.

A token of probability zero contributes its limit, never NaN. Triton's interpreter lacks expm1,
log1p and tanh: they are written out with full relative accuracy near 0, where models that nearly
agree live.
"""

from __future__ import annotations

import triton
import triton.language as tl

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
def relative_expm1(y):
    """Return (e^y - 1) / y within 1/2 of 0: a Taylor polynomial, whose remainder is below 2^-26."""
    series = 1.0 / 5040 + y * (1.0 / 40320)
    series = 1.0 / 720 + y * series
    series = 1.0 / 120 + y * series
    series = 1.0 / 24 + y * series
    series = 1.0 / 6 + y * series
    series = 0.5 + y * series
    return 1.0 + y * series


@triton.jit
def expm1(y):
    """Return e^y - 1."""
    return tl.where(tl.abs(y) < 0.5, y * relative_expm1(y), tl.exp(y) - 1.0)


@triton.jit
def log1p(w, sum_of):
    """Return log(1 + w), w > -1; `sum_of` is 1 + w, computed without w where that is accurate.

    Between -1/2 and 1 it is the series of 2 atanh(w / (2 + w)).
    """
    s = w / (2.0 + w)
    t = s * s
    series = 1.0 / 13.0 + t * (1.0 / 15.0)
    series = 1.0 / 11.0 + t * series
    series = 1.0 / 9.0 + t * series
    series = 1.0 / 7.0 + t * series
    series = 1.0 / 5.0 + t * series
    series = 1.0 / 3.0 + t * series
    return tl.where((w > -0.5) & (w < 1.0), 2.0 * s * (1.0 + t * series), tl.log(sum_of))


@triton.jit
def tanh(x):
    """Return tanh(x), with full relative accuracy near 0."""
    e = expm1(-2.0 * tl.abs(x))
    magnitude = -e / (2.0 + e)
    return tl.where(x < 0, -magnitude, magnitude)


@triton.jit
def log_mixture(x, share, rest):
    """Return log(rest + share e^x), rest = 1 - share; accurate near 0 and free of overflow.

    With x and with -x the exponentials are the same: a compiler computes them once.
    """
    smaller, larger = tl.exp(-tl.abs(x)), tl.exp(tl.abs(x))
    gap = expm1(-tl.abs(x))
    is_above = x > 1.0  # x + log(share + rest e^-x)
    is_between = (x > 0) & (x <= 1.0)
    of_one, of_power = tl.where(is_above, share, rest), tl.where(is_above, rest, share)
    w = of_power * tl.where(is_between, -gap * larger, gap)
    of_mixture = log1p(w, of_one + of_power * tl.where(is_between, larger, smaller))
    return tl.where(is_above, x, 0.0) + of_mixture


@triton.jit
def over_mixture(x, share, rest):
    """Return (q - p) / m with m = share p + rest q and x = log q - log p, rest = 1 - share."""
    smaller = -tl.abs(x)
    gap, ratio = expm1(smaller), tl.exp(smaller)
    return tl.where(x > 0, -gap / (rest + share * ratio), gap / (share + rest * ratio))


@triton.jit
def expm1_series(x):
    """Return (e^x - 1 - x) / x^2 within 0.3 of 0; the remainder is below 2^-24 of it."""
    series = 1.0 / 720 + x * (1.0 / 5040)
    series = 1.0 / 120 + x * series
    series = 1.0 / 24 + x * series
    series = 1.0 / 6 + x * series
    return 0.5 + x * series


@triton.jit
def kl_of(p, r, x, FINITE: tl.constexpr):
    """Return a token's part of KL(p || r), given x = log r - log p: p (e^x - 1 - x) >= 0.

    Since sum(r - p) = 0 the sum is that of -p x, without its cancellation where p and r nearly
    agree.
    """
    near = (p * x) * (x * expm1_series(x))
    return tl.where(tl.abs(x) < 0.3, near, (r - p) - weighted(p, x, FINITE))


@triton.jit
def log_ratio(log_q, log_p):
    """Return log q - log p; 0 where both have probability 0."""
    return tl.where(log_q == log_p, 0.0, log_q - log_p)


@triton.jit
def sign(x):
    """Return the sign of x, 0 at 0; NaN stays."""
    return tl.where(x > 0, 1.0, tl.where(x < 0, -1.0, x))


@triton.jit
def scaled_log(power, log):
    """Return power * log, 0 at power 0 whatever the logarithm."""
    return tl.where(power == 0, 0.0, power * log)


@triton.jit
def power_difference(log_q, log_p, power, log_w, power_w):
    """Return w^power_w (q^power - p^power) / power, which is w^power_w (log q - log p) at power 0.

    0 * anything = 0.
    """
    x = log_ratio(log_q, log_p)
    y = power * tl.abs(x)
    near = tl.abs(x) * relative_expm1(-y)
    far = (1.0 - tl.exp(-y)) / tl.where(power > 0, power, 1.0)
    relative = tl.where(y < 0.5, near, far)  # to the larger of q^power and p^power
    relative = sign(x) * tl.where(power == 0, tl.abs(x), relative)
    larger = tl.where(log_q > log_p, log_q, log_p)
    return times(tl.exp(scaled_log(power_w, log_w) + scaled_log(power, larger)), relative)


@triton.jit
def alpha_beta_value(log_q, log_p, alpha, beta):
    """Return a token's part of the alpha-beta divergence.

    Near agreement it is p^s times a series, s = alpha + beta, as in the registry: x^n / n! has the
    coefficient sum over k of s^k beta^(n - 2 - k).
    """
    s, x = alpha + beta, log_ratio(log_q, log_p)
    near = tl.abs(x) * s < 0.25
    small = tl.where(near, x, 0.0)
    coefficient, power = s * 0.0 + 1.0, s * 0.0 + 1.0
    term = 0.5 + small * 0.0
    total = term
    for n in tl.static_range(3, 9):
        power *= beta
        coefficient = s * coefficient + power
        term *= small * (1.0 / n)
        total += coefficient * term
    of_near = tl.exp(tl.where(near, s * log_p, float("-inf"))) * total * small * small
    of_far = power_difference(log_q, log_p, alpha, log_q, beta)
    of_far -= power_difference(log_q, log_p, beta, log_p, alpha)
    return tl.where(near, of_near, of_far / s)


@triton.jit
def divergence_value(log_q, log_p, a, b, DIVERGENCE: tl.constexpr):
    """Return a token's part of the divergence, whose numbers are a and b (`work_table.numbers_of`).

    Where p or q is 0, x is infinite or NaN, and `kl_of` gives its limit.
    """
    p, q, x = tl.exp(log_p), tl.exp(log_q), log_q - log_p
    if DIVERGENCE == "kl":
        value = kl_of(p, q, x, False)
    elif DIVERGENCE == "reverse_kl":
        value = kl_of(q, p, -x, False)
    elif DIVERGENCE == "jsd":
        m = a * p + b * q
        value = a * kl_of(p, m, log_mixture(x, b, a), False)
        value += b * kl_of(q, m, log_mixture(-x, a, b), False)
    elif DIVERGENCE == "skew_kl":
        value = kl_of(p, a * p + b * q, log_mixture(x, b, a), False)
    elif DIVERGENCE == "skew_reverse_kl":
        value = kl_of(q, b * p + a * q, log_mixture(-x, b, a), False)
    elif DIVERGENCE == "tv":
        gap = -expm1(-tl.abs(log_ratio(log_q, log_p)))
        value = 0.5 * times(tl.exp(tl.where(log_q > log_p, log_q, log_p)), gap)
    else:
        tl.static_assert(DIVERGENCE == "alpha_beta")
        value = alpha_beta_value(log_q, log_p, a, b)
    return value


@triton.jit
def divergence_grad(log_q, log_p, a, b, DIVERGENCE: tl.constexpr):
    """Return the derivative with respect to log_q, up to the registry's multiple of q."""
    if DIVERGENCE == "kl":
        grad = -tl.exp(log_p)
    elif DIVERGENCE == "reverse_kl":
        grad = times(tl.exp(log_q), log_q - log_p + 1.0)
    elif DIVERGENCE == "jsd":
        grad = -b * times(tl.exp(log_q), log_mixture(-(log_q - log_p), a, b))
    elif DIVERGENCE == "skew_kl":
        grad = b * b * times(tl.exp(log_q), over_mixture(log_q - log_p, a, b))
    elif DIVERGENCE == "skew_reverse_kl":
        y = -log_mixture(-(log_q - log_p), b, a)  # log(q / m)
        rest = tl.where(tl.abs(y) < 0.3, y * y * expm1_series(y), tl.exp(y) - 1.0 - y)
        grad = times(tl.exp(log_q), b * y - a * rest)
    elif DIVERGENCE == "tv":
        grad = 0.5 * times(tl.exp(log_q), sign(log_ratio(log_q, log_p)))
    else:
        tl.static_assert(DIVERGENCE == "alpha_beta")
        grad = power_difference(log_q, log_p, a, log_q, b)
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
def mixed_logits(z_s, z_t, share_t, share_s, FINITE: tl.constexpr):
    """Return the logits of `Request.teacher_mix`: -inf where one of the two is, unless FINITE."""
    mixed = share_t * z_t + share_s * z_s
    if not FINITE:
        mixed = tl.where(is_finite_logit(z_s, z_t), mixed, float("-inf"))
    return mixed


@triton.jit
def finite_or_zero(largest):
    """Return a maximum of z, 0 where there is no token: the shift of exponentials."""
    return tl.where(largest > float("-inf"), largest, 0.0)


@triton.jit
def softmax_gradient(
    log_q, log_p, of_q, of_p, of_grad, a, b, TEACHER: tl.constexpr, DIVERGENCE: tl.constexpr
):
    """Return dL/dz without the label's part: of_q q + of_p p + of_grad divergence_grad(...)."""
    grad = of_q * tl.exp(log_q)
    if TEACHER:
        grad += of_p * tl.exp(log_p)
        if DIVERGENCE != "kl":
            # 0 where the slot has no request of it, nor numbers a and b
            grad += times(of_grad, divergence_grad(log_q, log_p, a, b, DIVERGENCE))
    return grad


@triton.jit
def moment_gradient(s, t, of_one, of_s, of_t, of_d):
    """Return dL/ds of a pair, from s and t about their means."""
    return of_one + of_s * s + of_t * t + of_d * (s - t)
