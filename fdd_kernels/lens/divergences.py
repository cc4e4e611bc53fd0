"""The divergences of the trajectory term: one entry each, used by the plan, the reference tests and
every backend.

With p the teacher's and q the student's distribution, a divergence is a sum over columns of an
elementwise `value(log_q, log_p)`. Each is made of KL(p || r) as the sum of p (e^x - 1 - x), x = log
r - log p: the columns' sum of r - p is 0, so it may be added, and what is left has no negative
summand and no large ones that cancel where the models nearly agree. `grad(log_q, log_p)` is the
derivative of the plain sum, without what was added, with respect to log_q. Since log_q = z -
logsumexp(z), the gradient with respect to the student's logits is `grad - q * sum(grad)`, for
either. A column of probability zero (a logit of -inf) contributes its limit, never NaN.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

SKEW = 0.1  # weight of the teacher in the mixture of skew_kl


@dataclass(frozen=True)
class Divergence:
    """An entry of the registry.

    Attributes:
        value: `value(log_q, log_p, *parameters)`, elementwise.
        grad: `grad(log_q, log_p, *parameters)`, its derivative with respect to log_q.
        expectation_of: the model ("teacher" or "student") under whose distribution the divergence
            is a plain expectation of the difference of logits plus log-sum-exps. One pass over the
            vocabulary is then enough. With None, a second pass sums `value` and `grad` once both
            log-sum-exps are known.
        parameters: names of its parameters with their defaults.
    """

    value: Callable[..., Tensor]
    grad: Callable[..., Tensor]
    expectation_of: str | None = None
    parameters: tuple[tuple[str, float], ...] = ()

    @property
    def defaults(self) -> tuple[float, ...]:
        """The parameters' default values."""
        return tuple([default for _, default in self.parameters])


def _where_weighted(weight: Tensor, x: Tensor) -> Tensor:
    """x, and 0 where the weight it is about to get is 0: 0 * anything = 0, for autograd too, which
    would meet 0 * NaN.
    """
    return torch.where(weight == 0, 0.0, x)


def _far_where_weightless(weight: Tensor, x: Tensor) -> Tensor:
    """x, and a number that is not near 0 where the weight is 0: what such a column adds to KL(p ||
    r) is r.
    """
    return torch.where(weight == 0, 100.0, x)


def is_near(x: Tensor) -> Tensor:
    """Where a few terms of e^x - 1 - x = x^2 / 2 + x^3 / 6 + ... are more accurate than the
    difference.
    """
    return x.abs() < (1e-2 if x.dtype == torch.float64 else 0.25)


def _series(x: Tensor) -> Tensor:
    """e^x - 1 - x where `is_near(x)`: off by the first term left out, below 2^-24 of it in float32,
    2^-48 in float64.
    """
    total = 1 + x / 7
    for k in (6, 5, 4, 3):
        total = 1 + x / k * total
    return x * x / 2 * total


def kl_of(p: Tensor, r: Tensor, x: Tensor) -> Tensor:
    """What each column adds to KL(p || r), given x = log r - log p: p (e^x - 1 - x), never
    negative.
    """
    near = is_near(x)
    return torch.where(
        near, p * _series(torch.where(near, x, 0.0)), r - p - p * _where_weighted(p, x)
    )


def _log_mixture(x: Tensor, share: float) -> Tensor:
    """log((1 - share) + share e^x), accurate near 0 and free of overflow."""
    above, below = torch.where(x > 1, x, 1.0), torch.where(x > 1, 1.0, x)
    of_above = above + torch.log1p((1 - share) * torch.expm1(-above))
    return torch.where(x > 1, of_above, torch.log1p(share * torch.expm1(below)))


def _kl_value(log_q: Tensor, log_p: Tensor) -> Tensor:
    return kl_of(log_p.exp(), log_q.exp(), log_q - log_p)


def _kl_grad(log_q: Tensor, log_p: Tensor) -> Tensor:
    return -log_p.exp()


def _reverse_kl_value(log_q: Tensor, log_p: Tensor) -> Tensor:
    return kl_of(log_q.exp(), log_p.exp(), log_p - log_q)


def _reverse_kl_grad(log_q: Tensor, log_p: Tensor) -> Tensor:
    q = log_q.exp()
    return q * (_where_weighted(q, log_q - log_p) + 1)


def _jsd_value(log_q: Tensor, log_p: Tensor) -> Tensor:
    p, q, x = log_p.exp(), log_q.exp(), log_q - log_p
    m, of_p, of_q = (p + q) / 2, _far_where_weightless(p, x), _far_where_weightless(q, -x)
    return (kl_of(p, m, _log_mixture(of_p, 0.5)) + kl_of(q, m, _log_mixture(of_q, 0.5))) / 2


def _jsd_grad(log_q: Tensor, log_p: Tensor) -> Tensor:
    q = log_q.exp()
    return -0.5 * q * _log_mixture(_where_weighted(q, log_p - log_q), 0.5)


def _skew_kl_value(log_q: Tensor, log_p: Tensor) -> Tensor:
    p, q = log_p.exp(), log_q.exp()
    x = _far_where_weightless(p, log_q - log_p)
    return kl_of(p, SKEW * p + (1 - SKEW) * q, _log_mixture(x, 1 - SKEW))


def _skew_kl_grad(log_q: Tensor, log_p: Tensor) -> Tensor:
    p = log_p.exp()
    return -p * torch.sigmoid(_where_weighted(p, log_q - log_p) + math.log((1 - SKEW) / SKEW))


DIVERGENCES: dict[str, Divergence] = {
    "kl": Divergence(_kl_value, _kl_grad, expectation_of="teacher"),
    "reverse_kl": Divergence(_reverse_kl_value, _reverse_kl_grad, expectation_of="student"),
    "jsd": Divergence(_jsd_value, _jsd_grad),
    "skew_kl": Divergence(_skew_kl_value, _skew_kl_grad),
}

FEATURE_DISTANCES = ("mse", "cosine")
TRAJECTORIES = (*DIVERGENCES, *FEATURE_DISTANCES)
DERIVATIVES = ("cosine", "centered_cosine", "mse")
