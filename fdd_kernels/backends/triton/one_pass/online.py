"""Running statistics of a tile of rows: updated by a tile of tokens, merged between splits.

Shape suffixes: r rows of a tile, e tokens of a sub-tile.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fdd_kernels.backends.triton.elementwise import (
    exponential_sums,
    is_finite_logit,
    second_moments,
)
from fdd_kernels.backends.triton.row_statistics import load_moments, store_moments
from fdd_kernels.backends.triton.work_table import (
    SLOT_BEGIN,
    SLOT_INVERSE,
    WANTS_LABEL,
    WANTS_STUDENT,
    table_entry,
    table_float,
)

SLOT_FIELDS = tl.constexpr(7)


@triton.jit
def update_softmax(z_re, difference_re, top, total, expectation, WITH_EXPECTATION: tl.constexpr):
    """Add a sub-tile to an online softmax: sums of e^(z - top) and of e^(z - top) * difference,
    `top` the largest z so far.
    """
    new_top = tl.maximum(top, tl.max(z_re, 1))
    # While every logit so far is -inf the shift must stay finite.
    shift = tl.where(new_top > float("-inf"), new_top, 0.0)
    rescale = tl.exp(top - shift)
    more, more_expectation = exponential_sums(
        z_re - shift[:, None], difference_re, 1, WITH_EXPECTATION, False
    )
    total = total * rescale + more
    if WITH_EXPECTATION:
        expectation = expectation * rescale + more_expectation
    return new_top, total, expectation


@triton.jit
def update_slot(
    state,
    field_stride,
    carried,
    everywhere,
    tile_s,
    tile_t,
    at_re,
    columns_e,
    label_r,
    inverse,
    flags,
    TEACHER: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Add a tile to a slot's state (7 fields, see `stats.py`).

    `carried` marks rows whose state exists already. `tile_s` and `tile_t` point at u - shift.
    """
    top_s = tl.load(state, mask=carried, other=float("-inf"))
    total_s = tl.load(state + field_stride, mask=carried, other=0.0)
    expectation_s = tl.load(state + 2 * field_stride, mask=carried, other=0.0)
    top_t = tl.load(state + 3 * field_stride, mask=carried, other=float("-inf"))
    total_t = tl.load(state + 4 * field_stride, mask=carried, other=0.0)
    expectation_t = tl.load(state + 5 * field_stride, mask=carried, other=0.0)
    label_z = tl.load(state + 6 * field_stride, mask=carried, other=float("-inf"))
    for start in range(0, BLOCK_C, BLOCK_E):
        z_s = tl.load(tile_s + at_re + start) * inverse
        if TEACHER:
            z_t = tl.load(tile_t + at_re + start) * inverse
            top_t, total_t, expectation_t = update_softmax(
                z_t, z_t - z_s, top_t, total_t, expectation_t, True
            )
            if flags & WANTS_STUDENT:
                top_s, total_s, expectation_s = update_softmax(
                    z_s, z_s - z_t, top_s, total_s, expectation_s, True
                )
            else:
                top_s, total_s, expectation_s = update_softmax(
                    z_s, z_s, top_s, total_s, expectation_s, False
                )
        else:
            top_s, total_s, expectation_s = update_softmax(
                z_s, z_s, top_s, total_s, expectation_s, False
            )
        if flags & WANTS_LABEL:
            at_label = (columns_e + start)[None, :] == label_r[:, None]
            label_z = tl.maximum(label_z, tl.max(tl.where(at_label, z_s, float("-inf")), 1))
    tl.store(state, top_s, mask=everywhere)
    tl.store(state + field_stride, total_s, mask=everywhere)
    tl.store(state + 2 * field_stride, expectation_s, mask=everywhere)
    tl.store(state + 3 * field_stride, top_t, mask=everywhere)
    tl.store(state + 4 * field_stride, total_t, mask=everywhere)
    tl.store(state + 5 * field_stride, expectation_t, mask=everywhere)
    tl.store(state + 6 * field_stride, label_z, mask=everywhere)


@triton.jit
def merge_softmax(top, total, expectation, top_b, total_b, expectation_b):
    """Merge the online softmax of two sets of tokens."""
    new_top = tl.maximum(top, top_b)
    shift = tl.where(new_top > float("-inf"), new_top, 0.0)
    a, b = tl.exp(top - shift), tl.exp(top_b - shift)
    return new_top, total * a + total_b * b, expectation * a + expectation_b * b


@triton.jit
def row_shift(
    state,
    layer,
    MODEL: tl.constexpr,
    layers,
    stride,
    split_stride,
    splits,
    table,
    table_width,
    is_valid,
    TILE_ROWS: tl.constexpr,
):
    """Return the largest u of each row over all splits.

    `layer` is a student layer; MODEL 1 takes its teacher layer instead. The state has each split's
    largest z about its shift, at the temperature of the first slot. Without a slot the first
    split's shift serves.
    """
    shift = state + (2 * layer + MODEL) * stride
    first_slot = table_entry(table, table_width, SLOT_BEGIN, layer)
    top = state + (2 * layers + first_slot * SLOT_FIELDS + 3 * MODEL) * stride
    found = tl.load(shift, mask=is_valid, other=0.0)
    if first_slot < table_entry(table, table_width, SLOT_BEGIN, layer + 1):
        inverse = table_float(table, table_width, SLOT_INVERSE, first_slot)
        largest = tl.full((TILE_ROWS,), float("-inf"), tl.float32)
        for part in range(splits):
            own = tl.load(shift + part * split_stride, mask=is_valid, other=0.0)
            largest = tl.maximum(
                largest,
                own + tl.load(top + part * split_stride, mask=is_valid, other=0.0) / inverse,
            )
        found = tl.where(tl.abs(largest) < float("inf"), largest, found)
    return found


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
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Add a tile to the moments of a pair.

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
