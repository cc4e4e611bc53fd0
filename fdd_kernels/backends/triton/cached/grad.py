"""dL/dlogits of one row and one tile of a slab of the vocabulary, all layers.

With per-row coefficients from the upstream gradients (`coefficients_kernel`), per slot and per
pair,

    dL/dz = a q + b p + d grad(log_q, log_p) + n [token = label]
    dL/ds = k_1 + k_s (s - mean_s) + k_t (t - mean_t) + k_d ((s - mean_s) - (t - mean_t))

times the token's weight where tokens have weights.

A program walks the layers with the logits of the layer before, and its unfinished gradient, in
registers: a pair gives +dL/ds to its second layer and -dL/ds to its first. Both log-sum-exps are
known here. So where KL is small, its value is summed again on the way in the accurate form
(`elementwise.kl_of`).
"""

from __future__ import annotations

import triton
import triton.language as tl

from fdd_kernels.backends.triton.cached.coefficients import ITEM_FIELDS
from fdd_kernels.backends.triton.cached.row import pair_vectors, row_logits
from fdd_kernels.backends.triton.elementwise import (
    REFINED_BELOW,
    kl_of,
    mixed_logits,
    moment_gradient,
    softmax_gradient,
)
from fdd_kernels.backends.triton.weighted_moments import weighted_moment_gradient
from fdd_kernels.backends.triton.work_table import (
    FIRST,
    IS_MIXED,
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


@triton.jit
def store_gradient(at, gradient, inside, FULL: tl.constexpr):
    """Store a tile in the dtype of `at`; unmasked where FULL."""
    if FULL:
        tl.store(at, gradient.to(at.dtype.element_ty))
    else:
        tl.store(at, gradient.to(at.dtype.element_ty), mask=inside)


@triton.jit(
    do_not_specialize=[
        "rows",
        "columns",
        "layers",
        "slots",
        "tiles",
        "first_tile",
        "state_tile",
        "first_column",
        "table_width",
        "stride",
    ]
)
def cached_grad_kernel(
    grad,
    values,
    logits_s,
    logits_t,
    bias_s,
    bias_t,
    shifts,
    coefficients,
    labels,
    count,
    table,
    rows,
    columns,
    ld_s,
    ld_t,
    grad_ld,
    layers,
    slots,
    tiles,
    first_tile,
    state_tile,
    first_column,
    table_width,
    stride,
    scale_s,
    scale_t,
    cap_s,
    cap_t,
    TEACHER: tl.constexpr,
    SOFTMAX: tl.constexpr,
    MOMENTS: tl.constexpr,
    WEIGHTED: tl.constexpr,
    MIXED: tl.constexpr,
    VALUES: tl.constexpr,
    LABELS: tl.constexpr,
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
    """Store dL/dx of a row (axis 0) and a tile (axis 1) of the slab in grad (L, rows, grad_ld).

    With VALUES also sum small values of KL again, into values (slots, rows, tiles).
    """
    EVERY: tl.constexpr = FULL and not (BIAS_S or BIAS_T)  # without a bias no logit is -inf
    row = tl.program_id(0)
    tile = first_tile + tl.program_id(1)
    c = tile * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = c < columns
    row_s = logits_s + row.to(tl.int64) * ld_s
    row_t = logits_t + row.to(tl.int64) * ld_t
    stride_s = rows.to(tl.int64) * ld_s
    stride_t = rows.to(tl.int64) * ld_t
    out = grad + row.to(tl.int64) * grad_ld + c
    out_stride = rows.to(tl.int64) * grad_ld
    values += row.to(tl.int64) * tiles + state_tile + tile
    shifts += row
    coefficients += row
    field = rows.to(tl.int64)
    stride = stride.to(tl.int64)
    nothing = tl.zeros((BLOCK_C,), tl.float32)
    if row >= tl.load(count):  # GEMMs take it, and 0 e^z need not be 0
        for layer in range(layers):
            store_gradient(out + layer * out_stride, nothing, inside, FULL)
        return
    if LABELS:
        label = tl.load(labels + row) - first_column
    t, before_s, before_t, before_g, before_cap_grad = nothing, nothing, nothing, nothing, nothing
    for layer in range(layers):
        s, cap_grad = row_logits(
            row_s, bias_s, c, inside, scale_s, cap_s, BIAS_S, SCALE_S, CAP_S, FULL
        )
        s -= tl.load(shifts + layer * stride)
        row_s += stride_s
        if TEACHER:
            teacher_layer = table_entry(table, table_width, TEACHER_LAYER, layer)
            at_t = row_t + teacher_layer * stride_t
            t, _cap_grad_t = row_logits(
                at_t, bias_t, c, inside, scale_t, cap_t, BIAS_T, SCALE_T, CAP_T, FULL
            )
            t -= tl.load(shifts + (layers + teacher_layer) * stride)
        g = nothing
        if SOFTMAX:
            for slot in range(
                table_entry(table, table_width, SLOT_BEGIN, layer),
                table_entry(table, table_width, SLOT_BEGIN, layer + 1),
            ):
                inverse = table_float(table, table_width, SLOT_INVERSE, slot)
                k = coefficients + slot * ITEM_FIELDS * field
                log_q = s * inverse - tl.load(k + 4 * field)
                log_p = log_q
                if TEACHER:
                    z_t = t * inverse
                    if MIXED:
                        if table_entry(table, table_width, SLOT_FLAGS, slot) & IS_MIXED:
                            a = table_float(table, table_width, SLOT_A, slot)
                            b = table_float(table, table_width, SLOT_B, slot)
                            z_t = mixed_logits(s * inverse, z_t, a, b, EVERY)
                    log_p = z_t - tl.load(k + 5 * field)
                g += softmax_gradient(
                    log_q,
                    log_p,
                    tl.load(k),
                    tl.load(k + field),
                    tl.load(k + 2 * field),
                    table_float(table, table_width, SLOT_A, slot),
                    table_float(table, table_width, SLOT_B, slot),
                    TEACHER,
                    DIVERGENCE,
                )
                if LABELS:
                    g += tl.where(c == label, tl.load(k + 3 * field), 0.0)
                if VALUES:
                    if tl.load(k + 6 * field) < REFINED_BELOW:
                        tl.store(
                            values + slot * field * tiles,
                            tl.sum(kl_of(tl.exp(log_p), tl.exp(log_q), log_q - log_p, EVERY), 0),
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
                    k = coefficients + (slots + pair) * ITEM_FIELDS * field
                    of_s = of_s * inverse - tl.load(k + 4 * field)
                    of_t = of_t * inverse - tl.load(k + 5 * field)
                    k_1, k_s = tl.load(k), tl.load(k + field)
                    k_t, k_d = tl.load(k + 2 * field), tl.load(k + 3 * field)
                    if WEIGHTED:
                        if table_entry(table, table_width, PAIR_WEIGHTED, pair) != 0:
                            v = weighted_moment_gradient(
                                of_s,
                                of_t,
                                t * inverse,
                                tl.load(k + 6 * field),
                                tl.load(k + 7 * field),
                                tl.load(k + 8 * field),
                                k_1,
                                k_s,
                                k_t,
                                k_d,
                            )
                        else:
                            v = moment_gradient(of_s, of_t, k_1, k_s, k_t, k_d)
                    else:
                        v = moment_gradient(of_s, of_t, k_1, k_s, k_t, k_d)
                    if not EVERY:
                        v = tl.where(live, v, 0.0)
                    g += v
                    if role == SECOND:
                        before_g -= v
            if layer > 0:  # the layer before is finished only now
                if CAP_S:
                    before_g *= before_cap_grad
                store_gradient(out, before_g, inside, FULL)
                out += out_stride
            before_s, before_t, before_g, before_cap_grad = s, t, g, cap_grad
        else:
            if CAP_S:
                g *= cap_grad
            store_gradient(out, g, inside, FULL)
            out += out_stride
    if MOMENTS:
        if CAP_S:
            before_g *= before_cap_grad
        store_gradient(out, before_g, inside, FULL)
