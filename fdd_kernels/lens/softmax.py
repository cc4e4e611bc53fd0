"""Softmax of logits that are at hand, and its gradient: exact also where one token has nearly all
probability.

With a likeliest token of probability 1 - 1e-12, float32 stores its probability as 1 and its
log-probability, as a difference of logit and log-sum-exp, as 0. What is left of it then comes from
the other tokens, whose sum is accurate.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fdd_kernels.lens.divergences import kl_of

_PARTS = 8  # of a row, for the temporaries of elementwise formulas
_SEARCHED = 64  # columns of a part of a row in the search for the largest logit
# KL of a row above which the sum of p (log p - log q) has all digits that float32 sums can have.
_FAR = 1 / 16


def row_max(z: Tensor) -> tuple[Tensor, Tensor]:
    """Return the largest of each row (r, C), and its column: (r, 1) each.

    torch's maximum with indices takes ten times as long on a CPU as the one without: the search is
    within the part of a row that has the largest.
    """
    columns = z.shape[-1]
    if columns <= 2 * _SEARCHED:
        return z.max(-1, keepdim=True)
    whole = columns // _SEARCHED * _SEARCHED
    of_part = z[:, :whole].unflatten(-1, (-1, _SEARCHED)).amax(-1)
    if whole < columns:
        of_part = torch.cat([of_part, z[:, whole:].amax(-1, keepdim=True)], -1)
    inside = torch.arange(_SEARCHED, device=z.device)
    candidates = (of_part.argmax(-1, keepdim=True) * _SEARCHED + inside).clamp(max=columns - 1)
    largest, at = z.gather(-1, candidates).max(-1, keepdim=True)
    return largest, candidates.gather(-1, at)


class Hidden(NamedTuple):
    """Columns that rows do not see: `mask` (r, C - first) marks them from column `first` on."""

    mask: Tensor
    first: int = 0

    def fill_(self, matrix: Tensor, number: float) -> Tensor:
        """Set these columns of a matrix (r, C) to a number."""
        matrix[:, self.first :].masked_fill_(self.mask, number)
        return matrix

    def count(self) -> Tensor:
        """Count them, (r, 1)."""
        return self.mask.sum(-1, keepdim=True)


class RowSoftmax(NamedTuple):
    """The softmax of rows of logits, not yet divided by its sum.

    Attributes:
        exps: exp(z - max), (r, C): 1 in the column `at` of the largest logit.
        at: (r, 1).
        others: the sum over the other columns, (r, 1), accurate also where it is far below 1.
    """

    exps: Tensor
    at: Tensor
    others: Tensor

    @staticmethod
    def of_exps_(exps: Tensor, at: Tensor) -> RowSoftmax:
        """Take exponentials (r, C), whose largest are at the columns `at`."""
        others = exps.scatter_(-1, at, 0.0).sum(-1, keepdim=True)
        return RowSoftmax(exps.scatter_(-1, at, 1.0), at, others)

    @property
    def top(self) -> Tensor:
        """Compute the largest probability, (r, 1)."""
        return 1 / (1 + self.others)

    def at_columns(self, at: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the probability of columns (r, 1), and 1 minus it: both keep their digits."""
        top, found = self.top, self.exps.gather(-1, at) * self.top
        return found, torch.where(at == self.at, self.others * top, 1 - found)

    def probabilities_(self, factor: Tensor) -> Tensor:
        """Turn the exponentials into factor * probability, factors (r, 1)."""
        return self.exps.mul_(self.top * factor)


def subtract_max_(z: Tensor) -> tuple[Tensor, Tensor]:
    """Subtract the largest logit of each row (r, C) in place; return it, and its column, (r, 1).

    A row without a finite logit stays as it is.
    """
    largest, at = row_max(z)
    z -= largest.where(largest != -torch.inf, 0.0)
    return largest, at


def log_softmax_(z: Tensor) -> Tensor:
    """Turn logits (r, C) into log-probabilities in place, and return the log-sum-exps (r, 1).

    The log-sum-exp about the largest logit is log1p of the sum over the other tokens. A row without
    a finite logit has log-probabilities and a log-sum-exp of -inf.
    """
    largest, at = subtract_max_(z)
    of_top = z.gather(-1, at)
    z.scatter_(-1, at, -torch.inf)
    above = sum_over_tokens(torch.exp, z).log1p()
    z.scatter_(-1, at, of_top)
    z -= above
    return largest + above


def kl_of_logits_(
    z_s: Tensor, z_t: Tensor, hidden: Hidden | None = None
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Compute KL(p || q) of rows of finite logits (r, C), q the student's softmax and p the
    teacher's; both matrices are overwritten. Logits of `hidden` columns are -inf.

    With w = z_s - z_t about their largest and Z the sums of exponentials, KL = log Z_s - log Z_t -
    sum of p w. Where the models nearly agree this loses digits that `kl_of` keeps. It takes ten
    times as many operations, so that on a CPU only such rows take it; elsewhere asking which they
    are would wait for the device.

    Returns:
        The values (r, 1), and a function of their upstream gradients that returns the gradient of
        the student's logits, (q - p) times these.
    """
    at_s, at_t = (subtract_max_(z)[1] for z in (z_s, z_t))
    q = RowSoftmax.of_exps_(z_s.exp(), at_s)
    w = z_s.sub_(z_t)
    p = RowSoftmax.of_exps_(z_t.exp_(), at_t)
    if hidden is not None:
        hidden.fill_(w, 0.0)
    size = max(1, len(w) // _PARTS)
    if w.device.type == "cpu":
        expected = sum_over_tokens(torch.mul, p.exps, w) * p.top
        value = q.others.log1p() - p.others.log1p() - expected
        near = (value < _FAR).nonzero()[:, 0]
        parts = near.split(size) if len(near) else ()
    else:
        value, parts = torch.empty_like(p.top), [slice(i, i + size) for i in range(0, len(w), size)]
    for rows in parts:
        value[rows] = _kl_of_rows(q, p, w, rows)

    def grad_of(upstream: Tensor) -> Tensor:
        exact = [(at, _difference(q, p, at) * upstream) for at in (p.at, q.at)]
        grad = q.probabilities_(upstream).addcmul_(p.exps, p.top * upstream, value=-1)
        for at, of_column in exact:
            grad.scatter_(-1, at, of_column)
        return grad

    return value, grad_of


def _kl_of_rows(q: RowSoftmax, p: RowSoftmax, w: Tensor, rows: Tensor | slice) -> Tensor:
    """Compute KL(p || q) of some rows by `kl_of`, (n, 1)."""
    log_ratio = (q.others.log1p() - p.others.log1p())[rows]
    top_q, top_p = q.top[rows], p.top[rows]

    of_tokens = kl_of(p.exps[rows] * top_p, q.exps[rows] * top_q, w[rows] - log_ratio)
    return of_tokens.sum(-1, keepdim=True)


def _difference(q: RowSoftmax, p: RowSoftmax, at: Tensor) -> Tensor:
    """Compute q - p at columns (r, 1), accurate also where both are nearly 1."""
    (of_q, lack_q), (of_p, lack_p) = q.at_columns(at), p.at_columns(at)
    return torch.where(of_q > 0.5, lack_p - lack_q, of_q - of_p)


def logit_gradient_(grad: Tensor, log_q: Tensor) -> Tensor:
    """Turn dL/dlog q into dL/dz = grad - q * sum(grad) in place, (r, C); log q becomes q.

    `grad` may lack a multiple of q. Of the likeliest token it is grad (1 - q) less q times the sum
    of the others.
    """
    log_top, at = row_max(log_q)
    of_top = grad.gather(-1, at)
    others = grad.scatter_(-1, at, 0.0).sum(-1, keepdim=True)
    grad.addcmul_(log_q.exp_(), others + of_top, value=-1)
    return grad.scatter_(-1, at, -of_top * log_top.expm1() - log_top.exp() * others)


def sum_over_tokens(function: Callable[..., Tensor], *matrices: Tensor) -> Tensor:
    """Sum an elementwise function of matrices (r, C) over the tokens, (r, 1), in parts of a row."""
    sums = [
        function(*[m[:, part] for m in matrices]).sum(-1, keepdim=True)
        for part in _parts(matrices[0])
    ]
    return torch.cat(sums, -1).sum(-1, keepdim=True)


def map_over_tokens(function: Callable[..., Tensor], *matrices: Tensor) -> Tensor:
    """Compute an elementwise function of matrices (r, C), (r, C), in parts of a row."""
    result = torch.empty_like(matrices[0])
    for part in _parts(result):
        result[:, part] = function(*[m[:, part] for m in matrices])
    return result


def _parts(matrix: Tensor) -> list[slice]:
    columns = matrix.shape[-1]
    size = max(1, -(-columns // _PARTS))
    return [slice(first, first + size) for first in range(0, columns, size)]
