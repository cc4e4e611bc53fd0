"""Oracles of objectives on Gram matrices: dense in float64, and with 60 digits."""

from __future__ import annotations

import decimal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

KINDS = ("sp", "cka", "nst", "ickd")
PLACES = 60


def dense(kind: str, s: Tensor, t: Tensor, other: Tensor | None = None) -> Tensor:
    """Compute one group's value as its formula says, from (N, N) or (D, D) matrices.

    `other` are the same features as s: the right factor of "sp", to tell its gradient's two parts.
    """
    if kind == "sp":
        other = s if other is None else other
        return (F.normalize(s @ other.T) - F.normalize(t @ t.T)).square().mean()
    if kind == "cka":
        s, t = s - s.mean(0), t - t.mean(0)
        return 1 - (s.T @ t).square().sum() / ((s.T @ s).norm() * (t.T @ t).norm())
    if kind == "nst":
        return ((s.T @ s).square().mean() - 2 * (s.T @ t).square().mean()) / len(s)
    return (F.normalize(s.T @ s) - F.normalize(t.T @ t)).square().sum() / s.shape[1]


def exact(kind: str, s: Tensor, t: Tensor) -> float:
    """The same with `PLACES` digits."""
    with decimal.localcontext(prec=PLACES):
        return float(_exact(kind, _decimals(s), _decimals(t)))


def exact_derivative(kind: str, s: Tensor, t: Tensor, direction: Tensor) -> float:
    """The derivative along a direction of s, by a central difference with `PLACES` digits."""
    with decimal.localcontext(prec=PLACES):
        step = decimal.Decimal(10) ** -(PLACES // 3)
        ours, theirs, along = (_decimals(m) for m in (s, t, direction))
        ends = [_exact(kind, ours + sign * step * along, theirs) for sign in (1, -1)]
        return float((ends[0] - ends[1]) / (2 * step))


def _decimals(matrix: Tensor) -> np.ndarray:
    numbers = matrix.detach().double().numpy()
    return np.vectorize(decimal.Decimal, otypes=[object])(numbers)


def _normalised(matrix: np.ndarray) -> np.ndarray:
    return np.array([row / (row @ row).sqrt() for row in matrix])


def _exact(kind: str, s: np.ndarray, t: np.ndarray):
    rows, width = len(s), s.shape[1]
    if kind == "sp":
        return ((_normalised(s @ s.T) - _normalised(t @ t.T)) ** 2).sum() / rows**2
    if kind == "cka":
        s, t = (m - m.sum(0) / rows for m in (s, t))
        lengths = [((m.T @ m) ** 2).sum().sqrt() for m in (s, t)]
        return 1 - ((s.T @ t) ** 2).sum() / (lengths[0] * lengths[1])
    if kind == "nst":
        both = ((s.T @ t) ** 2).sum() / (width * t.shape[1])
        return (((s.T @ s) ** 2).sum() / width**2 - 2 * both) / rows
    return ((_normalised(s.T @ s) - _normalised(t.T @ t)) ** 2).sum() / width


def unit(dtype: torch.dtype) -> float:
    """The unit roundoff of a dtype."""
    return torch.finfo(dtype).eps / 2
