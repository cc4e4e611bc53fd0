"""The divergences of two distributions: one entry each, for the plan, the tests and every backend.

With p the teacher's and q the student's distribution, a divergence is the sum over the vocabulary
of an elementwise `value(log_q, log_p)`. Each is made of KL(p || r) as the sum of p (e^x - 1 - x)
with x = log r - log p. The sum of r - p over the vocabulary is 0 and may be added; what is left has
no negative summand, and no large ones that cancel where the models nearly agree.

`grad(log_q, log_p)` is the derivative of the sum with respect to log_q, up to a multiple of q.
Since log_q = z - logsumexp(z), the gradient with respect to the student's logits is
`grad - q * sum(grad)`, and a multiple of q cancels in it. A token of probability 0 (a logit of
-inf) contributes its limit, never NaN.

`csrc/divergences_impl.h` and `backends/triton/elementwise.py` repeat the formulas; tests compare
them. Every backend must use the same multiple of q, since the sum of `grad` may come from another
one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from fdd_kernels.lens.distances import DISTANCES


class Parameter(NamedTuple):
    """A parameter of a divergence: its default, and the range in which it is legal."""

    name: str
    default: float
    low: float = -math.inf
    high: float = math.inf


@dataclass(frozen=True)
class Divergence:
    """An entry of the registry.

    Attributes:
        value: `value(log_q, log_p, *parameters)`, elementwise.
        grad: `grad(log_q, log_p, *parameters)`, the derivative of the sum with respect to log_q,
            up to a multiple of q; elementwise.
        parameters: its parameters.
        same_as: values of the parameters with which it is another entry without parameters.
        illegal: `illegal(*parameters)` -> why values within the ranges do not go together, or None.
    """

    value: Callable[..., Tensor]
    grad: Callable[..., Tensor]
    parameters: tuple[Parameter, ...] = ()
    same_as: Mapping[tuple[float, ...], str] = field(default_factory=dict)
    illegal: Callable[..., str | None] | None = None

    @property
    def defaults(self) -> tuple[float, ...]:
        """Return the parameters' default values."""
        return tuple([parameter.default for parameter in self.parameters])


def expectation_of(name: str | None) -> str | None:
    """Return the model under whose distribution a divergence is an expectation of log-ratios.

    "teacher" for KL, "student" for reverse KL: backends sum these two in one pass over the
    vocabulary. None for the others, for NLL, and for a request without divergence.
    """
    return {"kl": "teacher", "reverse_kl": "student"}.get(name)


def needs_second_pass(name: str | None) -> bool:
    """Say whether a request's divergence is summed once both log-sum-exps are known."""
    return name in DIVERGENCES and expectation_of(name) is None


def __getattr__(name: str) -> tuple[str, ...]:
    """Derive the lists of names from the registries, which may have grown at run time."""
    if name == "DERIVATIVES":
        return tuple(DISTANCES)
    of_features = tuple([key for key, distance in DISTANCES.items() if distance.of_features])
    if name == "FEATURE_DISTANCES":
        return of_features
    if name == "TRAJECTORIES":
        return (*DIVERGENCES, *of_features)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _where_weighted(weight: Tensor, x: Tensor) -> Tensor:
    """Return x, but 0 where its weight is 0: 0 * anything = 0, for autograd too, which would meet
    0 * NaN.
    """
    return torch.where(weight == 0, 0.0, x)


def _far_where_weightless(weight: Tensor, x: Tensor) -> Tensor:
    """Return x, but a number that is not near 0 where the weight is 0: such a token adds r to
    KL(p || r).
    """
    return torch.where(weight == 0, 100.0, x)


def is_near(x: Tensor) -> Tensor:
    """Mark where a few terms of x^2 / 2 + x^3 / 6 + ... are more accurate than e^x - 1 - x."""
    return x.abs() < (1e-2 if x.dtype == torch.float64 else 0.25)


def _series(x: Tensor) -> Tensor:
    """Compute e^x - 1 - x where `is_near(x)`; relative error below 2^-24 (float64: 2^-48)."""
    total = 1 + x / 7
    for k in (6, 5, 4, 3):
        total = 1 + x / k * total
    return x * x / 2 * total


def kl_of(p: Tensor, r: Tensor, x: Tensor) -> Tensor:
    """Compute each token's part of KL(p || r), p (e^x - 1 - x) with x = log r - log p; never
    negative.
    """
    near = is_near(x)
    return torch.where(
        near, p * _series(torch.where(near, x, 0.0)), r - p - p * _where_weighted(p, x)
    )


def _step(x: Tensor) -> Tensor:
    """Compute e^x - 1, accurate near 0; so is autograd's derivative e^x far from 0, for which it
    takes expm1(x) + 1 of expm1.
    """
    near = x.abs() < 1
    return torch.where(near, torch.expm1(torch.where(near, x, 0.0)), x.exp() - 1)


def _log_mixture(x: Tensor, share: float, rest: float) -> Tensor:
    """Compute log(rest + share e^x), share + rest = 1, for any share and free of overflow.

    Both are given: the smaller of the two is lost in 1 minus the larger.
    """
    above, below = torch.where(x > 32, x, 32.0), torch.where(x > 32, 0.0, x)
    of_above = above + torch.log(share + rest * torch.exp(-above))
    mixed = rest + share * torch.exp(below)
    is_small = mixed < 0.5  # log1p of something near -1 would cancel
    of_small = torch.log(torch.where(is_small, mixed, 1.0))
    of_other = torch.log1p(share * _step(torch.where(is_small, 0.0, below)))
    return torch.where(x > 32, of_above, torch.where(is_small, of_small, of_other))


def _kl_value(log_q: Tensor, log_p: Tensor) -> Tensor:
    return kl_of(log_p.exp(), log_q.exp(), log_q - log_p)


def _kl_grad(log_q: Tensor, log_p: Tensor) -> Tensor:
    return -log_p.exp()


def _reverse_kl_value(log_q: Tensor, log_p: Tensor) -> Tensor:
    return kl_of(log_q.exp(), log_p.exp(), log_p - log_q)


def _reverse_kl_grad(log_q: Tensor, log_p: Tensor) -> Tensor:
    q = log_q.exp()
    return q * (_where_weighted(q, log_q - log_p) + 1)


def _jsd_value(log_q: Tensor, log_p: Tensor, beta: float) -> Tensor:
    """Compute beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q.

    TRL's convention. It tends to 0 with beta, where TRL, and `same_as`, jump to KL.
    """
    p, q, x = log_p.exp(), log_q.exp(), log_q - log_p
    m, of_p, of_q = (
        beta * p + (1 - beta) * q,
        _far_where_weightless(p, x),
        _far_where_weightless(q, -x),
    )
    of_teacher = kl_of(p, m, _log_mixture(of_p, 1 - beta, beta))
    return beta * of_teacher + (1 - beta) * kl_of(q, m, _log_mixture(of_q, beta, 1 - beta))


def _jsd_grad(log_q: Tensor, log_p: Tensor, beta: float) -> Tensor:
    q = log_q.exp()
    return (beta - 1) * q * _log_mixture(_where_weighted(q, log_p - log_q), beta, 1 - beta)


def _over_mixture(x: Tensor, share: float) -> Tensor:
    """Compute (q - p) / m with m = share p + (1 - share) q and x = log q - log p.

    With r the smaller of q and p over the larger, it is 1 - r over the larger's weight plus r times
    the smaller's.
    """
    r, gap = torch.exp(-x.abs()), torch.expm1(-x.abs())
    return torch.where(x > 0, -gap / (1 - share + share * r), gap / (share + (1 - share) * r))


def _skew_kl_value(log_q: Tensor, log_p: Tensor, alpha: float) -> Tensor:
    """Compute KL(p || m) with m = alpha p + (1 - alpha) q (DistiLLM)."""
    p, q = log_p.exp(), log_q.exp()
    x = _far_where_weightless(p, log_q - log_p)
    return kl_of(p, alpha * p + (1 - alpha) * q, _log_mixture(x, 1 - alpha, alpha))


def _skew_kl_grad(log_q: Tensor, log_p: Tensor, alpha: float) -> Tensor:
    """Compute (1 - alpha) q - p (1 - alpha) q / m = (1 - alpha)^2 q (q - p) / m.

    The added (1 - alpha) q makes it small where the models nearly agree.
    """
    q = log_q.exp()
    return (1 - alpha) ** 2 * q * _over_mixture(_where_weighted(q, log_q - log_p), alpha)


def _skew_reverse_kl_value(log_q: Tensor, log_p: Tensor, alpha: float) -> Tensor:
    """Compute KL(q || m) with m = (1 - alpha) p + alpha q (DistiLLM)."""
    p, q = log_p.exp(), log_q.exp()
    x = _far_where_weightless(q, log_p - log_q)
    return kl_of(q, (1 - alpha) * p + alpha * q, _log_mixture(x, 1 - alpha, alpha))


def _skew_reverse_kl_grad(log_q: Tensor, log_p: Tensor, alpha: float) -> Tensor:
    """Compute q (log q - log m + 1 - alpha q / m), less the multiple (1 - alpha) q.

    With y = log(q / m) it is q ((1 - alpha) y - alpha (e^y - 1 - y)), which is small where the
    models nearly agree and has no difference of nearly equal numbers.
    """
    q = log_q.exp()
    y = -_log_mixture(_where_weighted(q, log_p - log_q), 1 - alpha, alpha)
    near = is_near(y)
    rest = torch.where(near, _series(torch.where(near, y, 0.0)), torch.expm1(y) - y)
    return q * ((1 - alpha) * y - alpha * rest)


def _tv_value(log_q: Tensor, log_p: Tensor) -> Tensor:
    """Compute |q - p| / 2, total variation."""
    difference = _power_difference(log_q, log_p, 1.0)
    return difference * _sign(difference.detach()) / 2


def _tv_grad(log_q: Tensor, log_p: Tensor) -> Tensor:
    """Compute q sign(q - p) / 2; 0 at a tie."""
    q = log_q.exp()
    return q * _sign(_where_weighted(q, log_q - log_p)) / 2


def _sign(x: Tensor) -> Tensor:
    """Compute sign(x), 0 at 0; NaN stays NaN."""
    return torch.where(torch.isnan(x), x, torch.sign(x))


def _power_difference(log_q: Tensor, log_p: Tensor, power: float) -> Tensor:
    """Compute (q^power - p^power) / power, which is log q - log p at power 0; 0 where q = p = 0."""
    x = torch.where(log_q == log_p, 0.0, log_q - log_p)  # also where both are -inf
    if power == 0:
        return x
    near = (power * x).abs() < 1
    q, p = (torch.exp(power * log) for log in (log_q, log_p))
    return torch.where(near, p * torch.expm1(torch.where(near, power * x, 0.0)), q - p) / power


def _alpha_beta_value(log_q: Tensor, log_p: Tensor, alpha: float, beta: float) -> Tensor:
    """Compute a token's part of -sum(p^a q^b - a/s p^s - b/s q^s) / (a b) with s = a + b (ABKD).

    With x = log q - log p it is p^s times the integral of e^(b t) (e^(a t) - 1) / a over t from 0
    to x, never negative, without poles at a = 0 and b = 0. Near 0 the integral is the series

        sum over n >= 2 of x^n / n! times the sum over k of s^k b^(n - 2 - k)

    and elsewhere (q^b (q^a - p^a) / a - p^a (q^b - p^b) / b) / s.
    """
    s, x = alpha + beta, log_q - log_p
    near = (x * s).abs() < (1e-2 if x.dtype == torch.float64 else 0.25)
    small = torch.where(near, x, 0.0)
    coefficients = [1.0]  # of x^n / n!, n from 2
    for n in range(1, 7):
        coefficients.append(s * coefficients[-1] + beta**n)
    total = torch.zeros_like(x)
    for n, coefficient in reversed(list(enumerate(coefficients, 2))):
        total = coefficient + total * small / (n + 1)
    weight_p = torch.where(near, s * log_p, -torch.inf).exp()
    of_near = weight_p * total * small * small / 2
    of_far = _weighted_power(log_q, beta, _power_difference(log_q, log_p, alpha))
    of_far = of_far - _weighted_power(log_p, alpha, _power_difference(log_q, log_p, beta))
    return torch.where(near, of_near, of_far / s)


def _alpha_beta_grad(log_q: Tensor, log_p: Tensor, alpha: float, beta: float) -> Tensor:
    """Compute q^b (q^a - p^a) / a."""
    return _weighted_power(log_q, beta, _power_difference(log_q, log_p, alpha))


def _weighted_power(log_weight: Tensor, power: float, x: Tensor) -> Tensor:
    """Compute e^(power * log_weight) x with 0 * anything = 0."""
    if power == 0:
        return x
    weight = (power * log_weight).exp()
    return weight * _where_weighted(weight, x)


def _no_power(alpha: float, beta: float) -> str | None:
    return "alpha and beta are both 0: one of them must be above 0" if alpha + beta == 0 else None


ALMOST_ONE = math.nextafter(1.0, 0.0)

DIVERGENCES: dict[str, Divergence] = {
    "kl": Divergence(_kl_value, _kl_grad),
    "reverse_kl": Divergence(_reverse_kl_value, _reverse_kl_grad),
    "jsd": Divergence(
        _jsd_value,
        _jsd_grad,
        (Parameter("beta", 0.5, 0.0, 1.0),),
        {(0.0,): "kl", (1.0,): "reverse_kl"},
    ),
    "skew_kl": Divergence(
        _skew_kl_value,
        _skew_kl_grad,
        (Parameter("alpha", 0.1, 0.0, ALMOST_ONE),),
        {(0.0,): "kl"},
    ),
    "skew_reverse_kl": Divergence(
        _skew_reverse_kl_value,
        _skew_reverse_kl_grad,
        (Parameter("alpha", 0.1, 0.0, ALMOST_ONE),),
        {(0.0,): "reverse_kl"},
    ),
    "tv": Divergence(_tv_value, _tv_grad),
    "alpha_beta": Divergence(
        _alpha_beta_value,
        _alpha_beta_grad,
        (Parameter("alpha", 0.2, 0.0, 100.0), Parameter("beta", 0.7, 0.0, 100.0)),
        {(1.0, 0.0): "kl", (0.0, 1.0): "reverse_kl"},
        _no_power,
    ),
}
