"""Softmax of rows that are at hand: the search for the largest logit, and KL with its gradient,
also where the models nearly agree and where one column has nearly all probability.

Bounds are first-order rounding errors: with u the unit roundoff, exponentials and their sums are
off by u (C + 16) of themselves, and a log-ratio by as much of its parts.
"""

from __future__ import annotations

import pytest
import torch

from fdd_kernels.lens.divergences import is_near, kl_of
from fdd_kernels.lens.softmax import Hidden, kl_of_logits_, row_max
from fdd_kernels.testing import unit_roundoff

ROWS = 24
F64 = torch.float64


@pytest.mark.parametrize("columns", [1, 63, 128, 129, 191, 192, 1000])
def test_row_max_is_the_maximum_and_its_column(columns):
    z = torch.randn(ROWS, columns, generator=torch.Generator().manual_seed(columns))
    z[0], z[1, columns // 2 :], z[2] = -torch.inf, -torch.inf, 3.0
    z[3, -1] = z[4, 0] = 9.0
    largest, at = row_max(z)
    assert torch.equal(largest, z.amax(-1, keepdim=True))
    assert torch.equal(z.gather(-1, at), largest)
    views = row_max(torch.cat([z, z], -1)[:, :columns])
    assert torch.equal(views[0], largest)


def logits(near: float, gap: float, columns: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Draw both models' logits, with one column of the teacher's, and of most rows of the
    student's, `gap` above others.
    """
    generator = torch.Generator().manual_seed(int(gap) + columns)
    t, away = torch.randn((2, ROWS, columns), generator=generator, dtype=F64)
    t[:, 5] += gap
    s = t + near * away
    s[0] = away[0]  # these two do not agree
    return [z.to(dtype) for z in (s, t)]


@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
@pytest.mark.parametrize("columns", [8, 200])
@pytest.mark.parametrize("gap", [0.0, 6.0, 27.0, 60.0])
@pytest.mark.parametrize("near", [0.0, 1e-4, 1e-2, 0.3, 3.0])
def test_kl_of_logits_keeps_its_digits(near, gap, columns, dtype):
    s, t = logits(near, gap, columns, dtype)
    value, grad_of = kl_of_logits_(s.clone(), t.clone())
    upstream = torch.linspace(-1, 2, ROWS, dtype=dtype)[:, None]
    grad = grad_of(upstream)

    # The truth has the sum over the other columns too, so that a likely column loses no digit.
    def split(z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        z = z.to(F64)
        z = z - z.amax(-1, keepdim=True)
        others = z.exp().scatter(-1, z.argmax(-1, keepdim=True), 0.0).sum(-1, keepdim=True)
        return z - others.log1p(), z.exp() / (1 + others)

    (log_q, q), (log_p, p) = split(s), split(t)
    x = log_q - log_p
    error = unit_roundoff(dtype) * (columns + 16)
    if dtype == F64:  # the truth is rounded as often
        error = 2 * error
    of_x = error * (log_q.abs() + log_p.abs())
    parts = kl_of(p, q, x)
    far = q + p + p * x.abs()
    bound = p * torch.expm1(x).abs() * of_x + error * torch.where(is_near(x), parts, far)
    expected = parts.sum(-1, keepdim=True)
    allowed = bound.sum(-1, keepdim=True)
    # Values of more than 1/16 are differences of sums: of the logarithms and of p x.
    sums = error * (1 + (p * (log_q.abs() + log_p.abs())).sum(-1, keepdim=True))
    allowed = torch.where(expected > 1 / 20, allowed + sums, allowed)
    assert ((value.to(F64) - expected).abs() <= allowed).all()

    # Of a column of more than half in both models q - p is what the others have more of.
    rest_q, rest_p = (a.where(a <= 0.5, 0.0).sum(-1, keepdim=True) for a in (q, p))
    both = (q > 0.5) & (p > 0.5)
    true = torch.where(both, rest_p - rest_q, q - p)
    size = torch.where(both, rest_p + rest_q, q + p) * (1 + log_q.abs() + log_p.abs())
    error_of_grad = (grad.to(F64) - true * upstream).abs()
    assert (error_of_grad <= 2 * error * size * upstream.abs()).all()


def test_rows_that_see_nothing_are_0():
    s, t = torch.randn(2, 3, 300)
    mask = torch.zeros(3, 300, dtype=torch.bool)
    mask[0], mask[1, 7:] = True, True
    hidden = Hidden(mask)
    hidden.fill_(s, -torch.inf)
    hidden.fill_(t, -torch.inf)
    seen = s[1, :7].clone(), t[1, :7].clone()
    value, grad_of = kl_of_logits_(s, t, hidden)
    grad = grad_of(torch.ones(3, 1))
    assert value[0] == 0
    assert not grad[0].any()
    assert not grad[1, 7:].any()
    alone, of_alone = kl_of_logits_(*[z[None] for z in seen])
    bound = 2**-24 * 64
    assert (alone[0] - value[1]).abs() <= bound * (1 + value[1])
    assert ((of_alone(torch.ones(1, 1))[0] - grad[1, :7]).abs() <= bound).all()
