"""Second pass: value and slope of the divergences that need both log-sum-exps, summed per range of
columns.

Shape suffixes: r rows of a tile, c columns of a tile, e columns of a strip.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fdd_kernels.backends.triton.elementwise import (
    LSE_S,
    LSE_T,
    REQUEST_FIELDS,
    divergence_grad,
    divergence_value,
)
from fdd_kernels.backends.triton.launch import launch
from fdd_kernels.backends.triton.one_pass.tiles import park_tile, tile_values
from fdd_kernels.backends.triton.work_table import (
    SECOND_INVERSE,
    SECOND_LAYER,
    SECOND_REQUEST,
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
        "tiles_per_range",
        "student_has_bias",
        "teacher_has_bias",
        "ranges",
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
    ranges,
    tiles_per_range,
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
    """sums (ranges, reads of this pass, 2, rows): value and slope; `requests` and `shifts` are the
    first pass's.
    """
    tl.static_assert(TEACHER and not IDENTITY)  # divergences compare two models' predictions
    TILE: tl.constexpr = BLOCK_R * BLOCK_C
    r = tl.arange(0, BLOCK_R)
    c = tl.arange(0, BLOCK_C)
    e = tl.arange(0, BLOCK_E)
    program = tl.program_id(0)
    tile_s = scratch + program.to(tl.int64) * (2 * TILE)
    tile_t = tile_s + TILE
    strip_re = r[:, None] * BLOCK_C + e[None, :]
    live_rows = tl.minimum(tl.load(count) - first, rows)
    row_tiles = tl.cdiv(tl.maximum(live_rows, 0), BLOCK_R)
    row_stride = rows.to(tl.int64)
    statistic_stride = total_rows.to(tl.int64)
    for item in tl.range(program, row_tiles * ranges, tl.num_programs(0), disable_licm=True):
        rows_r = (item % row_tiles) * BLOCK_R + r
        own_sums = sums + (item // row_tiles).to(tl.int64) * seconds * 2 * row_stride + rows_r
        first_tile = (item // row_tiles) * tiles_per_range
        for tile in tl.range(
            first_tile,
            tl.minimum(first_tile + tiles_per_range, tl.cdiv(columns, BLOCK_C)),
            disable_licm=True,
        ):
            columns_c = tile * BLOCK_C + c
            columns_e = tile * BLOCK_C + e
            for second in tl.range(seconds, disable_licm=True):
                layer = table_entry(table, table_width, SECOND_LAYER, second)
                inverse = table_float(table, table_width, SECOND_INVERSE, second)
                request = table_entry(table, table_width, SECOND_REQUEST, second)
                # Loaded again, sooner than held in registers; rows beyond the last compute what
                # nobody reads.
                row_r = tl.load(order + tl.minimum(first + rows_r, total_rows - 1))
                lse = requests + request * REQUEST_FIELDS * statistic_stride + row_r
                tl.debug_barrier()  # the tiles that stood here have been read
                x = tile_values(
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
                pivot_r = tl.load(shifts + layer * statistic_stride + row_r)
                park_tile(
                    tile_s, x, pivot_r, student_cap, columns_e, columns, BLOCK_R, BLOCK_C, BLOCK_E
                )
                x = tile_values(
                    teacher_hidden + layer * row_stride * teacher_width,
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
                pivot_r = tl.load(shifts + (layers + layer) * statistic_stride + row_r)
                park_tile(
                    tile_t, x, pivot_r, teacher_cap, columns_e, columns, BLOCK_R, BLOCK_C, BLOCK_E
                )
                tl.debug_barrier()  # every thread's part of the tiles can be read
                carried = (tl.zeros((BLOCK_R,), dtype=tl.int32) + tile) != first_tile
                value_r = tl.load(own_sums + 2 * second * row_stride, mask=carried, other=0.0)
                slope_r = tl.load(own_sums + (2 * second + 1) * row_stride, mask=carried, other=0.0)
                lse_s = tl.load(lse + LSE_S * statistic_stride)
                lse_t = tl.load(lse + LSE_T * statistic_stride)
                for start in range(0, BLOCK_C, BLOCK_E):
                    log_q = tl.load(tile_s + strip_re + start) * inverse - lse_s[:, None]
                    log_p = tl.load(tile_t + strip_re + start) * inverse - lse_t[:, None]
                    value_r += tl.sum(divergence_value(log_q, log_p, DIVERGENCE), 1)
                    slope_r += tl.sum(divergence_grad(log_q, log_p, DIVERGENCE), 1)
                tl.store(own_sums + 2 * second * row_stride, value_r)
                tl.store(own_sums + (2 * second + 1) * row_stride, slope_r)


def launch_divergence(block, sums, requests, shifts) -> None:
    """Fill `sums` (ranges, reads of this pass, 2, rows) for one block of rows; see `host.Block`."""
    config = block.config
    launch(
        divergence_stats_kernel,
        (block.programs(sums.shape[0]),),
        config.options,
        sums=sums,
        requests=requests,
        shifts=shifts,
        scratch=block.scratch(sums.shape[0], ring=1),
        order=block.order,
        total_rows=requests.shape[-1],
        ranges=sums.shape[0],
        tiles_per_range=block.tiles_per_range,
        seconds=block.table.second_pass,
        DIVERGENCE=block.table.divergence,
        BLOCK_E=config.block_strip,
        **block.arguments(),
    )
