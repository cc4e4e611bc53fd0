"""Device functions for dL/du of a sub-tile: from the requests of a slot, from one pair.

Shape suffixes: r rows of a tile, e tokens of a sub-tile.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fdd_kernels.backends.triton.elementwise import mixed_logits, moment_gradient, softmax_gradient
from fdd_kernels.backends.triton.one_pass.moments import vectors
from fdd_kernels.backends.triton.row_statistics import (
    COUNT,
    load_tops,
    moment_coefficients,
    slot_coefficients,
)
from fdd_kernels.backends.triton.weighted_moments import weighted_moment_gradient
from fdd_kernels.backends.triton.work_table import (
    FIRST,
    IS_MIXED,
    SECOND,
    SLOT_A,
    SLOT_B,
    SLOT_FLAGS,
    SLOT_INVERSE,
    table_entry,
    table_float,
)


@triton.jit
def slot_gradient(
    requests,
    grad_requests,
    stride,
    is_valid,
    label_r,
    columns_e,
    u_s,
    tile_t,
    at_re,
    table,
    table_width,
    slot,
    TEACHER: tl.constexpr,
    MIXED: tl.constexpr,
    DIVERGENCE: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Return dL/du of a sub-tile from the requests of one slot."""
    q_r, p_r, d_r, n_r, lse_s, lse_t, _kl_r = slot_coefficients(
        requests, grad_requests, stride, stride, is_valid, table, table_width, slot, BLOCK_R
    )
    inverse = table_float(table, table_width, SLOT_INVERSE, slot)
    a = table_float(table, table_width, SLOT_A, slot)
    b = table_float(table, table_width, SLOT_B, slot)
    log_q = u_s * inverse - lse_s[:, None]
    log_p = log_q
    if TEACHER:
        z_t = tl.load(tile_t + at_re) * inverse
        if MIXED:
            if table_entry(table, table_width, SLOT_FLAGS, slot) & IS_MIXED:
                z_t = mixed_logits(u_s * inverse, z_t, a, b, False)
        log_p = z_t - lse_t[:, None]
    grad = softmax_gradient(
        log_q,
        log_p,
        q_r[:, None],
        p_r[:, None],
        d_r[:, None],
        a,
        b,
        TEACHER,
        DIVERGENCE,
    )
    grad += tl.where(columns_e[None, :] == label_r[:, None], n_r[:, None], 0.0)
    return grad * inverse


@triton.jit
def part_gradient(
    moments,
    grad_moments,
    stride,
    is_valid,
    tile_s,
    tile_t,
    before_s,
    before_t,
    after_s,
    after_t,
    at_re,
    role,
    inverse,
    is_weighted,
    WEIGHTED: tl.constexpr,
):
    """Return dL/du of a sub-tile from one pair that the layer is part of."""
    if role == FIRST:
        s, t, live = vectors(after_s, after_t, tile_s, tile_t, at_re, True, inverse)
    else:
        s, t, live = vectors(tile_s, tile_t, before_s, before_t, at_re, role == SECOND, inverse)
    of_one, of_s, of_t, of_d, mean_s, mean_t = moment_coefficients(
        moments, grad_moments, stride, stride, is_valid, is_weighted, WEIGHTED
    )
    s -= mean_s[:, None]
    t -= mean_t[:, None]
    k_1, k_s, k_t, k_d = of_one[:, None], of_s[:, None], of_t[:, None], of_d[:, None]
    if WEIGHTED:
        if is_weighted != 0:
            second_t = tl.where(role == FIRST, after_t, tile_t)
            z = tl.load(second_t + at_re) * inverse
            count = tl.load(moments + COUNT * stride, mask=is_valid, other=0.0)
            top_s, top_t = load_tops(moments, stride, is_valid)
            grad = weighted_moment_gradient(
                s, t, z, count[:, None], top_s[:, None], top_t[:, None], k_1, k_s, k_t, k_d
            )
        else:
            grad = moment_gradient(s, t, k_1, k_s, k_t, k_d)
    else:
        grad = moment_gradient(s, t, k_1, k_s, k_t, k_d)
    sign = tl.where(role == FIRST, -inverse, inverse)
    return tl.where(live, grad * sign, 0.0)
