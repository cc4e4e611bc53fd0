"""The formulas of divergences, TAID's target and the weighted cosine, written out per row in
torch: nothing of the package is used, so an error there shows.

A term p * x is 0 where p is 0.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def times(p: Tensor, x: Tensor) -> Tensor:
    """Compute p * x, 0 where p is 0, for autograd too."""
    return p * torch.where(p == 0, 0.0, x)


def kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    """Compute KL(a || b) per row."""
    return times(log_a.exp(), log_a - log_b).sum(-1)


def log_mixture(log_a: Tensor, log_b: Tensor, share: float) -> Tensor:
    """Compute log(share * a + (1 - share) * b)."""
    both = log_a + math.log(share), log_b + math.log1p(-share)
    none = (both[0] == -torch.inf) & (both[1] == -torch.inf)  # no gradient of logaddexp there
    return torch.logaddexp(*[torch.where(none, -1e300, x) for x in both])


def jsd(log_p: Tensor, log_q: Tensor, b: float = 0.5) -> Tensor:
    if b in (0, 1):  # as in TRL
        return kl(log_q, log_p) if b else kl(log_p, log_q)
    log_m = log_mixture(log_p, log_q, b)
    return b * kl(log_p, log_m) + (1 - b) * kl(log_q, log_m)


def skew_kl(log_p: Tensor, log_q: Tensor, a: float = 0.1) -> Tensor:
    return kl(log_p, log_mixture(log_p, log_q, a)) if a else kl(log_p, log_q)


def skew_reverse_kl(log_p: Tensor, log_q: Tensor, a: float = 0.1) -> Tensor:
    return skew_kl(log_q, log_p, a)


def tv(log_p: Tensor, log_q: Tensor) -> Tensor:
    return (log_p.exp() - log_q.exp()).abs().sum(-1) / 2


def alpha_beta(log_p: Tensor, log_q: Tensor, a: float = 0.2, b: float = 0.7) -> Tensor:
    """ABKD; at a = 0 and b = 0 the limits of the formula, which has poles there."""
    s = a + b
    if b == 0:  # sum of p^a (log p - log q) / a - (p^a - q^a) / a^2
        of_p, of_q = (torch.exp(a * x) for x in (log_p, log_q))
        return (times(of_p, log_p - log_q) / a - (of_p - of_q) / a**2).sum(-1)
    if a == 0:
        return alpha_beta(log_q, log_p, b, 0.0)
    mixed = torch.exp(a * log_p + b * log_q)
    return -(mixed - (a * torch.exp(s * log_p) + b * torch.exp(s * log_q)) / s).sum(-1) / (a * b)


ORACLES = {
    "kl": kl,
    "reverse_kl": lambda log_p, log_q: kl(log_q, log_p),
    "jsd": jsd,
    "skew_kl": skew_kl,
    "skew_reverse_kl": skew_reverse_kl,
    "tv": tv,
    "alpha_beta": alpha_beta,
}


def divergence(text: str, log_p: Tensor, log_q: Tensor) -> Tensor:
    """Compute the divergence named by a text such as "jsd:0.1", per row."""
    name, _, numbers = text.partition(":")
    return ORACLES[name](log_p, log_q, *[float(x) for x in numbers.split(",") if x])


def taid(z_s: Tensor, z_t: Tensor, t: float) -> Tensor:
    """Compute the logits of TAID's target; -inf wherever one of the two is."""
    if t == 1:
        return z_t
    excluded = (z_s == -torch.inf) | (z_t == -torch.inf)
    return torch.where(excluded, -torch.inf, (1 - t) * z_s.detach() + t * z_t)


def weighted_cosine(t: Tensor, s: Tensor, z_t: Tensor) -> Tensor:
    """Compute 1 - the weighted correlation of s and t per row, the weights softmax(z_t), (R, C).

    sum w (s - mu_s) (t - mu_t) is half the sum over c and c' of w_c w_c' (s_c - s_c') (t_c -
    t_c'): nothing cancels, however sharp the weights are. 1 where a weighted variance is 0.
    """
    live = z_t > -torch.inf
    w = z_t.softmax(-1)
    pairs = w[..., :, None] * w[..., None, :] / 2
    s, t = (
        (v[..., :, None] - v[..., None, :])
        for v in (torch.where(live, s, 0.0), torch.where(live, t, 0.0))
    )
    of_s, of_t, of_both = ((pairs * x).sum((-1, -2)) for x in (s * s, t * t, s * t))
    defined = (of_s > 0) & (of_t > 0)
    length = torch.where(defined, of_s, 1.0).sqrt() * torch.where(defined, of_t, 1.0).sqrt()
    return torch.where(defined, 1 - of_both / length, 1.0)
