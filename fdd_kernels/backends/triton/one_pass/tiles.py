"""One tile of u = softcap(scale * (h W^T + b)) of one layer of one model, f32 whatever the inputs
are, parked in scratch.

Shape suffixes: r rows of a tile, c columns of a tile, D the hidden width. Rows of the hidden states
come in blocks whose number of rows is a multiple of the tile, so that rows need no mask; columns
beyond the last are clamped to it and set to -inf, so that they weigh nothing in a softmax and are
left out of moments.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fdd_kernels.backends.triton.elementwise import tanh


@triton.jit
def tile_values(
    hidden,
    weight,
    bias,
    rows_r,
    columns_c,
    columns,
    width,
    weight_stride,
    scale,
    has_bias,
    PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """scale * (h W^T + b) of the tile (r, c), before any soft cap. `hidden` points at the layer's
    first row of the block.
    """
    clamped_c = tl.minimum(columns_c, columns - 1)
    d = tl.arange(0, BLOCK_D)
    hidden_rd = hidden + rows_r.to(tl.int64)[:, None] * width + d[None, :]
    weight_dc = weight + clamped_c.to(tl.int64)[None, :] * weight_stride + d[:, None]
    x = tl.zeros((BLOCK_R, BLOCK_C), dtype=tl.float32)
    for start in range(0, width, BLOCK_D):
        inside = d < width - start
        h = tl.load(hidden_rd + start, mask=inside[None, :], other=0.0)
        w = tl.load(weight_dc + start, mask=inside[:, None], other=0.0)
        x = tl.dot(h, w.to(h.dtype), x, input_precision=PRECISION)
    if has_bias != 0:
        x += tl.load(bias + clamped_c)[None, :]
    x *= scale
    return tl.where((columns_c < columns)[None, :], x, float("-inf"))


@triton.jit
def soft_capped(x, cap):
    """cap * tanh(x / cap), or x where `cap` is 0."""
    return tl.where(cap > 0, cap * tanh(x / tl.where(cap > 0, cap, 1.0)), x)


@triton.jit
def pivot_of(x_rc, cap):
    """The largest u of each row, 0 where that is not finite. With a soft cap 0: |u| is small, and
    wanted to the last bit.
    """
    largest = tl.max(x_rc, 1)
    return tl.where((tl.abs(largest) < float("inf")) & (cap == 0), largest, 0.0)


@triton.jit
def park_tile(
    tile,
    x_rc,
    pivot_r,
    cap,
    columns_e,
    columns,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Store softcap(x) - shift at `tile`. A soft cap is applied a strip at a time: a whole tile of
    it wants registers.
    """
    r = tl.arange(0, BLOCK_R)
    c = tl.arange(0, BLOCK_C)
    e = tl.arange(0, BLOCK_E)
    tl.store(
        tile + r[:, None] * BLOCK_C + c[None, :], x_rc - tl.where(cap > 0, 0.0, pivot_r)[:, None]
    )
    if cap > 0:
        tl.debug_barrier()  # the strips are laid out over other threads than the tile
        for start in range(0, BLOCK_C, BLOCK_E):
            at = tile + r[:, None] * BLOCK_C + (start + e)[None, :]
            u = soft_capped(tl.load(at), cap) - pivot_r[:, None]
            tl.store(at, tl.where((columns_e + start < columns)[None, :], u, float("-inf")))


@triton.jit
def park_features(
    tile,
    hidden,
    rows_r,
    columns_e,
    columns,
    width,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Store u = h at `tile`: a teacher without a head, whose columns are its hidden width."""
    r = tl.arange(0, BLOCK_R)
    e = tl.arange(0, BLOCK_E)
    hidden_r = hidden + rows_r.to(tl.int64)[:, None] * width
    for start in range(0, BLOCK_C, BLOCK_E):
        inside = (columns_e + start < columns)[None, :]
        u = tl.load(hidden_r + (columns_e + start)[None, :], mask=inside, other=0.0).to(tl.float32)
        tl.store(
            tile + r[:, None] * BLOCK_C + (start + e)[None, :], tl.where(inside, u, float("-inf"))
        )
