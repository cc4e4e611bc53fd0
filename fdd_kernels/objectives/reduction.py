"""From terms per row to what a call returns: valid rows, denominators, sums and means."""

from __future__ import annotations

import torch
from torch import Tensor


def safe_denominator(items: Tensor | float) -> Tensor | float:
    """Return a number of items as a denominator.

    A tensor of 0, which nobody has looked at, becomes inf: what it divides is then 0.
    """
    return torch.where(items == 0, torch.inf, items) if isinstance(items, Tensor) else items


def loss_denominator(
    reduction: str,
    rows: int,
    valid: Tensor | None,
    device: torch.device,
    num_items_in_batch: Tensor | float | None,
) -> Tensor | float | None:
    """Return the denominator of the sum over R rows, or None for a plain sum.

    `valid` (R,) is None where every row is valid.
    """
    if num_items_in_batch is None:
        if reduction != "mean":
            return None
        return max(rows, 1) if valid is None else valid.sum().clamp(min=1)
    if isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.reshape(()).to(device)
    return safe_denominator(num_items_in_batch)


def reduce_rows(
    term: Tensor,
    valid: Tensor | None,
    leading_shape: tuple[int, ...] | None,
    denominator: Tensor | float | None,
    weights: Tensor | None = None,
) -> Tensor:
    """Reduce a term (R,) over its valid rows, in its own dtype.

    `weights` (R,) multiply it. With a `leading_shape` (reduction="none") the term is returned in
    that shape instead, 0 where a row is not valid.
    """
    if weights is not None:
        term = term * weights
    if valid is not None:
        term = torch.where(valid, term, 0.0)
    if leading_shape is not None:
        return term.view(leading_shape)
    return term.sum() if denominator is None else (term.sum() / denominator).to(term.dtype)
