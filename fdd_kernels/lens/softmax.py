"""Softmax of logits that are at hand, and its gradient: exact also where one token has nearly all
probability.

With a likeliest token of probability 1 - 1e-12, float32 stores its probability as 1 and its
log-probability, as a difference of logit and log-sum-exp, as 0. What is left of it then comes from
the other tokens, whose sum is accurate.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_PARTS = 8  # of a row, for the temporaries of elementwise formulas


def log_softmax_(z: Tensor) -> Tensor:
    """Turn logits (r, C) into log-probabilities in place, and return the log-sum-exps (r, 1).

    The log-sum-exp about the largest logit is log1p of the sum over the other tokens. A row without
    a finite logit has log-probabilities and a log-sum-exp of -inf.
    """
    largest, at = z.max(-1, keepdim=True)
    z -= largest.where(largest != -torch.inf, 0.0)
    of_top = z.gather(-1, at)
    z.scatter_(-1, at, -torch.inf)
    above = sum_over_tokens(torch.exp, z).log1p()
    z.scatter_(-1, at, of_top)
    z -= above
    return largest + above


def logit_gradient_(grad: Tensor, log_q: Tensor) -> Tensor:
    """Turn dL/dlog q into dL/dz = grad - q * sum(grad) in place, (r, C); log q becomes q.

    `grad` may lack a multiple of q. Of the likeliest token it is grad (1 - q) less q times the sum
    of the others.
    """
    at = log_q.argmax(-1, keepdim=True)
    log_top, of_top = log_q.gather(-1, at), grad.gather(-1, at)
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
