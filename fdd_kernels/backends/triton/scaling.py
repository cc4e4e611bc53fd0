"""The power of two that scales dL/dlogits of float16 models; bfloat16 and float32 need none."""

from __future__ import annotations

import torch
from torch import Tensor

from fdd_kernels.lens.layout import GRAD_SUM, LSE_S, M_DD, M_SS, M_ST, M_TT, MEAN_S, VALUE
from fdd_kernels.lens.spec import LensSpec

LARGEST_GRADIENT = 2.0**8  # of the scaled bound: far from overflow, and from underflow


def gradient_scale(
    dtype: torch.dtype,
    spec: LensSpec,
    requests: Tensor,
    moments: Tensor,
    grad_requests: Tensor,
    grad_moments: Tensor,
) -> Tensor:
    """Return the factor of dL/dlogits of `dtype`, (1,) on the device; 1 but for float16.

    float16 has no room for gradients of 1e-8. So a bound on |dL/dx| from the per-row statistics
    (|s - mean| is at most sqrt(M_SS)) is brought to LARGEST_GRADIENT.
    """
    if dtype != torch.float16:
        return torch.ones(1, dtype=torch.float32, device=requests.device)
    root = moments.clamp(min=0).sqrt()
    bound_R = (
        2 * grad_moments[:, M_SS].abs() * root[:, M_SS]
        + grad_moments[:, M_ST].abs() * root[:, M_TT]
    ).sum(0)
    bound_R += (
        2 * grad_moments[:, M_DD].abs() * root[:, M_DD] + grad_moments[:, MEAN_S].abs()
    ).sum(0)
    bound_R += (
        grad_requests[:, VALUE].abs() * (1 + requests[:, GRAD_SUM].abs())
        + grad_requests[:, LSE_S].abs()
    ).sum(0)
    steepest = spec.student_logit_scale * max(
        [1 / part.temperature for part in (*spec.requests, *spec.moments)]
    )
    bound = (bound_R.amax() * steepest).nan_to_num(1.0, 1.0).clamp(min=2.0**-100)
    return torch.exp2(torch.log2(LARGEST_GRADIENT / bound).floor()).reshape(1)
