"""Statistics of one row and one tile of the vocabulary, all layers; each logit is loaded once.

A program walks the layers with the logits of the layer before in registers, so layer deltas cost no
memory traffic. It holds its tile as a whole: the row's shifts are the tile's maxima, means are
taken before squares, nothing is updated online. Student layer l is met with its teacher layer
(TEACHER_LAYER of the work table).

The state (fields, r, tiles) is float32, tiles adjacent. Per row and tile:

    2 l, 2 l + 1                  shifts of student layer l and of its teacher layer: the tile's
                                  largest u, 0 where the call has no softmax request
    2 L + 5 slot + 0, 1           student, about its shift: sum of e^z, sum of e^z (z_s - z_t)
    2 L + 5 slot + 2, 3           teacher, about its shift: sum of e^z, sum of e^z (z_t - z_s); of a
                                  mixed teacher about the tile's largest z, in the place of 1
    2 L + 5 slot + 4              z_s at the label, -inf where the label is in another tile
    2 L + 5 slots + 9 pair + ...  MOMENT_STATS of `lens/layout.py`
"""

from __future__ import annotations

import triton
import triton.language as tl

from fdd_kernels.backends.triton.cached.row import pair_vectors, row_logits
from fdd_kernels.backends.triton.elementwise import (
    exponential_sums,
    finite_or_zero,
    mixed_logits,
    second_moments,
)
from fdd_kernels.backends.triton.row_statistics import (
    MOMENT_FIELDS,
    store_moments,
    store_tops,
)
from fdd_kernels.backends.triton.weighted_moments import tile_weighted_moments
from fdd_kernels.backends.triton.work_table import (
    FIRST,
    IS_MIXED,
    PAIR_INVERSE,
    PAIR_WEIGHTED,
    PART_BEGIN,
    PART_INDEX,
    PART_ROLE,
    SLOT_A,
    SLOT_B,
    SLOT_BEGIN,
    SLOT_FLAGS,
    SLOT_INVERSE,
    TEACHER_LAYER,
    WANTS_LABEL,
    WANTS_STUDENT,
    table_entry,
    table_float,
)

SLOT_FIELDS = tl.constexpr(5)


@triton.jit
def tile_shift(u):
    """Return the largest u of the tile; 0 where that is not finite."""
    largest = tl.max(u, 0)
    return tl.where(tl.abs(largest) < float("inf"), largest, 0.0)


@triton.jit
def tile_moments(s, t, live, EVERY: tl.constexpr, BLOCK_C: tl.constexpr):
    """Return count, means and second moments of a tile's `live` tokens (EVERY: all of them)."""
    if EVERY:
        n = tl.full((), BLOCK_C, tl.float32)
        mean_s, mean_t = tl.sum(s, 0) / n, tl.sum(t, 0) / n
        s -= mean_s
        t -= mean_t
    else:
        n = tl.sum(live.to(tl.float32), 0)
        divisor = tl.maximum(n, 1.0)
        mean_s, mean_t = (
            tl.sum(tl.where(live, s, 0.0), 0) / divisor,
            tl.sum(tl.where(live, t, 0.0), 0) / divisor,
        )
        s = tl.where(live, s - mean_s, 0.0)
        t = tl.where(live, t - mean_t, 0.0)
    m_ss, m_tt, m_st, m_dd = second_moments(s, t, 0)
    return n, mean_s, mean_t, m_ss, m_tt, m_st, m_dd


@triton.jit
def store_tile_moments(
    at,
    field,
    s,
    t,
    z,
    live,
    inverse,
    is_weighted,
    WEIGHTED: tl.constexpr,
    EVERY: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Store the moments of a tile's vectors, of logits that are not divided by the temperature yet.

    z are the logits of the weights, which count where `is_weighted`.
    """
    if WEIGHTED:
        if is_weighted != 0:
            n, mean_s, mean_t, m_ss, m_tt, m_st, m_dd, top_s, top_t = tile_weighted_moments(
                s * inverse, t * inverse, z * inverse, live, EVERY, BLOCK_C
            )
            store_moments(at, field, None, n, mean_s, mean_t, m_ss, m_tt, m_st, m_dd)
            store_tops(at, field, None, top_s, top_t)
        else:
            store_plain_tile_moments(at, field, s, t, live, inverse, EVERY, BLOCK_C)
    else:
        store_plain_tile_moments(at, field, s, t, live, inverse, EVERY, BLOCK_C)


@triton.jit
def store_plain_tile_moments(
    at, field, s, t, live, inverse, EVERY: tl.constexpr, BLOCK_C: tl.constexpr
):
    """Store the moments of a tile's vectors without weights; see `store_tile_moments`."""
    n, mean_s, mean_t, m_ss, m_tt, m_st, m_dd = tile_moments(s, t, live, EVERY, BLOCK_C)
    square = inverse * inverse
    store_moments(
        at,
        field,
        None,
        n,
        mean_s * inverse,
        mean_t * inverse,
        m_ss * square,
        m_tt * square,
        m_st * square,
        m_dd * square,
    )


@triton.jit(
    do_not_specialize=[
        "rows",
        "columns",
        "layers",
        "slots",
        "tiles",
        "first_tile",
        "first_column",
        "table_width",
        "state_tile",
    ]
)
def cached_stats_kernel(
    state,
    logits_s,
    logits_t,
    bias_s,
    bias_t,
    labels,
    count,
    table,
    rows,
    columns,
    ld_s,
    ld_t,
    layers,
    slots,
    tiles,
    first_tile,
    state_tile,
    first_column,
    table_width,
    scale_s,
    scale_t,
    cap_s,
    cap_t,
    TEACHER: tl.constexpr,
    SOFTMAX: tl.constexpr,
    MOMENTS: tl.constexpr,
    WEIGHTED: tl.constexpr,
    MIXED: tl.constexpr,
    LABELS: tl.constexpr,
    DIVERGENCE: tl.constexpr,
    BIAS_S: tl.constexpr,
    BIAS_T: tl.constexpr,
    SCALE_S: tl.constexpr,
    SCALE_T: tl.constexpr,
    CAP_S: tl.constexpr,
    CAP_T: tl.constexpr,
    FULL: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Store the state of a row (axis 0) and a tile (axis 1).

    Logits are (L, rows, ld); their first token is `first_column` of the vocabulary.
    """
    EVERY: tl.constexpr = FULL and not (BIAS_S or BIAS_T)  # without a bias no logit is -inf
    row = tl.program_id(0)
    tile = first_tile + tl.program_id(1)
    if row >= tl.load(count):
        return
    c = tile * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = c < columns
    field = rows.to(tl.int64) * tiles
    state += row.to(tl.int64) * tiles + state_tile + tile
    row_s = logits_s + row.to(tl.int64) * ld_s
    row_t = logits_t + row.to(tl.int64) * ld_t
    stride_s = rows.to(tl.int64) * ld_s
    stride_t = rows.to(tl.int64) * ld_t
    if LABELS:
        label = tl.load(labels + row) - first_column
    before_s = tl.zeros((BLOCK_C,), tl.float32)
    before_t = before_s
    t = before_s
    for layer in range(layers):
        s, _cap_grad_s = row_logits(
            row_s, bias_s, c, inside, scale_s, cap_s, BIAS_S, SCALE_S, CAP_S, FULL
        )
        row_s += stride_s
        if TEACHER:
            at_t = row_t + table_entry(table, table_width, TEACHER_LAYER, layer) * stride_t
            t, _cap_grad_t = row_logits(
                at_t, bias_t, c, inside, scale_t, cap_t, BIAS_T, SCALE_T, CAP_T, FULL
            )
        shift_s = tl.full((), 0.0, tl.float32)
        shift_t = shift_s
        if SOFTMAX:
            shift_s = tile_shift(s)
            s -= shift_s
            if TEACHER:
                shift_t = tile_shift(t)
                t -= shift_t
        tl.store(state + 2 * layer * field, shift_s)
        tl.store(state + (2 * layer + 1) * field, shift_t)
        if SOFTMAX:
            for slot in range(
                table_entry(table, table_width, SLOT_BEGIN, layer),
                table_entry(table, table_width, SLOT_BEGIN, layer + 1),
            ):
                inverse = table_float(table, table_width, SLOT_INVERSE, slot)
                flags = table_entry(table, table_width, SLOT_FLAGS, slot)
                at = state + (2 * layers + SLOT_FIELDS * slot) * field
                z_s = s * inverse
                total, expectation = exponential_sums(z_s, z_s, 0, False, EVERY)
                tl.store(at, total)
                if TEACHER:
                    z_t = t * inverse
                    difference = z_t - z_s
                    if MIXED:
                        if flags & IS_MIXED:
                            a = table_float(table, table_width, SLOT_A, slot)
                            b = table_float(table, table_width, SLOT_B, slot)
                            z_t = mixed_logits(z_s, z_t, a, b, EVERY)
                            difference = z_t - z_s
                            own_shift = finite_or_zero(tl.max(z_t, 0))
                            z_t -= own_shift
                            tl.store(at + field, own_shift)
                    if DIVERGENCE == "reverse_kl":
                        if flags & WANTS_STUDENT:
                            total, expectation = exponential_sums(z_s, z_s - z_t, 0, True, EVERY)
                            tl.store(at + field, expectation)
                    total, expectation = exponential_sums(z_t, difference, 0, True, EVERY)
                    tl.store(at + 2 * field, total)
                    tl.store(at + 3 * field, expectation)
                if LABELS:
                    if flags & WANTS_LABEL:
                        tl.store(
                            at + 4 * field, tl.max(tl.where(c == label, z_s, float("-inf")), 0)
                        )
        if MOMENTS:
            for part in range(
                table_entry(table, table_width, PART_BEGIN, layer),
                table_entry(table, table_width, PART_BEGIN, layer + 1),
            ):
                role = table_entry(table, table_width, PART_ROLE, part)
                if role != FIRST:
                    of_s, of_t, live = pair_vectors(s, t, before_s, before_t, inside, role, EVERY)
                    pair = table_entry(table, table_width, PART_INDEX, part)
                    inverse = table_float(table, table_width, PAIR_INVERSE, pair)
                    is_weighted = 0
                    if WEIGHTED:
                        is_weighted = table_entry(table, table_width, PAIR_WEIGHTED, pair)
                    store_tile_moments(
                        state + (2 * layers + SLOT_FIELDS * slots + MOMENT_FIELDS * pair) * field,
                        field,
                        of_s,
                        of_t,
                        t,
                        live,
                        inverse,
                        is_weighted,
                        WEIGHTED,
                        EVERY,
                        BLOCK_C,
                    )
            before_s = s
            before_t = t


def fields_of(layers: int, slots: int, moments: int) -> int:
    """Count the float32 numbers of state per row and tile."""
    return 2 * layers + SLOT_FIELDS.value * slots + MOMENT_FIELDS.value * moments
