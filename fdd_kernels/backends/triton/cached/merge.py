"""Tiles merged into the statistics of `spec.py`: one program a row and layer, all tiles in one
vector.

What a tile found is restated about the row's largest logit. Sums over a vector of tiles take a
tree, so their error does not grow with the number of tiles.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fdd_kernels.backends.triton.cached.stats import SLOT_FIELDS
from fdd_kernels.backends.triton.elementwise import (
    GRAD_SUM,
    LSE_S,
    LSE_T,
    MOMENT_FIELDS,
    REFINED_BELOW,
    REQUEST_FIELDS,
    VALUE,
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


@triton.jit
def row_shift(state, shift, total, tile, tiles, has_slot):
    """The largest of a row's tile shifts, 0 if none is finite; tiles of tokens that cannot occur
    have none.

    Returns it with each tile's shift about it.
    """
    inside = tile < tiles
    tile_shift = tl.load(state + shift + tile, mask=inside, other=0.0)
    live = inside
    if has_slot:
        live = live & (tl.load(state + total + tile, mask=inside, other=0.0) != 0.0)
    largest = tl.max(tl.where(live, tile_shift, float("-inf")), 0)
    largest = tl.where(tl.abs(largest) < float("inf"), largest, 0.0)
    return largest, tile_shift - largest


@triton.jit
def merged_sums(state, at, field, tile, tiles, own_shift, other_shift):
    """The log-sum-exp of z about the row's shift, and the expectation of z - (the other model's
    z).
    """
    inside = tile < tiles
    total = tl.load(state + at + tile, mask=inside, other=0.0)
    expectation = tl.load(state + at + field + tile, mask=inside, other=0.0)
    weight = tl.where(total != 0.0, tl.exp(own_shift), 0.0)
    expectation = tl.where(
        total != 0.0, weight * (expectation + total * (own_shift - other_shift)), 0.0
    )
    total = tl.sum(weight * total, 0)
    return tl.log(total), tl.sum(expectation, 0) / total


@triton.jit(do_not_specialize=["rows", "stride", "layers", "slots", "tiles", "table_width"])
def cached_merge_kernel(
    state,
    shifts,
    requests,
    moments,
    count,
    table,
    rows,
    stride,
    layers,
    slots,
    tiles,
    table_width,
    moment_inverse,
    TEACHER: tl.constexpr,
    DIVERGENCE: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Finish every statistic of a row (axis 0) and a layer (axis 1) that takes a single pass;
    invalid rows are left alone.
    """
    row = tl.program_id(0)
    layer = tl.program_id(1)
    if row >= tl.load(count):
        return
    tile = tl.arange(0, BLOCK_T)
    inside = tile < tiles
    field = rows.to(tl.int64) * tiles
    state += row.to(tl.int64) * tiles
    stride = stride.to(tl.int64)
    shifts += row
    requests += row
    moments += row
    first_slot = table_entry(table, table_width, SLOT_BEGIN, layer)
    last_slot = table_entry(table, table_width, SLOT_BEGIN, layer + 1)
    first_total = (2 * layers + SLOT_FIELDS * first_slot) * field
    shift = 2 * layer * field
    pivot_s, about_s = row_shift(state, shift, first_total, tile, tiles, first_slot < last_slot)
    pivot_t = pivot_s * 0.0
    about_t = about_s * 0.0
    if TEACHER:
        pivot_t, about_t = row_shift(
            state, shift + field, first_total + 2 * field, tile, tiles, first_slot < last_slot
        )
    tl.store(shifts + layer * stride, pivot_s)
    tl.store(shifts + (layers + layer) * stride, pivot_t)
    for slot in range(first_slot, last_slot):
        inverse = table_float(table, table_width, SLOT_INVERSE, slot)
        at = (2 * layers + SLOT_FIELDS * slot) * field
        lse_s, expectation_s = merged_sums(
            state, at, field, tile, tiles, about_s * inverse, about_t * inverse
        )
        lse_t = lse_s
        expectation_t = lse_s
        if TEACHER:
            lse_t, expectation_t = merged_sums(
                state, at + 2 * field, field, tile, tiles, about_t * inverse, about_s * inverse
            )
        for entry in range(
            table_entry(table, table_width, REQUEST_BEGIN, slot),
            table_entry(table, table_width, REQUEST_BEGIN, slot + 1),
        ):
            kind = table_entry(table, table_width, REQUEST_KIND, entry)
            request = (
                requests
                + table_entry(table, table_width, REQUEST_INDEX, entry) * REQUEST_FIELDS * stride
            )
            tl.store(request + LSE_S * stride, lse_s)
            if kind == KIND_NLL:
                label_z = (
                    tl.load(state + at + 4 * field + tile, mask=inside, other=float("-inf"))
                    + about_s * inverse
                )
                tl.store(request + VALUE * stride, lse_s - tl.max(label_z, 0))
            else:
                tl.store(request + LSE_T * stride, lse_t)
                if kind == KIND_KL:
                    value = expectation_t + (lse_s - lse_t)
                    # rounding, of near-equal models
                    tl.store(request + VALUE * stride, tl.where(value < 0, 0.0, value))
                    tl.store(request + GRAD_SUM * stride, -1.0)
                if DIVERGENCE == "reverse_kl" and kind == KIND_OTHER:
                    value = expectation_s + (lse_t - lse_s)
                    value = tl.where(value < 0, 0.0, value)
                    tl.store(request + VALUE * stride, value)
                    tl.store(request + GRAD_SUM * stride, value + 1.0)
    for entry in range(
        table_entry(table, table_width, PART_BEGIN, layer),
        table_entry(table, table_width, PART_BEGIN, layer + 1),
    ):
        role = table_entry(table, table_width, PART_ROLE, entry)
        if role != FIRST:
            off_s, off_t = about_s, about_t
            if role == SECOND:
                before = table_entry(table, table_width, SLOT_BEGIN, layer - 1)
                before_total = (2 * layers + SLOT_FIELDS * before) * field
                _largest, about = row_shift(
                    state, shift - 2 * field, before_total, tile, tiles, before < first_slot
                )
                off_s -= about
                _largest, about = row_shift(
                    state, shift - field, before_total + 2 * field, tile, tiles, before < first_slot
                )
                off_t -= about
            index = table_entry(table, table_width, PART_INDEX, entry) * MOMENT_FIELDS
            at = state + (2 * layers + SLOT_FIELDS * slots + index) * field + tile
            n = tl.load(at, mask=inside, other=0.0)
            mean_s = tl.load(at + field, mask=inside, other=0.0) + off_s * moment_inverse
            mean_t = tl.load(at + 2 * field, mask=inside, other=0.0) + off_t * moment_inverse
            total = tl.sum(n, 0)
            divisor = tl.maximum(total, 1.0)
            row_mean_s, row_mean_t = (
                tl.sum(n * mean_s, 0) / divisor,
                tl.sum(n * mean_t, 0) / divisor,
            )
            between_s, between_t = mean_s - row_mean_s, mean_t - row_mean_t
            between_d = between_s - between_t
            m_ss = tl.load(at + 3 * field, mask=inside, other=0.0) + n * between_s * between_s
            m_tt = tl.load(at + 4 * field, mask=inside, other=0.0) + n * between_t * between_t
            m_st = tl.load(at + 5 * field, mask=inside, other=0.0) + n * between_s * between_t
            m_dd = tl.load(at + 6 * field, mask=inside, other=0.0) + n * between_d * between_d
            out = moments + index * stride
            tl.store(out, total)
            tl.store(out + stride, row_mean_s)
            tl.store(out + 2 * stride, row_mean_t)
            tl.store(out + 3 * stride, tl.sum(m_ss, 0))
            tl.store(out + 4 * stride, tl.sum(m_tt, 0))
            tl.store(out + 5 * stride, tl.sum(m_st, 0))
            tl.store(out + 6 * stride, tl.sum(m_dd, 0))


@triton.jit(do_not_specialize=["rows", "stride", "tiles", "table_width"])
def merge_values_kernel(
    sums,
    requests,
    count,
    table,
    rows,
    stride,
    tiles,
    table_width,
    SECONDS: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Sums over tiles written as VALUE, one program a row and item.

    With SECONDS the items are the requests of the second pass and sums (items, 2, rows, tiles) have
    their GRAD_SUM too; without, they are slots, sums (items, rows, tiles), and the value is that of
    the slot's request of KL, where it is small.
    """
    row = tl.program_id(0)
    item = tl.program_id(1)
    if row >= tl.load(count):
        return
    tile = tl.arange(0, BLOCK_T)
    field = rows.to(tl.int64) * tiles
    stride = stride.to(tl.int64)
    requests += row
    sums += row.to(tl.int64) * tiles + tile
    if SECONDS:
        value = tl.sum(tl.load(sums + 2 * item * field, mask=tile < tiles, other=0.0), 0)
        slope = tl.sum(tl.load(sums + (2 * item + 1) * field, mask=tile < tiles, other=0.0), 0)
        request = (
            requests
            + table_entry(table, table_width, SECOND_REQUEST, item) * REQUEST_FIELDS * stride
        )
        tl.store(request + VALUE * stride, value)
        tl.store(request + GRAD_SUM * stride, slope)
    else:
        value = tl.sum(tl.load(sums + item * field, mask=tile < tiles, other=0.0), 0)
        for entry in range(
            table_entry(table, table_width, REQUEST_BEGIN, item),
            table_entry(table, table_width, REQUEST_BEGIN, item + 1),
        ):
            if table_entry(table, table_width, REQUEST_KIND, entry) == KIND_KL:
                request = (
                    requests
                    + table_entry(table, table_width, REQUEST_INDEX, entry)
                    * REQUEST_FIELDS
                    * stride
                    + VALUE * stride
                )
                tl.store(request, value, mask=tl.load(request) < REFINED_BELOW)
