"""Error budgets, derived from the arithmetic.

A backend is right when its error against the float64 reference, row by row, is at most twice that
of a dense computation with float32 logits on the same inputs plus a floor. The floor is what any
float32 implementation may lose. With u the unit roundoff (half of eps), roundings taken as
independent, so that n of them add up to sqrt(n) u (Higham and Mary, "A new approach to
probabilistic rounding error analysis", 2019):

- an inner product of width D is off by (sqrt(D) + 2) u sum_d |h_d w_cd|;
- a log-sum-exp over C columns is off by (sqrt(C) + log C + 4) u: C positive terms, a logarithm of
  at most that size, and exponentials to a few units in the last place.

The first moves the log-probabilities one by one, the second all of a row together. A term then
moves by its derivative with respect to the log-probabilities of both models, in the 2-norm times
three standard deviations and in the 1-norm. A gradient moves as it does when the logits are moved
that far at random, which is measured in float64.

Shape suffixes: R rows, C columns, D a hidden width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fdd_kernels.lens.divergences import DIVERGENCES
from fdd_kernels.objectives.fdd.api import fdd_loss_reference
from fdd_kernels.objectives.fdd.loss import prepare
from fdd_kernels.objectives.fdd.objective import reduce_terms
from fdd_kernels.objectives.fdd.options import FDDLossTerms, LossOptions
from fdd_kernels.objectives.fdd.plan import Plan
from fdd_kernels.objectives.fdd.reference import dense_logits, distance_of
from fdd_kernels.objectives.fdd.terms import RowTerms
from fdd_kernels.objectives.reduction import loss_denominator
from fdd_kernels.testing.problems import Outcome, Problem, evaluate, exact

# Of each column: what is below the smallest normal number may count as 0, before it is divided by a
# temperature.
_UNDERFLOW = 64 * torch.finfo(torch.float32).tiny
PERTURBATIONS = 3  # random movements of the logits from which the floor of a gradient is taken


def unit_roundoff(dtype: torch.dtype) -> float:
    """Half of eps: the relative error of rounding to nearest."""
    return torch.finfo(dtype).eps / 2


def _working_unit(problem: Problem) -> float:
    wide = any(t.dtype == torch.float64 for t in (*problem.student_hidden, problem.student_weight))
    return unit_roundoff(torch.float64 if wide else torch.float32)


def _gemm_rounding(
    hidden: Tensor, weight: Tensor | None, bias: Tensor | None, unit: float
) -> Tensor:
    """How far h W^T + b may be off, (R, C), from float64 hidden (R, D), weight (C, D), bias
    (C,).
    """
    if weight is None:
        return unit * hidden.abs()
    magnitude = hidden.abs() @ weight.abs().T
    if bias is not None:
        magnitude = magnitude + bias.abs().where(bias.isfinite(), 0.0)
    return unit * (math.sqrt(hidden.shape[-1]) + 2) * magnitude


def _summation_rounding(columns: int, unit: float) -> float:
    return unit * (math.sqrt(columns) + math.log(columns) + 4)


def _movement(
    value: Callable[..., Tensor], vectors: tuple[Tensor, ...], independent: Tensor, common: float
) -> Tensor:
    """How far value(*vectors) may move, (R,), if each element of its vectors (R, C) is off by up to
    `independent` (R,),

    at random, and by up to `common` together with its row: three standard deviations, and the
    1-norm.
    """
    leaves = [v.detach().requires_grad_() for v in vectors]
    grads = torch.cat(torch.autograd.grad(value(*leaves).sum(), leaves), -1)
    return 3 * independent * grads.norm(dim=-1) + common * grads.abs().sum(-1)


def _angle_rounding(kind: str, s: Tensor, t: Tensor, unit: float) -> Tensor:
    """How far 1 - cos of vectors (R, C) may be off because it is a difference, (R,): of numbers of
    the size of 1, or, where the vectors are close, of |s - t|^2 / (2 |s||t|), each the end of a few
    roundings."""
    if kind == "mse":
        return torch.zeros_like(s[:, 0])
    if kind == "centered_cosine":
        s, t = (v - v.mean(-1, keepdim=True) for v in (s, t))
    size = (s - t).square().sum(-1) / (2 * s.norm(dim=-1) * t.norm(dim=-1))
    return 8 * unit * size.clamp(max=1).nan_to_num(1)


@dataclass(frozen=True)
class _DenseCall:
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


def _dense_call(problem: Problem, unit: float | None, options: dict[str, Any]) -> _DenseCall:
    """Compute a call's plan and dense logits, differentiable in float64 leaves of `problem`."""
    unit = _working_unit(problem) if unit is None else unit
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
            off = scale * _gemm_rounding(h, weight, bias, unit)
            off = off + 3 * unit * u.abs().where(u.isfinite(), 0.0)
            models[-1].append((u, off.detach()))
    denominator = loss_denominator(o.reduction, tensors, items)
    return _DenseCall(o, plan, unit, tensors.valid, denominator, *models)


def value_floors(problem: Problem, unit: float | None = None, **options) -> FDDLossTerms:
    """The floor of the error of every term, reduced like the terms themselves: see the head of this
    file.

    `unit` is the roundoff of the logits, that of the working dtype unless given.
    """
    call = _dense_call(problem, unit, options)
    o, plan, columns, students = call.options, call.plan, call.plan.spec.columns, call.student
    models = [
        [(u.detach(), off.detach()) for u, off in model] for model in (call.student, call.teacher)
    ]
    summation = _summation_rounding(columns, call.unit)
    live = (models[0][0][0].isfinite() & models[1][0][0].isfinite()).all(0)

    def request(layer: int, temperature: float, softmax: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Both models' values (R, live C) at a layer and how far they may be off, (R,)."""
        values, off = [], 0.0
        for u, d in (models[0][layer], models[1][layer]):
            z = u / temperature
            values.append((z.log_softmax(-1) if softmax else z)[:, live])
            off = torch.maximum(torch.as_tensor(off), (d / temperature)[:, live].amax(-1))
        return *values, off

    def divergence(name: str, layer: int, temperature: float) -> Tensor:
        s, t, off = request(layer, temperature, softmax=True)
        value = lambda a, b: DIVERGENCES[name].value(a, b).sum(-1)  # noqa: E731
        # A backend may leave out the terms whose sum over the columns is 0, as `slope` does: they
        # then cancel in the sum alone.
        plain = DIVERGENCES[name].grad(s, t)
        plain = 3 * off * plain.norm(dim=-1) + summation * plain.abs().sum(-1)
        return _movement(value, (s, t), off, summation) + plain + summation * value(s, t).abs()

    def distance(name: str, s: Tensor, t: Tensor, off: Tensor, common: float) -> Tensor:
        value = lambda a, b: distance_of(name, a, b)  # noqa: E731
        return (
            _movement(value, (s, t), off, common)
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


def _moved(problem: Problem, seed: int, summation: float, unit: float, options: dict) -> Problem:
    """The problem in float64 with every logit moved by a random amount of at most the rounding
    error.

    Hidden states get one more unit vector per layer and row, heads as many more columns, which hold
    the movements.
    """
    generator = torch.Generator().manual_seed(seed)
    problem = problem.to(torch.float64)
    rows, layers = math.prod(problem.leading_shape), len(problem.student_hidden)
    eye = torch.eye(layers * rows, dtype=torch.float64, device=problem.student_weight.device)
    temperature = max(options.get("temperature", 1.0), options.get("output_temperature", 1.0))
    changed = {}
    for side in ("student", "teacher"):
        hidden, weight, bias = (
            getattr(problem, f"{side}_{what}") for what in ("hidden", "weight", "bias")
        )
        if weight is None:
            continue
        flat = torch.cat([h.detach().reshape(rows, -1) for h in hidden])
        off = _gemm_rounding(flat, weight.detach(), None if bias is None else bias.detach(), unit)
        off += summation * temperature / options.get(f"{side}_logit_scale", 1.0)
        moved = off * (
            2 * torch.rand(off.shape, generator=generator, dtype=torch.float64).to(off.device) - 1
        )
        at = [
            eye[i * rows : (i + 1) * rows].reshape(*problem.leading_shape, -1)
            for i in range(layers)
        ]
        grown = [
            torch.cat([h.detach(), e], -1).requires_grad_(h.requires_grad)
            for h, e in zip(hidden, at)
        ]
        changed[f"{side}_hidden"] = tuple(grown)
        # The student's in any case: the gradient of its movements is that of the logits.
        changed[f"{side}_weight"] = torch.cat([weight.detach(), moved.T], -1).requires_grad_(
            side == "student"
        )
    return replace(problem, **changed)


def _row_norms(gradient: Tensor) -> Tensor:
    """2-norms over the last dimension of a gradient of hidden states or a head; of a bias, absolute
    values.
    """
    return gradient.abs() if gradient.ndim == 1 else gradient.norm(dim=-1)


def gradient_floors(
    problem: Problem, truth: Outcome, upstream=None, unit: float | None = None, **options
) -> dict[str, Tensor]:
    """The floor of the error of every gradient, per row: see the head of this file; `truth` is of
    `exact`.
    """
    unit = _working_unit(problem) if unit is None else unit
    columns = problem.student_weight.shape[0]
    summation = _summation_rounding(columns, unit)
    floors = {}
    for name, leaf in problem.leaves.items():
        # Its own rounding to the leaf's dtype, and the relative error of the sums it is made of.
        relative = unit_roundoff(leaf.dtype) + summation + unit * math.sqrt(leaf.shape[-1])
        floors[name] = relative * _row_norms(truth.gradients[name])
    moves = [0.0] * len(floors)
    for seed in range(PERTURBATIONS if floors else 0):
        moved_problem = _moved(problem, seed, summation, unit, options)
        moved = evaluate(moved_problem, fdd_loss_reference, upstream, **options)
        for i, (name, true) in enumerate(truth.gradients.items()):
            width = true.shape[-1]
            move = _row_norms(moved.gradients[name][..., :width] - true)
            # single numbers: one that happens not to move says little
            if true.ndim == 1 and move.numel():
                move = move.clamp(min=float(move.mean()))
            moves[i] = torch.maximum(torch.as_tensor(moves[i]), move)
    if not floors:
        return {}
    products = _product_floors(problem, moved.gradients["student_weight"], unit, options)
    floors = {
        name: floor + 2 * move + products[name]
        for (name, floor), move in zip(floors.items(), moves)
    }
    if problem.teacher_weight is not None:
        extra = _denominator_floors(problem, upstream, unit, options)
        floors = {name: floor + extra[name] for name, floor in floors.items()}
    return floors


def _product_floors(
    problem: Problem, grad_moved_weight: Tensor, unit: float, options: dict[str, Any]
) -> dict[str, Tensor]:
    """What the logits' gradient G and its products with the head and with the hidden states lose,
    per row.

    Like any inner products, sqrt(n) u times the sum of the magnitudes, which counts where the sum
    itself cancels, and u for each of the dozen operations that form an element of G. Behind a soft
    cap that element is multiplied by 1 - tanh^2, which is off by u however small it is: there the
    magnitude is that of the gradient in front of it.
    """
    wide = problem.to(torch.float64)
    weight, width, rows = (
        wide.student_weight.detach(),
        wide.student_weight.shape[1],
        math.prod(problem.leading_shape),
    )
    hidden = torch.cat([h.detach().reshape(rows, width) for h in wide.student_hidden])
    grads = grad_moved_weight[:, width:].T.abs()  # |G|: layers and rows x columns
    cap = options.get("student_softcap")
    if cap is not None:
        x = hidden @ weight.T
        x = x if wide.student_bias is None else x + wide.student_bias.detach()
        factor = 1 - (options.get("student_logit_scale", 1.0) * x / cap).tanh().square()
        grads = torch.where(factor > 0, grads / factor, grads)
    of_hidden = unit * (math.sqrt(len(weight)) + 12) * (grads @ weight.abs()).norm(dim=-1)
    of_head = unit * (math.sqrt(len(hidden)) + 12)
    floors = {
        "student_weight": of_head * (grads.T @ hidden.abs()).norm(dim=-1),
        "student_bias": of_head * grads.sum(0),
    }
    for i in range(len(wide.student_hidden)):
        floors[f"student_hidden[{i}]"] = of_hidden[i * rows : (i + 1) * rows].reshape(
            problem.leading_shape
        )
    return floors


def _denominator_floors(
    problem: Problem, upstream, unit: float, options: dict[str, Any]
) -> dict[str, Tensor]:
    """What the gradients of the softmax terms lose through their normalisation, per row.

    With respect to the logits they are slope - q sum(slope), where the sum, and q itself, are known
    up to the error of a sum over the columns, relative to sum(|slope|). What that leaves is q times
    a number of each row, as a gradient of the row's log-sum-exp is.
    """
    problem = problem.to(torch.float64)
    call = _dense_call(problem, unit, options)
    o, final = call.options, len(call.student) - 1

    def row(layer: int, temperature: float, name: str) -> Tensor:
        z_s, z_t = (model[layer][0] / temperature for model in (call.student, call.teacher))
        size = 1.0
        if name in DIVERGENCES:
            size = (
                DIVERGENCES[name]
                .grad(*[z.detach().log_softmax(-1) for z in (z_s, z_t)])
                .abs()
                .sum(-1)
            )
        return _summation_rounding(call.plan.spec.columns, unit) * size * z_s.logsumexp(-1)

    trajectory = output_kd = ce = None
    if o.trajectory in DIVERGENCES and call.plan.trajectory:
        trajectory = torch.stack(
            [row(layer, o.temperature, o.trajectory) for layer in call.dynamics]
        ).mean(0)
    if call.plan.output_kd is not None:
        output_kd = row(final, o.output_temperature, "kl")
    if call.plan.ce is not None:
        ce = row(final, 1.0, "nll")
    leaves = problem.leaves
    floors = dict.fromkeys(leaves, 0.0)
    for term in (trajectory, output_kd, ce):
        if term is None:
            continue
        loss = call.reduce(
            RowTerms(*[t if t is term else None for t in (output_kd, trajectory, None, ce)])
        ).loss
        above = (
            torch.ones_like(loss)
            if upstream is None
            else torch.as_tensor(upstream).to(loss).expand_as(loss)
        )
        found = torch.autograd.grad(
            loss, list(leaves.values()), above, retain_graph=True, materialize_grads=True
        )
        floors = {name: floors[name] + _row_norms(g) for name, g in zip(leaves, found)}
    return floors


class Excess(NamedTuple):
    """The largest error of a tensor, as a fraction of its budget, and where it is."""

    fraction: float
    error: float
    budget: float
    at: int


def excesses(problem: Problem, outcome: Outcome, upstream=None, **options) -> dict[str, Excess]:
    """For every term and gradient of `outcome`, its error against float64 as a fraction of its
    budget, per row.

    The budget is twice the error of the dense computation with float32 logits on the same inputs,
    plus the floor.
    """
    truth = exact(problem, upstream, **options)
    dense = evaluate(problem, fdd_loss_reference, upstream, **options)
    result = {}

    def compare(
        name: str, got: Tensor, true: Tensor, dense_error: Tensor, floor: Tensor, error: Tensor
    ) -> None:
        assert got.shape == true.shape, (
            f"{name} has shape {tuple(got.shape)}, expected {tuple(true.shape)}"
        )
        if not got.numel():
            return
        # Infinite where the truth is (a token impossible for the student alone): then only equality
        # will do.
        same = got.double() == true
        budget = (2 * dense_error + floor + problem.student_weight.numel() * _UNDERFLOW).reshape(-1)
        fraction = torch.where(error == 0, 0.0, error / budget.view_as(error)).reshape(-1)
        if fraction.shape == same.reshape(-1).shape:
            fraction = torch.where(same.reshape(-1), 0.0, fraction)
        fraction = torch.where(fraction.isnan(), torch.inf, fraction)
        at = int(fraction.argmax())
        result[name] = Excess(
            float(fraction[at]), float(error.reshape(-1)[at]), float(budget[at]), at
        )

    for name, got, true, low, floor in zip(
        FDDLossTerms._fields,
        outcome.terms,
        truth.terms,
        dense.terms,
        value_floors(problem, **options),
    ):
        # Reducing rounds once more.
        floor = (
            floor
            + _working_unit(problem)
            * (2 + math.sqrt(math.prod(problem.leading_shape)))
            * true.abs()
        )
        compare(name, got, true, (low - true).abs(), floor, (got - true).abs())
    floors = gradient_floors(problem, truth, upstream, **options)
    for name, true in truth.gradients.items():
        got, low = outcome.gradients[name], dense.gradients[name]
        assert got.dtype == problem.leaves[name].dtype, f"the gradient of {name} is {got.dtype}"
        compare(name, got, true, _row_norms(low - true), floors[name], _row_norms(got - true))
    return result


def assert_within_budget(problem: Problem, outcome: Outcome, upstream=None, **options) -> None:
    """Every term and gradient of `outcome` is within its budget in every row.

    Raises:
        AssertionError: naming what is not, its error and its budget.
    """
    failed = {
        name: e
        for name, e in excesses(problem, outcome, upstream, **options).items()
        if not e.fraction <= 1
    }
    assert not failed, "\n".join(
        f"{name}: error {e.error:.3e} is {e.fraction:.2f} times the budget {e.budget:.3e} at flat "
        f"row {e.at}"
        for name, e in failed.items()
    )


def assert_same_sums(got: Tensor, expected: Tensor, terms: int, what: str = "value") -> None:
    """Two float64 evaluations of one formula agree up to the order of their sums.

    Each of at most `terms` additions and a dozen operations around them rounds by u of the largest
    number met, taken as the largest of `expected` or 1 (1 - cos and differences of log-sum-exps
    pass through numbers of that size).
    """
    assert got.shape == expected.shape, (
        f"{what} has shape {tuple(got.shape)}, expected {tuple(expected.shape)}"
    )
    if not got.numel():
        return
    bound = (terms + 12) * unit_roundoff(torch.float64) * max(1.0, float(expected.abs().max()))
    error = float((got - expected).abs().max())
    assert error <= bound, f"{what}: error {error:.3e} is above {bound:.3e}"
