"""Ranges of columns merged into the statistics of `spec.py`, at the rows of the caller.

Each range has pivots of its own; what it found is restated about those of the first range before it is merged.
Shape suffix: r rows of a tile.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fdd_kernels import spec
from fdd_kernels.backends.triton.launch import launch
from fdd_kernels.backends.triton.stats import MOMENT_FIELDS, SLOT_FIELDS, load_moments, merge_moments, store_moments
from fdd_kernels.backends.triton.tables import (
    FIRST,
    KIND_KL,
    KIND_NLL,
    KIND_OTHER,
    PART_BEGIN,
    PART_INDEX,
    PART_ROLE,
    READ_BEGIN,
    READ_INDEX,
    READ_KIND,
    SECOND,
    SECOND_READ,
    SLOT_BEGIN,
    SLOT_INVERSE,
)
from fdd_kernels.backends.triton.tiles import table_entry, table_float

READ_FIELDS = tl.constexpr(spec.READ_STATS)
LSE_S, LSE_T = tl.constexpr(spec.LSE_S), tl.constexpr(spec.LSE_T)
VALUE, SLOPE = tl.constexpr(spec.VALUE), tl.constexpr(spec.SLOPE)
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
def pivot_shift(pivot, reference, counts):
    """How far a range's pivot lies above that of the first range."""
    return tl.load(pivot, mask=counts, other=0.0) - tl.load(reference, mask=counts, other=0.0)


@triton.jit(do_not_specialize=["first", "rows", "total_rows", "layers", "slots", "fields", "table_width", "ranges"])
def merge_stats_kernel(
    state, pivots, reads, moments, table, count, order, first, rows, total_rows, layers, table_width, slots, fields, ranges,
    moment_inverse, TEACHER: tl.constexpr, DIVERGENCE: tl.constexpr, TILE_ROWS: tl.constexpr,
):  # fmt: skip
    """One program merges the ranges of a tile of rows and finishes every statistic that takes a single pass."""
    rows_r = tl.program_id(0) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    counts = (rows_r < rows) & (first + rows_r < tl.load(count))
    row_r = tl.load(order + first + rows_r, mask=counts, other=0)
    stride = rows.to(tl.int64)
    range_stride = fields * stride
    out_stride = total_rows.to(tl.int64)
    state += rows_r
    pivots += row_r
    reads += row_r
    moments += row_r
    for layer in range(layers):
        pivot_s = tl.load(state + 2 * layer * stride, mask=counts, other=0.0)
        pivot_t = tl.zeros((TILE_ROWS,), tl.float32)
        if TEACHER:
            pivot_t = tl.load(state + (2 * layer + 1) * stride, mask=counts, other=0.0)
        tl.store(pivots + layer * out_stride, pivot_s, mask=counts)
        tl.store(pivots + (layers + layer) * out_stride, pivot_t, mask=counts)
        for slot in range(
            table_entry(table, table_width, SLOT_BEGIN, layer), table_entry(table, table_width, SLOT_BEGIN, layer + 1)
        ):
            inverse = table_float(table, table_width, SLOT_INVERSE, slot)
            top_s = tl.full((TILE_ROWS,), float("-inf"), tl.float32)
            top_t, label_z = top_s, top_s
            total_s = tl.zeros((TILE_ROWS,), tl.float32)
            expectation_s, total_t, expectation_t = total_s, total_s, total_s
            for part in range(ranges):
                own = state + part * range_stride
                at = own + (2 * layers + slot * SLOT_FIELDS) * stride
                shift_s = (tl.load(own + 2 * layer * stride, mask=counts, other=0.0) - pivot_s) * inverse
                label_z = tl.maximum(label_z, tl.load(at + 6 * stride, mask=counts, other=0.0) + shift_s)
                total_b = tl.load(at + stride, mask=counts, other=0.0)
                expectation_b = tl.load(at + 2 * stride, mask=counts, other=0.0)
                if TEACHER:
                    shift_t = (tl.load(own + (2 * layer + 1) * stride, mask=counts, other=0.0) - pivot_t) * inverse
                    expectation_b += total_b * (shift_s - shift_t)
                top_b = tl.load(at, mask=counts, other=0.0) + shift_s
                top_s, total_s, expectation_s = merge_softmax(top_s, total_s, expectation_s, top_b, total_b, expectation_b)
                if TEACHER:
                    total_b = tl.load(at + 4 * stride, mask=counts, other=0.0)
                    expectation_b = tl.load(at + 5 * stride, mask=counts, other=0.0) + total_b * (shift_t - shift_s)
                    top_b = tl.load(at + 3 * stride, mask=counts, other=0.0) + shift_t
                    top_t, total_t, expectation_t = merge_softmax(top_t, total_t, expectation_t, top_b, total_b, expectation_b)
            lse_s = top_s + tl.log(total_s)
            lse_t = top_t + tl.log(total_t)
            for entry in range(
                table_entry(table, table_width, READ_BEGIN, slot), table_entry(table, table_width, READ_BEGIN, slot + 1)
            ):
                kind = table_entry(table, table_width, READ_KIND, entry)
                read = reads + table_entry(table, table_width, READ_INDEX, entry) * READ_FIELDS * out_stride
                tl.store(read + LSE_S * out_stride, lse_s, mask=counts)
                if kind == KIND_NLL:
                    tl.store(read + VALUE * out_stride, lse_s - label_z, mask=counts)
                else:
                    tl.store(read + LSE_T * out_stride, lse_t, mask=counts)
                    if kind == KIND_KL:
                        value = expectation_t / total_t + (lse_s - lse_t)
                        tl.store(read + VALUE * out_stride, value, mask=counts)
                        tl.store(read + SLOPE * out_stride, tl.full((TILE_ROWS,), -1.0, tl.float32), mask=counts)
                    if DIVERGENCE == "reverse_kl" and kind == KIND_OTHER:
                        value = expectation_s / total_s - (lse_s - lse_t)
                        tl.store(read + VALUE * out_stride, value, mask=counts)
                        tl.store(read + SLOPE * out_stride, value + 1.0, mask=counts)
        for entry in range(
            table_entry(table, table_width, PART_BEGIN, layer), table_entry(table, table_width, PART_BEGIN, layer + 1)
        ):
            role = table_entry(table, table_width, PART_ROLE, entry)
            if role != FIRST:
                moment = table_entry(table, table_width, PART_INDEX, entry)
                nothing = tl.zeros((TILE_ROWS,), tl.float32)
                n, mean_s, mean_t, m_ss, m_tt, m_st, m_dd = nothing, nothing, nothing, nothing, nothing, nothing, nothing
                for part in range(ranges):
                    own = state + part * range_stride
                    at = own + (2 * layers + SLOT_FIELDS * slots + moment * MOMENT_FIELDS) * stride
                    n_b, mean_sb, mean_tb, m_ssb, m_ttb, m_stb, m_ddb = load_moments(at, stride, counts)
                    mean_sb += (tl.load(own + 2 * layer * stride, mask=counts, other=0.0) - pivot_s) * moment_inverse
                    mean_tb += (tl.load(own + (2 * layer + 1) * stride, mask=counts, other=0.0) - pivot_t) * moment_inverse
                    if role == SECOND:
                        before_s = 2 * (layer - 1) * stride
                        mean_sb -= pivot_shift(own + before_s, state + before_s, counts) * moment_inverse
                        before_t = before_s + stride
                        mean_tb -= pivot_shift(own + before_t, state + before_t, counts) * moment_inverse
                    n, mean_s, mean_t, m_ss, m_tt, m_st, m_dd = merge_moments(
                        n, mean_s, mean_t, m_ss, m_tt, m_st, m_dd, n_b, mean_sb, mean_tb, m_ssb, m_ttb, m_stb, m_ddb
                    )
                store_moments(
                    moments + moment * MOMENT_FIELDS * out_stride, out_stride, counts, n, mean_s, mean_t, m_ss, m_tt, m_st, m_dd
                )


@triton.jit(do_not_specialize=["first", "rows", "total_rows", "table_width", "ranges", "seconds"])
def merge_divergence_kernel(
    sums, reads, table, count, order, first, rows, total_rows, table_width, ranges, seconds, TILE_ROWS: tl.constexpr,
):  # fmt: skip
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
    read = reads + table_entry(table, table_width, SECOND_READ, second) * READ_FIELDS * out_stride + row_r
    tl.store(read + VALUE * out_stride, value, mask=counts)
    tl.store(read + SLOPE * out_stride, slope, mask=counts)


def launch_merge(block, state, pivots, reads, moments) -> None:
    """Write the statistics of one block of rows from its `state`; see `operations.Block`."""
    launch(
        merge_stats_kernel, (triton.cdiv(block.rows, TILE_ROWS),), OPTIONS, state=state, pivots=pivots, reads=reads,
        moments=moments, table=block.table.values, count=block.count, order=block.order, first=block.first, rows=block.rows,
        total_rows=pivots.shape[-1], layers=pivots.shape[1], table_width=block.table.width, slots=block.table.slots,
        fields=state.shape[1], ranges=state.shape[0], moment_inverse=1.0 / block.spec.moment_temperature,
        TEACHER=block.spec.needs_teacher, DIVERGENCE=block.table.divergence, TILE_ROWS=TILE_ROWS,
    )  # fmt: skip


def launch_merge_divergence(block, sums, reads) -> None:
    """Write value and slope of the second pass from its `sums`."""
    launch(
        merge_divergence_kernel, (triton.cdiv(block.rows, TILE_ROWS), block.table.second_pass), OPTIONS, sums=sums, reads=reads,
        table=block.table.values, count=block.count, order=block.order, first=block.first, rows=block.rows,
        total_rows=reads.shape[-1], table_width=block.table.width, ranges=sums.shape[0], seconds=block.table.second_pass,
        TILE_ROWS=TILE_ROWS,
    )  # fmt: skip
