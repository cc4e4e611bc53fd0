"""Merge a row's tiles into its statistics: one program a row and layer, all tiles in one vector.

Numbers of a tile are about the tile's shift; here they are restated about the row's. Sums over a
vector of tiles take a tree, so their error does not grow with the number of tiles.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fdd_kernels.backends.triton.cached.stats import SLOT_FIELDS
from fdd_kernels.backends.triton.elementwise import REFINED_BELOW, finite_or_zero
from fdd_kernels.backends.triton.row_statistics import (
    GRAD_SUM,
    MOMENT_FIELDS,
    REQUEST_FIELDS,
    VALUE,
    load_moments,
    load_tops,
    store_moments,
    store_request,
    store_tops,
)
from fdd_kernels.backends.triton.weighted_moments import merge_weighted_tiles
from fdd_kernels.backends.triton.work_table import (
    FIRST,
    IS_MIXED,
    KIND_KL,
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


@triton.jit
def row_shift(state, layer, MODEL: tl.constexpr, layers, field, tile, tiles, table, table_width):
    """Return a row's shift, the largest of its tiles' (0 if none is finite), and theirs about it.

    `layer` is a student layer; MODEL 1 takes its teacher layer instead. Tiles of tokens that cannot
    occur have no say: their sums of exponentials are 0.
    """
    inside = tile < tiles
    first_slot = table_entry(table, table_width, SLOT_BEGIN, layer)
    tile_shift = tl.load(state + (2 * layer + MODEL) * field + tile, mask=inside, other=0.0)
    live = inside
    if first_slot < table_entry(table, table_width, SLOT_BEGIN, layer + 1):
        total = (2 * layers + SLOT_FIELDS * first_slot + 2 * MODEL) * field
        live = live & (tl.load(state + total + tile, mask=inside, other=0.0) != 0.0)
    largest = tl.max(tl.where(live, tile_shift, float("-inf")), 0)
    largest = tl.where(tl.abs(largest) < float("inf"), largest, 0.0)
    return largest, tile_shift - largest


@triton.jit
def merged_sums(state, at, field, tile, tiles, log_weight, rise):
    """Return the log-sum-exp of z, and the expectation of the difference of z from the other
    model's.

    The tiles' exponentials are to be multiplied by e^log_weight, and the differences rise by `rise`
    where both are restated about the row's shifts.
    """
    inside = tile < tiles
    total = tl.load(state + at + tile, mask=inside, other=0.0)
    expectation = tl.load(state + at + field + tile, mask=inside, other=0.0)
    weight = tl.where(total != 0.0, tl.exp(log_weight), 0.0)
    expectation = tl.where(total != 0.0, weight * (expectation + total * rise), 0.0)
    total = tl.sum(weight * total, 0)
    return tl.log(total), tl.sum(expectation, 0) / total


@triton.jit
def merge_moments(
    at,
    field,
    out,
    stride,
    inside,
    off_s,
    off_t,
    off_z,
    is_weighted,
    WEIGHTED: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Merge the moments at `at` of all tiles of a row and store them at `out`.

    off_s, off_t and off_z restate s, t and the logits of the weights about the row's shifts.
    """
    if WEIGHTED:
        if is_weighted != 0:
            n, mean_s, mean_t, m_ss, m_tt, m_st, m_dd = load_moments(at, field, inside)
            top_s, top_t = load_tops(at, field, inside)
            n, mean_s, mean_t, m_ss, m_tt, m_st, m_dd, top_s, top_t = merge_weighted_tiles(
                tl.where(inside, n + off_z, float("-inf")),
                mean_s + off_s,
                mean_t + off_t,
                m_ss,
                m_tt,
                m_st,
                m_dd,
                top_s,
                top_t,
                BLOCK_T,
            )
            store_moments(out, stride, None, n, mean_s, mean_t, m_ss, m_tt, m_st, m_dd)
            store_tops(out, stride, None, top_s, top_t)
        else:
            merge_plain_moments(at, field, out, stride, inside, off_s, off_t)
    else:
        merge_plain_moments(at, field, out, stride, inside, off_s, off_t)


@triton.jit
def merge_plain_moments(at, field, out, stride, inside, off_s, off_t):
    """Merge the moments of tokens without weights; see `merge_moments`."""
    n, mean_s, mean_t, m_ss, m_tt, m_st, m_dd = load_moments(at, field, inside)
    mean_s += off_s
    mean_t += off_t
    total = tl.sum(n, 0)
    divisor = tl.maximum(total, 1.0)
    row_mean_s, row_mean_t = tl.sum(n * mean_s, 0) / divisor, tl.sum(n * mean_t, 0) / divisor
    between_s, between_t = mean_s - row_mean_s, mean_t - row_mean_t
    between_d = between_s - between_t
    store_moments(
        out,
        stride,
        None,
        total,
        row_mean_s,
        row_mean_t,
        tl.sum(m_ss + n * between_s * between_s, 0),
        tl.sum(m_tt + n * between_t * between_t, 0),
        tl.sum(m_st + n * between_s * between_t, 0),
        tl.sum(m_dd + n * between_d * between_d, 0),
    )


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
    TEACHER: tl.constexpr,
    WEIGHTED: tl.constexpr,
    MIXED: tl.constexpr,
    DIVERGENCE: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Store the statistics of a row (axis 0) and a student layer (axis 1) that take one pass.

    Invalid rows are left alone. Student layers that share a teacher layer store the same shift.
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
    shift_s, about_s = row_shift(state, layer, 0, layers, field, tile, tiles, table, table_width)
    about_t = about_s * 0.0
    tl.store(shifts + layer * stride, shift_s)
    if TEACHER:
        of_shift = table_entry(table, table_width, SHIFT_LAYER, layer)
        shift_t, about_t = row_shift(
            state, of_shift, 1, layers, field, tile, tiles, table, table_width
        )
        teacher_layer = table_entry(table, table_width, TEACHER_LAYER, layer)
        tl.store(shifts + (layers + teacher_layer) * stride, shift_t)
    for slot in range(first_slot, last_slot):
        inverse = table_float(table, table_width, SLOT_INVERSE, slot)
        at = (2 * layers + SLOT_FIELDS * slot) * field
        off_s, off_t = about_s * inverse, about_t * inverse
        lse_s, expectation_s = merged_sums(state, at, field, tile, tiles, off_s, off_s - off_t)
        lse_t = lse_s
        expectation_t = lse_s
        if TEACHER:
            log_weight = off_t
            largest = 0.0
            if MIXED:
                if table_entry(table, table_width, SLOT_FLAGS, slot) & IS_MIXED:
                    a = table_float(table, table_width, SLOT_A, slot)
                    off_t = a * off_t + table_float(table, table_width, SLOT_B, slot) * off_s
                    total = tl.load(state + at + 2 * field + tile, mask=inside, other=0.0)
                    log_weight = off_t + tl.load(state + at + field + tile, mask=inside, other=0.0)
                    log_weight = tl.where(total != 0.0, log_weight, float("-inf"))
                    largest = finite_or_zero(tl.max(log_weight, 0))
                    log_weight -= largest
            lse_t, expectation_t = merged_sums(
                state, at + 2 * field, field, tile, tiles, log_weight, off_t - off_s
            )
            lse_t += largest
        for entry in range(
            table_entry(table, table_width, REQUEST_BEGIN, slot),
            table_entry(table, table_width, REQUEST_BEGIN, slot + 1),
        ):
            kind = table_entry(table, table_width, REQUEST_KIND, entry)
            request = (
                requests
                + table_entry(table, table_width, REQUEST_INDEX, entry) * REQUEST_FIELDS * stride
            )
            store_request(
                request, stride, None, kind, lse_s, lse_t, expectation_s, expectation_t, DIVERGENCE
            )
            if kind == KIND_NLL:
                label_z = (
                    tl.load(state + at + 4 * field + tile, mask=inside, other=float("-inf")) + off_s
                )
                tl.store(request + VALUE * stride, lse_s - tl.max(label_z, 0))
    for entry in range(
        table_entry(table, table_width, PART_BEGIN, layer),
        table_entry(table, table_width, PART_BEGIN, layer + 1),
    ):
        role = table_entry(table, table_width, PART_ROLE, entry)
        if role != FIRST:
            off_s, off_t = about_s, about_t
            if role == SECOND:
                _shift, about = row_shift(
                    state, layer - 1, 0, layers, field, tile, tiles, table, table_width
                )
                off_s -= about
                if TEACHER:
                    of_shift = table_entry(table, table_width, SHIFT_LAYER, layer - 1)
                    _shift, about = row_shift(
                        state, of_shift, 1, layers, field, tile, tiles, table, table_width
                    )
                    off_t -= about
            pair = table_entry(table, table_width, PART_INDEX, entry)
            inverse = table_float(table, table_width, PAIR_INVERSE, pair)
            at = state + (2 * layers + SLOT_FIELDS * slots + MOMENT_FIELDS * pair) * field + tile
            is_weighted = 0
            if WEIGHTED:
                is_weighted = table_entry(table, table_width, PAIR_WEIGHTED, pair)
            merge_moments(
                at,
                field,
                moments + pair * MOMENT_FIELDS * stride,
                stride,
                inside,
                off_s * inverse,
                off_t * inverse,
                about_t * inverse,
                is_weighted,
                WEIGHTED,
                BLOCK_T,
            )


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
    """Sum tiles and store VALUE, one program a row and item.

    With SECONDS items are the requests of the second pass; sums (items, 2, rows, tiles) have their
    GRAD_SUM too. Without, items are slots, sums (items, rows, tiles): the value replaces that of
    the slot's request of KL where it is small.
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
        grad_sum = tl.sum(tl.load(sums + (2 * item + 1) * field, mask=tile < tiles, other=0.0), 0)
        request = (
            requests
            + table_entry(table, table_width, SECOND_REQUEST, item) * REQUEST_FIELDS * stride
        )
        tl.store(request + VALUE * stride, value)
        tl.store(request + GRAD_SUM * stride, grad_sum)
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
