"""First pass: statistics of every layer, per split of the vocabulary.

A program owns a tile of rows and a split. It walks the split's tiles and, for each, all layers: two
GEMM tiles give u - shift of the student and of its teacher layer. The program parks them in its own
scratch, a ring of two layers that stays in L2. So a pair finds the layer before it, and statistics
are taken in narrow sub-tiles that fit in registers whatever the tile.

The state (splits, fields, rows) holds running statistics:

    2 l, 2 l + 1             shifts of student layer l and of its teacher layer: the largest u of
                             the split's first tile
    2 L + 7 slot + 0, 1, 2   student: largest z so far, sum of exponentials, expectation
    2 L + 7 slot + 3, 4, 5   the same of the teacher
    2 L + 7 slot + 6         z at the label, -inf while the label was not met
    2 L + 7 slots + 9 pair + ...  MOMENT_STATS of `lens/layout.py`

Shape suffixes: r rows of a tile, c tokens of a tile, e tokens of a sub-tile.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fdd_kernels.backends.triton.launch import Launch
from fdd_kernels.backends.triton.one_pass.moments import update_moments
from fdd_kernels.backends.triton.one_pass.online import SLOT_FIELDS, update_slot
from fdd_kernels.backends.triton.one_pass.tiles import (
    park_features,
    park_tile,
    row_max,
    tile_logits,
)
from fdd_kernels.backends.triton.row_statistics import MOMENT_FIELDS
from fdd_kernels.backends.triton.work_table import (
    FIRST,
    PAIR_INVERSE,
    PAIR_WEIGHTED,
    PART_BEGIN,
    PART_INDEX,
    PART_ROLE,
    SECOND,
    SLOT_A,
    SLOT_B,
    SLOT_BEGIN,
    SLOT_FLAGS,
    SLOT_INVERSE,
    TEACHER_LAYER,
    table_entry,
    table_float,
)


@triton.jit(
    do_not_specialize=[
        "first",
        "rows",
        "columns",
        "layers",
        "slots",
        "fields",
        "table_width",
        "tiles_per_split",
        "student_has_bias",
        "teacher_has_bias",
        "splits",
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
    splits,
    tiles_per_split,
    TEACHER: tl.constexpr,
    IDENTITY: tl.constexpr,
    MOMENTS: tl.constexpr,
    WEIGHTED: tl.constexpr,
    MIXED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Fill the state of every tile of rows and split.

    TEACHER and MOMENTS tell whether the spec needs any; IDENTITY is feature space.
    """
    TILE: tl.constexpr = BLOCK_R * BLOCK_C
    r = tl.arange(0, BLOCK_R)
    c = tl.arange(0, BLOCK_C)
    e = tl.arange(0, BLOCK_E)
    program = tl.program_id(0)
    ring = scratch + program.to(tl.int64) * (4 * TILE)
    at_re = r[:, None] * BLOCK_C + e[None, :]
    everywhere = r < BLOCK_R
    live_rows = tl.minimum(tl.load(count) - first, rows)
    row_tiles = tl.cdiv(tl.maximum(live_rows, 0), BLOCK_R)
    field_stride = rows.to(tl.int64)
    # Neighbouring programs share a split, and with it the head's rows that are in L2.
    for item in range(program, row_tiles * splits, tl.num_programs(0)):
        rows_r = (item % row_tiles) * BLOCK_R + r
        own_state = state + (item // row_tiles).to(tl.int64) * fields * field_stride + rows_r
        label_r = tl.load(labels + first + rows_r, mask=rows_r < live_rows, other=-1)
        first_tile = (item // row_tiles) * tiles_per_split
        for tile in range(
            first_tile, tl.minimum(first_tile + tiles_per_split, tl.cdiv(columns, BLOCK_C))
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
                x = tile_logits(
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
                shift = own_state + 2 * layer * field_stride
                shift_r = tl.load(shift, mask=carried, other=0.0)
                if (slots > 0) & is_first:
                    shift_r = row_max(x, student_cap)
                tl.store(shift, shift_r)
                park_tile(
                    tile_s, x, shift_r, student_cap, columns_e, columns, BLOCK_R, BLOCK_C, BLOCK_E
                )
                if TEACHER:
                    teacher_layer = table_entry(table, table_width, TEACHER_LAYER, layer)
                    hidden_t = teacher_hidden + teacher_layer * field_stride * teacher_width
                    shift = own_state + (2 * layer + 1) * field_stride
                    if IDENTITY:
                        tl.store(shift, tl.zeros((BLOCK_R,), dtype=tl.float32))
                        park_features(
                            tile_t,
                            hidden_t,
                            rows_r,
                            columns_e,
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
                        shift_r = tl.load(shift, mask=carried, other=0.0)
                        if (slots > 0) & is_first:
                            shift_r = row_max(x, teacher_cap)
                        tl.store(shift, shift_r)
                        park_tile(
                            tile_t,
                            x,
                            shift_r,
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
                        at_re,
                        columns_e,
                        label_r,
                        table_float(table, table_width, SLOT_INVERSE, slot),
                        table_entry(table, table_width, SLOT_FLAGS, slot),
                        table_float(table, table_width, SLOT_A, slot),
                        table_float(table, table_width, SLOT_B, slot),
                        TEACHER,
                        MIXED,
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
                            own_moments = (
                                own_state
                                + (2 * layers + SLOT_FIELDS * slots + moment * MOMENT_FIELDS)
                                * field_stride
                            )
                            inverse = table_float(table, table_width, PAIR_INVERSE, moment)
                            is_weighted = 0
                            if WEIGHTED:
                                is_weighted = table_entry(table, table_width, PAIR_WEIGHTED, moment)
                            update_moments(
                                own_moments,
                                field_stride,
                                carried,
                                everywhere,
                                tile_s,
                                tile_t,
                                before_s,
                                before_t,
                                at_re,
                                role == SECOND,
                                inverse,
                                is_weighted,
                                WEIGHTED,
                                BLOCK_R,
                                BLOCK_C,
                                BLOCK_E,
                            )


def fields_of(layers: int, slots: int, moments: int) -> int:
    """Count the float32 numbers of state per row and split."""
    return 2 * layers + SLOT_FIELDS.value * slots + MOMENT_FIELDS.value * moments


def stats_launch(block, state) -> Launch:
    """Fill `state` (splits, fields, rows) for a `RowBlock`."""
    config = block.config
    arguments = {
        **block.arguments(),
        "state": state,
        "scratch": block.scratch(state.shape[0], ring=2),
        "labels": block.labels,
        "slots": block.table.slots,
        "fields": state.shape[1],
        "splits": state.shape[0],
        "tiles_per_split": block.tiles_per_split,
        "MOMENTS": bool(block.spec.moments),
        "WEIGHTED": block.table.has_weights,
        "MIXED": block.table.has_mixtures,
    }
    return Launch(lens_stats_kernel, (block.programs(state.shape[0]),), config.options, arguments)
