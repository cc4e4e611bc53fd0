"""One call in float64, dense, and how far off float32 may have its logits; see `budgets.py`."""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fdd_kernels.lens.distances import DISTANCES
from fdd_kernels.lens.divergence_text import NamedDivergence, parse_divergence
from fdd_kernels.lens.spec import Layers
from fdd_kernels.objectives.dense import dense_logits
from fdd_kernels.objectives.fdd.loss import prepare
from fdd_kernels.objectives.fdd.objective import reduce_terms
from fdd_kernels.objectives.fdd.options import FDDLossTerms, LossOptions
from fdd_kernels.objectives.fdd.plan import Plan
from fdd_kernels.objectives.fdd.reference import mixed_target
from fdd_kernels.objectives.fdd.terms import RowTerms
from fdd_kernels.objectives.layer_pairs import LayerPairs
from fdd_kernels.objectives.reduction import loss_denominator
from fdd_kernels.testing.problems import Problem

# A number below so many times the smallest normal one may count as 0, before the division by a
# temperature.
UNDERFLOW = 64
LAST = Layers(-1, -1)  # the final states


def unit_roundoff(dtype: torch.dtype) -> float:
    """Return half of eps, the relative error of rounding to nearest."""
    return torch.finfo(dtype).eps / 2


def working_dtype(problem: Problem) -> torch.dtype:
    """Return the dtype of GEMMs and sums: float64 for a float64 student, or float32."""
    wide = any(t.dtype == torch.float64 for t in (*problem.student_hidden, problem.student_weight))
    return torch.float64 if wide else torch.float32


def working_unit(problem: Problem) -> float:
    """Return the unit roundoff of GEMMs and sums."""
    return unit_roundoff(working_dtype(problem))


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


def centred(kind: str, s: Tensor, t: Tensor, z: Tensor | None) -> tuple[Tensor, Tensor]:
    """Take vectors (R, C) as a distance compares them: about their means, times the square roots of
    their weights.
    """
    if DISTANCES[kind].weighted:
        w, top = z.softmax(-1), z.argmax(-1, keepdim=True)
        s, t = (v - v.gather(1, top) for v in (s, t))
        return tuple([w.sqrt() * (v - (w * v).sum(-1, keepdim=True)) for v in (s, t)])
    if DISTANCES[kind].centred:
        return tuple([v - v.mean(-1, keepdim=True) for v in (s, t)])
    return s, t


@dataclass(frozen=True)
class DenseCall:
    """One call in float64.

    `student` and `teacher` have per layer the logits (R, V) before a temperature, and how far off
    they may be. `tiny` is the smallest normal number of the dtype that is bounded.
    """

    options: LossOptions
    plan: Plan
    unit: float
    tiny: float
    valid: Tensor | None
    denominator: Tensor | float | None
    weights: Tensor | None
    student: list[tuple[Tensor, Tensor]]
    teacher: list[tuple[Tensor, Tensor]]

    @property
    def layers(self) -> LayerPairs:
        """The pairs of layers of trajectory and derivative."""
        left_out = not self.options.output_in_dynamics
        return self.options.layer_pairs(len(self.student) - left_out, len(self.teacher) - left_out)

    @property
    def summation(self) -> float:
        return summation_rounding(self.plan.spec.columns, self.unit)

    def reduce(self, rows: RowTerms) -> FDDLossTerms:
        shape = self.plan.leading_shape
        return reduce_terms(rows, self.options, self.valid, shape, self.denominator, self.weights)

    def divergences(self) -> list[tuple[str, float, Layers, float, NamedDivergence]]:
        """List the divergences of the call: term, weight in it, layers, temperature, divergence."""
        o, plan, found = self.options, self.plan, []
        if plan.trajectory and o.trajectory not in DISTANCES:
            divergence = parse_divergence(o.trajectory)
            for i, j, weight in self.layers.weighted():
                found.append(("trajectory", weight, Layers(i, j), o.temperature, divergence))
        if plan.output_kd is not None:
            divergence = parse_divergence(o.output_divergence)
            found.append(("output_kd", 1.0, LAST, o.output_temperature, divergence))
        return found

    def log_probabilities(
        self, layers: Layers, temperature: float
    ) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
        """Return log q and log p (of TAID's target) at two layers, (R, V), and how far off each may
        be, (R,).
        """
        (u_s, off_s), (u_t, off_t) = self.student[layers.student], self.teacher[layers.teacher]
        z_s, mix = u_s / temperature, self.options.teacher_mix
        log_q, log_p = (
            z.log_softmax(-1) for z in (z_s, mixed_target(z_s, u_t / temperature, mix).detach())
        )
        off_s, off_t = (off.amax(-1) / temperature for off in (off_s, off_t))
        return log_q, log_p, (off_s, off_t if mix == 1 else torch.maximum(off_s, off_t))

    def pairs(self) -> list[tuple[Layers, Layers]]:
        """List the derivative's pairs of deltas, by the layers that they lead from and to."""
        ends = [Layers(*layers) for layers in enumerate(self.layers.derivative)]
        return list(zip(ends, ends[1:])) if self.plan.derivative else []

    def live(self) -> Tensor:
        """Mark the columns that are finite in both models, (V,)."""
        return (self.student[0][0].isfinite() & self.teacher[0][0].isfinite()).all(0)

    def pair_vectors(self, first: Layers, second: Layers) -> tuple[Tensor, Tensor, Tensor]:
        """Compute the deltas of logits s and t, and the weights' z, of a pair: (R, live V) each."""
        live, temperature = self.live(), self.options.temperature_of_deltas
        s, t = (
            (model[to][0] - model[start][0])[:, live] / temperature
            for model, start, to in zip((self.student, self.teacher), first, second)
        )
        return s, t, self.teacher[second.teacher][0][:, live] / temperature

    def underflow(self, first: Layers, second: Layers) -> Tensor:
        """Mark the rows of a pair whose weighted variances are no numbers of the working dtype.

        A weight below its smallest normal number may be 0. Where the average weight about the mean
        is not far above, the term is 1 with gradient 0, or has few digits.
        """
        s, t, z = (v.detach() for v in self.pair_vectors(first, second))
        kind, lost = self.options.derivative, torch.zeros_like(s[:, 0], dtype=torch.bool)
        if not DISTANCES[kind].weighted:
            return lost
        for vector, weighted in zip((s, t), centred(kind, s, t, z)):
            about_top = vector - vector.gather(1, z.argmax(-1, keepdim=True))
            least = self.tiny / self.unit * about_top.square().sum(-1).clamp(min=1)
            lost |= (weighted.square().sum(-1) < least) & (vector != 0).any(-1)
        return lost


def dense_call(problem: Problem, unit: float | None, options: dict[str, Any]) -> DenseCall:
    """Compute a call's plan and dense logits, differentiable in float64 leaves of `problem`.

    `unit` is the roundoff of GEMMs and sums.
    """
    tiny = torch.finfo(working_dtype(problem)).tiny
    unit = working_unit(problem) if unit is None else unit
    p = problem if problem.student_weight.dtype == torch.float64 else problem.to(torch.float64)
    options = dict(options)
    items = options.pop("num_items_in_batch", None)
    o = LossOptions(**options | {"backend": "reference"})
    plan, tensors = prepare(replace(p, num_items_in_batch=items), o)
    denominator = loss_denominator(o.reduction, tensors.rows, tensors.valid, tensors.device, items)
    tensors, weights = p.weighted(tensors)
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
    return DenseCall(o, plan, unit, tiny, tensors.valid, denominator, weights, *models)
