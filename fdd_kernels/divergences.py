"""The divergences of the trajectory term: one entry each, used by the plan, the reference tests and every backend.

With p the teacher's and q the student's distribution, a divergence is a sum over columns of an elementwise
`value(log_q, log_p)`; `slope(log_q, log_p)` is its derivative with respect to log_q. Since
log_q = z - logsumexp(z), the gradient with respect to the student's logits is `slope - q * sum(slope)`.
A column of probability zero (a logit of -inf) contributes its limit, never NaN.
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

    `expectation_of` names the model under whose distribution the divergence is a plain expectation of the difference of
    logits plus log-sum-exps; one pass over the columns is then enough. Without it a second pass, with both log-sum-exps
    known, sums `value` and `slope`.
    """

    value: Callable[[Tensor, Tensor], Tensor]
    slope: Callable[[Tensor, Tensor], Tensor]
    expectation_of: str | None = None


def _where_positive(weight: Tensor, x: Tensor) -> Tensor:
    """x, and 0 where the weight it is about to get is 0: 0 * anything = 0, for autograd too, which would meet 0 * NaN."""
    return torch.where(weight > 0, x, 0.0)


def _log_mean(x: Tensor) -> Tensor:
    """log((1 + e^x) / 2), accurate near 0 and free of overflow."""
    return x.clamp(min=0) + torch.log1p(torch.expm1(-x.abs()) / 2)


def _kl_value(log_q: Tensor, log_p: Tensor) -> Tensor:
    p = log_p.exp()
    return p * _where_positive(p, log_p - log_q)


def _kl_slope(log_q: Tensor, log_p: Tensor) -> Tensor:
    return -log_p.exp()


def _reverse_kl_value(log_q: Tensor, log_p: Tensor) -> Tensor:
    q = log_q.exp()
    return q * _where_positive(q, log_q - log_p)


def _reverse_kl_slope(log_q: Tensor, log_p: Tensor) -> Tensor:
    q = log_q.exp()
    return q * (_where_positive(q, log_q - log_p) + 1)


def _jsd_value(log_q: Tensor, log_p: Tensor) -> Tensor:
    p, q, x = log_p.exp(), log_q.exp(), log_q - log_p
    return -0.5 * (p * _log_mean(_where_positive(p, x)) + q * _log_mean(_where_positive(q, -x)))


def _jsd_slope(log_q: Tensor, log_p: Tensor) -> Tensor:
    q = log_q.exp()
    return -0.5 * q * _log_mean(_where_positive(q, log_p - log_q))


def _skew_kl_value(log_q: Tensor, log_p: Tensor) -> Tensor:
    # log(SKEW + (1 - SKEW) e^x), written about the larger of the two terms.
    p = log_p.exp()
    x = _where_positive(p, log_q - log_p)
    small = torch.expm1(-x.abs())
    small = torch.where(x > 0, SKEW * small, (1 - SKEW) * small)
    return -p * (x.clamp(min=0) + torch.log1p(small))


def _skew_kl_slope(log_q: Tensor, log_p: Tensor) -> Tensor:
    p = log_p.exp()
    return -p * torch.sigmoid(_where_positive(p, log_q - log_p) + math.log((1 - SKEW) / SKEW))


DIVERGENCES: dict[str, Divergence] = {
    "kl": Divergence(_kl_value, _kl_slope, expectation_of="teacher"),
    "reverse_kl": Divergence(_reverse_kl_value, _reverse_kl_slope, expectation_of="student"),
    "jsd": Divergence(_jsd_value, _jsd_slope),
    "skew_kl": Divergence(_skew_kl_value, _skew_kl_slope),
}

FEATURE_DISTANCES = ("mse", "cosine")
TRAJECTORIES = (*DIVERGENCES, *FEATURE_DISTANCES)
DERIVATIVES = ("cosine", "centered_cosine", "mse")
