"""Gather valid rows into contiguous blocks, and put gradients back at the caller's rows.

The number of valid rows stays on the device.

Shape suffixes: L layers, R rows of the caller, r rows of a block, D a hidden width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fdd_kernels.backends.triton.launch import SMALL, Launch, launch

TILE_ROWS, TILE_WIDTH = 16, 128
LAYERS_A_LAUNCH = 8  # pointers of the kernel


@triton.jit
def layer_pointer(layer, h0, h1, h2, h3, h4, h5, h6, h7):
    """Choose the pointer of a layer: the states of each layer are a tensor."""
    pointer = h0
    if layer == 1:
        pointer = h1
    if layer == 2:
        pointer = h2
    if layer == 3:
        pointer = h3
    if layer == 4:
        pointer = h4
    if layer == 5:
        pointer = h5
    if layer == 6:
        pointer = h6
    if layer == 7:
        pointer = h7
    return pointer


@triton.jit(
    do_not_specialize=["first", "rows", "width", "hidden_row_stride", "hidden_column_stride"]
)
def move_rows_kernel(
    h0,
    h1,
    h2,
    h3,
    h4,
    h5,
    h6,
    h7,
    block_LrD,
    order_R,
    count,
    scale,
    first,
    rows,
    width,
    hidden_row_stride,
    hidden_column_stride,
    INTO_BLOCK: tl.constexpr,
    SCALED: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_WIDTH: tl.constexpr,
):
    """Copy row order[first + i] of a layer's states (axis 2) to row i of the block, or back.

    Beyond `count` rows the block is 0 and nothing is put back. Numbers that are put back are
    divided by `scale` where SCALED.
    """
    layer = tl.program_id(2)
    hidden_RD = layer_pointer(layer, h0, h1, h2, h3, h4, h5, h6, h7)
    block_rD = block_LrD + layer.to(tl.int64) * rows * width
    r = tl.program_id(0) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    d = tl.program_id(1) * TILE_WIDTH + tl.arange(0, TILE_WIDTH)
    is_valid = (r < rows) & (first + r < tl.load(count))
    row = tl.load(order_R + first + r, mask=is_valid, other=0).to(tl.int64)
    hidden = (
        hidden_RD
        + row[:, None] * hidden_row_stride
        + d[None, :].to(tl.int64) * hidden_column_stride
    )
    block = block_rD + r[:, None].to(tl.int64) * width + d[None, :]
    inside = d[None, :] < width
    if INTO_BLOCK:
        values = tl.load(hidden, mask=is_valid[:, None] & inside, other=0.0)
        tl.store(block, values.to(block_LrD.dtype.element_ty), mask=(r < rows)[:, None] & inside)
    else:
        values = tl.load(block, mask=is_valid[:, None] & inside, other=0.0)
        if SCALED:
            values = values / tl.load(scale)
        tl.store(hidden, values.to(h0.dtype.element_ty), mask=is_valid[:, None] & inside)


def order_of_rows(valid: Tensor | None, rows: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return a stable permutation (R,) with valid rows first, and their count (1,): int32, on the
    device.
    """
    if valid is None:
        return torch.arange(rows, dtype=torch.int32, device=device), torch.full(
            (1,), rows, dtype=torch.int32, device=device
        )
    order = torch.argsort(valid.logical_not().to(torch.uint8), stable=True).to(torch.int32)
    return order, valid.sum(dtype=torch.int32).reshape(1)


def move_rows(
    states: Sequence[Tensor | None],
    block_LrD: Tensor,
    order_R: Tensor,
    count: Tensor,
    first: int,
    *,
    into_block: bool,
    scale: Tensor | None = None,
) -> None:
    """Copy rows of `states` (R, D) into the layers of a block, or out of it divided by `scale`.

    Dtypes are converted. None stands for a layer that is left alone. One launch moves up to
    LAYERS_A_LAUNCH neighbouring layers of one dtype and layout.
    """
    _, rows, width = block_LrD.shape
    begin = 0
    while begin < len(states):
        one, stop = states[begin], begin + 1
        while (
            one is not None
            and stop < min(len(states), begin + LAYERS_A_LAUNCH)
            and _alike(one, states[stop])
        ):
            stop += 1
        if one is not None:
            pointers = [states[min(begin + i, stop - 1)] for i in range(LAYERS_A_LAUNCH)]
            grid = (triton.cdiv(rows, TILE_ROWS), triton.cdiv(width, TILE_WIDTH), stop - begin)
            arguments = {
                **{f"h{i}": pointer for i, pointer in enumerate(pointers)},
                "block_LrD": block_LrD[begin:stop],
                "order_R": order_R,
                "count": count,
                "scale": count if scale is None else scale,
                "first": first,
                "rows": rows,
                "width": width,
                "hidden_row_stride": one.stride(0),
                "hidden_column_stride": one.stride(1),
                "INTO_BLOCK": into_block,
                "SCALED": scale is not None,
                "TILE_ROWS": TILE_ROWS,
                "TILE_WIDTH": TILE_WIDTH,
            }
            launch(Launch(move_rows_kernel, grid, SMALL, arguments))
        begin = stop


def _alike(first: Tensor, second: Tensor | None) -> bool:
    return second is not None and (first.dtype, first.stride()) == (second.dtype, second.stride())
