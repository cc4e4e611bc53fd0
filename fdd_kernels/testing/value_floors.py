"""Bound how far float32 arithmetic may move the terms of a call; see `budgets.py`."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fdd_kernels.lens.distances import DISTANCES
from fdd_kernels.lens.divergences import DIVERGENCES
from fdd_kernels.objectives.dense import dense_logits
from fdd_kernels.objectives.fdd.loss import prepare
from fdd_kernels.objectives.fdd.objective import reduce_terms
from fdd_kernels.objectives.fdd.options import FDDLossTerms, LossOptions
from fdd_kernels.objectives.fdd.plan import Plan
from fdd_kernels.objectives.fdd.reference import distance_of
from fdd_kernels.objectives.fdd.terms import RowTerms
from fdd_kernels.objectives.reduction import loss_denominator
from fdd_kernels.testing.problems import Problem


def unit_roundoff(dtype: torch.dtype) -> float:
    """Return half of eps, the relative error of rounding to nearest."""
    return torch.finfo(dtype).eps / 2


def working_unit(problem: Problem) -> float:
    """Return the unit roundoff of GEMMs and sums: of float64 for a float64 student, or float32."""
    wide = any(t.dtype == torch.float64 for t in (*problem.student_hidden, problem.student_weight))
    return unit_roundoff(torch.float64 if wide else torch.float32)


def gemm_rounding(
    hidden: Tensor, weight: Tensor | None, bias: Tensor | None, unit: float
) -> Tensor:
    """Bound the error of h W^T + b, (R, C); hidden (R, D), weight (C, D), bias (C,) in float64."""
    if weight is None:
        return unit * hidden.abs()
    magnitude = hidden.abs() @ weight.abs().T
    if bias is not None:
        magnitude = magnitude + bias.abs().where(bias.isfinite(), 0.0)
    return unit * (math.sqrt(hidden.shape[-1]) + 2) * magnitude


def summation_rounding(columns: int, unit: float) -> float:
    """Bound the error of a log-sum-exp over so many columns."""
    return unit * (math.sqrt(columns) + math.log(columns) + 4)


def movement(
    value: Callable[..., Tensor], vectors: tuple[Tensor, ...], independent: Tensor, common: float
) -> Tensor:
    """Bound how far value(*vectors) may move, (R,), to first order.

    Each element of the vectors (R, C) is off by up to `independent` (R,) at random, which counts
    with three standard deviations, and by up to `common` together with its row, which counts with
    the 1-norm.
    """
    leaves = [v.detach().requires_grad_() for v in vectors]
    grads = torch.cat(torch.autograd.grad(value(*leaves).sum(), leaves), -1)
    return 3 * independent * grads.norm(dim=-1) + common * grads.abs().sum(-1)


def _angle_rounding(kind: str, s: Tensor, t: Tensor, unit: float) -> Tensor:
    """Bound the cancellation in the distance of vectors (R, C), (R,); 0 if it has no direction.

    1 - cos is a difference of numbers of the size of 1 or, where the vectors are close, of
    |s - t|^2 / (2 |s||t|). Each of them results from a few roundings.
    """
    if not DISTANCES[kind].directional:
        return torch.zeros_like(s[:, 0])
    if DISTANCES[kind].centred:
        s, t = (v - v.mean(-1, keepdim=True) for v in (s, t))
    size = (s - t).square().sum(-1) / (2 * s.norm(dim=-1) * t.norm(dim=-1))
    return 8 * unit * size.clamp(max=1).nan_to_num(1)


@dataclass(frozen=True)
class DenseCall:
    """One call in float64.

    `student` and `teacher` have per layer the logits (R, V) before a temperature, and how far off
    they may be.
    """

    options: LossOptions
    plan: Plan
    unit: float
    valid: Tensor | None
    denominator: Tensor | float | None
    student: list[tuple[Tensor, Tensor]]
    teacher: list[tuple[Tensor, Tensor]]

    @property
    def dynamics(self) -> range:
        return range(len(self.student) - (not self.options.output_in_dynamics))

    def reduce(self, rows: RowTerms) -> FDDLossTerms:
        shape = self.plan.leading_shape
        return reduce_terms(rows, self.options, self.valid, shape, self.denominator)


def dense_call(problem: Problem, unit: float | None, options: dict[str, Any]) -> DenseCall:
    """Compute a call's plan and dense logits, differentiable in float64 leaves of `problem`."""
    unit = working_unit(problem) if unit is None else unit
    p = problem if problem.student_weight.dtype == torch.float64 else problem.to(torch.float64)
    options = dict(options)
    items = options.pop("num_items_in_batch", None)
    o = LossOptions(**options)
    plan, tensors = prepare(replace(p, num_items_in_batch=items), o)
    models = []
    for states, *head, scale, cap in (
        (*tensors[:3], o.student_logit_scale, o.student_softcap),
        (*tensors[3:6], o.teacher_logit_scale, o.teacher_softcap),
    ):
        weight, bias = (None if t is None else t[: plan.spec.columns] for t in head)
        models.append([])
        for h in states:
            u = dense_logits(h, weight, bias, scale, cap, plan.spec.columns)
            # A soft cap's derivative is at most 1; scaling, capping and dividing round three times
            # more.
            off = scale * gemm_rounding(h, weight, bias, unit)
            off = off + 3 * unit * u.abs().where(u.isfinite(), 0.0)
            models[-1].append((u, off.detach()))
    denominator = loss_denominator(o.reduction, tensors.rows, tensors.valid, tensors.device, items)
    return DenseCall(o, plan, unit, tensors.valid, denominator, *models)


def value_floors(problem: Problem, unit: float | None = None, **options) -> FDDLossTerms:
    """Compute the floor of the error of every term, reduced like the terms; see `budgets.py`.

    `unit` is the roundoff of the logits, that of the working dtype unless given.
    """
    call = dense_call(problem, unit, options)
    o, plan, columns, students = call.options, call.plan, call.plan.spec.columns, call.student
    models = [
        [(u.detach(), off.detach()) for u, off in model] for model in (call.student, call.teacher)
    ]
    summation = summation_rounding(columns, call.unit)
    live = (models[0][0][0].isfinite() & models[1][0][0].isfinite()).all(0)

    def request(layer: int, temperature: float, softmax: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Return both models' vectors (R, live C) at a layer and how far they may be off, (R,)."""
        vectors, off = [], 0.0
        for u, d in (models[0][layer], models[1][layer]):
            z = u / temperature
            vectors.append((z.log_softmax(-1) if softmax else z)[:, live])
            off = torch.maximum(torch.as_tensor(off), (d / temperature)[:, live].amax(-1))
        return *vectors, off

    def divergence(name: str, layer: int, temperature: float) -> Tensor:
        s, t, off = request(layer, temperature, softmax=True)
        entry = DIVERGENCES[name]
        value = lambda a, b: entry.value(a, b, *entry.defaults).sum(-1)  # noqa: E731
        # A backend may sum `value` plus multiples of q - p, whose sum is 0. The derivative by log_q
        # then has another multiple of q: with sum(p (log p - log q)) and sum(q (log q - log p)), in
        # one pass, it is `grad`. `plain` bounds how far errors of log_q move a sum whose
        # derivative by log_q is `grad`.
        plain = entry.grad(s, t, *entry.defaults)
        plain = 3 * off * plain.norm(dim=-1) + summation * plain.abs().sum(-1)
        return movement(value, (s, t), off, summation) + plain + summation * value(s, t).abs()

    def distance(name: str, s: Tensor, t: Tensor, off: Tensor, common: float) -> Tensor:
        value = lambda a, b: distance_of(name, a, b)  # noqa: E731
        return (
            movement(value, (s, t), off, common)
            + summation * value(s, t)
            + _angle_rounding(name, s, t, call.unit)
        )

    final = len(students) - 1
    dynamics = range(final + 1 if o.output_in_dynamics else final)
    trajectory = derivative = output_kd = ce = None
    if plan.trajectory and o.trajectory in DIVERGENCES:
        trajectory = torch.stack(
            [divergence(o.trajectory, layer, o.temperature) for layer in dynamics]
        ).mean(0)
    elif plan.trajectory:
        per_layer = [
            distance(o.trajectory, *request(i, o.temperature, softmax=False), 0.0) for i in dynamics
        ]
        trajectory = torch.stack(per_layer).mean(0)
    if plan.derivative:
        per_pair = []
        for first, second in zip(dynamics, dynamics[1:]):
            (s1, t1, off1), (s2, t2, off2) = (
                request(i, o.temperature, not plan.feature_space) for i in (first, second)
            )
            common = 0.0 if plan.feature_space else 2 * summation
            per_pair.append(distance(o.derivative, s2 - s1, t2 - t1, off1 + off2, common))
        derivative = torch.stack(per_pair).mean(0)
    if plan.output_kd is not None:
        output_kd = divergence("kl", final, o.output_temperature)
    if plan.ce is not None:
        ce = 3 * request(final, 1.0, softmax=True)[2] + summation
    return call.reduce(RowTerms(output_kd, trajectory, derivative, ce))
