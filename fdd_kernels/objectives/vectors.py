"""The sums of vectors over the vocabulary, from moments about their means.

Shape suffixes: P pairs of vectors (one per pair moments), R rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fdd_kernels.lens.distances import Sums
from fdd_kernels.lens.layout import M_DD, M_SS, M_ST, M_TT
from fdd_kernels.lens.spec import Layers


class Vectors(NamedTuple):
    """Sums of the vectors that are compared, and count times their offset, (P, R) each.

    The offset leads from a centred vector to the vector itself.
    """

    sums: Sums
    of_s: Tensor
    of_t: Tensor
    of_difference: Tensor


def positions_of(positions: Sequence[int]) -> slice | list[int]:
    """Turn positions into a slice, a view without a copy, where they follow one another."""
    positions = list(positions)
    run = slice(positions[0], positions[-1] + 1)
    return run if positions == list(range(run.start, run.stop)) else positions


def shifts_of(shifts: Tensor, pairs: Sequence[Layers]) -> Tensor:
    """Select the shifts of pairs of layers, (P, 2, R) from (2, L, R)."""
    students, teachers = (positions_of(layers) for layers in zip(*pairs))
    if students == teachers:  # by rank: one operator, perhaps a view
        return shifts[:, students].transpose(0, 1)
    return torch.stack([shifts[0, students], shifts[1, teachers]], 1)


def about_zero(
    moments: Tensor, count: Tensor, offset: Tensor, static: Tensor | None = None
) -> Vectors:
    """Restate moments (P, MOMENT_STATS, R) about 0.

    `count` (P, R) are the numbers of tokens, or sums of their weights; `offset` (P, 2, R) are the
    vectors' means, student first. `static` (P, 2, R) marks vectors of length 0.
    """
    summed = count[:, None] * offset
    (offset_s, offset_t), (sum_s, sum_t) = offset.unbind(1), summed.unbind(1)
    apart = offset_s - offset_t
    sum_apart = count * apart
    squares = torch.addcmul(moments[:, M_SS : M_TT + 1], summed, offset)
    if static is not None:
        squares = squares.masked_fill(static, 0.0)
    sums = Sums(
        count=count,
        squares=squares,
        product=torch.addcmul(moments[:, M_ST], sum_s, offset_t),
        difference=torch.addcmul(moments[:, M_DD], sum_apart, apart),
    )
    return Vectors(sums, sum_s, sum_t, sum_apart)
