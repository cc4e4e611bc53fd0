"""Temperatures of logits: one number, or each row's standard deviation.

Shape suffixes: r rows of a block, V tokens compared.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fdd_kernels.lens.softmax import sum_over_tokens

STD = "std"
_OF_ROW = 0.0  # stands for "std" among numbers


def encode_temperature(temperature: float | str, scale_by_t2: bool) -> tuple[float, float]:
    """Return the temperature for `LogitOptions`, and the one for formulas.

    Raises:
        ValueError: a string that is not "std", or a square of temperatures that differ by row.
    """
    if not isinstance(temperature, str):
        numeric = isinstance(temperature, (int, float))
        return temperature, float(temperature) if numeric else 1.0
    if temperature != STD:
        raise ValueError(f"temperature={temperature!r} is neither a number nor {STD!r}")
    if scale_by_t2:
        raise ValueError(
            f"scale_by_t2=True multiplies the loss by one temperature squared, and {STD!r} is "
            "another one in each row: leave it out"
        )
    return 1.0, _OF_ROW


def at_temperature(u: Tensor, temperature: float) -> Tensor:
    """Divide logits (r, V) by the temperature, in operations that autograd can differentiate."""
    if temperature != _OF_ROW:
        return u / temperature
    z = _finite(u) / row_std(u)
    return torch.where(u == -torch.inf, -torch.inf, z)


def at_temperature_(u: Tensor, temperature: float) -> Tensor:
    """Divide logits (r, V) by the temperature in place."""
    return u.div_(temperature if temperature != _OF_ROW else row_std(u))


def student_at_temperature_(
    u: Tensor, temperature: float
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Divide logits (r, V) by the temperature; they are overwritten.

    Returns:
        z, which may be overwritten, and a function that turns dL/dz into dL/du in place. With the
        standard deviation s and n tokens the latter is (g - (g . z) (z - mean z) / (n - 1)) / s.
    """
    if temperature != _OF_ROW:
        return u.div_(temperature), lambda grad: grad.div_(temperature)
    std, excluded = row_std(u), u == -torch.inf
    count = (~excluded).sum(-1, keepdim=True)
    z = u.masked_fill_(excluded, 0.0).div_(std)

    def chain(grad: Tensor) -> Tensor:
        along = sum_over_tokens(torch.mul, grad, z) / (count - 1).clamp(min=1)
        mean = z.sum(-1, keepdim=True) / count.clamp(min=1)
        grad.sub_(z.sub_(mean).masked_fill_(excluded, 0.0).mul_(along))
        return grad.div_(std)

    return z.masked_fill(excluded, -torch.inf), chain


def row_std(u: Tensor) -> Tensor:
    """Compute the unbiased standard deviation of each row's finite logits, (r, 1).

    Of a row whose logits are all equal it is 1.
    """
    count = (u != -torch.inf).sum(-1, keepdim=True)
    mean = sum_over_tokens(_finite, u) / count.clamp(min=1)
    squares = sum_over_tokens(lambda x: _finite(x - mean).square(), u)
    variance = squares / (count - 1).clamp(min=1)
    return torch.where(variance > 0, variance, 1.0).sqrt()


def _finite(u: Tensor) -> Tensor:
    """Put 0 in the place of tokens that cannot occur; a new tensor."""
    return u.masked_fill(u == -torch.inf, 0.0)
