"""The distances of two vectors that are functions of sums over the vocabulary, each beside its
derivative.

An entry of `DISTANCES` computes the value for any number of pairs of vectors, s the student's and t
the teacher's, and the derivatives by the sums that depend on s. The teacher is a constant: there is
no derivative by t.t.

Shape suffixes: P pairs of vectors, R rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Sums(NamedTuple):
    """Sums over the vocabulary for each pair of vectors: (P, R), `squares` (P, 2, R)."""

    count: Tensor  # of tokens; 1 where these have weights, whose sum it is
    squares: Tensor  # s.s and t.t
    product: Tensor  # s.t
    difference: Tensor  # |s - t|^2, which s.s + t.t - 2 s.t would lose where s and t nearly agree

    def at(self, pairs: slice) -> Sums:
        """Select some of the pairs; all of them cost no operator."""
        if pairs == slice(0, len(self.count)):
            return self
        return Sums(*[of_all[pairs] for of_all in self])


@dataclass(frozen=True)
class Distance:
    """An entry of the registry.

    Attributes:
        value: `value(sums)` -> the distance, (P, R), in operations that autograd can differentiate.
        write_grad: `write_grad(sums, of_ss, of_st, of_dd)` writes its derivatives with respect to
            s.s, s.t and |s - t|^2 into tensors of zeros (P, R).
        centred: whether the vectors are taken about their means over the vocabulary.
        weighted: whether a token has the teacher's probability as its weight (`PairMoments`), of
            the later of two layers. There is no such probability in feature space.
        directional: whether it depends on the vectors' directions, of which a difference of two
            equal hidden states has none.
        of_features: whether the option `trajectory` may name it. The trajectory then compares the
            vectors themselves: logits over the temperature, or features in feature space.
    """

    value: Callable[[Sums], Tensor]
    write_grad: Callable[[Sums, Tensor, Tensor, Tensor], None]
    centred: bool = False
    weighted: bool = False
    directional: bool = False
    of_features: bool = False


def smallest_square(dtype: torch.dtype) -> float:
    """Return the square below which a length counts as 0.

    The summands of a smaller one have lost digits to underflow, which is the case where one token
    has nearly all the weight, and powers of its inverse overflow.
    """
    return torch.finfo(dtype).tiny / torch.finfo(dtype).eps


def _inverse_lengths(sums: Sums) -> tuple[Tensor, Tensor]:
    """Compute 1 / |s| and 1 / |t|; 0, with derivative 0, for a vector of length 0, also where
    rounding made its square negative.
    """
    is_zero = sums.squares < smallest_square(sums.squares.dtype)
    return sums.squares.masked_fill(is_zero, torch.inf).rsqrt().unbind(1)


def _cosine_value(sums: Sums) -> Tensor:
    """Compute 1 - cos(s, t); 1 where either vector has length 0. NaN stays NaN.

    Where the vectors nearly agree, 1 - s.t / (|s||t|) would lose every digit. The same number as
    (|s - t|^2 - (|s| - |t|)^2) / (2 |s||t|) keeps them.

    All sums are multiplied by the constant 1 / (|s||t|) first, so that autograd's powers of lengths
    do not overflow.
    """
    scale = math.prod(_inverse_lengths(Sums(*[of_all.detach() for of_all in sums])))
    defined = scale > 0
    ss, tt = torch.where(defined[:, None], sums.squares * scale[:, None], 1.0).unbind(1)
    product, difference = sums.product * scale, sums.difference * scale
    per_product = (ss * tt).rsqrt()
    of_lengths = (ss - tt) / (ss.sqrt() + tt.sqrt())
    return torch.where(
        defined & (difference < 2 * product),
        (difference - of_lengths.square()) * per_product / 2,
        1 - product * per_product,
    )


def _write_cosine_grad(sums: Sums, of_ss: Tensor, of_st: Tensor, of_dd: Tensor) -> None:
    """Write the derivatives of the form that `_cosine_value` uses; 0 where a vector has length 0.

    far:  s.t / (2 |s|^3 |t|)                            -1 / (|s||t|)    0
    near: (t.t - s.s - |s - t|^2) / (4 |s|^3 |t|)        0                1 / (2 |s||t|)

    Where the vectors nearly agree, the first of the near form is small and the gradient is nearly a
    multiple of s - t. The far form would compute it as the difference of a multiple of s and one of
    t.
    """
    per_s, per_t = _inverse_lengths(sums)
    ss, tt = sums.squares.unbind(1)
    per_product, twice_st = per_s * per_t, 2 * sums.product
    near = sums.difference < twice_st
    along_s = torch.where(near, tt - ss - sums.difference, twice_st) * per_product * per_s
    near_part = per_product * near
    torch.mul(along_s * per_s, 0.25, out=of_ss)
    torch.sub(near_part, per_product, out=of_st)
    torch.mul(near_part, 0.5, out=of_dd)


def _mse_value(sums: Sums) -> Tensor:
    """Compute |s - t|^2 / count."""
    return sums.difference / sums.count.clamp(min=1)


def _write_mse_grad(sums: Sums, of_ss: Tensor, of_st: Tensor, of_dd: Tensor) -> None:
    torch.reciprocal(sums.count.clamp(min=1), out=of_dd)


DISTANCES: dict[str, Distance] = {
    "cosine": Distance(_cosine_value, _write_cosine_grad, directional=True, of_features=True),
    "centered_cosine": Distance(_cosine_value, _write_cosine_grad, centred=True, directional=True),
    "weighted_cosine": Distance(
        _cosine_value, _write_cosine_grad, centred=True, weighted=True, directional=True
    ),
    "mse": Distance(_mse_value, _write_mse_grad, of_features=True),
}
