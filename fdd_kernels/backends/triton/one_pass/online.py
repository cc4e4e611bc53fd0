"""Running softmax sums of a tile of rows: updated by a tile of tokens, merged between splits.

Shape suffixes: r rows of a tile, e tokens of a sub-tile.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fdd_kernels.backends.triton.elementwise import exponential_sums, mixed_logits
from fdd_kernels.backends.triton.work_table import (
    IS_MIXED,
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
    """Add a sub-tile to an online softmax: sums of e^(z - top) and of e^(z - top) * difference,
    `top` the largest z so far.
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
    at_re,
    columns_e,
    label_r,
    inverse,
    flags,
    share_t,
    share_s,
    TEACHER: tl.constexpr,
    MIXED: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Add a tile to a slot's state (7 fields, see `stats.py`).

    `carried` marks rows whose state exists already. `tile_s` and `tile_t` point at u - shift. The
    shares are those of a mixed teacher.
    """
    top_s = tl.load(state, mask=carried, other=float("-inf"))
    total_s = tl.load(state + field_stride, mask=carried, other=0.0)
    expectation_s = tl.load(state + 2 * field_stride, mask=carried, other=0.0)
    top_t = tl.load(state + 3 * field_stride, mask=carried, other=float("-inf"))
    total_t = tl.load(state + 4 * field_stride, mask=carried, other=0.0)
    expectation_t = tl.load(state + 5 * field_stride, mask=carried, other=0.0)
    label_z = tl.load(state + 6 * field_stride, mask=carried, other=float("-inf"))
    for start in range(0, BLOCK_C, BLOCK_E):
        z_s = tl.load(tile_s + at_re + start) * inverse
        if TEACHER:
            z_t = tl.load(tile_t + at_re + start) * inverse
            if MIXED:
                if flags & IS_MIXED:
                    z_t = mixed_logits(z_s, z_t, share_t, share_s, False)
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
def merge_softmax(top, total, expectation, top_b, total_b, expectation_b):
    """Merge the online softmax of two sets of tokens."""
    new_top = tl.maximum(top, top_b)
    shift = tl.where(new_top > float("-inf"), new_top, 0.0)
    a, b = tl.exp(top - shift), tl.exp(top_b - shift)
    return new_top, total * a + total_b * b, expectation * a + expectation_b * b


@triton.jit
def row_shift(
    state,
    layer,
    MODEL: tl.constexpr,
    layers,
    stride,
    split_stride,
    splits,
    table,
    table_width,
    is_valid,
    TILE_ROWS: tl.constexpr,
):
    """Return the largest u of each row over all splits.

    `layer` is a student layer; MODEL 1 takes its teacher layer instead. The state has each split's
    largest z about its shift, at the temperature of the first slot. Without a slot, and where the
    teacher of the first is mixed, the first split's shift serves.
    """
    shift = state + (2 * layer + MODEL) * stride
    first_slot = table_entry(table, table_width, SLOT_BEGIN, layer)
    top = state + (2 * layers + first_slot * SLOT_FIELDS + 3 * MODEL) * stride
    found = tl.load(shift, mask=is_valid, other=0.0)
    has_slot = first_slot < table_entry(table, table_width, SLOT_BEGIN, layer + 1)
    if MODEL == 1:
        has_slot = has_slot & (
            (table_entry(table, table_width, SLOT_FLAGS, first_slot) & IS_MIXED) == 0
        )
    if has_slot:
        inverse = table_float(table, table_width, SLOT_INVERSE, first_slot)
        largest = tl.full((TILE_ROWS,), float("-inf"), tl.float32)
        for part in range(splits):
            own = tl.load(shift + part * split_stride, mask=is_valid, other=0.0)
            largest = tl.maximum(
                largest,
                own + tl.load(top + part * split_stride, mask=is_valid, other=0.0) / inverse,
            )
        found = tl.where(tl.abs(largest) < float("inf"), largest, found)
    return found
