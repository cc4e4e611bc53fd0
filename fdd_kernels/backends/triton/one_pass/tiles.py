"""A tile of u = softcap(scale * (h W^T + b)) of one layer of one model, float32, parked in scratch.

Hidden states come in blocks whose number of rows is a multiple of the tile's, so rows need no mask.
Tokens beyond the last are clamped to it and set to -inf: they weigh nothing in a softmax and
moments leave them out.

Shape suffixes: r rows of a tile, c tokens of a tile, e tokens of a sub-tile, D the hidden width.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fdd_kernels.backends.triton.elementwise import tanh


@triton.jit
def tile_logits(
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
    """Return scale * (h W^T + b) of the tile (r, c), before any soft cap.

    `hidden` points at the layer's first row of the block.
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
    """Return cap * tanh(x / cap), or x where `cap` is 0."""
    return tl.where(cap > 0, cap * tanh(x / tl.where(cap > 0, cap, 1.0)), x)


@triton.jit
def row_max(x_rc, cap):
    """Return the largest u of each row, 0 where that is not finite.

    0 under a soft cap: capped logits are small, and subtracting a shift would cost precision.
    """
    largest = tl.max(x_rc, 1)
    return tl.where((tl.abs(largest) < float("inf")) & (cap == 0), largest, 0.0)


@triton.jit
def park_tile(
    tile,
    x_rc,
    shift_r,
    cap,
    columns_e,
    columns,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Store softcap(x) - shift at `tile`.

    A soft cap is applied a sub-tile at a time: over a whole tile it would spill.
    """
    r = tl.arange(0, BLOCK_R)
    c = tl.arange(0, BLOCK_C)
    e = tl.arange(0, BLOCK_E)
    tl.store(
        tile + r[:, None] * BLOCK_C + c[None, :], x_rc - tl.where(cap > 0, 0.0, shift_r)[:, None]
    )
    if cap > 0:
        tl.debug_barrier()  # sub-tiles are laid out over other threads than the tile
        for start in range(0, BLOCK_C, BLOCK_E):
            at = tile + r[:, None] * BLOCK_C + (start + e)[None, :]
            u = soft_capped(tl.load(at), cap) - shift_r[:, None]
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
    """Store u = h at `tile`: a teacher without a head, whose hidden width stands for V."""
    r = tl.arange(0, BLOCK_R)
    e = tl.arange(0, BLOCK_E)
    hidden_r = hidden + rows_r.to(tl.int64)[:, None] * width
    for start in range(0, BLOCK_C, BLOCK_E):
        inside = (columns_e + start < columns)[None, :]
        u = tl.load(hidden_r + (columns_e + start)[None, :], mask=inside, other=0.0).to(tl.float32)
        tl.store(
            tile + r[:, None] * BLOCK_C + (start + e)[None, :], tl.where(inside, u, float("-inf"))
        )
