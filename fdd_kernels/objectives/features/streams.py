"""Sums over rows in memory that does not grow with their number."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

# Numbers in one float64 tensor of a row block: 8 MiB.
BLOCK_NUMBERS = 2**20


def block_rows(width: int) -> int:
    """Return how many rows of `width` numbers make a row block."""
    return max(1, BLOCK_NUMBERS // max(1, width))


def again(function: Callable, *arguments):
    """Call a function whose intermediate tensors are computed again in the backward pass."""
    return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)


def sum_over_rows(
    function: Callable[..., Sequence[Tensor]],
    rows: Sequence[Tensor | None],
    width: int,
    *shared,
) -> list[Tensor]:
    """Add up `function(*row block of each tensor, *shared)` over all row blocks.

    Autograd keeps the tensors as they are given and no intermediate result.

    Args:
        function: returns tensors whose shapes do not depend on the rows.
        rows: tensors (R, ...), the first of which is not None; None goes to the function as None.
        width: how many numbers per row the function's largest tensor has.
        shared: further arguments of every call.
    """
    count, size = len(rows[0]), block_rows(width)
    columns = [
        [None] * max(1, -(-count // size)) if tensor is None else tensor.split(size)
        for tensor in rows
    ]
    total: list[Tensor] = []
    for block in zip(*columns):
        part = again(function, *block, *shared)
        total = [a + b for a, b in zip(total, part)] if total else list(part)
    return total


def in_float64(block: Tensor, valid: Tensor | None) -> Tensor:
    """Convert a row block (r, D) to float64, with 0 in rows that are not valid."""
    block = block.to(torch.float64)
    return block if valid is None else torch.where(valid[:, None], block, 0.0)


def count_rows(rows: Tensor, valid: Tensor | None) -> Tensor:
    """Count the valid rows of (R, ...), as a float64 scalar on their device."""
    if valid is None:
        return rows.new_full((), len(rows), dtype=torch.float64)
    return valid.sum(dtype=torch.float64)
