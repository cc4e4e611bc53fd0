"""The closed-form gradients of `terms.py` against autograd of its values, their accuracy in
float32, and how few operators.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fdd_kernels import fused_fdd_loss
from fdd_kernels.backends import BACKENDS, torch_stream
from fdd_kernels.engine.cached_logits import outputs_and_gradients
from fdd_kernels.lens.distances import DISTANCES, Sums
from fdd_kernels.lens.divergences import DERIVATIVES, TRAJECTORIES
from fdd_kernels.lens.inputs import LensInputs
from fdd_kernels.lens.layout import LSE_S, M_DD, M_SS, M_ST, MEAN_S, VALUE
from fdd_kernels.objectives.fdd.loss import prepare, used_by
from fdd_kernels.objectives.fdd.objective import FDDObjective, reduce_terms
from fdd_kernels.objectives.fdd.options import LossOptions
from fdd_kernels.objectives.fdd.plan import Plan
from fdd_kernels.objectives.fdd.terms import (
    row_terms_from_statistics,
    term_weights,
    upstream_gradients,
)
from fdd_kernels.objectives.reduction import safe_denominator
from fdd_kernels.testing import Problem, random_problem

F64 = torch.float64
OF_STUDENT_REQUESTS, OF_STUDENT_MOMENTS = [LSE_S, VALUE], [MEAN_S, M_SS, M_ST, M_DD]


def inputs_of(problem: Problem, **options) -> tuple[LensInputs, Plan, Tensor | None]:
    """Return the layers that the plan of a call uses, the plan, and the valid rows of the mask."""
    frozen = problem.frozen("student_hidden", "student_weight", "student_bias")
    plan, tensors = prepare(frozen, LossOptions(**options, backend="torch"))
    return used_by(plan, tensors), plan, tensors.valid


def statistics_of(problem: Problem, **options) -> tuple[Plan, tuple[Tensor, ...], Tensor | None]:
    inputs, plan, valid = inputs_of(problem, **options)
    return plan, torch_stream.stats(inputs, plan.spec), valid


def static(problem: Problem) -> Problem:
    """The last two layers but one of both models are the same: a delta of length 0."""
    for model in ("student_hidden", "teacher_hidden"):
        first, second, _, *others = getattr(problem, model)
        problem = replace(problem, **{model: (first, second, second, *others)})
    return problem


SAME = {"student_width": 8, "teacher_width": 8}
PROBLEMS = {
    "random": random_problem(dtype=F64, layers=5, labels=True),
    "nearly equal": random_problem(dtype=F64, layers=5, near=1e-3, **SAME, labels=True),
    "identical": random_problem(dtype=F64, layers=5, near=0.0, **SAME, labels=True),
    "zero length": static(random_problem(dtype=F64, layers=5, labels=True)),
    "masked": random_problem(dtype=F64, layers=5, labels=True, mask=True),
}
PROBLEMS = {name: replace(p, labels=p.labels.clamp(min=0)) for name, p in PROBLEMS.items()}
SCALES = [
    {},
    {
        "output_in_dynamics": True,
        "temperature": 2.0,
        "output_temperature": 3.0,
        "scale_by_t2": True,
        "ce_weight": 0.4,
    },
    {"alpha": 0.0, "ce_weight": 0.4, "output_kd_weight": 0.7},
    {"output_in_dynamics": True, "beta": 0.3, "alpha": 1.9},
]


def by_autograd(plan: Plan, statistics, valid, denominator, upstream) -> tuple[Tensor, Tensor]:
    shifts, requests, moments = [s.detach().requires_grad_() for s in statistics]
    terms = reduce_terms(
        row_terms_from_statistics(plan, shifts, requests, moments),
        plan.options,
        valid,
        plan.leading_shape,
        denominator,
    )
    total = sum(
        ((g * term).sum() for g, term in zip(upstream, terms) if g is not None), 0 * requests.sum()
    )
    return torch.autograd.grad(total, (requests, moments), materialize_grads=True)


@pytest.mark.parametrize("options", SCALES, ids=lambda o: ",".join(o) or "defaults")
@pytest.mark.parametrize("name", PROBLEMS)
def test_closed_form_is_what_autograd_finds(name, options):
    """Differentiate the loss and single terms, for every distance, divided or not: float64, to
    the rounding of cancelling sums.
    """
    for trajectory, derivative in itertools.product(TRAJECTORIES, [*DERIVATIVES, None]):
        plan, statistics, valid = statistics_of(
            PROBLEMS[name], trajectory=trajectory, derivative=derivative, **options
        )
        for upstream, items in (
            ((torch.tensor(1.3, dtype=F64), None, None, None, None), None),
            ((None, None, torch.tensor(2.0, dtype=F64), -1.0, None), torch.tensor(7.0)),
            ((-0.5, 1.0, 2.0, 3.0, 4.0), 3),
        ):
            denominator = valid.sum() if items is None else safe_denominator(items)
            expected = by_autograd(plan, statistics, valid, denominator, upstream)
            found = upstream_gradients(
                plan, *statistics, valid, term_weights(plan, denominator, upstream, F64)
            )
            for of_student, a, b in zip((OF_STUDENT_REQUESTS, OF_STUDENT_MOMENTS), found, expected):
                assert not a[:, [i for i in range(a.shape[1]) if i not in of_student]].any()
                a, b = a[:, of_student], b[:, of_student]
                if b.numel():
                    size = b.abs().amax(-1, keepdim=True)  # of one statistic over the rows
                    assert (a - b).abs().le(1e-9 * size + 1e-14).all(), (
                        trajectory,
                        derivative,
                        upstream,
                    )


def test_closed_form_of_a_gradient_per_row():
    """Upstream gradients (R,) of reduction="none"."""
    for options in SCALES:
        plan, statistics, valid = statistics_of(
            PROBLEMS["masked"], reduction="none", trajectory="cosine", **options
        )
        upstream = (torch.linspace(-1, 2, 10, dtype=F64), None, None, None, None)
        per_row = tuple(g if g is None else g.view(plan.leading_shape) for g in upstream)
        expected = by_autograd(plan, statistics, valid, None, per_row)
        found = upstream_gradients(
            plan, *statistics, valid, term_weights(plan, None, upstream, F64)
        )
        torch.testing.assert_close(
            found[0][:, OF_STUDENT_REQUESTS], expected[0][:, OF_STUDENT_REQUESTS]
        )
        torch.testing.assert_close(
            found[1][:, OF_STUDENT_MOMENTS], expected[1][:, OF_STUDENT_MOMENTS]
        )


def sums_of(s: Tensor, t: Tensor) -> Sums:
    """Of vectors (R, C), as one pair."""
    return Sums(
        count=torch.full((1, len(s)), float(s.shape[-1]), dtype=s.dtype),
        squares=torch.stack([s.square().sum(-1), t.square().sum(-1)])[None],
        product=(s * t).sum(-1)[None],
        difference=(s - t).square().sum(-1)[None],
    )


def grads_of(distance, sums: Sums) -> list[Tensor]:
    found = [torch.zeros_like(sums.product) for _ in range(3)]
    distance.write_grad(sums, *found)
    return found


def gradient(grads: list[Tensor], s: Tensor, t: Tensor) -> Tensor:
    """Return the gradients that backends form from the upstream gradients."""
    of_ss, of_st, of_dd = [of_sum[0, :, None] for of_sum in grads]
    return 2 * of_ss * s + of_st * t + 2 * of_dd * (s - t)


def plain(kind: str, s: Tensor, t: Tensor) -> Tensor:
    if kind == "mse":
        return (s - t).square().mean(-1)
    return 1 - torch.nn.functional.cosine_similarity(s, t, dim=-1, eps=0.0)


@pytest.mark.parametrize("near", [None, 1e-1, 1e-3, 1e-5])
@pytest.mark.parametrize("kind", ["cosine", "mse"])
def test_distances_are_the_plain_formulas(kind, near):
    """Value, and gradient by autograd of the plain formula over vectors, in float64."""
    generator = torch.Generator().manual_seed(3)
    s, noise = torch.randn(2, 20, 50, dtype=F64, generator=generator)
    t = noise if near is None else s * (1 + near * noise)
    leaf = s.clone().requires_grad_()
    value = plain(kind, leaf, t)
    (expected,) = torch.autograd.grad(value.sum(), leaf)
    sums = sums_of(s, t)
    torch.testing.assert_close(
        DISTANCES[kind].value(sums)[0], value.detach(), rtol=1e-9, atol=1e-15
    )
    # The plain formula's own gradient cancels: it is off by the unit roundoff of 1 / |s|.
    torch.testing.assert_close(
        gradient(grads_of(DISTANCES[kind], sums), s, t), expected, rtol=1e-9, atol=1e-14
    )


def test_distances_of_vectors_of_no_length():
    s = torch.randn(4, 6)
    s[0], t = 0.0, torch.randn(4, 6)
    t[1] = 0.0
    s[2] = t[2] = 0.0
    sums = sums_of(s, t)
    assert (DISTANCES["cosine"].value(sums)[0, :3] == 1).all()
    for grad in grads_of(DISTANCES["cosine"], sums):
        assert not grad[0, :3].any()
        assert grad.isfinite().all()
    # as rounding may leave for a length of zero
    rounded = sums._replace(squares=-sums.squares.abs())
    assert (DISTANCES["cosine"].value(rounded) == 1).all()
    assert not any(grad.any() for grad in grads_of(DISTANCES["cosine"], rounded))


@pytest.mark.parametrize("kind", DISTANCES)
def test_nan_passes(kind):
    sums = sums_of(torch.full((2, 6), torch.nan), torch.randn(2, 6))
    assert DISTANCES[kind].value(sums).isnan().all()
    if "cosine" in kind:
        assert grads_of(DISTANCES[kind], sums)[0].isnan().all()


@pytest.mark.parametrize("near", [None, 1e-1, 1e-2, 1e-3, 1e-4])
def test_closed_form_in_float32(near):
    """Compare with float64 on the same sums.

    Each upstream gradient has a relative error of a few roundings; the first one of the near form
    those of t.t - s.s and |s - t|^2, from which it is formed. So the gradient has its digits where
    the models agree.
    """
    generator = torch.Generator().manual_seed(5)
    s, noise = torch.randn(2, 200, 300, dtype=F64, generator=generator)
    t = noise if near is None else s * (1 + near * noise)
    sums = Sums(*[of_all.float() for of_all in sums_of(s, t)])
    exact = grads_of(DISTANCES["cosine"], Sums(*[of_all.double() for of_all in sums]))
    unit, (ss, tt) = 2.0**-24, sums.squares.double().unbind(1)
    found = [grad.double() for grad in grads_of(DISTANCES["cosine"], sums)]
    # Three inverse square roots of one or two roundings each, and five multiplications and sums.
    relative, per_product = 12 * unit, 1 / (ss * tt).sqrt()
    is_near = exact[2] > 0
    assert is_near.all() if near else not is_near.any()
    parts = ((tt - ss).abs() + sums.difference.double()) * per_product / (4 * ss)
    bounds = [torch.where(is_near, parts, exact[0].abs()), per_product, per_product]
    for a, b, bound in zip(found, exact, bounds):
        assert (a - b).abs().le(relative * bound).all()
    if near:
        # The gradient's length is of the size of s - t; multiples of s and of t alone would be off
        # by the roundoff of s.
        error = (gradient(found, s, t) - gradient(exact, s, t)).norm(dim=-1)
        assert error.le(
            2 * relative * gradient(exact, s, t).norm(dim=-1) * (1 + 300**0.5 * near)
        ).all()


class Operators(TorchDispatchMode):
    """Record dispatched operators; `kernels` are those that return no view."""

    def __init__(self):
        super().__init__()
        self.all: list[str] = []
        self.kernels: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.all.append(str(function))
        if not any(
            r.alias_info is not None and not r.alias_info.is_write for r in function._schema.returns
        ):
            self.kernels.append(str(function))
        return function(*args, **(kwargs or {}))


def test_operators_of_a_block(monkeypatch):
    """A row block takes at most 42 operators beside views, however many layers there are."""
    counts: list[Operators] = []

    def stats_and_grad(inputs, spec, block_rows, upstream_of, needed, refine):
        rows, statistics = torch.arange(inputs.rows), torch_stream.stats(inputs, spec)
        with Operators() as counted:
            upstream_of(rows, *statistics)
        counts.append(counted)
        return [], statistics

    monkeypatch.setitem(
        BACKENDS, "torch", replace(BACKENDS["torch"], stats_and_grad=stats_and_grad)
    )
    for trajectory, derivative in itertools.product(TRAJECTORIES, [*DERIVATIVES, None]):
        for options in SCALES:
            for layers in (4, 9):
                problem = random_problem(layers=layers, labels=True)
                problem = replace(problem, labels=problem.labels.clamp(min=0))
                inputs, plan, _ = inputs_of(
                    problem, trajectory=trajectory, derivative=derivative, **options
                )
                objective = FDDObjective.of(plan, inputs, torch.tensor(7.0))
                needed = [True] * (layers + 2)
                outputs_and_gradients(objective, "torch", None, 4, needed, inputs)
            few, many = counts[-2:]
            assert len(few.kernels) <= 42, (trajectory, derivative, options, few.kernels)
            assert few.all == many.all


@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.int64, torch.float16], ids=str)
def test_items_of_any_dtype_leave_the_losss_own(backend, dtype):
    problem = random_problem()
    loss = fused_fdd_loss(
        **problem.arguments, backend=backend, num_items_in_batch=torch.tensor(3, dtype=dtype)
    )
    assert loss.dtype == torch.float32
    assert torch.equal(
        loss, fused_fdd_loss(**problem.arguments, backend=backend, num_items_in_batch=3)
    )
    loss.backward()
    assert problem.student_weight.grad.dtype == torch.float32
    count = torch.tensor(3.0, dtype=F64, requires_grad=True)
    loss = fused_fdd_loss(**problem.arguments, backend=backend, num_items_in_batch=count)
    assert loss.dtype == torch.float32
    (of_count,) = torch.autograd.grad(loss, count)
    assert math.isclose(of_count, -loss.detach() / 3, rel_tol=1e-6)


@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.int64], ids=str)
def test_no_items_are_a_loss_of_zero(backend, dtype):
    problem = random_problem()
    terms = fused_fdd_loss(
        **problem.arguments,
        backend=backend,
        num_items_in_batch=torch.zeros((), dtype=dtype),
        return_terms=True,
    )
    assert all(term == 0 for term in terms)
    for gradient in torch.autograd.grad(terms.loss, list(problem.leaves.values())):
        assert not gradient.any()
