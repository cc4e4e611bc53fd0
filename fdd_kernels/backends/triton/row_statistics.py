"""Device functions that load and store numbers of rows: statistics, and coefficients of gradients.

They take a pointer to the rows and the stride from one statistic to the next. The places of
statistics are those of `fdd_kernels/lens/layout.py`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fdd_kernels.backends.triton.work_table import (
    KIND_KL,
    KIND_LSE,
    KIND_NLL,
    KIND_OTHER,
    REQUEST_BEGIN,
    REQUEST_INDEX,
    REQUEST_KIND,
    table_entry,
)
from fdd_kernels.lens import layout

REQUEST_FIELDS = tl.constexpr(layout.REQUEST_STATS)
MOMENT_FIELDS = tl.constexpr(layout.MOMENT_STATS)
LSE_S, LSE_T = tl.constexpr(layout.LSE_S), tl.constexpr(layout.LSE_T)
VALUE, GRAD_SUM = tl.constexpr(layout.VALUE), tl.constexpr(layout.GRAD_SUM)
COUNT, MEAN_S = tl.constexpr(layout.COUNT), tl.constexpr(layout.MEAN_S)
MEAN_T, M_SS = tl.constexpr(layout.MEAN_T), tl.constexpr(layout.M_SS)
M_TT, M_ST = tl.constexpr(layout.M_TT), tl.constexpr(layout.M_ST)
M_DD, TOP_S = tl.constexpr(layout.M_DD), tl.constexpr(layout.TOP_S)
TOP_T = tl.constexpr(layout.TOP_T)


@triton.jit
def load_moments(moments, stride, mask):
    """Load the moments of a pair per row, but TOP_S and TOP_T; 0 where masked."""
    return (
        tl.load(moments + COUNT * stride, mask=mask, other=0.0),
        tl.load(moments + MEAN_S * stride, mask=mask, other=0.0),
        tl.load(moments + MEAN_T * stride, mask=mask, other=0.0),
        tl.load(moments + M_SS * stride, mask=mask, other=0.0),
        tl.load(moments + M_TT * stride, mask=mask, other=0.0),
        tl.load(moments + M_ST * stride, mask=mask, other=0.0),
        tl.load(moments + M_DD * stride, mask=mask, other=0.0),
    )


@triton.jit
def store_moments(moments, stride, mask, count, mean_s, mean_t, m_ss, m_tt, m_st, m_dd):
    """Store the moments of a pair per row, but TOP_S and TOP_T; `mask` may be None."""
    tl.store(moments + COUNT * stride, count, mask=mask)
    tl.store(moments + MEAN_S * stride, mean_s, mask=mask)
    tl.store(moments + MEAN_T * stride, mean_t, mask=mask)
    tl.store(moments + M_SS * stride, m_ss, mask=mask)
    tl.store(moments + M_TT * stride, m_tt, mask=mask)
    tl.store(moments + M_ST * stride, m_st, mask=mask)
    tl.store(moments + M_DD * stride, m_dd, mask=mask)


@triton.jit
def load_tops(moments, stride, mask):
    """Load TOP_S and TOP_T of a pair per row, 0 where masked."""
    top_s = tl.load(moments + TOP_S * stride, mask=mask, other=0.0)
    return top_s, tl.load(moments + TOP_T * stride, mask=mask, other=0.0)


@triton.jit
def store_tops(moments, stride, mask, top_s, top_t):
    """Store TOP_S and TOP_T of a pair per row; `mask` may be None."""
    tl.store(moments + TOP_S * stride, top_s, mask=mask)
    tl.store(moments + TOP_T * stride, top_t, mask=mask)


@triton.jit
def store_request(
    request, stride, mask, kind, lse_s, lse_t, mean_s, mean_t, DIVERGENCE: tl.constexpr
):
    """Store the statistics of a request that one pass over the vocabulary gives, but NLL's value.

    `mean_s` is the expectation of z_s - z_t under q, `mean_t` that of z_t - z_s under p:
    KL(p || q) = mean_t + lse_s - lse_t, KL(q || p) = mean_s + lse_t - lse_s. A negative result is
    rounding of models that nearly agree. `mask` may be None.
    """
    tl.store(request + LSE_S * stride, lse_s, mask=mask)
    if kind != KIND_NLL:
        tl.store(request + LSE_T * stride, lse_t, mask=mask)
        if kind == KIND_KL:
            value = mean_t + (lse_s - lse_t)
            value = tl.where(value < 0, 0.0, value)
            tl.store(request + VALUE * stride, value, mask=mask)
            tl.store(request + GRAD_SUM * stride, -1.0, mask=mask)
        if DIVERGENCE == "reverse_kl" and kind == KIND_OTHER:
            value = mean_s + (lse_t - lse_s)
            value = tl.where(value < 0, 0.0, value)
            tl.store(request + VALUE * stride, value, mask=mask)
            tl.store(request + GRAD_SUM * stride, value + 1.0, mask=mask)


@triton.jit
def slot_coefficients(
    requests,
    grad_requests,
    stride,
    grad_stride,
    is_valid,
    table,
    table_width,
    slot,
    BLOCK_R: tl.constexpr,
):
    """Return per row the coefficients of a slot's dL/dz: of q, p, the divergence's grad, the label.

    With them come both log-sum-exps and the value of KL, infinite without a request of KL; all
    (BLOCK_R,). `requests` and `grad_requests` point at the rows. Invalid rows get 0.
    """
    q_r = tl.zeros((BLOCK_R,), dtype=tl.float32)
    kl = q_r + float("inf")
    p_r, grad_r, label_r, lse_s, lse_t = q_r, q_r, q_r, q_r, q_r
    for entry in range(
        table_entry(table, table_width, REQUEST_BEGIN, slot),
        table_entry(table, table_width, REQUEST_BEGIN, slot + 1),
    ):
        kind = table_entry(table, table_width, REQUEST_KIND, entry)
        index = table_entry(table, table_width, REQUEST_INDEX, entry) * REQUEST_FIELDS
        request = requests + index * stride
        grad_request = grad_requests + index * grad_stride
        lse_s = tl.load(request + LSE_S * stride, mask=is_valid, other=0.0)
        q_r += tl.load(grad_request + LSE_S * grad_stride, mask=is_valid, other=0.0)
        if kind != KIND_LSE:
            upstream = tl.load(grad_request + VALUE * grad_stride, mask=is_valid, other=0.0)
            if kind == KIND_NLL:
                q_r += upstream
                label_r -= upstream
            else:
                q_r -= upstream * tl.load(request + GRAD_SUM * stride, mask=is_valid, other=0.0)
                if kind == KIND_KL:
                    p_r -= upstream
                    kl = tl.load(request + VALUE * stride, mask=is_valid, other=float("inf"))
                else:
                    grad_r += upstream
        if kind != KIND_NLL:
            lse_t = tl.load(request + LSE_T * stride, mask=is_valid, other=0.0)
    return q_r, p_r, grad_r, label_r, lse_s, lse_t, kl


@triton.jit
def moment_coefficients(
    moments, grad_moments, stride, grad_stride, is_valid, is_weighted, WEIGHTED: tl.constexpr
):
    """Return per row the coefficients of dL/ds of a pair: of 1, s - mean_s, t - mean_t, their
    difference; and both means.

    `moments` and `grad_moments` point at the rows of one pair. `is_weighted` is looked at where
    WEIGHTED. Invalid rows get 0.
    """
    mean_s = tl.load(moments + MEAN_S * stride, mask=is_valid, other=0.0)
    mean_t = tl.load(moments + MEAN_T * stride, mask=is_valid, other=0.0)
    of_one = tl.load(grad_moments + MEAN_S * grad_stride, mask=is_valid, other=0.0)
    count = tl.maximum(tl.load(moments + COUNT * stride, mask=is_valid, other=1.0), 1.0)
    if WEIGHTED:
        count = tl.where(is_weighted != 0, 1.0, count)
    of_one /= count
    of_s = 2.0 * tl.load(grad_moments + M_SS * grad_stride, mask=is_valid, other=0.0)
    of_t = tl.load(grad_moments + M_ST * grad_stride, mask=is_valid, other=0.0)
    of_d = 2.0 * tl.load(grad_moments + M_DD * grad_stride, mask=is_valid, other=0.0)
    return of_one, of_s, of_t, of_d, mean_s, mean_t
