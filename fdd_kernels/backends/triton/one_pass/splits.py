"""Splits of the vocabulary merged into the statistics of `spec.py`, at the rows of the caller.

Each split has row shifts of its own; what it found is restated about the largest logit of the row
before it is merged, so that probable tokens lie near 0 and stay exact at any temperature. Shape
suffix: r rows of a tile.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fdd_kernels.backends.triton.elementwise import (
    GRAD_SUM,
    LSE_S,
    LSE_T,
    MOMENT_FIELDS,
    REQUEST_FIELDS,
    VALUE,
)
from fdd_kernels.backends.triton.launch import launch
from fdd_kernels.backends.triton.one_pass.stats import (
    SLOT_FIELDS,
    load_moments,
    merge_moments,
    store_moments,
)
from fdd_kernels.backends.triton.work_table import (
    FIRST,
    KIND_KL,
    KIND_NLL,
    KIND_OTHER,
    PART_BEGIN,
    PART_INDEX,
    PART_ROLE,
    REQUEST_BEGIN,
    REQUEST_INDEX,
    REQUEST_KIND,
    SECOND,
    SECOND_REQUEST,
    SLOT_BEGIN,
    SLOT_INVERSE,
    table_entry,
    table_float,
)

# One row a thread, and threads alone: for more of them the assembler spills to make room.
TILE_ROWS = 32
OPTIONS = {"num_warps": 1, "num_stages": 1}


@triton.jit
def merge_softmax(top, total, expectation, top_b, total_b, expectation_b):
    """Sums of two sets of columns, restated about the larger of their `top`s."""
    new_top = tl.maximum(top, top_b)
    shift = tl.where(new_top > float("-inf"), new_top, 0.0)
    a, b = tl.exp(top - shift), tl.exp(top_b - shift)
    return new_top, total * a + total_b * b, expectation * a + expectation_b * b


@triton.jit
def row_shift(pivot, top, range_stride, ranges, inverse, counts, TILE_ROWS: tl.constexpr):
    """The largest u of each row over all splits: of their shifts (`shift`).

    `top` has each split's largest z at the temperature 1 / inverse; without a slot (inverse 0) the
    first split's shift serves.
    """
    shift = tl.load(pivot, mask=counts, other=0.0)
    if inverse > 0:
        largest = tl.full((TILE_ROWS,), float("-inf"), tl.float32)
        for part in range(ranges):
            own = tl.load(pivot + part * range_stride, mask=counts, other=0.0)
            largest = tl.maximum(
                largest, own + tl.load(top + part * range_stride, mask=counts, other=0.0) / inverse
            )
        shift = tl.where(tl.abs(largest) < float("inf"), largest, shift)
    return shift


@triton.jit(
    do_not_specialize=[
        "first",
        "rows",
        "total_rows",
        "layers",
        "slots",
        "fields",
        "table_width",
        "ranges",
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
    ranges,
    moment_inverse,
    TEACHER: tl.constexpr,
    DIVERGENCE: tl.constexpr,
    TILE_ROWS: tl.constexpr,
):
    """One program merges the ranges of a tile of rows and finishes every statistic that takes a
    single pass.
    """
    rows_r = tl.program_id(0) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    counts = (rows_r < rows) & (first + rows_r < tl.load(count))
    row_r = tl.load(order + first + rows_r, mask=counts, other=0)
    stride = rows.to(tl.int64)
    range_stride = fields * stride
    out_stride = total_rows.to(tl.int64)
    state += rows_r
    shifts += row_r
    requests += row_r
    moments += row_r
    before_s = tl.zeros((TILE_ROWS,), tl.float32)
    before_t = before_s
    for layer in range(layers):
        first_slot = table_entry(table, table_width, SLOT_BEGIN, layer)
        inverse = 0.0
        if first_slot < table_entry(table, table_width, SLOT_BEGIN, layer + 1):
            inverse = table_float(table, table_width, SLOT_INVERSE, first_slot)
        top = state + (2 * layers + first_slot * SLOT_FIELDS) * stride
        pivot_s = row_shift(
            state + 2 * layer * stride, top, range_stride, ranges, inverse, counts, TILE_ROWS
        )
        pivot_t = tl.zeros((TILE_ROWS,), tl.float32)
        if TEACHER:
            pivot = state + (2 * layer + 1) * stride
            pivot_t = row_shift(
                pivot, top + 3 * stride, range_stride, ranges, inverse, counts, TILE_ROWS
            )
        tl.store(shifts + layer * out_stride, pivot_s, mask=counts)
        tl.store(shifts + (layers + layer) * out_stride, pivot_t, mask=counts)
        for slot in range(
            table_entry(table, table_width, SLOT_BEGIN, layer),
            table_entry(table, table_width, SLOT_BEGIN, layer + 1),
        ):
            inverse = table_float(table, table_width, SLOT_INVERSE, slot)
            top_s = tl.full((TILE_ROWS,), float("-inf"), tl.float32)
            top_t, label_z = top_s, top_s
            total_s = tl.zeros((TILE_ROWS,), tl.float32)
            expectation_s, total_t, expectation_t = total_s, total_s, total_s
            for part in range(ranges):
                own = state + part * range_stride
                at = own + (2 * layers + slot * SLOT_FIELDS) * stride
                shift_s = (
                    tl.load(own + 2 * layer * stride, mask=counts, other=0.0) - pivot_s
                ) * inverse
                label_z = tl.maximum(
                    label_z, tl.load(at + 6 * stride, mask=counts, other=0.0) + shift_s
                )
                total_b = tl.load(at + stride, mask=counts, other=0.0)
                expectation_b = tl.load(at + 2 * stride, mask=counts, other=0.0)
                if TEACHER:
                    shift_t = (
                        tl.load(own + (2 * layer + 1) * stride, mask=counts, other=0.0) - pivot_t
                    ) * inverse
                    expectation_b += total_b * (shift_s - shift_t)
                top_b = tl.load(at, mask=counts, other=0.0) + shift_s
                top_s, total_s, expectation_s = merge_softmax(
                    top_s, total_s, expectation_s, top_b, total_b, expectation_b
                )
                if TEACHER:
                    total_b = tl.load(at + 4 * stride, mask=counts, other=0.0)
                    expectation_b = tl.load(at + 5 * stride, mask=counts, other=0.0) + total_b * (
                        shift_t - shift_s
                    )
                    top_b = tl.load(at + 3 * stride, mask=counts, other=0.0) + shift_t
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
                tl.store(request + LSE_S * out_stride, lse_s, mask=counts)
                if kind == KIND_NLL:
                    tl.store(request + VALUE * out_stride, lse_s - label_z, mask=counts)
                else:
                    tl.store(request + LSE_T * out_stride, lse_t, mask=counts)
                    if kind == KIND_KL:
                        value = expectation_t / total_t + (lse_s - lse_t)
                        # rounding, where the models nearly agree
                        value = tl.where(value < 0, 0.0, value)
                        tl.store(request + VALUE * out_stride, value, mask=counts)
                        tl.store(
                            request + GRAD_SUM * out_stride,
                            tl.full((TILE_ROWS,), -1.0, tl.float32),
                            mask=counts,
                        )
                    if DIVERGENCE == "reverse_kl" and kind == KIND_OTHER:
                        value = expectation_s / total_s - (lse_s - lse_t)
                        value = tl.where(value < 0, 0.0, value)
                        tl.store(request + VALUE * out_stride, value, mask=counts)
                        tl.store(request + GRAD_SUM * out_stride, value + 1.0, mask=counts)
        for entry in range(
            table_entry(table, table_width, PART_BEGIN, layer),
            table_entry(table, table_width, PART_BEGIN, layer + 1),
        ):
            role = table_entry(table, table_width, PART_ROLE, entry)
            if role != FIRST:
                moment = table_entry(table, table_width, PART_INDEX, entry)
                nothing = tl.zeros((TILE_ROWS,), tl.float32)
                n, mean_s, mean_t, m_ss, m_tt, m_st, m_dd = (
                    nothing,
                    nothing,
                    nothing,
                    nothing,
                    nothing,
                    nothing,
                    nothing,
                )
                for part in range(ranges):
                    own = state + part * range_stride
                    at = own + (2 * layers + SLOT_FIELDS * slots + moment * MOMENT_FIELDS) * stride
                    n_b, mean_sb, mean_tb, m_ssb, m_ttb, m_stb, m_ddb = load_moments(
                        at, stride, counts
                    )
                    mean_sb += (
                        tl.load(own + 2 * layer * stride, mask=counts, other=0.0) - pivot_s
                    ) * moment_inverse
                    mean_tb += (
                        tl.load(own + (2 * layer + 1) * stride, mask=counts, other=0.0) - pivot_t
                    ) * moment_inverse
                    if role == SECOND:
                        before = own + 2 * (layer - 1) * stride
                        mean_sb -= (
                            tl.load(before, mask=counts, other=0.0) - before_s
                        ) * moment_inverse
                        mean_tb -= (
                            tl.load(before + stride, mask=counts, other=0.0) - before_t
                        ) * moment_inverse
                    n, mean_s, mean_t, m_ss, m_tt, m_st, m_dd = merge_moments(
                        n,
                        mean_s,
                        mean_t,
                        m_ss,
                        m_tt,
                        m_st,
                        m_dd,
                        n_b,
                        mean_sb,
                        mean_tb,
                        m_ssb,
                        m_ttb,
                        m_stb,
                        m_ddb,
                    )
                store_moments(
                    moments + moment * MOMENT_FIELDS * out_stride,
                    out_stride,
                    counts,
                    n,
                    mean_s,
                    mean_t,
                    m_ss,
                    m_tt,
                    m_st,
                    m_dd,
                )
        before_s, before_t = pivot_s, pivot_t


@triton.jit(do_not_specialize=["first", "rows", "total_rows", "table_width", "ranges", "seconds"])
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
    ranges,
    seconds,
    TILE_ROWS: tl.constexpr,
):
    """Value and slope of the second pass: the ranges' sums, added in their order."""
    rows_r = tl.program_id(0) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    second = tl.program_id(1)
    counts = (rows_r < rows) & (first + rows_r < tl.load(count))
    row_r = tl.load(order + first + rows_r, mask=counts, other=0)
    stride = rows.to(tl.int64)
    value = tl.zeros((TILE_ROWS,), tl.float32)
    slope = value
    for part in range(ranges):
        at = sums + (part * seconds + second) * 2 * stride + rows_r
        value += tl.load(at, mask=counts, other=0.0)
        slope += tl.load(at + stride, mask=counts, other=0.0)
    out_stride = total_rows.to(tl.int64)
    request = (
        requests
        + table_entry(table, table_width, SECOND_REQUEST, second) * REQUEST_FIELDS * out_stride
        + row_r
    )
    tl.store(request + VALUE * out_stride, value, mask=counts)
    tl.store(request + GRAD_SUM * out_stride, slope, mask=counts)


def launch_merge(block, state, shifts, requests, moments) -> None:
    """Write the statistics of one block of rows from its `state`; see `host.Block`."""
    launch(
        merge_stats_kernel,
        (triton.cdiv(block.rows, TILE_ROWS),),
        OPTIONS,
        state=state,
        shifts=shifts,
        requests=requests,
        moments=moments,
        table=block.table.values,
        count=block.count,
        order=block.order,
        first=block.first,
        rows=block.rows,
        total_rows=shifts.shape[-1],
        layers=shifts.shape[1],
        table_width=block.table.width,
        slots=block.table.slots,
        fields=state.shape[1],
        ranges=state.shape[0],
        moment_inverse=1.0 / block.spec.moment_temperature,
        TEACHER=block.spec.needs_teacher,
        DIVERGENCE=block.table.divergence,
        TILE_ROWS=TILE_ROWS,
    )


def launch_merge_divergence(block, sums, requests) -> None:
    """Write value and slope of the second pass from its `sums`."""
    launch(
        merge_divergence_kernel,
        (triton.cdiv(block.rows, TILE_ROWS), block.table.second_pass),
        OPTIONS,
        sums=sums,
        requests=requests,
        table=block.table.values,
        count=block.count,
        order=block.order,
        first=block.first,
        rows=block.rows,
        total_rows=requests.shape[-1],
        table_width=block.table.width,
        ranges=sums.shape[0],
        seconds=block.table.second_pass,
        TILE_ROWS=TILE_ROWS,
    )
