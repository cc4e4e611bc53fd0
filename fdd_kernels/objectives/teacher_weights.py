"""Weights of several teachers of one call: the same for all rows, or of each row."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fdd_kernels.objectives.numbers import looks_at


def check_teacher_weights(
    weights: Tensor, shapes: Sequence[tuple[int, ...]], valid: Tensor | None
) -> None:
    """Check the shape of the weights of M teachers, (M,) or (M, ...), and their numbers.

    Args:
        shapes: that are legal, the one for all rows first.
        valid: (R,) bool, the rows whose weights count; None for all.

    Raises:
        ValueError: another shape; on a CPU, or elsewhere if FDD_KERNELS_DEBUG=1, weights of a row
            that are negative, not finite or all 0.
    """
    if tuple(weights.shape) not in shapes:
        of_all, *of_rows = shapes
        more = f", or per row, {of_rows[0]}" if of_rows else ""
        raise ValueError(
            f"teacher_weights has shape {tuple(weights.shape)}: pass one weight per teacher, "
            f"{of_all}{more}"
        )
    if not looks_at(weights):
        return
    seen = _matrix(weights)
    if valid is not None and weights.ndim > 1:
        seen = seen[:, valid]
    if not (((seen >= 0) & (seen < torch.inf)).all() and (seen.sum(0) > 0).all()):
        raise ValueError(
            "teacher_weights has a position with a weight that is negative or not finite, or with "
            "weights that sum to 0: correct it, or mask the position"
        )


def weights_of_rows(weights: Tensor, rows: int, dtype: torch.dtype) -> Tensor:
    """Return the weights (M,) or (M, ...) as constants for each row, (R, M)."""
    return _matrix(weights).T.to(dtype).expand(rows, len(weights))


def _matrix(weights: Tensor) -> Tensor:
    """Return the weights as (M, R), or as (M, 1) where they are the same for all rows."""
    weights = weights.detach()
    return weights.flatten(1) if weights.ndim > 1 else weights[:, None]
