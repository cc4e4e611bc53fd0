"""Logits of all rows at once, and expectations of them, for the backend "reference"."""

from __future__ import annotations

import torch
from torch import Tensor


def dense_logits(
    hidden: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: float,
    softcap: float | None,
    columns: int | None,
) -> Tensor:
    """Compute softcap(scale * (h W^T + b)) of one layer, (R, V), in float32 or better.

    `columns` is V, None for all rows of the head.
    """
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    if weight is None:
        return hidden.to(torch.promote_types(wide, hidden.dtype))
    wide = torch.promote_types(wide, weight.dtype)
    u = hidden.to(wide) @ weight[:columns].to(wide).T
    if bias is not None:
        u = u + bias[:columns].to(wide)
    u = scale * u
    return u if softcap is None else softcap * torch.tanh(u / softcap)


def expected_ratio(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Compute the sum of p (log p - log q), (R, 1); a token of probability p = 0 adds nothing."""
    absent = log_p == -torch.inf
    ratio = torch.where(absent, 0.0, log_p) - torch.where(absent, 0.0, log_q)
    return (log_p.exp() * ratio).sum(-1, keepdim=True)
