"""Coefficients per row of dL/dlogits, from the upstream gradients."""

from __future__ import annotations

import triton
import triton.language as tl

from fdd_kernels.backends.triton.row_statistics import (
    COUNT,
    MOMENT_FIELDS,
    load_tops,
    moment_coefficients,
    slot_coefficients,
)
from fdd_kernels.backends.triton.work_table import (
    PAIR_INVERSE,
    PAIR_WEIGHTED,
    SLOT_INVERSE,
    table_entry,
    table_float,
)

ITEM_FIELDS = tl.constexpr(9)  # of a slot or pair: its coefficients, see `coefficients_kernel`


@triton.jit(
    do_not_specialize=[
        "rows",
        "slots",
        "table_width",
        "stride",
        "grad_stride",
        "moment_stride",
        "grad_moment_stride",
    ]
)
def coefficients_kernel(
    coefficients,
    requests,
    moments,
    grad_requests,
    grad_moments,
    grad_scale,
    count,
    table,
    rows,
    slots,
    table_width,
    stride,
    grad_stride,
    moment_stride,
    grad_moment_stride,
    student_scale,
    WEIGHTED: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Store coefficients (slots + pairs, 9, rows) of dL/dx, times `grad_scale`; 0 at invalid rows.

    Of a slot: a, b, d, n, both log-sum-exps, the value of KL. Of a pair: k_1, k_s, k_t, k_d, both
    means; where its tokens have weights, COUNT, TOP_S and TOP_T.
    """
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    item = tl.program_id(1)
    is_valid = (row < rows) & (row < tl.load(count))
    stored = row < rows
    field = rows.to(tl.int64)
    out = coefficients + item * ITEM_FIELDS * field + row
    scale = student_scale * tl.load(grad_scale)
    if item < slots:
        a, b, d, n, lse_s, lse_t, kl = slot_coefficients(
            requests + row,
            grad_requests + row,
            stride.to(tl.int64),
            grad_stride.to(tl.int64),
            is_valid,
            table,
            table_width,
            item,
            BLOCK_R,
        )
        factor = scale * table_float(table, table_width, SLOT_INVERSE, item)
        tl.store(out, a * factor, mask=stored)
        tl.store(out + field, b * factor, mask=stored)
        tl.store(out + 2 * field, d * factor, mask=stored)
        tl.store(out + 3 * field, n * factor, mask=stored)
        tl.store(out + 4 * field, lse_s, mask=stored)
        tl.store(out + 5 * field, lse_t, mask=stored)
        tl.store(out + 6 * field, kl, mask=stored)
    else:
        index = (item - slots) * MOMENT_FIELDS
        of_rows = moments + index * moment_stride.to(tl.int64) + row
        is_weighted = 0
        if WEIGHTED:
            is_weighted = table_entry(table, table_width, PAIR_WEIGHTED, item - slots)
        of_one, of_s, of_t, of_d, mean_s, mean_t = moment_coefficients(
            of_rows,
            grad_moments + index * grad_moment_stride.to(tl.int64) + row,
            moment_stride.to(tl.int64),
            grad_moment_stride.to(tl.int64),
            is_valid,
            is_weighted,
            WEIGHTED,
        )
        factor = scale * table_float(table, table_width, PAIR_INVERSE, item - slots)
        tl.store(out, of_one * factor, mask=stored)
        tl.store(out + field, of_s * factor, mask=stored)
        tl.store(out + 2 * field, of_t * factor, mask=stored)
        tl.store(out + 3 * field, of_d * factor, mask=stored)
        tl.store(out + 4 * field, mean_s, mask=stored)
        tl.store(out + 5 * field, mean_t, mask=stored)
        if WEIGHTED:
            step = moment_stride.to(tl.int64)
            top_s, top_t = load_tops(of_rows, step, is_valid)
            log_weights = tl.load(of_rows + COUNT * step, mask=is_valid, other=0.0)
            tl.store(out + 6 * field, log_weights, mask=stored)
            tl.store(out + 7 * field, top_s, mask=stored)
            tl.store(out + 8 * field, top_t, mask=stored)
