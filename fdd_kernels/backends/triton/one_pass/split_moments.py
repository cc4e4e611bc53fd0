"""Merge the moments of a pair over the splits of the vocabulary, for a tile of rows."""

from __future__ import annotations

import triton
import triton.language as tl

from fdd_kernels.backends.triton.one_pass.moments import merge_moments
from fdd_kernels.backends.triton.row_statistics import (
    load_moments,
    load_tops,
    store_moments,
    store_tops,
)
from fdd_kernels.backends.triton.weighted_moments import merge_weighted_moments


@triton.jit
def merge_split_moments(
    own,
    at,
    out,
    stride,
    split_stride,
    out_stride,
    splits,
    is_valid,
    shift_s,
    shift_t,
    before_s,
    before_t,
    pair,
    inverse,
    is_weighted,
    WEIGHTED: tl.constexpr,
    TILE_ROWS: tl.constexpr,
):
    """Merge the moments of a pair over the splits; store them at `out`.

    `own` and `at` point at the first split's shifts of the layer, and at its moments. `shift_s` ..
    `before_t` are the row's shifts, of the layer and of the one before, which counts where `pair`.
    """
    if WEIGHTED:
        if is_weighted != 0:
            merge_splits(
                own,
                at,
                out,
                stride,
                split_stride,
                out_stride,
                splits,
                is_valid,
                shift_s,
                shift_t,
                before_s,
                before_t,
                pair,
                inverse,
                True,
                TILE_ROWS,
            )
        else:
            merge_splits(
                own,
                at,
                out,
                stride,
                split_stride,
                out_stride,
                splits,
                is_valid,
                shift_s,
                shift_t,
                before_s,
                before_t,
                pair,
                inverse,
                False,
                TILE_ROWS,
            )
    else:
        merge_splits(
            own,
            at,
            out,
            stride,
            split_stride,
            out_stride,
            splits,
            is_valid,
            shift_s,
            shift_t,
            before_s,
            before_t,
            pair,
            inverse,
            False,
            TILE_ROWS,
        )


@triton.jit
def merge_splits(
    own,
    at,
    out,
    stride,
    split_stride,
    out_stride,
    splits,
    is_valid,
    shift_s,
    shift_t,
    before_s,
    before_t,
    pair,
    inverse,
    WEIGHTED: tl.constexpr,
    TILE_ROWS: tl.constexpr,
):
    """Merge the moments of a pair, WEIGHTED or not; see `merge_split_moments`.

    The means of a split are restated about the row's shifts.
    """
    nothing = tl.zeros((TILE_ROWS,), tl.float32)
    n, mean_s, mean_t, top_s, top_t = nothing, nothing, nothing, nothing, nothing
    m_ss, m_tt, m_st, m_dd = nothing, nothing, nothing, nothing
    if WEIGHTED:
        n += float("-inf")
    for part in range(splits):
        own_b, at_b = own + part * split_stride, at + part * split_stride
        n_b, mean_sb, mean_tb, m_ssb, m_ttb, m_stb, m_ddb = load_moments(at_b, stride, is_valid)
        off_t = (tl.load(own_b + stride, mask=is_valid, other=0.0) - shift_t) * inverse
        mean_sb += (tl.load(own_b, mask=is_valid, other=0.0) - shift_s) * inverse
        mean_tb += off_t
        if pair:
            before = own_b - 2 * stride
            mean_sb -= (tl.load(before, mask=is_valid, other=0.0) - before_s) * inverse
            mean_tb -= (tl.load(before + stride, mask=is_valid, other=0.0) - before_t) * inverse
        if WEIGHTED:
            top_sb, top_tb = load_tops(at_b, stride, is_valid)
            n, mean_s, mean_t, m_ss, m_tt, m_st, m_dd, top_s, top_t = merge_weighted_moments(
                n,
                mean_s,
                mean_t,
                m_ss,
                m_tt,
                m_st,
                m_dd,
                top_s,
                top_t,
                n_b + off_t,
                mean_sb,
                mean_tb,
                m_ssb,
                m_ttb,
                m_stb,
                m_ddb,
                top_sb,
                top_tb,
            )
        else:
            n, mean_s, mean_t, m_ss, m_tt, m_st, m_dd = merge_moments(
                n,
                mean_s,
                mean_t,
                m_ss,
                m_tt,
                m_st,
                m_dd,
                n_b,
                mean_sb,
                mean_tb,
                m_ssb,
                m_ttb,
                m_stb,
                m_ddb,
            )
    store_moments(out, out_stride, is_valid, n, mean_s, mean_t, m_ss, m_tt, m_st, m_dd)
    if WEIGHTED:
        store_tops(out, out_stride, is_valid, top_s, top_t)
