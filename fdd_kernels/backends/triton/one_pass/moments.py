"""Moments of a pair for a tile of rows: updated by a tile of tokens.

Shape suffixes: r rows of a tile, e tokens of a sub-tile.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fdd_kernels.backends.triton.elementwise import finite_or_zero, is_finite_logit, second_moments
from fdd_kernels.backends.triton.row_statistics import (
    load_moments,
    load_tops,
    store_moments,
    store_tops,
)
from fdd_kernels.backends.triton.weighted_moments import (
    merge_weighted_moments,
    weighted_second_moments,
)


@triton.jit
def vectors(tile_s, tile_t, before_s, before_t, at_re, pair, inverse):
    """Load a sub-tile of the vectors of `PairMoments`, and tell which tokens they have.

    They are z of the layer; where `pair`, less z of the layer before.
    """
    s = tl.load(tile_s + at_re)
    t = tl.load(tile_t + at_re)
    live = is_finite_logit(s, t)
    if pair:
        s_before = tl.load(before_s + at_re)
        t_before = tl.load(before_t + at_re)
        live = live & is_finite_logit(s_before, t_before)
        s -= s_before
        t -= t_before
    return s * inverse, t * inverse, live


@triton.jit
def merge_moments(
    count,
    mean_s,
    mean_t,
    m_ss,
    m_tt,
    m_st,
    m_dd,
    count_b,
    mean_sb,
    mean_tb,
    m_ssb,
    m_ttb,
    m_stb,
    m_ddb,
):
    """Merge the moments of two sets of tokens (Chan, Golub and LeVeque's update)."""
    total = count + count_b
    weight_b = count_b / tl.maximum(total, 1.0)
    cross = count * weight_b
    delta_s, delta_t = mean_sb - mean_s, mean_tb - mean_t
    difference = delta_s - delta_t
    return (
        total,
        mean_s + delta_s * weight_b,
        mean_t + delta_t * weight_b,
        m_ss + m_ssb + cross * delta_s * delta_s,
        m_tt + m_ttb + cross * delta_t * delta_t,
        m_st + m_stb + cross * delta_s * delta_t,
        m_dd + m_ddb + cross * difference * difference,
    )


@triton.jit
def update_moments(
    state,
    field_stride,
    carried,
    everywhere,
    tile_s,
    tile_t,
    before_s,
    before_t,
    at_re,
    pair,
    inverse,
    is_weighted,
    WEIGHTED: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Add a tile to the moments of a pair, whose tokens have weights where `is_weighted`."""
    is_plain = True
    if WEIGHTED:
        is_plain = is_weighted == 0
        if is_weighted != 0:
            update_weighted_moments(
                state,
                field_stride,
                carried,
                everywhere,
                tile_s,
                tile_t,
                before_s,
                before_t,
                at_re,
                pair,
                inverse,
                BLOCK_R,
                BLOCK_C,
                BLOCK_E,
            )
    if is_plain:
        update_plain_moments(
            state,
            field_stride,
            carried,
            everywhere,
            tile_s,
            tile_t,
            before_s,
            before_t,
            at_re,
            pair,
            inverse,
            BLOCK_R,
            BLOCK_C,
            BLOCK_E,
        )


@triton.jit
def update_plain_moments(
    state,
    field_stride,
    carried,
    everywhere,
    tile_s,
    tile_t,
    before_s,
    before_t,
    at_re,
    pair,
    inverse,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Add a tile to the moments of a pair without weights.

    Within the tile, sums are taken about the running mean, at first the mean of the first sub-tile:
    a common part of the vector, however large, leaves no rounding in its spread.
    """
    count, mean_s, mean_t, m_ss, m_tt, m_st, m_dd = load_moments(state, field_stride, carried)
    s, t, live = vectors(tile_s, tile_t, before_s, before_t, at_re, pair, inverse)
    in_sub_tile = tl.maximum(tl.sum(live.to(tl.float32), 1), 1.0)
    base_s = tl.where(count > 0, mean_s, tl.sum(tl.where(live, s, 0.0), 1) / in_sub_tile)
    base_t = tl.where(count > 0, mean_t, tl.sum(tl.where(live, t, 0.0), 1) / in_sub_tile)
    n = tl.zeros((BLOCK_R,), dtype=tl.float32)
    sum_s, sum_t, sum_ss, sum_tt, sum_st, sum_dd = n, n, n, n, n, n
    for start in range(0, BLOCK_C, BLOCK_E):
        s, t, live = vectors(tile_s, tile_t, before_s, before_t, at_re + start, pair, inverse)
        s = tl.where(live, s - base_s[:, None], 0.0)
        t = tl.where(live, t - base_t[:, None], 0.0)
        n += tl.sum(live.to(tl.float32), 1)
        sum_s += tl.sum(s, 1)
        sum_t += tl.sum(t, 1)
        ss, tt, st, dd = second_moments(s, t, 1)
        sum_ss += ss
        sum_tt += tt
        sum_st += st
        sum_dd += dd
    divisor = tl.maximum(n, 1.0)
    offset_s, offset_t = sum_s / divisor, sum_t / divisor
    difference = sum_s - sum_t
    count, mean_s, mean_t, m_ss, m_tt, m_st, m_dd = merge_moments(
        count,
        mean_s,
        mean_t,
        m_ss,
        m_tt,
        m_st,
        m_dd,
        n,
        base_s + offset_s,
        base_t + offset_t,
        tl.maximum(sum_ss - sum_s * offset_s, 0.0),
        tl.maximum(sum_tt - sum_t * offset_t, 0.0),
        sum_st - sum_s * offset_t,
        tl.maximum(sum_dd - difference * (difference / divisor), 0.0),
    )
    store_moments(state, field_stride, everywhere, count, mean_s, mean_t, m_ss, m_tt, m_st, m_dd)


@triton.jit
def update_weighted_moments(
    state,
    field_stride,
    carried,
    everywhere,
    tile_s,
    tile_t,
    before_s,
    before_t,
    at_re,
    pair,
    inverse,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Add a tile to the moments of a pair whose tokens have weights.

    One walk over the tile finds its likeliest token, a second the offset of the mean from it, a
    third the sums of squares.
    """
    e = tl.arange(0, BLOCK_E)
    nothing = tl.zeros((BLOCK_R,), dtype=tl.float32)
    largest, vector_s, vector_t = nothing + float("-inf"), nothing, nothing
    for start in range(0, BLOCK_C, BLOCK_E):
        s, t, live = vectors(tile_s, tile_t, before_s, before_t, at_re + start, pair, inverse)
        z = tl.where(live, tl.load(tile_t + at_re + start) * inverse, float("-inf"))
        of_strip = tl.max(z, 1)
        place = tl.min(tl.where(z == of_strip[:, None], e[None, :], BLOCK_E), 1)
        is_top = live & (e[None, :] == place[:, None])
        is_larger = of_strip > largest
        vector_s = tl.where(is_larger, tl.sum(tl.where(is_top, s, 0.0), 1), vector_s)
        vector_t = tl.where(is_larger, tl.sum(tl.where(is_top, t, 0.0), 1), vector_t)
        largest = tl.where(is_larger, of_strip, largest)
    shift = finite_or_zero(largest)
    total, offset_s, offset_t = nothing, nothing, nothing
    for start in range(0, BLOCK_C, BLOCK_E):
        s, t, live = vectors(tile_s, tile_t, before_s, before_t, at_re + start, pair, inverse)
        z = tl.load(tile_t + at_re + start) * inverse - shift[:, None]
        weight = tl.where(live, tl.exp(z), 0.0)
        total += tl.sum(weight, 1)
        offset_s += tl.sum(weight * tl.where(live, s - vector_s[:, None], 0.0), 1)
        offset_t += tl.sum(weight * tl.where(live, t - vector_t[:, None], 0.0), 1)
    divisor = tl.maximum(total, 1.0)  # that of the likeliest is 1
    offset_s, offset_t = offset_s / divisor, offset_t / divisor
    m_ss, m_tt, m_st, m_dd = nothing, nothing, nothing, nothing
    for start in range(0, BLOCK_C, BLOCK_E):
        s, t, live = vectors(tile_s, tile_t, before_s, before_t, at_re + start, pair, inverse)
        z = tl.load(tile_t + at_re + start) * inverse - shift[:, None]
        weight = tl.where(live, tl.exp(z), 0.0) / divisor[:, None]
        s = tl.where(live, s - vector_s[:, None] - offset_s[:, None], 0.0)
        t = tl.where(live, t - vector_t[:, None] - offset_t[:, None], 0.0)
        ss, tt, st, dd = weighted_second_moments(weight, s, t, 1)
        m_ss += ss
        m_tt += tt
        m_st += st
        m_dd += dd
    n_a, mean_sa, mean_ta, m_ssa, m_tta, m_sta, m_dda = load_moments(state, field_stride, carried)
    top_sa, top_ta = load_tops(state, field_stride, carried)
    n, mean_s, mean_t, m_ss, m_tt, m_st, m_dd, top_s, top_t = merge_weighted_moments(
        tl.where(carried, n_a, float("-inf")),
        mean_sa,
        mean_ta,
        m_ssa,
        m_tta,
        m_sta,
        m_dda,
        top_sa,
        top_ta,
        shift + tl.log(total),
        vector_s + offset_s,
        vector_t + offset_t,
        m_ss,
        m_tt,
        m_st,
        m_dd,
        -offset_s,
        -offset_t,
    )
    store_moments(state, field_stride, everywhere, n, mean_s, mean_t, m_ss, m_tt, m_st, m_dd)
    store_tops(state, field_stride, everywhere, top_s, top_t)
