"""Rows that count, gathered into contiguous blocks, and gradients put back; how many they are stays on the device.

Shape suffixes: R rows of the caller, r rows of a block, D a hidden width.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fdd_kernels.backends.triton.launch import SMALL, launch

TILE_ROWS, TILE_WIDTH = 16, 128


@triton.jit(do_not_specialize=["first", "rows", "width", "hidden_row_stride", "hidden_column_stride"])
def move_rows_kernel(
    hidden_RD, block_rD, order_R, count, scale, first, rows, width, hidden_row_stride, hidden_column_stride,
    INTO_BLOCK: tl.constexpr, SCALED: tl.constexpr, TILE_ROWS: tl.constexpr, TILE_WIDTH: tl.constexpr,
):  # fmt: skip
    """Row i of the block is row order[first + i] of `hidden`; beyond `count` rows the block is 0 and nothing is put back.

    Out of the block, values are divided by `scale` where SCALED.
    """
    r = tl.program_id(0) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    d = tl.program_id(1) * TILE_WIDTH + tl.arange(0, TILE_WIDTH)
    counts = (r < rows) & (first + r < tl.load(count))
    row = tl.load(order_R + first + r, mask=counts, other=0).to(tl.int64)
    hidden = hidden_RD + row[:, None] * hidden_row_stride + d[None, :].to(tl.int64) * hidden_column_stride
    block = block_rD + r[:, None].to(tl.int64) * width + d[None, :]
    inside = d[None, :] < width
    if INTO_BLOCK:
        values = tl.load(hidden, mask=counts[:, None] & inside, other=0.0)
        tl.store(block, values.to(block_rD.dtype.element_ty), mask=(r < rows)[:, None] & inside)
    else:
        values = tl.load(block, mask=counts[:, None] & inside, other=0.0)
        if SCALED:
            values = values / tl.load(scale)
        tl.store(hidden, values.to(hidden_RD.dtype.element_ty), mask=counts[:, None] & inside)


def order_of_rows(valid: Tensor | None, rows: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The rows that count first, each part in its order (R,), and how many they are (1,): int32, on the device."""
    if valid is None:
        return torch.arange(rows, dtype=torch.int32, device=device), torch.full((1,), rows, dtype=torch.int32, device=device)
    order = torch.argsort(valid.logical_not().to(torch.uint8), stable=True).to(torch.int32)
    return order, valid.sum(dtype=torch.int32).reshape(1)


def move_rows(hidden_RD: Tensor, block_rD: Tensor, order_R: Tensor, count: Tensor, first: int, *, into_block: bool,
              scale: Tensor | None = None) -> None:  # fmt: skip
    """Copy rows into a block, or out of it divided by `scale`, converting between their dtypes."""
    rows, width = block_rD.shape
    launch(
        move_rows_kernel, (triton.cdiv(rows, TILE_ROWS), triton.cdiv(width, TILE_WIDTH)), SMALL, hidden_RD=hidden_RD,
        block_rD=block_rD, order_R=order_R, count=count, scale=count if scale is None else scale, first=first, rows=rows,
        width=width, hidden_row_stride=hidden_RD.stride(0), hidden_column_stride=hidden_RD.stride(1),
        INTO_BLOCK=into_block, SCALED=scale is not None, TILE_ROWS=TILE_ROWS, TILE_WIDTH=TILE_WIDTH,
    )  # fmt: skip
