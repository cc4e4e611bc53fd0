"""First pass: statistics of every layer, per range of columns, in one walk over the columns.

A program owns a tile of rows and a range of columns. It walks the range's column tiles and, for
each, all layers: two products give the student's and the teacher's tile of u - shift, which it
parks in its own scratch (a ring of two layers that stays in the second cache level), so that the
deltas find the layer before and the statistics can be taken in narrow strips that fit in registers
whatever the tile. Running statistics live in `state`, one row vector per field:

    2 l, 2 l + 1                     shifts of layer l, student and teacher: the largest u of the
    range's first tile 2 L + 7 slot + 0..6              running max, sum of exponentials,
                                     expectation: student, then teacher; label's z, -inf while the
                                     label's column was not met
    2 L + 7 slots + 7 moment + 0..6  the moments of `spec.py`

Shape suffixes: r rows of a tile, c columns of a tile, e columns of a strip.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fdd_kernels.backends.triton.elementwise import MOMENT_FIELDS, exponential_sums, second_moments
from fdd_kernels.backends.triton.launch import launch
from fdd_kernels.backends.triton.one_pass.tiles import (
    park_features,
    park_tile,
    pivot_of,
    tile_values,
)
from fdd_kernels.backends.triton.work_table import (
    FIRST,
    PART_BEGIN,
    PART_INDEX,
    PART_ROLE,
    SECOND,
    SLOT_BEGIN,
    SLOT_FLAGS,
    SLOT_INVERSE,
    WANTS_LABEL,
    WANTS_STUDENT,
    table_entry,
    table_float,
)

SLOT_FIELDS = tl.constexpr(7)


@triton.jit
def update_softmax(z_re, difference_re, top, total, expectation, WITH_EXPECTATION: tl.constexpr):
    """Online softmax: sums of e^(z - top) and of e^(z - top) * difference, `top` the largest z so
    far.
    """
    new_top = tl.maximum(top, tl.max(z_re, 1))
    # While every logit so far is -inf the shift must stay finite.
    shift = tl.where(new_top > float("-inf"), new_top, 0.0)
    rescale = tl.exp(top - shift)
    more, more_expectation = exponential_sums(
        z_re - shift[:, None], difference_re, 1, WITH_EXPECTATION, False
    )
    total = total * rescale + more
    if WITH_EXPECTATION:
        expectation = expectation * rescale + more_expectation
    return new_top, total, expectation


@triton.jit
def update_slot(
    state,
    field_stride,
    carried,
    everywhere,
    tile_s,
    tile_t,
    strip_re,
    columns_e,
    label_r,
    inverse,
    flags,
    TEACHER: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Add one column tile to a slot. `carried` marks rows whose state already exists; `tile_*`
    point at u - shift.
    """
    top_s = tl.load(state, mask=carried, other=float("-inf"))
    total_s = tl.load(state + field_stride, mask=carried, other=0.0)
    expectation_s = tl.load(state + 2 * field_stride, mask=carried, other=0.0)
    top_t = tl.load(state + 3 * field_stride, mask=carried, other=float("-inf"))
    total_t = tl.load(state + 4 * field_stride, mask=carried, other=0.0)
    expectation_t = tl.load(state + 5 * field_stride, mask=carried, other=0.0)
    label_z = tl.load(state + 6 * field_stride, mask=carried, other=float("-inf"))
    for start in range(0, BLOCK_C, BLOCK_E):
        z_s = tl.load(tile_s + strip_re + start) * inverse
        if TEACHER:
            z_t = tl.load(tile_t + strip_re + start) * inverse
            top_t, total_t, expectation_t = update_softmax(
                z_t, z_t - z_s, top_t, total_t, expectation_t, True
            )
            if flags & WANTS_STUDENT:
                top_s, total_s, expectation_s = update_softmax(
                    z_s, z_s - z_t, top_s, total_s, expectation_s, True
                )
            else:
                top_s, total_s, expectation_s = update_softmax(
                    z_s, z_s, top_s, total_s, expectation_s, False
                )
        else:
            top_s, total_s, expectation_s = update_softmax(
                z_s, z_s, top_s, total_s, expectation_s, False
            )
        if flags & WANTS_LABEL:
            at_label = (columns_e + start)[None, :] == label_r[:, None]
            label_z = tl.maximum(label_z, tl.max(tl.where(at_label, z_s, float("-inf")), 1))
    tl.store(state, top_s, mask=everywhere)
    tl.store(state + field_stride, total_s, mask=everywhere)
    tl.store(state + 2 * field_stride, expectation_s, mask=everywhere)
    tl.store(state + 3 * field_stride, top_t, mask=everywhere)
    tl.store(state + 4 * field_stride, total_t, mask=everywhere)
    tl.store(state + 5 * field_stride, expectation_t, mask=everywhere)
    tl.store(state + 6 * field_stride, label_z, mask=everywhere)


@triton.jit
def vectors(tile_s, tile_t, before_s, before_t, strip_re, pair, inverse):
    """A strip of a moment target's vectors: z of the layer, less z of the layer before for a pair;
    and where they count.

    Tokens whose logit is -inf in either model or layer do not; NaN does, and shows.
    """
    s = tl.load(tile_s + strip_re)
    t = tl.load(tile_t + strip_re)
    live = (s != float("-inf")) & (t != float("-inf"))
    if pair:
        s_before = tl.load(before_s + strip_re)
        t_before = tl.load(before_t + strip_re)
        live = live & (s_before != float("-inf")) & (t_before != float("-inf"))
        s -= s_before
        t -= t_before
    return s * inverse, t * inverse, live


@triton.jit
def merge_moments(
    count,
    mean_s,
    mean_t,
    m_ss,
    m_tt,
    m_st,
    m_dd,
    count_b,
    mean_sb,
    mean_tb,
    m_ssb,
    m_ttb,
    m_stb,
    m_ddb,
):
    """Moments of the union of two sets of columns (Chan, Golub and LeVeque's update)."""
    total = count + count_b
    weight_b = count_b / tl.maximum(total, 1.0)
    cross = count * weight_b
    delta_s, delta_t = mean_sb - mean_s, mean_tb - mean_t
    difference = delta_s - delta_t
    return (
        total,
        mean_s + delta_s * weight_b,
        mean_t + delta_t * weight_b,
        m_ss + m_ssb + cross * delta_s * delta_s,
        m_tt + m_ttb + cross * delta_t * delta_t,
        m_st + m_stb + cross * delta_s * delta_t,
        m_dd + m_ddb + cross * difference * difference,
    )


@triton.jit
def load_moments(state, field_stride, mask):
    return (
        tl.load(state, mask=mask, other=0.0),
        tl.load(state + field_stride, mask=mask, other=0.0),
        tl.load(state + 2 * field_stride, mask=mask, other=0.0),
        tl.load(state + 3 * field_stride, mask=mask, other=0.0),
        tl.load(state + 4 * field_stride, mask=mask, other=0.0),
        tl.load(state + 5 * field_stride, mask=mask, other=0.0),
        tl.load(state + 6 * field_stride, mask=mask, other=0.0),
    )


@triton.jit
def store_moments(state, field_stride, mask, count, mean_s, mean_t, m_ss, m_tt, m_st, m_dd):
    tl.store(state, count, mask=mask)
    tl.store(state + field_stride, mean_s, mask=mask)
    tl.store(state + 2 * field_stride, mean_t, mask=mask)
    tl.store(state + 3 * field_stride, m_ss, mask=mask)
    tl.store(state + 4 * field_stride, m_tt, mask=mask)
    tl.store(state + 5 * field_stride, m_st, mask=mask)
    tl.store(state + 6 * field_stride, m_dd, mask=mask)


@triton.jit
def update_moments(
    state,
    field_stride,
    carried,
    everywhere,
    tile_s,
    tile_t,
    before_s,
    before_t,
    strip_re,
    pair,
    inverse,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Add one column tile to a moment target.

    Within the tile, sums are taken about the running mean (at first the mean of the first strip),
    so that a common part of the vector, however large, leaves no rounding in its spread.
    """
    count, mean_s, mean_t, m_ss, m_tt, m_st, m_dd = load_moments(state, field_stride, carried)
    s, t, live = vectors(tile_s, tile_t, before_s, before_t, strip_re, pair, inverse)
    in_strip = tl.maximum(tl.sum(live.to(tl.float32), 1), 1.0)
    base_s = tl.where(count > 0, mean_s, tl.sum(tl.where(live, s, 0.0), 1) / in_strip)
    base_t = tl.where(count > 0, mean_t, tl.sum(tl.where(live, t, 0.0), 1) / in_strip)
    n = tl.zeros((BLOCK_R,), dtype=tl.float32)
    sum_s, sum_t, sum_ss, sum_tt, sum_st, sum_dd = n, n, n, n, n, n
    for start in range(0, BLOCK_C, BLOCK_E):
        s, t, live = vectors(tile_s, tile_t, before_s, before_t, strip_re + start, pair, inverse)
        s = tl.where(live, s - base_s[:, None], 0.0)
        t = tl.where(live, t - base_t[:, None], 0.0)
        n += tl.sum(live.to(tl.float32), 1)
        sum_s += tl.sum(s, 1)
        sum_t += tl.sum(t, 1)
        ss, tt, st, dd = second_moments(s, t, 1)
        sum_ss += ss
        sum_tt += tt
        sum_st += st
        sum_dd += dd
    divisor = tl.maximum(n, 1.0)
    offset_s, offset_t = sum_s / divisor, sum_t / divisor
    difference = sum_s - sum_t
    count, mean_s, mean_t, m_ss, m_tt, m_st, m_dd = merge_moments(
        count,
        mean_s,
        mean_t,
        m_ss,
        m_tt,
        m_st,
        m_dd,
        n,
        base_s + offset_s,
        base_t + offset_t,
        tl.maximum(sum_ss - sum_s * offset_s, 0.0),
        tl.maximum(sum_tt - sum_t * offset_t, 0.0),
        sum_st - sum_s * offset_t,
        tl.maximum(sum_dd - difference * (difference / divisor), 0.0),
    )
    store_moments(state, field_stride, everywhere, count, mean_s, mean_t, m_ss, m_tt, m_st, m_dd)


@triton.jit(
    do_not_specialize=[
        "first",
        "rows",
        "columns",
        "layers",
        "slots",
        "fields",
        "table_width",
        "tiles_per_range",
        "student_has_bias",
        "teacher_has_bias",
        "ranges",
    ]
)
def lens_stats_kernel(
    state,
    scratch,
    table,
    count,
    labels,
    student_hidden,
    student_weight,
    student_bias,
    teacher_hidden,
    teacher_weight,
    teacher_bias,
    first,
    rows,
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
    slots,
    fields,
    ranges,
    tiles_per_range,
    moment_inverse,
    TEACHER: tl.constexpr,
    IDENTITY: tl.constexpr,
    MOMENTS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """State of every (row tile, column range). TEACHER, MOMENTS: whether the spec needs any;
    IDENTITY: feature space.
    """
    TILE: tl.constexpr = BLOCK_R * BLOCK_C
    r = tl.arange(0, BLOCK_R)
    c = tl.arange(0, BLOCK_C)
    e = tl.arange(0, BLOCK_E)
    program = tl.program_id(0)
    ring = scratch + program.to(tl.int64) * (4 * TILE)
    strip_re = r[:, None] * BLOCK_C + e[None, :]
    everywhere = r < BLOCK_R
    live_rows = tl.minimum(tl.load(count) - first, rows)
    row_tiles = tl.cdiv(tl.maximum(live_rows, 0), BLOCK_R)
    field_stride = rows.to(tl.int64)
    # Neighbouring programs share a range, and with it the head's rows that are in cache.
    for item in range(program, row_tiles * ranges, tl.num_programs(0)):
        rows_r = (item % row_tiles) * BLOCK_R + r
        own_state = state + (item // row_tiles).to(tl.int64) * fields * field_stride + rows_r
        label_r = tl.load(labels + first + rows_r, mask=rows_r < live_rows, other=-1)
        first_tile = (item // row_tiles) * tiles_per_range
        for tile in range(
            first_tile, tl.minimum(first_tile + tiles_per_range, tl.cdiv(columns, BLOCK_C))
        ):
            columns_c = tile * BLOCK_C + c
            columns_e = tile * BLOCK_C + e
            is_first = tile == first_tile
            carried = (tl.zeros((BLOCK_R,), dtype=tl.int32) + tile) != first_tile
            for layer in tl.range(layers, disable_licm=True):
                tile_s = ring + (layer % 2) * (2 * TILE)
                tile_t = tile_s + TILE
                before_s = ring + ((layer + 1) % 2) * (2 * TILE)
                before_t = before_s + TILE
                tl.debug_barrier()  # the layer that stood here has been read
                x = tile_values(
                    student_hidden + layer * field_stride * student_width,
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
                pivot = own_state + 2 * layer * field_stride
                pivot_r = tl.load(pivot, mask=carried, other=0.0)
                if (slots > 0) & is_first:
                    pivot_r = pivot_of(x, student_cap)
                tl.store(pivot, pivot_r)
                park_tile(
                    tile_s, x, pivot_r, student_cap, columns_e, columns, BLOCK_R, BLOCK_C, BLOCK_E
                )
                if TEACHER:
                    teacher_layer = teacher_hidden + layer * field_stride * teacher_width
                    pivot = own_state + (2 * layer + 1) * field_stride
                    if IDENTITY:
                        tl.store(pivot, tl.zeros((BLOCK_R,), dtype=tl.float32))
                        park_features(
                            tile_t,
                            teacher_layer,
                            rows_r,
                            columns_e,
                            columns,
                            teacher_width,
                            BLOCK_R,
                            BLOCK_C,
                            BLOCK_E,
                        )
                    else:
                        x = tile_values(
                            teacher_layer,
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
                        pivot_r = tl.load(pivot, mask=carried, other=0.0)
                        if (slots > 0) & is_first:
                            pivot_r = pivot_of(x, teacher_cap)
                        tl.store(pivot, pivot_r)
                        park_tile(
                            tile_t,
                            x,
                            pivot_r,
                            teacher_cap,
                            columns_e,
                            columns,
                            BLOCK_R,
                            BLOCK_C,
                            BLOCK_E,
                        )
                tl.debug_barrier()  # every thread's part of the tiles can be read
                for slot in range(
                    table_entry(table, table_width, SLOT_BEGIN, layer),
                    table_entry(table, table_width, SLOT_BEGIN, layer + 1),
                ):
                    update_slot(
                        own_state + (2 * layers + slot * SLOT_FIELDS) * field_stride,
                        field_stride,
                        carried,
                        everywhere,
                        tile_s,
                        tile_t,
                        strip_re,
                        columns_e,
                        label_r,
                        table_float(table, table_width, SLOT_INVERSE, slot),
                        table_entry(table, table_width, SLOT_FLAGS, slot),
                        TEACHER,
                        BLOCK_C,
                        BLOCK_E,
                    )
                if MOMENTS:
                    for part in range(
                        table_entry(table, table_width, PART_BEGIN, layer),
                        table_entry(table, table_width, PART_BEGIN, layer + 1),
                    ):
                        role = table_entry(table, table_width, PART_ROLE, part)
                        if role != FIRST:
                            moment = table_entry(table, table_width, PART_INDEX, part)
                            update_moments(
                                own_state
                                + (2 * layers + SLOT_FIELDS * slots + moment * MOMENT_FIELDS)
                                * field_stride,
                                field_stride,
                                carried,
                                everywhere,
                                tile_s,
                                tile_t,
                                before_s,
                                before_t,
                                strip_re,
                                role == SECOND,
                                moment_inverse,
                                BLOCK_R,
                                BLOCK_C,
                                BLOCK_E,
                            )


def fields_of(layers: int, slots: int, moments: int) -> int:
    return 2 * layers + SLOT_FIELDS.value * slots + MOMENT_FIELDS.value * moments


def launch_stats(block, state) -> None:
    """Fill `state` (ranges, fields, rows) for one block of rows; see `host.Block`."""
    config = block.config
    launch(
        lens_stats_kernel,
        (block.programs(state.shape[0]),),
        config.options,
        state=state,
        scratch=block.scratch(state.shape[0], ring=2),
        labels=block.labels,
        slots=block.table.slots,
        fields=state.shape[1],
        ranges=state.shape[0],
        tiles_per_range=block.tiles_per_range,
        moment_inverse=1.0 / block.spec.moment_temperature,
        MOMENTS=bool(block.spec.moments),
        BLOCK_E=config.block_strip,
        **block.arguments(),
    )
