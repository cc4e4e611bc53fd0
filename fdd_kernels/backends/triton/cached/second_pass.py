"""Second pass over logits in scratch, for divergences that need both log-sum-exps."""

from __future__ import annotations

import triton
import triton.language as tl

from fdd_kernels.backends.triton.cached.row import row_logits
from fdd_kernels.backends.triton.elementwise import divergence_grad, divergence_value
from fdd_kernels.backends.triton.row_statistics import (
    LSE_S,
    LSE_T,
    REQUEST_FIELDS,
)
from fdd_kernels.backends.triton.work_table import (
    SECOND_LAYER,
    SECOND_REQUEST,
    SECOND_SLOT,
    SLOT_A,
    SLOT_B,
    SLOT_INVERSE,
    TEACHER_LAYER,
    table_entry,
    table_float,
)


@triton.jit(
    do_not_specialize=[
        "rows",
        "columns",
        "layers",
        "tiles",
        "first_tile",
        "state_tile",
        "table_width",
        "stride",
    ]
)
def cached_second_pass_kernel(
    sums,
    logits_s,
    logits_t,
    bias_s,
    bias_t,
    shifts,
    requests,
    count,
    table,
    rows,
    columns,
    ld_s,
    ld_t,
    layers,
    tiles,
    first_tile,
    state_tile,
    table_width,
    stride,
    scale_s,
    scale_t,
    cap_s,
    cap_t,
    BIAS_S: tl.constexpr,
    BIAS_T: tl.constexpr,
    SCALE_S: tl.constexpr,
    SCALE_T: tl.constexpr,
    CAP_S: tl.constexpr,
    CAP_T: tl.constexpr,
    FULL: tl.constexpr,
    DIVERGENCE: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Store sums (requests of this pass, 2, rows, tiles): VALUE and GRAD_SUM of a tile.

    The grid is (rows, tiles, requests of this pass).
    """
    row = tl.program_id(0)
    tile = first_tile + tl.program_id(1)
    second = tl.program_id(2)
    if row >= tl.load(count):
        return
    c = tile * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = c < columns
    stride = stride.to(tl.int64)
    layer = table_entry(table, table_width, SECOND_LAYER, second)
    teacher_layer = table_entry(table, table_width, TEACHER_LAYER, layer)
    slot = table_entry(table, table_width, SECOND_SLOT, second)
    inverse = table_float(table, table_width, SLOT_INVERSE, slot)
    a = table_float(table, table_width, SLOT_A, slot)
    b = table_float(table, table_width, SLOT_B, slot)
    request = (
        requests
        + table_entry(table, table_width, SECOND_REQUEST, second) * REQUEST_FIELDS * stride
        + row
    )
    row_s = logits_s + (layer * rows.to(tl.int64) + row) * ld_s
    row_t = logits_t + (teacher_layer * rows.to(tl.int64) + row) * ld_t
    s, _cap_grad_s = row_logits(
        row_s, bias_s, c, inside, scale_s, cap_s, BIAS_S, SCALE_S, CAP_S, FULL
    )
    t, _cap_grad_t = row_logits(
        row_t, bias_t, c, inside, scale_t, cap_t, BIAS_T, SCALE_T, CAP_T, FULL
    )
    log_q = (s - tl.load(shifts + layer * stride + row)) * inverse - tl.load(
        request + LSE_S * stride
    )
    log_p = (t - tl.load(shifts + (layers + teacher_layer) * stride + row)) * inverse - tl.load(
        request + LSE_T * stride
    )
    field = rows.to(tl.int64) * tiles
    sums += 2 * second * field + row.to(tl.int64) * tiles + state_tile + tile
    tl.store(sums, tl.sum(divergence_value(log_q, log_p, a, b, DIVERGENCE), 0))
    tl.store(sums + field, tl.sum(divergence_grad(log_q, log_p, a, b, DIVERGENCE), 0))
