"""One tile of u = softcap(scale * (h W^T + b)) of one layer of one model, f32 whatever the inputs are.

Shape suffixes: r rows of a tile, c columns of a tile, D the hidden width. Rows of the hidden states come in blocks whose
number of rows is a multiple of the tile, so that rows need no mask; columns beyond the last are clamped to it and set to
-inf, so that they weigh nothing in a softmax and are left out of moments.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fdd_kernels.backends.triton.divergences import tanh


@triton.jit
def tile_values(
    hidden, weight, bias, rows_r, columns_c, columns, width, weight_stride, scale, cap, has_bias,
    IDENTITY: tl.constexpr, PRECISION: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """u of the tile (r, c). `hidden` points at the layer's first row of the block; `cap` 0: none; IDENTITY: u = h."""
    clamped_c = tl.minimum(columns_c, columns - 1)
    hidden_r = hidden + rows_r.to(tl.int64)[:, None] * width
    if IDENTITY:
        u = tl.load(hidden_r + clamped_c[None, :]).to(tl.float32)
    else:
        d = tl.arange(0, BLOCK_D)
        hidden_rd = hidden_r + d[None, :]
        weight_dc = weight + clamped_c.to(tl.int64)[None, :] * weight_stride + d[:, None]
        u = tl.zeros((BLOCK_R, BLOCK_C), dtype=tl.float32)
        for start in range(0, width, BLOCK_D):
            inside = d < width - start
            h = tl.load(hidden_rd + start, mask=inside[None, :], other=0.0)
            w = tl.load(weight_dc + start, mask=inside[:, None], other=0.0)
            u = tl.dot(h, w.to(h.dtype), u, input_precision=PRECISION)
        if has_bias != 0:
            u += tl.load(bias + clamped_c)[None, :]
        u *= scale
        if cap > 0:
            u = cap * tanh(u / cap)
    return tl.where((columns_c < columns)[None, :], u, float("-inf"))


@triton.jit
def finite_max(u_rc):
    """The largest value of each row, 0 where that is not finite."""
    largest = tl.max(u_rc, 1)
    return tl.where(tl.abs(largest) < float("inf"), largest, 0.0)


@triton.jit
def table_entry(table, table_width, ROW: tl.constexpr, index):
    return tl.load(table + ROW * table_width + index)


@triton.jit
def table_float(table, table_width, ROW: tl.constexpr, index):
    return tl.load(table + ROW * table_width + index).to(tl.float32, bitcast=True)
