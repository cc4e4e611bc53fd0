"""Merge the splits of the vocabulary into the statistics, at the rows of the caller.

Each split has row shifts of its own. Its numbers are restated about the largest logit of the row
before they are merged: probable tokens lie near 0 and stay exact at any temperature.

Shape suffix: r rows of a tile.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fdd_kernels.backends.triton.launch import Launch
from fdd_kernels.backends.triton.one_pass.online import (
    SLOT_FIELDS,
    merge_softmax,
    row_shift,
)
from fdd_kernels.backends.triton.one_pass.split_moments import merge_split_moments
from fdd_kernels.backends.triton.row_statistics import (
    GRAD_SUM,
    MOMENT_FIELDS,
    REQUEST_FIELDS,
    VALUE,
    store_request,
)
from fdd_kernels.backends.triton.work_table import (
    FIRST,
    IS_MIXED,
    KIND_NLL,
    PAIR_INVERSE,
    PAIR_WEIGHTED,
    PART_BEGIN,
    PART_INDEX,
    PART_ROLE,
    REQUEST_BEGIN,
    REQUEST_INDEX,
    REQUEST_KIND,
    SECOND,
    SECOND_REQUEST,
    SHIFT_LAYER,
    SLOT_A,
    SLOT_B,
    SLOT_BEGIN,
    SLOT_FLAGS,
    SLOT_INVERSE,
    TEACHER_LAYER,
    table_entry,
    table_float,
)

# One warp, one row per thread: with more warps the assembler spills.
TILE_ROWS = 32
OPTIONS = {"num_warps": 1, "num_stages": 1}


@triton.jit(
    do_not_specialize=[
        "first",
        "rows",
        "total_rows",
        "layers",
        "slots",
        "fields",
        "table_width",
        "splits",
    ]
)
def merge_stats_kernel(
    state,
    shifts,
    requests,
    moments,
    table,
    count,
    order,
    first,
    rows,
    total_rows,
    layers,
    table_width,
    slots,
    fields,
    splits,
    TEACHER: tl.constexpr,
    WEIGHTED: tl.constexpr,
    MIXED: tl.constexpr,
    DIVERGENCE: tl.constexpr,
    TILE_ROWS: tl.constexpr,
):
    """Merge the splits of a tile of rows; store every statistic that takes a single pass."""
    rows_r = tl.program_id(0) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    is_valid = (rows_r < rows) & (first + rows_r < tl.load(count))
    row_r = tl.load(order + first + rows_r, mask=is_valid, other=0)
    stride = rows.to(tl.int64)
    split_stride = fields * stride
    out_stride = total_rows.to(tl.int64)
    state += rows_r
    shifts += row_r
    requests += row_r
    moments += row_r
    before_s = tl.zeros((TILE_ROWS,), tl.float32)
    before_t = before_s
    for layer in range(layers):
        shift_s = row_shift(
            state,
            layer,
            0,
            layers,
            stride,
            split_stride,
            splits,
            table,
            table_width,
            is_valid,
            TILE_ROWS,
        )
        tl.store(shifts + layer * out_stride, shift_s, mask=is_valid)
        shift_t = tl.zeros((TILE_ROWS,), tl.float32)
        if TEACHER:
            shift_t = row_shift(
                state,
                table_entry(table, table_width, SHIFT_LAYER, layer),
                1,
                layers,
                stride,
                split_stride,
                splits,
                table,
                table_width,
                is_valid,
                TILE_ROWS,
            )
            teacher_layer = table_entry(table, table_width, TEACHER_LAYER, layer)
            tl.store(shifts + (layers + teacher_layer) * out_stride, shift_t, mask=is_valid)
        for slot in range(
            table_entry(table, table_width, SLOT_BEGIN, layer),
            table_entry(table, table_width, SLOT_BEGIN, layer + 1),
        ):
            inverse = table_float(table, table_width, SLOT_INVERSE, slot)
            top_s = tl.full((TILE_ROWS,), float("-inf"), tl.float32)
            top_t, label_z = top_s, top_s
            total_s = tl.zeros((TILE_ROWS,), tl.float32)
            expectation_s, total_t, expectation_t = total_s, total_s, total_s
            for part in range(splits):
                own = state + part * split_stride
                at = own + (2 * layers + slot * SLOT_FIELDS) * stride
                offset_s = (
                    tl.load(own + 2 * layer * stride, mask=is_valid, other=0.0) - shift_s
                ) * inverse
                label_z = tl.maximum(
                    label_z, tl.load(at + 6 * stride, mask=is_valid, other=0.0) + offset_s
                )
                total_b = tl.load(at + stride, mask=is_valid, other=0.0)
                expectation_b = tl.load(at + 2 * stride, mask=is_valid, other=0.0)
                if TEACHER:
                    offset_t = (
                        tl.load(own + (2 * layer + 1) * stride, mask=is_valid, other=0.0) - shift_t
                    ) * inverse
                    if MIXED:
                        if table_entry(table, table_width, SLOT_FLAGS, slot) & IS_MIXED:
                            a = table_float(table, table_width, SLOT_A, slot)
                            b = table_float(table, table_width, SLOT_B, slot)
                            offset_t = a * offset_t + b * offset_s
                    expectation_b += total_b * (offset_s - offset_t)
                top_b = tl.load(at, mask=is_valid, other=0.0) + offset_s
                top_s, total_s, expectation_s = merge_softmax(
                    top_s, total_s, expectation_s, top_b, total_b, expectation_b
                )
                if TEACHER:
                    total_b = tl.load(at + 4 * stride, mask=is_valid, other=0.0)
                    expectation_b = tl.load(at + 5 * stride, mask=is_valid, other=0.0) + total_b * (
                        offset_t - offset_s
                    )
                    top_b = tl.load(at + 3 * stride, mask=is_valid, other=0.0) + offset_t
                    top_t, total_t, expectation_t = merge_softmax(
                        top_t, total_t, expectation_t, top_b, total_b, expectation_b
                    )
            lse_s = top_s + tl.log(total_s)
            lse_t = top_t + tl.log(total_t)
            for entry in range(
                table_entry(table, table_width, REQUEST_BEGIN, slot),
                table_entry(table, table_width, REQUEST_BEGIN, slot + 1),
            ):
                kind = table_entry(table, table_width, REQUEST_KIND, entry)
                request = (
                    requests
                    + table_entry(table, table_width, REQUEST_INDEX, entry)
                    * REQUEST_FIELDS
                    * out_stride
                )
                store_request(
                    request,
                    out_stride,
                    is_valid,
                    kind,
                    lse_s,
                    lse_t,
                    expectation_s / total_s,
                    expectation_t / total_t,
                    DIVERGENCE,
                )
                if kind == KIND_NLL:
                    tl.store(request + VALUE * out_stride, lse_s - label_z, mask=is_valid)
        for entry in range(
            table_entry(table, table_width, PART_BEGIN, layer),
            table_entry(table, table_width, PART_BEGIN, layer + 1),
        ):
            role = table_entry(table, table_width, PART_ROLE, entry)
            if role != FIRST:
                moment = table_entry(table, table_width, PART_INDEX, entry)
                inverse = table_float(table, table_width, PAIR_INVERSE, moment)
                at = state + (2 * layers + SLOT_FIELDS * slots + moment * MOMENT_FIELDS) * stride
                out = moments + moment * MOMENT_FIELDS * out_stride
                is_weighted = 0
                if WEIGHTED:
                    is_weighted = table_entry(table, table_width, PAIR_WEIGHTED, moment)
                merge_split_moments(
                    state + 2 * layer * stride,
                    at,
                    out,
                    stride,
                    split_stride,
                    out_stride,
                    splits,
                    is_valid,
                    shift_s,
                    shift_t,
                    before_s,
                    before_t,
                    role == SECOND,
                    inverse,
                    is_weighted,
                    WEIGHTED,
                    TILE_ROWS,
                )
        before_s, before_t = shift_s, shift_t


@triton.jit(do_not_specialize=["first", "rows", "total_rows", "table_width", "splits", "seconds"])
def merge_divergence_kernel(
    sums,
    requests,
    table,
    count,
    order,
    first,
    rows,
    total_rows,
    table_width,
    splits,
    seconds,
    TILE_ROWS: tl.constexpr,
):
    """Store VALUE and GRAD_SUM of the second pass: the splits' sums, added in their order."""
    rows_r = tl.program_id(0) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    second = tl.program_id(1)
    is_valid = (rows_r < rows) & (first + rows_r < tl.load(count))
    row_r = tl.load(order + first + rows_r, mask=is_valid, other=0)
    stride = rows.to(tl.int64)
    value = tl.zeros((TILE_ROWS,), tl.float32)
    grad_sum = value
    for part in range(splits):
        at = sums + (part * seconds + second) * 2 * stride + rows_r
        value += tl.load(at, mask=is_valid, other=0.0)
        grad_sum += tl.load(at + stride, mask=is_valid, other=0.0)
    out_stride = total_rows.to(tl.int64)
    request = (
        requests
        + table_entry(table, table_width, SECOND_REQUEST, second) * REQUEST_FIELDS * out_stride
        + row_r
    )
    tl.store(request + VALUE * out_stride, value, mask=is_valid)
    tl.store(request + GRAD_SUM * out_stride, grad_sum, mask=is_valid)


def merge_launch(block, state, shifts, requests, moments) -> Launch:
    """Write the statistics of a `RowBlock` from its `state`."""
    arguments = {
        **block.merge_arguments(),
        "state": state,
        "shifts": shifts,
        "requests": requests,
        "moments": moments,
        "total_rows": shifts.shape[-1],
        "layers": shifts.shape[1],
        "slots": block.table.slots,
        "fields": state.shape[1],
        "splits": state.shape[0],
        "WEIGHTED": block.table.has_weights,
        "MIXED": block.table.has_mixtures,
        "TEACHER": block.spec.needs_teacher,
        "DIVERGENCE": block.table.one_pass_divergence,
        "TILE_ROWS": TILE_ROWS,
    }
    return Launch(merge_stats_kernel, (triton.cdiv(block.rows, TILE_ROWS),), OPTIONS, arguments)


def merge_divergence_launch(block, sums, requests) -> Launch:
    """Write VALUE and GRAD_SUM of the second pass from its `sums`."""
    grid = (triton.cdiv(block.rows, TILE_ROWS), block.table.second_pass)
    arguments = {
        **block.merge_arguments(),
        "sums": sums,
        "requests": requests,
        "total_rows": requests.shape[-1],
        "splits": sums.shape[0],
        "seconds": block.table.second_pass,
        "TILE_ROWS": TILE_ROWS,
    }
    return Launch(merge_divergence_kernel, grid, OPTIONS, arguments)
