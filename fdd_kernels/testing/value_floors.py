"""Bound how far float32 arithmetic may move the terms of a call; see `budgets.py`."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fdd_kernels.lens.distances import DISTANCES, Sums
from fdd_kernels.lens.divergence_text import NamedDivergence, parse_divergence
from fdd_kernels.lens.divergences import DIVERGENCES
from fdd_kernels.objectives.dense import dense_logits
from fdd_kernels.objectives.fdd.loss import prepare
from fdd_kernels.objectives.fdd.objective import reduce_terms
from fdd_kernels.objectives.fdd.options import FDDLossTerms, LossOptions
from fdd_kernels.objectives.fdd.plan import Plan
from fdd_kernels.objectives.fdd.reference import distance_of, mixed_target
from fdd_kernels.objectives.fdd.terms import RowTerms, weigh_layers
from fdd_kernels.objectives.reduction import loss_denominator
from fdd_kernels.testing.problems import Problem

PERTURBATIONS = 3  # random movements, where a derivative alone is no bound
# A number below so many times the smallest normal one may count as 0, before the division by a
# temperature.
UNDERFLOW = 64


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


def movement(
    value: Callable[..., Tensor],
    vectors: tuple[Tensor, ...],
    independent: tuple[Tensor, ...],
    common: float,
) -> tuple[Tensor, Tensor]:
    """Bound how far value(*vectors) may move, (R,), to first order and beyond it.

    Each element of a vector (R, C) is off by up to its `independent` (R,) at random, which counts
    with three standard deviations, and by up to `common` together with its row, which counts with
    the 1-norm. Beyond the first order (at a minimum, at a tie) a few random movements are measured,
    of which the largest counts.
    """
    leaves = [v.detach().requires_grad_() for v in vectors]
    found = value(*leaves)
    grads = torch.autograd.grad(found.sum(), leaves)
    grads = [g.where(v.isfinite(), 0.0) for g, v in zip(grads, vectors)]
    squares = [(off * g.norm(dim=-1)).square() for g, off in zip(grads, independent)]
    bound = 3 * sum(squares).sqrt() + common * torch.cat(grads, -1).abs().sum(-1)
    generator, beyond = torch.Generator().manual_seed(0), torch.zeros_like(bound)
    for _ in range(PERTURBATIONS):
        moves = []
        for vector, off in zip(vectors, independent):
            move = 2 * torch.rand(vector.shape, generator=generator, dtype=vector.dtype) - 1
            moves.append(off[:, None] * move.to(vector.device))
        moved = value(*[v + move for v, move in zip(vectors, moves)]) - found.detach()
        moved = moved - sum((g * move).sum(-1) for g, move in zip(grads, moves))
        beyond = torch.maximum(beyond, moved.abs().nan_to_num(0.0))
    return bound, beyond


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


def _angle_rounding(kind: str, s: Tensor, t: Tensor, unit: float) -> Tensor:
    """Bound the cancellation in the distance of vectors (R, C), (R,); 0 if it has no direction.

    1 - cos is a difference of numbers of the size of 1 or, where the vectors are close, of
    |s - t|^2 / (2 |s||t|). Each of them results from a few roundings.
    """
    if not DISTANCES[kind].directional:
        return torch.zeros_like(s[:, 0])
    size = (s - t).square().sum(-1) / (2 * s.norm(dim=-1) * t.norm(dim=-1))
    return 8 * unit * size.clamp(max=1).nan_to_num(1)


def sums_and_grads(kind: str, s: Tensor, t: Tensor) -> tuple[Sums, list[Tensor]]:
    """Compute the sums of a distance of vectors (R, C), and its derivatives by s.s, s.t and
    |s - t|^2, (R,) each.
    """
    squares = torch.stack([s.square().sum(-1), t.square().sum(-1)])
    sums = Sums(
        torch.ones_like(squares[:1]),
        squares[None],
        (s * t).sum(-1)[None],
        (s - t).square().sum(-1)[None],
    )
    grads = [torch.zeros_like(sums.product) for _ in range(3)]
    DISTANCES[kind].write_grad(sums, *grads)
    return sums, [grad[0] for grad in grads]


def _sums_rounding(kind: str, s: Tensor, t: Tensor, summation: float) -> Tensor:
    """Bound the error of a distance of vectors (R, C) by that of its sums, each of which is off by
    `summation` of the sum of its summands' magnitudes.
    """
    sums, (of_ss, of_st, of_dd) = sums_and_grads(kind, s, t)
    ss, tt = sums.squares[0]
    sizes = 2 * of_ss.abs() * ss + of_dd.abs() * sums.difference[0]
    return summation * (sizes + of_st.abs() * (ss.sqrt() * tt.sqrt()))


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
    def dynamics(self) -> range:
        return range(len(self.student) - (not self.options.output_in_dynamics))

    @property
    def summation(self) -> float:
        return summation_rounding(self.plan.spec.columns, self.unit)

    def reduce(self, rows: RowTerms) -> FDDLossTerms:
        shape = self.plan.leading_shape
        return reduce_terms(rows, self.options, self.valid, shape, self.denominator, self.weights)

    def layers_mean(self, per_layer: list[Tensor]) -> Tensor:
        """Reduce the trajectory's layers to the term per row."""
        weights = self.options.layer_weights
        per_layer = per_layer if weights is None else weigh_layers(per_layer, weights)
        return torch.stack(tuple(per_layer)).mean(0)

    def divergences(self) -> list[tuple[str, int, float, NamedDivergence]]:
        """List the divergences of the call: term, layer, temperature, divergence."""
        o, plan, found = self.options, self.plan, []
        if plan.trajectory and o.trajectory not in DISTANCES:
            divergence = parse_divergence(o.trajectory)
            found += [("trajectory", i, o.temperature, divergence) for i in self.dynamics]
        if plan.output_kd is not None:
            last, divergence = len(self.student) - 1, parse_divergence(o.output_divergence)
            found.append(("output_kd", last, o.output_temperature, divergence))
        return found

    def log_probabilities(
        self, layer: int, temperature: float
    ) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
        """Return log q and log p (of TAID's target) at a layer, (R, V), and how far off each may
        be, (R,).
        """
        (u_s, off_s), (u_t, off_t) = self.student[layer], self.teacher[layer]
        z_s, mix = u_s / temperature, self.options.teacher_mix
        log_q, log_p = (
            z.log_softmax(-1) for z in (z_s, mixed_target(z_s, u_t / temperature, mix).detach())
        )
        off_s, off_t = (off.amax(-1) / temperature for off in (off_s, off_t))
        return log_q, log_p, (off_s, off_t if mix == 1 else torch.maximum(off_s, off_t))

    def pair_temperature(self) -> float:
        """Return the temperature of the derivative."""
        given = self.options.derivative_temperature
        return self.options.temperature if given is None else given

    def pairs(self) -> list[tuple[int, int]]:
        """List the derivative's pairs of layers."""
        return list(zip(self.dynamics, self.dynamics[1:])) if self.plan.derivative else []

    def live(self) -> Tensor:
        """Mark the columns that are finite in both models, (V,)."""
        return (self.student[0][0].isfinite() & self.teacher[0][0].isfinite()).all(0)

    def pair_vectors(self, first: int, second: int) -> tuple[Tensor, Tensor, Tensor]:
        """Compute the deltas of logits s and t, and the weights' z, of a pair: (R, live V) each."""
        live, temperature = self.live(), self.pair_temperature()
        s, t = (
            (model[second][0] - model[first][0])[:, live] / temperature
            for model in (self.student, self.teacher)
        )
        return s, t, self.teacher[second][0][:, live] / temperature

    def underflow(self, first: int, second: int) -> Tensor:
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
    """Compute a call's plan and dense logits, differentiable in float64 leaves of `problem`."""
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


def _divergence_floor(
    call: DenseCall, layer: int, temperature: float, divergence: NamedDivergence
) -> Tensor:
    """Bound the error of one divergence, (R,)."""
    log_q, log_p, off = call.log_probabilities(layer, temperature)
    some = (log_q.isfinite() | log_p.isfinite()).any(0)
    s, t, summation = log_q.detach()[:, some], log_p[:, some], call.summation
    value = lambda a, b: divergence.value(a, b).sum(-1)  # noqa: E731
    # A backend may sum `value` plus multiples of q - p, whose sum is 0. The derivative by log_q
    # then has another multiple of q: with sum(p (log p - log q)) and sum(q (log q - log p)), in
    # one pass, it is `grad`. `plain` bounds how far errors of log_q move a sum whose
    # derivative by log_q is `grad`.
    plain = DIVERGENCES[divergence.name].grad(s, t, *divergence.parameters)
    plain = 3 * torch.maximum(*off) * plain.norm(dim=-1) + summation * plain.abs().sum(-1)
    return sum(movement(value, (s, t), off, summation)) + plain + summation * value(s, t).abs()


def _distance_floor(
    call: DenseCall, kind: str, s: Tensor, t: Tensor, off: Tensor, common: float
) -> Tensor:
    """Bound the error of the distance of vectors (R, C) whose elements are off by `off`, (R,)."""
    value = lambda a, b: distance_of(kind, a, b)  # noqa: E731
    return (
        movement(value, (s, t), (off, off), common)[0]
        + call.summation * value(s, t)
        + _angle_rounding(kind, *centred(kind, s, t, None), call.unit)
    )


def _weighted_distance(kind: str, s: Tensor, t: Tensor, z: Tensor) -> Tensor:
    """Compute a weighted distance, (R,), differentiable also by z where weights underflow."""
    w, top = z.softmax(-1), z.argmax(-1, keepdim=True)
    s, t = (v - v.gather(1, top) for v in (s, t))
    s, t = (v - (w * v).sum(-1, keepdim=True) for v in (s, t))
    ss, tt, st, dd = ((w * x).sum(-1)[None] for x in (s * s, t * t, s * t, (s - t).square()))
    return DISTANCES[kind].value(Sums(torch.ones_like(ss), torch.stack([ss, tt], 1), st, dd))[0]


def _weighted_floor(call: DenseCall, first: int, second: int, off: Tensor, off_z: Tensor) -> Tensor:
    """Bound the error of the weighted distance of a pair: also the weights are off."""
    kind, vectors = call.options.derivative, [v.detach() for v in call.pair_vectors(first, second)]
    value = lambda *vectors: _weighted_distance(kind, *vectors)  # noqa: E731
    about_means = centred(kind, *vectors)
    floor, _ = movement(value, tuple(vectors), (off, off, off_z + 4 * call.unit), 0.0)
    floor = (
        floor + call.summation * value(*vectors) + _angle_rounding(kind, *about_means, call.unit)
    )
    floor = floor + _sums_rounding(kind, *about_means, call.summation)
    return floor.masked_fill(call.underflow(first, second), 2.0)


def value_floors(problem: Problem, unit: float | None = None, **options) -> FDDLossTerms:
    """Compute the floor of the error of every term, reduced like the terms; see `budgets.py`.

    `unit` is the roundoff of the logits, that of the working dtype unless given.
    """
    call = dense_call(problem, unit, options)
    o, plan, live = call.options, call.plan, call.live()

    def vectors(layer: int, temperature: float, softmax: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Return both models' vectors (R, live C) at a layer and how far they may be off, (R,)."""
        found, off = [], 0.0
        for u, d in (call.student[layer], call.teacher[layer]):
            z = u.detach() / temperature
            found.append((z.log_softmax(-1) if softmax else z)[:, live])
            off = torch.maximum(torch.as_tensor(off), (d / temperature)[:, live].amax(-1))
        return *found, off

    rows: dict[str, list[Tensor]] = {"trajectory": [], "output_kd": []}
    for term, *divergence in call.divergences():
        rows[term].append(_divergence_floor(call, *divergence))
    if plan.trajectory and o.trajectory in DISTANCES:
        for layer in call.dynamics:
            of_layer = vectors(layer, o.temperature, softmax=False)
            rows["trajectory"].append(_distance_floor(call, o.trajectory, *of_layer, 0.0))
    per_pair = []
    for first, second in call.pairs():
        (s1, t1, off1), (s2, t2, off2) = (
            vectors(i, call.pair_temperature(), not plan.feature_space) for i in (first, second)
        )
        if DISTANCES[o.derivative].weighted:
            per_pair.append(_weighted_floor(call, first, second, off1 + off2, off2))
            continue
        common = 0.0 if plan.feature_space else 2 * call.summation
        per_pair.append(_distance_floor(call, o.derivative, s2 - s1, t2 - t1, off1 + off2, common))
    ce = None
    if plan.ce is not None:
        ce = 3 * vectors(len(call.student) - 1, 1.0, softmax=True)[2] + call.summation
    return call.reduce(
        RowTerms(
            output_kd=rows["output_kd"][0] if rows["output_kd"] else None,
            trajectory=call.layers_mean(rows["trajectory"]) if rows["trajectory"] else None,
            derivative=torch.stack(per_pair).mean(0) if per_pair else None,
            ce=ce,
        )
    )
