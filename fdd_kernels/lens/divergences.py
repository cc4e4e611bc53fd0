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

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fdd_kernels.lens.distances import DISTANCES

SKEW = 0.1  # weight of the teacher in the mixture of skew_kl


@dataclass(frozen=True)
class Divergence:
    """An entry of the registry.

    Attributes:
        value: `value(log_q, log_p, *parameters)`, elementwise.
        grad: `grad(log_q, log_p, *parameters)`, the derivative of the sum with respect to log_q,
            up to a multiple of q; elementwise.
        parameters: names of its parameters with their defaults.
    """

    value: Callable[..., Tensor]
    grad: Callable[..., Tensor]
    parameters: tuple[tuple[str, float], ...] = ()

    @property
    def defaults(self) -> tuple[float, ...]:
        """Return the parameters' default values."""
        return tuple([default for _, default in self.parameters])


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


def _log_mixture(x: Tensor, share: float) -> Tensor:
    """Compute log((1 - share) + share e^x), accurate near 0 and free of overflow."""
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
    """Compute (1 - SKEW) q - p (1 - SKEW) q / m = (1 - SKEW)^2 q (q - p) / m.

    m is SKEW p + (1 - SKEW) q.

    The added (1 - SKEW) q makes it small where the models nearly agree. With r the smaller of q and
    p over the larger, (q - p) / m is 1 - r over the larger's weight plus r times the smaller's.
    """
    q = log_q.exp()
    x = _where_weighted(q, log_q - log_p)
    gap = torch.expm1(-x.abs())  # r - 1
    ratio = torch.where(x > 0, -gap / (1 + SKEW * gap), gap / (1 + (1 - SKEW) * gap))
    return (1 - SKEW) ** 2 * q * ratio


DIVERGENCES: dict[str, Divergence] = {
    "kl": Divergence(_kl_value, _kl_grad),
    "reverse_kl": Divergence(_reverse_kl_value, _reverse_kl_grad),
    "jsd": Divergence(_jsd_value, _jsd_grad),
    "skew_kl": Divergence(_skew_kl_value, _skew_kl_grad),
}
