"""The sums of vectors over the vocabulary, from moments about their means.

Shape suffixes: P pairs of vectors (one per pair moments), R rows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fdd_kernels.lens.distances import Sums
from fdd_kernels.lens.layout import M_DD, M_SS, M_ST, M_TT


class Vectors(NamedTuple):
    """Sums of the vectors that are compared, and count times their offset, (P, R) each.

    The offset leads from a centred vector to the vector itself.
    """

    sums: Sums
    of_s: Tensor
    of_t: Tensor
    of_difference: Tensor


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
