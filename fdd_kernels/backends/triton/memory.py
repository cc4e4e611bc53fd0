"""The bytes that a call allocates by each strategy, and the budgets of the one-pass kernels.

`one_pass/blocks.py` cuts its work by the functions of this file, the other strategies by those of
`strategy.py`; the planner adds up `memory`. Needs no triton.
"""

from __future__ import annotations

import torch

from fdd_kernels.backends.call_shape import FLOAT, CallShape
from fdd_kernels.backends.triton.config import LaunchConfig, choose
from fdd_kernels.backends.triton.strategy import (
    cache_budget,
    chosen_strategy,
    gradient_tokens,
    padded,
    rows_of_cache,
    slabs_of,
)
from fdd_kernels.common.sizes import MIB

BLOCK_BYTES = 256 * MIB  # hidden states of a block of rows, with the student's float32 gradient
GRAD_BYTES = 128 * MIB  # dL/dlogits of that block and a chunk of tokens
HEAD_BYTES = 128 * MIB  # the head's gradient of those tokens
RING = 3  # layers whose tiles a program of the gradient parks
# The device that is planned for where none is at hand: an H100.
PLANNED_ARCHITECTURE, PLANNED_MULTIPROCESSORS = "sm_90", 132


def rows_of_a_block(
    rows: int,
    layers: int,
    student: tuple[int, int],
    teacher: tuple[int, int] | None,
    tile_rows: int,
) -> int:
    """Return the rows of a block within BLOCK_BYTES: whole tiles, blocks of nearly equal size.

    `student` and `teacher` are (width, itemsize).
    """
    bytes_a_row = student[0] * (student[1] + FLOAT) + (teacher[0] * teacher[1] if teacher else 0)
    most = max(1, BLOCK_BYTES // (layers * bytes_a_row * tile_rows))
    tiles = -(-rows // tile_rows)
    return -(-tiles // -(-tiles // most)) * tile_rows if tiles else 0


def tiles_of_a_chunk(
    block_rows: int, layers: int, columns: int, width: int, itemsize: int, tile_columns: int
) -> int:
    """Return the tiles of a chunk of tokens, which goes through the vendor's GEMMs at once.

    It is within GRAD_BYTES and HEAD_BYTES.
    """
    gradient, head = layers * block_rows * tile_columns * itemsize, width * tile_columns * FLOAT
    return min(max(1, min(GRAD_BYTES // gradient, HEAD_BYTES // head)), -(-columns // tile_columns))


def memory(shape: CallShape) -> dict[str, int]:
    """Return the bytes that a training call allocates by part, by the strategy that it takes.

    Gradients and statistics are the caller's.
    """
    shape = shape.with_equal_layers()  # as the kernels take the states
    asked, budget = chosen_strategy(), cache_budget(shape.device_memory)
    rows = rows_of_cache(shape, budget) if asked in ("auto", "cached") else 0
    if rows:
        return _with_logits(shape, rows, padded(shape.columns))
    slabs = slabs_of(shape, budget) if asked != "one_pass" else None
    return _one_pass(shape) if slabs is None else _with_logits(shape, slabs.rows, slabs.tokens)


def _with_logits(shape: CallShape, rows: int, tokens: int) -> dict[str, int]:
    """Return the bytes where scratch holds the logits of `rows` rows and `tokens` tokens."""
    layers, width, item = shape.layers, shape.student_width, shape.itemsize
    slab = min(gradient_tokens(rows, layers, shape.columns, item), tokens)
    trained = shape.narrow and shape.train_head
    return {
        "logits": FLOAT * shape.heads * layers * rows * padded(tokens),
        "hidden states of a block": layers
        * rows
        * ((width + shape.teacher_width) * item + width * FLOAT),
        "gradient of a block's logits": layers * rows * slab * item,
        "chunk of the head's gradient": FLOAT * slab * width
        if trained and rows >= shape.rows
        else 0,
        "sum of the head's gradient": FLOAT * shape.columns * width
        if trained and rows < shape.rows
        else 0,
    }


def _one_pass(shape: CallShape) -> dict[str, int]:
    """Return the bytes of the one-pass kernels."""
    tile = planned_tile(shape)
    layers, width, item = shape.layers, shape.student_width, shape.itemsize
    rows = rows_of_a_block(
        shape.rows, layers, (width, item), (shape.teacher_width, item), tile.block_rows
    )
    tiles = tiles_of_a_chunk(rows, layers, shape.columns, width, item, tile.block_columns)
    chunk = tiles * tile.block_columns
    programs = min(rows // tile.block_rows * tiles, tile.programs * PLANNED_MULTIPROCESSORS)
    summed = shape.narrow and shape.train_head and rows < shape.rows
    return {
        "hidden states of a block": rows
        * layers
        * ((width + shape.teacher_width) * item + width * FLOAT),
        "gradient of a block's logits": rows * layers * chunk * item,
        "chunk of the head's gradient": FLOAT * chunk * width if shape.train_head else 0,
        "sum of the head's gradient": FLOAT * shape.columns * width if summed else 0,
        "tiles": programs * RING * 2 * tile.block_rows * tile.block_columns * FLOAT,
    }


def planned_tile(shape: CallShape) -> LaunchConfig:
    """Return the launch configuration of the one-pass kernels on the device that is planned for."""
    dtype = torch.bfloat16 if shape.narrow else torch.float32
    widths = shape.student_width, shape.teacher_width
    return choose((shape.rows, shape.columns, *widths), dtype, PLANNED_ARCHITECTURE)
