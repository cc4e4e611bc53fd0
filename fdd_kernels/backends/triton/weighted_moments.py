"""Device functions of pair moments whose tokens have weights (`PairMoments.weighted`).

The weights are softmax(z), z the teacher's logits of the pair's second layer over its temperature,
over the tokens that are not left out. Sums are taken about the likeliest token's vector, the top:
where one token has nearly all the weight, the offset of the mean from it is a small number, of
which a difference of means in float32 would leave nothing. That offset, negative, is TOP_S and
TOP_T. The formulas are those of `fdd_kernels/lens/layout.py`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fdd_kernels.backends.triton.elementwise import finite_or_zero, moment_gradient
from fdd_kernels.lens import layout

CERTAIN = tl.constexpr(layout.CERTAIN)


@triton.jit
def weighted_second_moments(weight, s, t, AXIS: tl.constexpr):
    """Sum s s, t t, s t and (s - t)^2 over the vocabulary with weights."""
    d = s - t
    weighted_s, weighted_t = weight * s, weight * t
    return (
        tl.sum(weighted_s * s, AXIS),
        tl.sum(weighted_t * t, AXIS),
        tl.sum(weighted_s * t, AXIS),
        tl.sum(weight * d * d, AXIS),
    )


@triton.jit
def tile_weighted_moments(s, t, z, live, EVERY: tl.constexpr, BLOCK_C: tl.constexpr):
    """Return the weighted moments of a tile's `live` tokens (EVERY: all of them); tensors
    (BLOCK_C,).
    """
    i = tl.arange(0, BLOCK_C)
    if not EVERY:
        z = tl.where(live, z, float("-inf"))
    largest = tl.max(z, 0)
    is_top = i == tl.min(tl.where(z == largest, i, BLOCK_C), 0)
    if not EVERY:
        is_top = is_top & live
    top_s, top_t = tl.sum(tl.where(is_top, s, 0.0), 0), tl.sum(tl.where(is_top, t, 0.0), 0)
    s -= top_s
    t -= top_t
    if not EVERY:
        s = tl.where(live, s, 0.0)
        t = tl.where(live, t, 0.0)
    shift = finite_or_zero(largest)
    weight = tl.exp(z - shift)
    total = tl.sum(weight, 0)
    weight /= tl.maximum(total, 1.0)  # that of the top is 1
    offset_s, offset_t = tl.sum(weight * s, 0), tl.sum(weight * t, 0)
    m_ss, m_tt, m_st, m_dd = weighted_second_moments(weight, s - offset_s, t - offset_t, 0)
    mean_s, mean_t = top_s + offset_s, top_t + offset_t
    return shift + tl.log(total), mean_s, mean_t, m_ss, m_tt, m_st, m_dd, -offset_s, -offset_t


@triton.jit
def merge_weighted_tiles(
    count, mean_s, mean_t, m_ss, m_tt, m_st, m_dd, top_s, top_t, BLOCK_T: tl.constexpr
):
    """Merge the weighted moments of all tiles of a row, (BLOCK_T,) each, about the heaviest one's
    top; COUNT of a tile without a token is -inf.
    """
    i = tl.arange(0, BLOCK_T)
    largest = tl.max(count, 0)
    heaviest = i == tl.min(tl.where(count == largest, i, BLOCK_T), 0)
    shift = finite_or_zero(largest)
    share = tl.exp(count - shift)
    total = tl.sum(share, 0)
    share /= tl.maximum(total, 1.0)
    vector_s = tl.sum(tl.where(heaviest, mean_s + top_s, 0.0), 0)
    vector_t = tl.sum(tl.where(heaviest, mean_t + top_t, 0.0), 0)
    from_s = tl.where(heaviest, -top_s, mean_s - vector_s)
    from_t = tl.where(heaviest, -top_t, mean_t - vector_t)
    offset_s, offset_t = tl.sum(share * from_s, 0), tl.sum(share * from_t, 0)
    b_ss, b_tt, b_st, b_dd = weighted_second_moments(share, from_s - offset_s, from_t - offset_t, 0)
    return (
        shift + tl.log(total),
        vector_s + offset_s,
        vector_t + offset_t,
        tl.sum(share * m_ss, 0) + b_ss,
        tl.sum(share * m_tt, 0) + b_tt,
        tl.sum(share * m_st, 0) + b_st,
        tl.sum(share * m_dd, 0) + b_dd,
        -offset_s,
        -offset_t,
    )


@triton.jit
def merge_weighted_moments(
    count,
    mean_s,
    mean_t,
    m_ss,
    m_tt,
    m_st,
    m_dd,
    top_s,
    top_t,
    count_b,
    mean_sb,
    mean_tb,
    m_ssb,
    m_ttb,
    m_stb,
    m_ddb,
    top_sb,
    top_tb,
):
    """Merge the weighted moments of two sets of tokens, about the heavier one's top."""
    shift = finite_or_zero(tl.maximum(count, count_b))
    a, b = tl.exp(count - shift), tl.exp(count_b - shift)
    total = a + b
    a /= tl.maximum(total, 1.0)
    b /= tl.maximum(total, 1.0)
    cross = a * b
    delta_s, delta_t = mean_sb - mean_s, mean_tb - mean_t
    difference = delta_s - delta_t
    second = b > a
    return (
        shift + tl.log(total),
        tl.where(second, mean_sb - a * delta_s, mean_s + b * delta_s),
        tl.where(second, mean_tb - a * delta_t, mean_t + b * delta_t),
        a * m_ss + b * m_ssb + cross * delta_s * delta_s,
        a * m_tt + b * m_ttb + cross * delta_t * delta_t,
        a * m_st + b * m_stb + cross * delta_s * delta_t,
        a * m_dd + b * m_ddb + cross * difference * difference,
        tl.where(second, top_sb + a * delta_s, top_s - b * delta_s),
        tl.where(second, top_tb + a * delta_t, top_t - b * delta_t),
    )


@triton.jit
def weighted_moment_gradient(s, t, z, count, top_s, top_t, of_one, of_s, of_t, of_d):
    """Return dL/ds of a pair from s and t about their means, which are TOP_S and TOP_T of the
    token with nearly all the weight.
    """
    weight = tl.exp(z - count)
    is_top = weight > CERTAIN
    s = tl.where(is_top, top_s, s)
    t = tl.where(is_top, top_t, t)
    return weight * moment_gradient(s, t, of_one, of_s, of_t, of_d)
