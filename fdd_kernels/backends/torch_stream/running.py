"""Statistics of a row block that grow tile by tile: row maxima, softmax sums, the expectation of a
one-pass divergence, and pair moments.

Shape suffixes: L layers, r rows of a block, c tokens of a tile.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fdd_kernels.lens.divergences import is_near, kl_of
from fdd_kernels.lens.layout import (
    COUNT,
    M_DD,
    M_SS,
    M_ST,
    M_TT,
    MEAN_S,
    MEAN_T,
    MOMENT_STATS,
    TOP_S,
    TOP_T,
)
from fdd_kernels.lens.spec import PairMoments


def shifts_of(u_LrC: Tensor, shifts_Lr: Tensor) -> Tensor:
    """Select the shifts (L, r, 1) of a model's layers, which may be fewer than the other's."""
    return shifts_Lr[: len(u_LrC), :, None]


class RowMax:
    """The largest logit of every row so far, of both models (2, L, r), and the shifts that follow:
    the same, but 0 while every logit is -inf.
    """

    def __init__(self, layers: int, rows: int, like: Tensor):
        self.largest = like.new_full((2, layers, rows), -torch.inf)
        self.shift = like.new_zeros((2, layers, rows))

    def subtract(self, u_s: Tensor, u_t: Tensor | None) -> tuple[Tensor, Tensor]:
        """Take in a tile's logits and make them relative to the new shifts, in place.

        Returns how far the old maxima lie below the new shifts (-inf without one), and how far the
        shifts rose: (2, L, r).
        """
        largest, old = self.largest.clone(), self.shift
        for of_model, u in zip(largest, (u_s, u_t)):
            if u is not None:
                of_layers = of_model[: len(u)]
                torch.maximum(of_layers, u.amax(-1), out=of_layers)
        self.shift = torch.where(largest == -torch.inf, 0.0, largest)
        below, self.largest = self.largest - self.shift, largest
        u_s -= shifts_of(u_s, self.shift[0])
        if u_t is not None:
            u_t -= shifts_of(u_t, self.shift[1])
        return below, self.shift - old


class Softmax:
    """Running sum of e^z of a row block, z relative to the shifts."""

    def __init__(self, like: Tensor):
        self.total = torch.zeros_like(like)

    def add(self, below: Tensor, z_rc: Tensor) -> tuple[Tensor, Tensor]:
        """Take in a tile. Returns the factor by which the risen shifts scale e^z, and the tile's
        e^z.
        """
        scale, e_rc = below.exp(), z_rc.exp()
        self.total = self.total * scale + e_rc.sum(-1)
        return scale, e_rc


class Expectation:
    """KL(p || r) of a row block in one pass: with e and e' = e e^x the two models' e^z, sums of

        weighted -e x,    excess e (e^x - 1 - x),    difference e' - e

    Where the models are close, log(R / P) + E_p[-x] is a small difference, while E_p[e^x - 1 - x]
    is a sum of positive numbers. The two differ by log(R / P) - (R - P) / P, which is of the second
    order in how far R / P is from 1.
    """

    def __init__(self, like: Tensor):
        self.weighted, self.excess, self.difference = (torch.zeros_like(like) for _ in range(3))

    def add(
        self,
        total: Tensor,
        scale: Tensor,
        other_scale: Tensor,
        moved: Tensor,
        e_rc: Tensor,
        other_rc: Tensor,
        x_rc: Tensor,
    ) -> None:
        """Restate the sums about shifts that moved x by `moved`, and take in a tile.

        `total` is the sum of e so far; `scale` and `other_scale` are the factors of e and e'.
        """
        first, second, gap = _orders(scale, other_scale, moved)
        is_scaled = scale > 0
        self.excess = (
            torch.where(is_scaled, scale * self.excess, 0.0)
            + total * second
            + self.difference * gap
        )
        self.weighted = torch.where(is_scaled, scale * self.weighted, 0.0) - total * first
        self.difference = other_scale * self.difference + total * gap
        first, second, gap = _orders(e_rc, other_rc, x_rc)
        self.weighted -= first.sum(-1)
        self.excess += second.sum(-1)
        self.difference += gap.sum(-1)

    def value(self, total: Tensor, other: Tensor) -> Tensor:
        """Compute KL from the sums of e and e'."""
        off = self.difference / total
        log_ratio = off.clamp(min=-0.5).log1p()
        near = self.excess / total - kl_of(torch.ones_like(off), 1 + off, log_ratio)
        far = self.weighted / total + other.log() - total.log()
        return torch.where(off.abs() < 0.5, near, far).clamp(min=0)


def _orders(e: Tensor, other: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compute e x, e (e^x - 1 - x) and e (e^x - 1), given other = e e^x; 0 * anything = 0."""
    first, second = torch.where(e == 0, 0.0, e * x), kl_of(e, other, x)
    return first, second, torch.where(is_near(x), first + second, other - e)


def no_moments(pairs: tuple[PairMoments, ...], rows: int, like: Tensor) -> Tensor:
    """Return the moments (pairs, MOMENT_STATS, rows) of no token."""
    out = like.new_zeros((len(pairs), MOMENT_STATS, rows))
    for moments, pair in zip(out, pairs):
        if pair.weighted:
            moments[COUNT] = -torch.inf
    return out


def weighted_tile_moments(s: Tensor, t: Tensor, z: Tensor, live: Tensor | None) -> Tensor:
    """Compute moments (MOMENT_STATS, r) of one tile's vectors s and t with the weights e^z, all
    (r, c).

    They are taken over the tokens marked in `live`. Sums are about the likeliest token: where it
    has nearly all the weight, its distance from the means is a small sum over the others.
    """
    if live is not None:
        s, t = torch.where(live, s, 0.0), torch.where(live, t, 0.0)
        z = torch.where(live, z, -torch.inf)
    largest, top = z.max(-1, keepdim=True)
    w = (z - largest.where(largest != -torch.inf, 0.0)).exp()
    total = w.sum(-1, keepdim=True)
    w = w / torch.where(total == 0, 1.0, total)
    out = s.new_empty((MOMENT_STATS, len(s)))
    out[COUNT] = (largest + total.log())[:, 0]
    centred = []
    for vector, mean, of_top in ((s, MEAN_S, TOP_S), (t, MEAN_T, TOP_T)):
        at_top = vector.gather(1, top)
        vector = vector - at_top
        offset = (w * vector).sum(-1, keepdim=True)
        out[mean], out[of_top] = (at_top + offset)[:, 0], -offset[:, 0]
        centred.append(vector.sub_(offset))
    s, t = centred
    weighted_s, weighted_t = w * s, w * t
    out[M_SS], out[M_TT] = (weighted_s * s).sum(-1), (weighted_t * t).sum(-1)
    out[M_ST] = (weighted_s * t).sum(-1)
    out[M_DD] = (w * s.sub_(t).square_()).sum(-1)
    return out


def tile_moments(s: Tensor, t: Tensor, live: Tensor | None) -> Tensor:
    """Compute moments (MOMENT_STATS, r) of one tile's vectors s and t, (r, c) each.

    They are taken over the tokens marked in `live`; s and t are overwritten.
    """
    out = s.new_zeros((MOMENT_STATS, len(s)))
    if live is None:
        count = s.new_full((), s.shape[-1])
    else:
        count = live.sum().to(s.dtype)
        s, t = torch.where(live, s, 0.0), torch.where(live, t, 0.0)
    out[COUNT], divisor = count, count.clamp(min=1)
    for vector, mean in ((s, MEAN_S), (t, MEAN_T)):
        # About the first token first: the sum then has no large common part to round.
        base = vector[:, :1].clone()
        vector -= base
        offset = (vector if live is None else torch.where(live, vector, 0.0)).sum(-1) / divisor
        vector -= offset[:, None]
        out[mean] = base[:, 0] + offset
        if live is not None:
            vector *= live
    out[M_SS], out[M_TT], out[M_ST] = (s * s).sum(-1), (t * t).sum(-1), (s * t).sum(-1)
    out[M_DD] = s.sub_(t).square_().sum(-1)
    return out
