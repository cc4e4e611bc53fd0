"""The registry's formulas in float32 and float64 against the same numbers with 60 digits.

The budgets of the other tests include the error of a dense float32 computation with these formulas:
an inaccurate formula would excuse itself. Here every token's value and gradient is compared with
mpmath, and the bound is counted from the operations, in units of u (half of eps): a sum, product or
rounded parameter 1; exp, log, expm1 and log1p 2 (one unit in the last place).
"""

from __future__ import annotations

from collections.abc import Callable

import mpmath
import pytest
import torch
from mpmath import exp, log, mpf
from torch import Tensor

from fdd_kernels.lens.divergence_text import parse_divergence
from fdd_kernels.lens.divergences import DIVERGENCES
from fdd_kernels.testing import unit_roundoff
from tests.support.options import DIVERGENCE_TEXTS

SETS = ["sweep", "nearly the same", "sd 1", "sd 6", "sd 20", "excluded"]


@pytest.fixture(autouse=True)
def _digits():
    with mpmath.workdps(60):
        yield


def log_probabilities(which: str, dtype: torch.dtype) -> list[Tensor]:
    """Log q and log p per token.

    The sweep goes through every x = log q - log p where a formula changes its form, and where the
    two parts of a mixture are equally large.
    """
    if which == "sweep":
        steps = [0.0, 1e-6, 1e-3, 9.99e-3, 0.0101, 0.05, 0.124, 0.2499, 0.2501, 0.3, 0.69]
        steps += [0.999, 1.001, 3.0, 7.0, 13.0, 13.8, 14.5, 20.0, 20.8, 22.0, 31.9, 32.1, 45.0]
        x = torch.tensor([*steps, *[-s for s in steps]], dtype=dtype)
        log_p = torch.tensor([-0.5, -9.0], dtype=dtype)[:, None] - x.clamp(min=0)
        return [(log_p + x).reshape(-1), log_p.reshape(-1)]
    spread = float(which[3:]) if which.startswith("sd") else 3.0
    generator = torch.Generator().manual_seed(len(which))
    z_s, z_t = spread * torch.randn((2, 50), generator=generator, dtype=torch.float64)
    if which == "nearly the same":
        z_s = z_t + 1e-3 * z_s
    if which == "excluded":
        z_s[:12] = z_t[8:20] = -torch.inf
    return [z.log_softmax(-1).to(dtype) for z in (z_s, z_t)]


class Token:
    """A token's probabilities and the bounds of what formulas make of them, in units of u."""

    def __init__(self, log_q: float, log_p: float, dtype: torch.dtype):
        self.dtype, self.log_q, self.log_p = dtype, mpf(log_q), mpf(log_p)
        self.q, self.p = exp(self.log_q), exp(self.log_p)
        # log q - log p, 0 where both are -inf
        self.x = mpf(0) if log_q == log_p else self.log_q - self.log_p
        # Below these, series; where rounding may decide, the bound of the other form, the larger.
        self.near = mpf(9.9e-3 if dtype == torch.float64 else 0.249)
        self.series = 42 if dtype == torch.float64 else 11  # 2^-48 or u of its end, ten operations

    def swapped(self) -> Token:
        """The same with the models in each other's place."""
        return Token(self.log_p, self.log_q, self.dtype)

    def log_mixture(self, share):
        """log((1 - share) + share e^x) = log m - log p, and its bound.

        Each of its numbers is off by a few units, and x by one that e^x multiplies by |x|.
        """
        of_q, of_p = share * self.q, (1 - share) * self.p
        if of_q + of_p == 0 or self.p == 0:
            return mpf(0), mpf(0)  # a token without weight
        y = log((of_q + of_p) / self.p)
        moved = 2 * abs(self.x) * of_q / (of_q + of_p) if of_q else 0
        return y, 8 * abs(y) + moved

    def kl(self, share=None):
        """A token's part of KL(p || m), m = (1 - share) p + share q, and its bound.

        Far from agreement it is m - p - p y, whose numbers are up to 2 / y^2 times the result: 32
        at 1/4. Share None: m is q, without the operations of a mixture.
        """
        y, off = (self.x, abs(self.x)) if share is None else self.log_mixture(share)
        m = self.q if share is None else (1 - share) * self.p + share * self.q
        if self.p == 0:
            return m, 5 * m
        if m == 0:
            return mpmath.inf, mpf(0)
        value = m - self.p - self.p * y
        if abs(y) < self.near:
            twice = 2.2 * off / abs(y) if y else 0
            return value, value * (self.series + 4 + twice)
        return value, 5 * m + 3 * self.p + 4 * self.p * abs(y) + self.p * off

    def power(self, c):
        """(q^c - p^c) / c, which is x at c = 0, and its bound: c and its product with a logarithm
        are rounded, which the power multiplies by that product.
        """
        if c == 0 or self.q == self.p:
            return self.x, abs(self.x)
        q, p = (exp(c * z) for z in (self.log_q, self.log_p))
        of_q, of_p = (
            w * (5 + 2 * c * abs(z)) if w else 0 for w, z in ((q, self.log_q), (p, self.log_p))
        )
        value = (q - p) / c
        if abs(c * self.x) < 0.99:
            return value, abs(value) * (12 + (of_p / p if p else 0))
        return value, (of_q + of_p) / c + 2 * abs(value)

    def weighted(self, log_weight, c, power):
        """A weight e^(c log_weight) times such a difference, and its bound."""
        value, bound = power
        if c == 0:
            return value, bound
        weight = exp(c * log_weight)
        if weight == 0:
            return mpf(0), mpf(0)
        of_weight = (3 + 2 * c * abs(log_weight)) * abs(value)
        return weight * value, weight * (bound + of_weight)


def skew_kl(token: Token, alpha, of_value: bool):
    if of_value:
        return token.kl(1 - alpha)
    q, p = token.q, token.p
    of_q, of_p = (1 - alpha) * q, alpha * p
    if of_q == 0:
        return mpf(0), mpf(0)
    grad = (1 - alpha) ** 2 * q * (q - p) / (of_q + of_p)
    smaller = (of_q if q < p else of_p) / (of_q + of_p)  # e^-|x| in the denominator
    return grad, abs(grad) * (16 + (abs(token.x) * smaller if smaller else 0))


def skew_reverse_kl(token: Token, alpha, of_value: bool):
    other = token.swapped()
    if of_value:
        return other.kl(1 - alpha)
    y, off = other.log_mixture(1 - alpha)  # log m - log q
    y, q = -y, token.q
    rest = exp(y) - 1 - y
    of_rest = 3 * abs(exp(y) - 1) + abs(y) + abs(exp(y) - 1) * off
    if abs(y) < token.near:
        of_rest = rest * (token.series + (2.2 * off / abs(y) if y else 0))
    grad = q * ((1 - alpha) * y - alpha * rest)
    sizes = (1 - alpha) * (6 * abs(y) + off) + alpha * (6 * abs(rest) + of_rest)
    return grad, q * sizes


def jsd(token: Token, beta, of_value: bool):
    other = token.swapped()
    if not of_value:
        y, off = other.log_mixture(beta)
        return (beta - 1) * token.q * y, (1 - beta) * token.q * (5 * abs(y) + off)
    parts = [(beta, *token.kl(1 - beta)), (1 - beta, *other.kl(beta))]
    value = sum(weight * v for weight, v, _ in parts)
    return value, sum(weight * bound for weight, _, bound in parts) + 3 * value


def total_variation(token: Token, of_value: bool):
    if not of_value:
        return token.q * mpmath.sign(token.q - token.p) / 2, 3 * token.q
    value, bound = token.power(mpf(1))
    return abs(value) / 2, bound / 2


def alpha_beta(token: Token, alpha, beta, of_value: bool):
    s = alpha + beta
    first = token.weighted(token.log_q, beta, token.power(alpha))
    if not of_value or token.q == token.p:
        return first if token.q != token.p else (mpf(0), mpf(0))
    second = token.weighted(token.log_p, alpha, token.power(beta))
    value = (first[0] - second[0]) / s
    if abs(s * token.x) < token.near:
        return value, value * (token.series + 13 + 2 * s * abs(token.log_p))
    return value, (first[1] + second[1] + 3 * (abs(first[0]) + abs(second[0]))) / s


def kl(token: Token, of_value: bool):
    return token.kl() if of_value else (-token.p, 3 * token.p)


def reverse_kl(token: Token, of_value: bool):
    if of_value:
        return token.swapped().kl()
    if token.q == 0:
        return mpf(0), mpf(0)
    return token.q * (token.x + 1), 5 * token.q * (abs(token.x) + 1)


EXACT: dict[str, Callable] = {
    "kl": kl,
    "reverse_kl": reverse_kl,
    "jsd": jsd,
    "skew_kl": skew_kl,
    "skew_reverse_kl": skew_reverse_kl,
    "tv": total_variation,
    "alpha_beta": alpha_beta,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("which", SETS)
@pytest.mark.parametrize("text", DIVERGENCE_TEXTS)
def test_every_token(text, which, dtype):
    """Value and gradient; infinite where the formula is, and never NaN."""
    named = parse_divergence(text)
    entry, parameters = DIVERGENCES[named.name], named.parameters
    logs, unit = log_probabilities(which, dtype), unit_roundoff(dtype)
    tiny = torch.finfo(dtype).tiny  # probabilities below it have fewer digits, or are 0
    for formula, of_value in ((entry.value, True), (entry.grad, False)):
        found = formula(*logs, *parameters).tolist()
        for log_q, log_p, got in zip(*[t.tolist() for t in logs], found):
            token = Token(log_q, log_p, dtype)
            true, bound = EXACT[named.name](token, *[mpf(x) for x in parameters], of_value)
            if mpmath.isinf(true):
                assert got == true, (log_q, log_p)
                continue
            size = 1 + (abs(token.x) if mpmath.isfinite(token.x) else 0)
            bound = unit * bound + 8 * tiny * size
            error = abs(got - true)
            assert error <= bound, (
                f"{formula.__name__} at log q = {log_q}, log p = {log_p}: {got}, not "
                f"{float(true)}; error {float(error / bound):.3g} times the bound"
            )
