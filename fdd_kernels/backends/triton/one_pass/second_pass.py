"""Second pass: VALUE and GRAD_SUM of divergences that need both log-sum-exps, summed per split.

Shape suffixes: r rows of a tile, c tokens of a tile, e tokens of a sub-tile.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fdd_kernels.backends.triton.elementwise import divergence_grad, divergence_value
from fdd_kernels.backends.triton.launch import Launch
from fdd_kernels.backends.triton.one_pass.tiles import park_tile, tile_logits
from fdd_kernels.backends.triton.row_statistics import (
    LSE_S,
    LSE_T,
    REQUEST_FIELDS,
)
from fdd_kernels.backends.triton.work_table import (
    SECOND_LAYER,
    SECOND_REQUEST,
    SECOND_SLOT,
    SLOT_A,
    SLOT_B,
    SLOT_INVERSE,
    TEACHER_LAYER,
    table_entry,
    table_float,
)


@triton.jit(
    do_not_specialize=[
        "first",
        "rows",
        "total_rows",
        "columns",
        "layers",
        "table_width",
        "tiles_per_split",
        "student_has_bias",
        "teacher_has_bias",
        "splits",
        "seconds",
    ]
)
def divergence_stats_kernel(
    sums,
    requests,
    shifts,
    scratch,
    table,
    count,
    order,
    student_hidden,
    student_weight,
    student_bias,
    teacher_hidden,
    teacher_weight,
    teacher_bias,
    first,
    rows,
    total_rows,
    columns,
    layers,
    student_width,
    student_stride,
    student_scale,
    student_cap,
    student_has_bias,
    teacher_width,
    teacher_stride,
    teacher_scale,
    teacher_cap,
    teacher_has_bias,
    table_width,
    splits,
    tiles_per_split,
    seconds,
    TEACHER: tl.constexpr,
    IDENTITY: tl.constexpr,
    DIVERGENCE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Fill sums (splits, requests of this pass, 2, rows) with VALUE and GRAD_SUM.

    `requests` and `shifts` are those of the first pass.
    """
    tl.static_assert(TEACHER and not IDENTITY)  # divergences compare two models' predictions
    TILE: tl.constexpr = BLOCK_R * BLOCK_C
    r = tl.arange(0, BLOCK_R)
    c = tl.arange(0, BLOCK_C)
    e = tl.arange(0, BLOCK_E)
    program = tl.program_id(0)
    tile_s = scratch + program.to(tl.int64) * (2 * TILE)
    tile_t = tile_s + TILE
    at_re = r[:, None] * BLOCK_C + e[None, :]
    live_rows = tl.minimum(tl.load(count) - first, rows)
    row_tiles = tl.cdiv(tl.maximum(live_rows, 0), BLOCK_R)
    row_stride = rows.to(tl.int64)
    statistic_stride = total_rows.to(tl.int64)
    for item in tl.range(program, row_tiles * splits, tl.num_programs(0), disable_licm=True):
        rows_r = (item % row_tiles) * BLOCK_R + r
        own_sums = sums + (item // row_tiles).to(tl.int64) * seconds * 2 * row_stride + rows_r
        first_tile = (item // row_tiles) * tiles_per_split
        for tile in tl.range(
            first_tile,
            tl.minimum(first_tile + tiles_per_split, tl.cdiv(columns, BLOCK_C)),
            disable_licm=True,
        ):
            columns_c = tile * BLOCK_C + c
            columns_e = tile * BLOCK_C + e
            for second in tl.range(seconds, disable_licm=True):
                layer = table_entry(table, table_width, SECOND_LAYER, second)
                slot = table_entry(table, table_width, SECOND_SLOT, second)
                inverse = table_float(table, table_width, SLOT_INVERSE, slot)
                a = table_float(table, table_width, SLOT_A, slot)
                b = table_float(table, table_width, SLOT_B, slot)
                request = table_entry(table, table_width, SECOND_REQUEST, second)
                # Loaded again rather than held in registers. Rows beyond the last compute numbers
                # that nobody looks at.
                row_r = tl.load(order + tl.minimum(first + rows_r, total_rows - 1))
                lse = requests + request * REQUEST_FIELDS * statistic_stride + row_r
                tl.debug_barrier()  # the tiles that stood here have been read
                x = tile_logits(
                    student_hidden + layer * row_stride * student_width,
                    student_weight,
                    student_bias,
                    rows_r,
                    columns_c,
                    columns,
                    student_width,
                    student_stride,
                    student_scale,
                    student_has_bias,
                    PRECISION,
                    BLOCK_R,
                    BLOCK_C,
                    BLOCK_D,
                )
                shift_r = tl.load(shifts + layer * statistic_stride + row_r)
                park_tile(
                    tile_s, x, shift_r, student_cap, columns_e, columns, BLOCK_R, BLOCK_C, BLOCK_E
                )
                teacher_layer = table_entry(table, table_width, TEACHER_LAYER, layer)
                x = tile_logits(
                    teacher_hidden + teacher_layer * row_stride * teacher_width,
                    teacher_weight,
                    teacher_bias,
                    rows_r,
                    columns_c,
                    columns,
                    teacher_width,
                    teacher_stride,
                    teacher_scale,
                    teacher_has_bias,
                    PRECISION,
                    BLOCK_R,
                    BLOCK_C,
                    BLOCK_D,
                )
                shift_r = tl.load(shifts + (layers + teacher_layer) * statistic_stride + row_r)
                park_tile(
                    tile_t, x, shift_r, teacher_cap, columns_e, columns, BLOCK_R, BLOCK_C, BLOCK_E
                )
                tl.debug_barrier()  # every thread's part of the tiles can be read
                carried = (tl.zeros((BLOCK_R,), dtype=tl.int32) + tile) != first_tile
                value_r = tl.load(own_sums + 2 * second * row_stride, mask=carried, other=0.0)
                grad_sum_r = tl.load(
                    own_sums + (2 * second + 1) * row_stride, mask=carried, other=0.0
                )
                lse_s = tl.load(lse + LSE_S * statistic_stride)
                lse_t = tl.load(lse + LSE_T * statistic_stride)
                for start in range(0, BLOCK_C, BLOCK_E):
                    log_q = tl.load(tile_s + at_re + start) * inverse - lse_s[:, None]
                    log_p = tl.load(tile_t + at_re + start) * inverse - lse_t[:, None]
                    value_r += tl.sum(divergence_value(log_q, log_p, a, b, DIVERGENCE), 1)
                    grad_sum_r += tl.sum(divergence_grad(log_q, log_p, a, b, DIVERGENCE), 1)
                tl.store(own_sums + 2 * second * row_stride, value_r)
                tl.store(own_sums + (2 * second + 1) * row_stride, grad_sum_r)


def divergence_launch(block, sums, requests, shifts) -> Launch:
    """Fill `sums` for a `RowBlock`."""
    arguments = {
        **block.arguments(),
        "sums": sums,
        "requests": requests,
        "shifts": shifts,
        "scratch": block.scratch(sums.shape[0], ring=1),
        "order": block.order,
        "total_rows": requests.shape[-1],
        "splits": sums.shape[0],
        "tiles_per_split": block.tiles_per_split,
        "seconds": block.table.second_pass,
        "DIVERGENCE": block.table.divergence,
    }
    grid = (block.programs(sums.shape[0]),)
    return Launch(divergence_stats_kernel, grid, block.config.options, arguments)
