"""Device functions over one row of logits in scratch, a tile of the vocabulary at a time."""

from __future__ import annotations

import triton
import triton.language as tl

from fdd_kernels.backends.triton.elementwise import is_finite_logit, tanh
from fdd_kernels.backends.triton.work_table import SECOND


@triton.jit
def row_logits(
    row,
    bias,
    c,
    inside,
    scale,
    cap,
    BIAS: tl.constexpr,
    SCALE: tl.constexpr,
    CAP: tl.constexpr,
    FULL: tl.constexpr,
):
    """Load u = softcap(scale * (x + bias)) of the tokens c, and the soft cap's derivative there.

    Beyond the last token u is -inf. FULL promises that no token is beyond: a mask would keep the
    compiler from loading 128 bits at a time.
    """
    if FULL:
        u = tl.load(row + c).to(tl.float32)
        if BIAS:
            u += tl.load(bias + c)
    else:
        u = tl.load(row + c, mask=inside, other=0.0).to(tl.float32)
        if BIAS:
            u += tl.load(bias + c, mask=inside, other=0.0)
    if SCALE:
        u *= scale
    cap_grad = u
    if CAP:
        u = tanh(u / cap)
        cap_grad = 1.0 - u * u
        u *= cap
    if not FULL:
        u = tl.where(inside, u, float("-inf"))
    return u, cap_grad


@triton.jit
def pair_vectors(s, t, before_s, before_t, inside, role, EVERY: tl.constexpr):
    """Return the vectors of `PairMoments` and the tokens that they have.

    They are u of the layer, less u of the layer before where `role` is SECOND. EVERY promises that
    every logit is above -inf.
    """
    of_s, of_t, live = s, t, inside
    if not EVERY:
        live = is_finite_logit(s, t)
    if role == SECOND:
        of_s = s - before_s
        of_t = t - before_t
        if not EVERY:
            live = live & is_finite_logit(before_s, before_t)
    return of_s, of_t, live
