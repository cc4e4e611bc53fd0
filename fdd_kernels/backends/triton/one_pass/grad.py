"""The gradient with respect to x = h W^T + b, one block of rows and tokens at a time.

A program owns a tile of rows and tokens and walks all layers. It computes the tiles of u - shift of
both models again and parks them in a ring of three layers in its scratch: the moments of a pair tie
dL/du of a layer to the layers beside it. With coefficients per row (`elementwise.py`), dL/dz of a
slot is a q + b p + d grad(log_q, log_p) + n [token = label], and dL/ds of a pair, about the means,
2 g_SS s + g_ST t + g_MEAN / count + 2 g_DD (s - t), with sign - at its first layer; where tokens
have weights, w (2 g_SS s + g_ST t + g_MEAN + 2 g_DD (s - t)).

Shape suffixes: r rows of a tile, c tokens of a tile, e tokens of a sub-tile.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fdd_kernels.backends.triton.launch import Launch
from fdd_kernels.backends.triton.memory import RING
from fdd_kernels.backends.triton.one_pass.sub_tiles import part_gradient, slot_gradient
from fdd_kernels.backends.triton.one_pass.tiles import park_features, park_tile, tile_logits
from fdd_kernels.backends.triton.row_statistics import (
    MOMENT_FIELDS,
)
from fdd_kernels.backends.triton.work_table import (
    PAIR_INVERSE,
    PAIR_WEIGHTED,
    PART_BEGIN,
    PART_INDEX,
    PART_ROLE,
    SLOT_BEGIN,
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
        "student_has_bias",
        "teacher_has_bias",
        "first_tile",
        "tiles",
        "grad_width",
    ]
)
def lens_grad_kernel(
    grad,
    requests,
    moments,
    grad_requests,
    grad_moments,
    shifts,
    grad_scale,
    scratch,
    table,
    count,
    order,
    labels,
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
    first_tile,
    tiles,
    grad_width,
    TEACHER: tl.constexpr,
    IDENTITY: tl.constexpr,
    MOMENTS: tl.constexpr,
    WEIGHTED: tl.constexpr,
    MIXED: tl.constexpr,
    DIVERGENCE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Store grad (L, rows, grad_width) = grad_scale * dL/dx for `tiles` tiles from `first_tile`."""
    TILE: tl.constexpr = BLOCK_R * BLOCK_C
    RING: tl.constexpr = 3 if MOMENTS else 1
    LAG: tl.constexpr = 1 if MOMENTS else 0  # a layer is finished once the layer after it is there
    r = tl.arange(0, BLOCK_R)
    c = tl.arange(0, BLOCK_C)
    e = tl.arange(0, BLOCK_E)
    program = tl.program_id(0)
    ring = scratch + program.to(tl.int64) * (2 * RING * TILE)
    at_re = r[:, None] * BLOCK_C + e[None, :]
    live_rows = tl.minimum(tl.load(count) - first, rows)
    row_tiles = tl.cdiv(tl.maximum(live_rows, 0), BLOCK_R)
    row_stride = rows.to(tl.int64)
    stride = total_rows.to(tl.int64)
    scale_of_grad = tl.load(grad_scale)
    for item in range(program, row_tiles * tiles, tl.num_programs(0)):
        rows_r = (item % row_tiles) * BLOCK_R + r
        is_valid = rows_r < live_rows
        row_r = tl.load(order + first + rows_r, mask=is_valid, other=0)
        label_r = tl.load(labels + first + rows_r, mask=is_valid, other=-1)
        first_column = (first_tile + item // row_tiles) * BLOCK_C
        columns_c = first_column + c
        for step in tl.range(layers + LAG, disable_licm=True):
            if step < layers:
                columns_f = first_column + e  # of the first sub-tile
                tile_s = ring + (step % RING) * (2 * TILE)
                tl.debug_barrier()  # the layer that stood here has been read
                x = tile_logits(
                    student_hidden + step * row_stride * student_width,
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
                shift_r = tl.load(shifts + step * stride + row_r, mask=is_valid, other=0.0)
                park_tile(
                    tile_s, x, shift_r, student_cap, columns_f, columns, BLOCK_R, BLOCK_C, BLOCK_E
                )
                if TEACHER:
                    tile_t = tile_s + TILE
                    teacher_layer = table_entry(table, table_width, TEACHER_LAYER, step)
                    hidden_t = teacher_hidden + teacher_layer * row_stride * teacher_width
                    if IDENTITY:
                        park_features(
                            tile_t,
                            hidden_t,
                            rows_r,
                            columns_f,
                            columns,
                            teacher_width,
                            BLOCK_R,
                            BLOCK_C,
                            BLOCK_E,
                        )
                    else:
                        x = tile_logits(
                            hidden_t,
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
                        shift = shifts + (layers + teacher_layer) * stride + row_r
                        park_tile(
                            tile_t,
                            x,
                            tl.load(shift, mask=is_valid, other=0.0),
                            teacher_cap,
                            columns_f,
                            columns,
                            BLOCK_R,
                            BLOCK_C,
                            BLOCK_E,
                        )
                tl.debug_barrier()  # every thread's part of the tiles can be read
            layer = step - LAG
            if layer >= 0:
                tile_s = ring + (layer % RING) * (2 * TILE)
                before_s = ring + ((layer + 2) % RING) * (2 * TILE)
                after_s = ring + ((layer + 1) % RING) * (2 * TILE)
                shift_r = tl.load(shifts + layer * stride + row_r, mask=is_valid, other=0.0)
                out_r = grad + (layer * row_stride + rows_r) * grad_width
                for start in range(0, BLOCK_C, BLOCK_E):
                    columns_e = first_column + start + e
                    u_s = tl.load(tile_s + at_re + start)
                    g = tl.zeros((BLOCK_R, BLOCK_E), dtype=tl.float32)
                    for slot in range(
                        table_entry(table, table_width, SLOT_BEGIN, layer),
                        table_entry(table, table_width, SLOT_BEGIN, layer + 1),
                    ):
                        g += slot_gradient(
                            requests + row_r,
                            grad_requests + row_r,
                            stride,
                            is_valid,
                            label_r,
                            columns_e,
                            u_s,
                            tile_s + TILE + start,
                            at_re,
                            table,
                            table_width,
                            slot,
                            TEACHER,
                            MIXED,
                            DIVERGENCE,
                            BLOCK_R,
                        )
                    if MOMENTS:
                        for part in range(
                            table_entry(table, table_width, PART_BEGIN, layer),
                            table_entry(table, table_width, PART_BEGIN, layer + 1),
                        ):
                            moment = table_entry(table, table_width, PART_INDEX, part)
                            at = moment * MOMENT_FIELDS * stride
                            is_weighted = 0
                            if WEIGHTED:
                                is_weighted = table_entry(table, table_width, PAIR_WEIGHTED, moment)
                            g += part_gradient(
                                moments + at + row_r,
                                grad_moments + at + row_r,
                                stride,
                                is_valid,
                                tile_s + start,
                                tile_s + TILE + start,
                                before_s + start,
                                before_s + TILE + start,
                                after_s + start,
                                after_s + TILE + start,
                                at_re,
                                table_entry(table, table_width, PART_ROLE, part),
                                table_float(table, table_width, PAIR_INVERSE, moment),
                                is_weighted,
                                WEIGHTED,
                            )
                    if student_cap > 0:  # du/dx of the soft cap, from its value
                        capped = (u_s + shift_r[:, None]) / student_cap
                        g *= 1.0 - capped * capped
                    g *= student_scale * scale_of_grad
                    g = tl.where(is_valid[:, None], g, 0.0)
                    out = out_r[:, None] + (columns_e - first_tile * BLOCK_C)[None, :]
                    tl.store(out, g.to(grad.dtype.element_ty), mask=(columns_e < columns)[None, :])


def grad_launch(block, grad, per_row, grad_scale, first_tile: int, tiles: int) -> Launch:
    """Fill `grad` for a `RowBlock` and `tiles` tiles."""
    shifts, requests, moments, grad_requests, grad_moments = per_row
    arguments = {
        **block.arguments(),
        "grad": grad,
        "requests": requests,
        "moments": moments,
        "grad_requests": grad_requests,
        "grad_moments": grad_moments,
        "shifts": shifts,
        "grad_scale": grad_scale,
        "scratch": block.scratch(tiles, ring=RING),
        "order": block.order,
        "labels": block.labels,
        "total_rows": shifts.shape[-1],
        "first_tile": first_tile,
        "tiles": tiles,
        "grad_width": grad.shape[-1],
        "MOMENTS": bool(block.spec.moments),
        "WEIGHTED": block.table.has_weights,
        "MIXED": block.table.has_mixtures,
        "DIVERGENCE": block.table.divergence,
    }
    return Launch(lens_grad_kernel, (block.programs(tiles),), block.config.options, arguments)
