"""One row's logits as the kernels of this package read them."""

from __future__ import annotations

import triton
import triton.language as tl

from fdd_kernels.backends.triton.elementwise import tanh


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
    """u = softcap(scale * (x + bias)) of the tokens c, and du/dx but for the scale; -inf beyond the
    last token.

    FULL promises that there is none beyond: a mask would keep the compiler from loading 128 bits at
    a time.
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
    slope = u
    if CAP:
        u = tanh(u / cap)
        slope = 1.0 - u * u
        u *= cap
    if not FULL:
        u = tl.where(inside, u, float("-inf"))
    return u, slope


@triton.jit
def live_tokens(s, t):
    """Tokens that a layer's moments count: those of finite logits, and NaN, which shows."""
    return (s != float("-inf")) & (t != float("-inf"))
