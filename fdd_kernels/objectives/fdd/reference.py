"""The executable specification: the same loss with dense (rows x columns) tensors, in any dtype up
to float64.

It shares validation (`plan.py`) and reduction (`terms.py`) with the fused backends and no other
arithmetic: what it computes follows the formulas of the paper term by term, without streaming,
shifts or moments.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fdd_kernels.lens.divergences import DIVERGENCES
from fdd_kernels.objectives.fdd.options import LossOptions
from fdd_kernels.objectives.fdd.plan import Plan
from fdd_kernels.objectives.fdd.terms import RowTerms


def dense_logits(
    hidden: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: float,
    softcap: float | None,
    columns: int,
) -> Tensor:
    """softcap(scale * (h W^T + b)) of one layer, (R, C), in float32 or better."""
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    if weight is None:
        return hidden.to(torch.promote_types(wide, hidden.dtype))
    wide = torch.promote_types(wide, weight.dtype)
    u = hidden.to(wide) @ weight[:columns].to(wide).T
    if bias is not None:
        u = u + bias[:columns].to(wide)
    u = scale * u
    return u if softcap is None else softcap * torch.tanh(u / softcap)


def _live_columns(columns: int, *biased: tuple[Tensor | None, float | None]) -> Tensor | None:
    """(C,) bool: no bias is -inf there, in front of no soft cap. None without biases; of each model
    its bias and soft cap.
    """
    live = None
    for bias, softcap in biased:
        if bias is not None and softcap is None:
            own = bias[:columns] != -torch.inf
            live = own if live is None else live & own
    return live


def distance_of(kind: str, s: Tensor, t: Tensor, live: Tensor | None = None) -> Tensor:
    """Distance of two vectors per row, (R, C) -> (R,), over the columns that are `live` (C,); None:
    all.
    """
    if live is None:
        live = torch.ones_like(s[0], dtype=torch.bool)
    count = live.sum().clamp(min=1)
    s, t = torch.where(live, s, 0.0), torch.where(live, t, 0.0)
    if kind == "mse":
        return (s - t).square().sum(-1) / count
    if kind == "centered_cosine":
        s = torch.where(live, s - s.sum(-1, keepdim=True) / count, 0.0)
        t = torch.where(live, t - t.sum(-1, keepdim=True) / count, 0.0)
    defined = (s != 0).any(-1) & (t != 0).any(-1)
    s, t = (torch.where(defined[:, None], x, 1.0) for x in (s, t))
    cosine = (s * t).sum(-1) / (s.norm(dim=-1) * t.norm(dim=-1))
    return torch.where(defined, 1 - cosine, 1.0)


def dense_row_terms(
    plan: Plan,
    student_hidden: tuple[Tensor, ...],
    student_weight: Tensor,
    student_bias: Tensor | None,
    teacher_hidden: tuple[Tensor, ...],
    teacher_weight: Tensor | None,
    teacher_bias: Tensor | None,
    valid: Tensor | None,
    labels: Tensor | None,
) -> RowTerms:
    """The four terms per row, (R,), from hidden states (R, D); rows with `valid` False are computed
    on zeros.
    """
    # Autocast would round the logits: its cast of the inputs is the caller's.
    with torch.autocast(student_weight.device.type, enabled=False):
        return _dense_row_terms(
            plan,
            student_hidden,
            student_weight,
            student_bias,
            teacher_hidden,
            teacher_weight,
            teacher_bias,
            valid,
            labels,
        )


def _dense_row_terms(
    plan: Plan,
    student_hidden,
    student_weight,
    student_bias,
    teacher_hidden,
    teacher_weight,
    teacher_bias,
    valid,
    labels,
) -> RowTerms:
    o: LossOptions = plan.options
    if valid is not None:
        student_hidden = [torch.where(valid[:, None], h, 0.0) for h in student_hidden]
        teacher_hidden = [torch.where(valid[:, None], h, 0.0) for h in teacher_hidden]
    columns, final = plan.spec.columns, len(student_hidden) - 1
    u_s = [
        dense_logits(
            h, student_weight, student_bias, o.student_logit_scale, o.student_softcap, columns
        )
        for h in student_hidden
    ]
    u_t = [
        dense_logits(
            h, teacher_weight, teacher_bias, o.teacher_logit_scale, o.teacher_softcap, columns
        )
        for h in teacher_hidden
    ]
    live = _live_columns(
        columns, (student_bias, o.student_softcap), (teacher_bias, o.teacher_softcap)
    )
    dynamics = range(final + 1 if o.output_in_dynamics else final)
    z_s, z_t = ([u[layer] / o.temperature for layer in dynamics] for u in (u_s, u_t))
    output_kd = trajectory = derivative = ce = None
    if o.alpha and len(dynamics):
        if o.trajectory in DIVERGENCES:
            value = DIVERGENCES[o.trajectory].value
            per_layer = [
                value(s.log_softmax(-1), t.log_softmax(-1)).sum(-1) for s, t in zip(z_s, z_t)
            ]
        else:
            per_layer = [distance_of(o.trajectory, s, t, live) for s, t in zip(z_s, z_t)]
        trajectory = torch.stack(per_layer).mean(0)
    if o.beta and o.derivative is not None and len(dynamics) > 1:
        y_s, y_t = (z if plan.feature_space else [x.log_softmax(-1) for x in z] for z in (z_s, z_t))
        per_pair = []
        for first, second in zip(dynamics, dynamics[1:]):
            per_pair.append(
                distance_of(o.derivative, y_s[second] - y_s[first], y_t[second] - y_t[first], live)
            )
        derivative = torch.stack(per_pair).mean(0)
    if o.output_kd_weight and not plan.feature_space:
        log_q, log_p = ((u[final] / o.output_temperature).log_softmax(-1) for u in (u_s, u_t))
        output_kd = DIVERGENCES["kl"].value(log_q, log_p).sum(-1)
    if o.ce_weight:
        targets = labels if valid is None else torch.where(valid, labels, 0)
        ce = F.cross_entropy(u_s[final], targets.long(), reduction="none")
    return RowTerms(output_kd, trajectory, derivative, ce)
