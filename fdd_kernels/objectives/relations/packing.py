"""Sequences packed in rows of T positions: ids, and how many positions each one sees.

Shape suffixes: B rows of the batch, T positions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fdd_kernels.objectives.numbers import looks_at
from fdd_kernels.objectives.tensors import INTEGERS, check_entries

_FIRST = "the student's tensors"


def sequence_ids(
    lengths: Sequence[int] | Tensor | None, positions: Tensor | None, shape: tuple[int, int], device
) -> Tensor | None:
    """Return the ids (B, T), not decreasing in a row, of the sequences that are packed; None: one
    sequence a row.

    Raises:
        TypeError, ValueError: a wrong type, shape or device; lengths that do not fill the rows.
    """
    if lengths is not None and positions is not None:
        raise ValueError("lengths and positions were both given: pass one of them")
    if positions is not None:
        remedy = f": it must be {shape}"
        check_entries("positions", positions, INTEGERS, shape, device, _FIRST, remedy)
        starts = positions[:, 1:] != positions[:, :-1] + 1
        ids = starts.to(torch.int32).cumsum(1, dtype=torch.int32)
        return torch.nn.functional.pad(ids, (1, 0))
    if lengths is None:
        return None
    if not isinstance(lengths, Tensor):
        if isinstance(lengths, str) or not isinstance(lengths, Sequence):
            raise TypeError(f"lengths must be a list of ints, got {type(lengths).__name__}")
        lengths = torch.tensor(lengths, dtype=torch.int64, device=device)
    remedy = ": it must be one length per sequence, (sequences,)"
    check_entries("lengths", lengths, INTEGERS, (lengths.numel(),), device, _FIRST, remedy)
    rows, width = shape
    if looks_at(lengths):
        ends = lengths.cumsum(0)
        total = int(ends[-1]) if len(ends) else 0
        if total != rows * width or (lengths < 1).any():
            raise ValueError(
                f"lengths sum to {total} and the least is "
                f"{int(lengths.min()) if len(ends) else 0}: positive lengths, in order, must fill "
                f"{rows} rows of {width} positions; count what is masked at an end as a sequence"
            )
        missing = set(range(width, total + 1, width)) - set(ends.tolist())
        if missing:
            raise ValueError(
                f"lengths let a sequence cross the end of a row, at position {min(missing)}: "
                "sequences lie within one row"
            )
    numbers = torch.arange(len(lengths), dtype=torch.int32, device=device)
    return numbers.repeat_interleave(lengths, output_size=rows * width).view(rows, width)


def visible(seen: Tensor, ids: Tensor | None, causal: bool, exclude_self: bool) -> Tensor:
    """Count the positions that each one sees, (B, T), of those that are `seen` (B, T) bool."""
    length = seen.shape[1]
    at = torch.arange(length, device=seen.device).expand_as(seen)
    up_to = seen.cumsum(1)
    if ids is None:
        first, last = torch.zeros_like(at), torch.full_like(at, length - 1)
    else:
        changes = ids[:, 1:] != ids[:, :-1]
        starts = torch.nn.functional.pad(changes, (1, 0), value=True)
        ends = torch.nn.functional.pad(changes, (0, 1), value=True)
        first = torch.where(starts, at, 0).cummax(1).values
        last = torch.where(ends, at, length - 1).flip(1).cummin(1).values.flip(1)
    last = at if causal else last
    count = up_to.gather(1, last) - (up_to - seen.long()).gather(1, first)
    return count - seen.long() if exclude_self else count
