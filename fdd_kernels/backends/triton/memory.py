"""Byte budgets, how they cut rows and columns, and what a call allocates by them. Needs no triton.

`operations.py` cuts its work by the functions of this file, and the planner adds up `memory`.
"""

from __future__ import annotations

import torch

from fdd_kernels.backends.call_shape import FLOAT, CallShape
from fdd_kernels.backends.triton.config import LaunchConfig, choose

MIB = 2**20
BLOCK_BYTES = 256 * MIB  # hidden states of a block of rows, with the student's as a 16-bit operand and their float32 gradient
GRAD_BYTES = 128 * MIB  # dL/dx of that block and some columns
HEAD_BYTES = 128 * MIB  # those columns of the head, and of its gradient
RING = 3  # layers whose tiles a program of the gradient parks
OPERAND = 2  # bytes of a float16 operand
# What is planned for where no device is at hand: an H100.
PLANNED_ARCHITECTURE, PLANNED_MULTIPROCESSORS = "sm_90", 132


def rows_of_a_block(rows: int, layers: int, student: tuple[int, int], teacher: tuple[int, int] | None, tile_rows: int) -> int:
    """Rows of a block within BLOCK_BYTES, whole tiles, in blocks of nearly equal size; `student` and `teacher` are (width,
    itemsize)."""
    width, itemsize = student
    bytes_a_row = width * (itemsize + FLOAT + (OPERAND if itemsize < FLOAT else 0))
    bytes_a_row += teacher[0] * teacher[1] if teacher else 0
    most = max(1, BLOCK_BYTES // (layers * bytes_a_row * tile_rows))
    tiles = -(-rows // tile_rows)
    return -(-tiles // -(-tiles // most)) * tile_rows if tiles else 0


def tiles_of_a_chunk(block_rows: int, layers: int, columns: int, width: int, itemsize: int, tile_columns: int) -> int:
    """Tiles of columns that go through the vendor's products at once, within GRAD_BYTES and HEAD_BYTES."""
    narrow = itemsize < FLOAT
    gradient = layers * block_rows * tile_columns * (OPERAND if narrow else FLOAT)
    head = width * tile_columns * (FLOAT + (OPERAND if narrow else 0))
    return min(max(1, min(GRAD_BYTES // gradient, HEAD_BYTES // head)), -(-columns // tile_columns))


def memory(shape: CallShape) -> dict[str, int]:
    """Bytes of the gradient's pass by part, the larger of the two; gradients and statistics themselves are the caller's."""
    tile = planned_tile(shape)
    item, width, layers = shape.itemsize, shape.student_width, shape.layers
    rows = rows_of_a_block(shape.rows, layers, (width, item), (shape.teacher_width, item), tile.block_rows)
    tiles = tiles_of_a_chunk(rows, layers, shape.columns, width, item, tile.block_columns)
    chunk = tiles * tile.block_columns
    several = rows < shape.rows
    operand = OPERAND if shape.narrow else FLOAT
    programs = min(rows // tile.block_rows * tiles, tile.programs * PLANNED_MULTIPROCESSORS)
    states = (width + shape.teacher_width) * item + width * FLOAT
    states += width * OPERAND if shape.narrow and shape.train_head else 0
    return {
        "hidden states of a block": rows * layers * states,
        "gradient of a block's logits": rows * layers * chunk * operand,
        "columns of the head": chunk * width * (FLOAT if shape.train_head else OPERAND if shape.narrow else 0),
        "sum of the head's gradient": FLOAT * shape.columns * width if shape.narrow and shape.train_head and several else 0,
        "tiles": programs * RING * 2 * tile.block_rows * tile.block_columns * FLOAT,
    }


def planned_tile(shape: CallShape) -> LaunchConfig:
    """The launch configuration of such a call on the device that is planned for."""
    dtype = torch.bfloat16 if shape.narrow else torch.float32
    widths = shape.student_width, shape.teacher_width
    return choose((shape.rows, shape.columns, *widths), dtype, PLANNED_ARCHITECTURE)
