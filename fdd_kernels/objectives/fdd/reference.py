"""The executable specification: the loss with dense (R, V) tensors, in any dtype up to float64.

It shares validation (`plan.py`) and reduction with the fused backends, and no other arithmetic. It
follows the formulas of the paper term by term, without streaming, shifts or moments.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fdd_kernels.lens.distances import DISTANCES, Sums, smallest_square
from fdd_kernels.lens.divergence_text import parse_divergence
from fdd_kernels.lens.inputs import LensInputs
from fdd_kernels.lens.spec import LensSpec
from fdd_kernels.objectives.dense import dense_logits
from fdd_kernels.objectives.fdd.options import LossOptions
from fdd_kernels.objectives.fdd.plan import Plan
from fdd_kernels.objectives.fdd.terms import RowTerms


def dense_models(
    inputs: LensInputs, spec: LensSpec
) -> tuple[list[Tensor], list[Tensor], Tensor | None]:
    """Compute the logits of every layer, (R, V) each of student and teacher, and the tokens (V,)
    that no bias excludes; rows that are not valid have hidden states of 0.
    """
    valid, columns = inputs.valid, spec.columns
    student = inputs.student_bias, spec.student_logit_scale, spec.student_softcap
    teacher = inputs.teacher_bias, spec.teacher_logit_scale, spec.teacher_softcap
    u_s, u_t = (
        [
            dense_logits(
                h if valid is None else torch.where(valid[:, None], h, 0.0), weight, *head, columns
            )
            for h in states
        ]
        for states, weight, head in (
            (inputs.student_hidden, inputs.student_weight, student),
            (inputs.teacher_hidden, inputs.teacher_weight, teacher),
        )
    )
    return u_s, u_t, _live_columns(columns, student[::2], teacher[::2])


def _live_columns(columns: int, *biased: tuple[Tensor | None, float | None]) -> Tensor | None:
    """Find the tokens that a bias of -inf does not exclude, (V,) bool; None where no bias can.

    Takes each model's bias and soft cap. A soft cap makes -inf finite.
    """
    live = None
    for bias, softcap in biased:
        if bias is not None and softcap is None:
            own = bias[:columns] != -torch.inf
            live = own if live is None else live & own
    return live


def distance_of(
    kind: str, s: Tensor, t: Tensor, live: Tensor | None = None, z: Tensor | None = None
) -> Tensor:
    """Compute the distance of two vectors per row, (R, V) -> (R,), over the `live` tokens (V,).

    A weighted distance weighs them by softmax(z), z (R, V). A distance without a formula here,
    registered at run time, is a function of dense sums.
    """
    distance = DISTANCES[kind]
    if live is None:
        live = torch.ones_like(s[0], dtype=torch.bool)
    s, t = torch.where(live, s, 0.0), torch.where(live, t, 0.0)
    w, count = live.to(s.dtype), live.sum().clamp(min=1)
    if distance.weighted:
        z = torch.where(live, z, -torch.inf)
        w, count = torch.where(live, z - z.logsumexp(-1, keepdim=True), -torch.inf).exp(), 1
        # About the likeliest token, where its weight of nearly 1 would hide all others.
        s, t = (x - x.gather(1, z.argmax(-1, keepdim=True)) for x in (s, t))
    if distance.centred:
        s, t = (torch.where(live, x - (w * x).sum(-1, keepdim=True) / count, 0.0) for x in (s, t))
    if kind == "mse":
        return (s - t).square().sum(-1) / count
    if kind not in ("cosine", "centered_cosine", "weighted_cosine"):
        squares = torch.stack([(w * s.square()).sum(-1), (w * t.square()).sum(-1)])
        counts = torch.as_tensor(count, device=s.device).expand(1, len(s))
        sums = Sums(counts, squares[None], *_one_pair(w * s * t, w * (s - t).square()))
        return distance.value(sums)[0]
    s, t = (w.sqrt() * x if distance.weighted else x for x in (s, t))
    least = smallest_square(s.dtype)
    defined = ~((s.square().sum(-1) < least) | (t.square().sum(-1) < least))
    s, t = (torch.where(defined[:, None], x, 1.0) for x in (s, t))
    cosine = (s * t).sum(-1) / (s.norm(dim=-1) * t.norm(dim=-1))
    return torch.where(defined, 1 - cosine, 1.0)


def mixed_target(z_s: Tensor, z_t: Tensor, mix: float) -> Tensor:
    """Compute the logits (1 - mix) z_s + mix z_t of TAID's target, the student's a constant.

    A token that one of the two models excludes has no part in it.
    """
    if mix == 1:
        return z_t
    excluded = (z_s == -torch.inf) | (z_t == -torch.inf)
    mixed = (1 - mix) * z_s.detach() + mix * z_t
    return torch.where(excluded, -torch.inf, mixed)


def _divergence_of(text: str, z_s: Tensor, z_t: Tensor, mix: float) -> Tensor:
    """Compute a divergence per row, (R, V) -> (R,)."""
    log_q, log_p = z_s.log_softmax(-1), mixed_target(z_s, z_t, mix).log_softmax(-1)
    return parse_divergence(text).value(log_q, log_p).sum(-1)


def _one_pair(*columns: Tensor) -> list[Tensor]:
    return [x.sum(-1)[None] for x in columns]


def dense_row_terms(plan: Plan, inputs: LensInputs) -> RowTerms:
    """Compute the four terms per row, (R,), from the states of every layer.

    Rows that are not valid are computed on zeros.
    """
    # Autocast would round the logits; the inputs have been cast already.
    with torch.autocast(inputs.device.type, enabled=False):
        return _dense_row_terms(plan, plan.options, inputs)


def _dense_row_terms(plan: Plan, o: LossOptions, inputs: LensInputs) -> RowTerms:
    valid = inputs.valid
    u_s, u_t, live = dense_models(inputs, plan.spec)
    layers = o.layer_pairs(*[len(u) - (not o.output_in_dynamics) for u in (u_s, u_t)])
    output_kd = trajectory = derivative = ce = None
    if o.alpha:
        per_pair = []
        for i, j, weight in layers.weighted():
            z_s, z_t = u_s[i] / o.temperature, u_t[j] / o.temperature
            if o.trajectory in DISTANCES:
                term = distance_of(o.trajectory, z_s, z_t, live)
            else:
                term = _divergence_of(o.trajectory, z_s, z_t, o.teacher_mix)
            per_pair.append(weight * term)
        trajectory = torch.stack(per_pair).sum(0) if per_pair else None
    if o.beta and o.derivative is not None and len(layers.derivative) > 1:
        layers_s = range(len(layers.derivative))
        z_s, z_t = (
            [u[layer] / o.temperature_of_deltas for layer in own]
            for u, own in ((u_s, layers_s), (u_t, layers.derivative))
        )
        y_s, y_t = (z if plan.feature_space else [x.log_softmax(-1) for x in z] for z in (z_s, z_t))
        per_pair = []
        for i in layers_s[1:]:
            deltas = y_s[i] - y_s[i - 1], y_t[i] - y_t[i - 1]
            per_pair.append(distance_of(o.derivative, *deltas, live, z_t[i]))
        derivative = torch.stack(per_pair).mean(0)
    if o.output_kd_weight and not plan.feature_space:
        z_s, z_t = (u[-1] / o.output_temperature for u in (u_s, u_t))
        output_kd = _divergence_of(o.output_divergence, z_s, z_t, o.teacher_mix)
    if o.ce_weight:
        targets = inputs.labels if valid is None else torch.where(valid, inputs.labels, 0)
        ce = F.cross_entropy(u_s[-1], targets.long(), reduction="none")
    return RowTerms(output_kd, trajectory, derivative, ce)
