"""Compare errors with budgets that are derived from the arithmetic.

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
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from fdd_kernels.objectives.fdd.api import fdd_loss_reference
from fdd_kernels.objectives.fdd.options import FDDLossTerms
from fdd_kernels.testing.dense_call import UNDERFLOW, unit_roundoff, working_unit
from fdd_kernels.testing.gradient_floors import gradient_floors, relative_floors, row_norms
from fdd_kernels.testing.problems import Outcome, Problem, evaluate, exact
from fdd_kernels.testing.value_floors import value_floors

_UNDERFLOW = UNDERFLOW * torch.finfo(torch.float32).tiny  # per token


class Excess(NamedTuple):
    """The largest error of a tensor, as a fraction of its budget, and where it is."""

    fraction: float
    error: float
    budget: float
    at: int


# Parts of a budget, the cheapest first; each is added to those before.
ROUNDING, DENSE, WHOLE = range(3)


class _Comparison:
    """Terms and gradients of an outcome, their errors, and the parts of their budgets.

    A part is computed when it is first asked for.

    Raises:
        AssertionError: a tensor has another shape or dtype than the reference's.
    """

    def __init__(self, problem: Problem, outcome: Outcome, upstream, options: dict) -> None:
        self.problem, self.upstream, self.options = problem, upstream, options
        self.truth = exact(problem, upstream, **options)
        terms = zip(FDDLossTerms._fields, outcome.terms, self.truth.terms)
        pairs = {name: (got, true) for name, got, true in terms}
        for name, true in self.truth.gradients.items():
            got = outcome.gradients[name]
            assert got.dtype == problem.leaves[name].dtype, f"the gradient of {name} is {got.dtype}"
            pairs[name] = got, true
        for name, (got, true) in pairs.items():
            assert got.shape == true.shape, (
                f"{name} has shape {tuple(got.shape)}, expected {tuple(true.shape)}"
            )
        self.pairs = {name: (got, true) for name, (got, true) in pairs.items() if got.numel()}

    @cached_property
    def dense(self) -> dict[str, Tensor]:
        found = evaluate(self.problem, fdd_loss_reference, self.upstream, **self.options)
        return found.terms._asdict() | found.gradients

    @cached_property
    def rounding(self) -> dict[str, Tensor]:
        """What the reduction of a term, and the sums of a gradient, round in any case."""
        tokens = math.prod(self.problem.leading_shape)
        relative = working_unit(self.problem) * (2 + math.sqrt(tokens))
        of_terms = {n: relative * true.abs() for n, true in self.truth.terms._asdict().items()}
        return of_terms | relative_floors(self.problem, self.truth)

    @cached_property
    def value_floors(self) -> dict[str, Tensor]:
        return value_floors(self.problem, **self.options)._asdict()

    @cached_property
    def gradient_floors(self) -> dict[str, Tensor]:
        return gradient_floors(self.problem, self.truth, self.upstream, **self.options)

    def floor(self, name: str, parts: int) -> Tensor:
        if parts < WHOLE:
            return self.rounding[name]
        if name in FDDLossTerms._fields:
            return self.rounding[name] + self.value_floors[name]
        return self.gradient_floors[name]

    def excess(self, name: str, parts: int) -> Excess:
        """Compare the error of a tensor with the `parts` of its budget."""
        got, true = self.pairs[name]
        size = torch.abs if name in FDDLossTerms._fields else row_norms
        error = size(got - true)
        budget = self.floor(name, parts) + self.problem.student_weight.numel() * _UNDERFLOW
        if parts >= DENSE:
            budget = budget + 2 * size(self.dense[name] - true)
        budget = budget.reshape(-1)
        # Infinite where the truth is (a token impossible for the student alone): then only equality
        # will do.
        same = (got.double() == true).reshape(-1)
        fraction = torch.where(error == 0, 0.0, error / budget.view_as(error)).reshape(-1)
        if fraction.shape == same.shape:
            fraction = torch.where(same, 0.0, fraction)
        fraction = torch.where(fraction.isnan(), torch.inf, fraction)
        at = int(fraction.argmax())
        return Excess(float(fraction[at]), float(error.reshape(-1)[at]), float(budget[at]), at)


def excesses(problem: Problem, outcome: Outcome, upstream=None, **options) -> dict[str, Excess]:
    """Compute the error of every term and gradient of `outcome` as a fraction of its budget.

    Errors are per row, against float64; the row with the largest fraction is returned.

    The budget is twice the error of the dense computation with float32 logits on the same inputs,
    plus the floor.
    """
    call = _Comparison(problem, outcome, upstream, options)
    return {name: call.excess(name, WHOLE) for name in call.pairs}


def beyond_budget(
    problem: Problem, outcome: Outcome, upstream=None, most: float = 1.0, **options
) -> dict[str, Excess]:
    """Compute what `excesses` has above `most`, with less work.

    No part of a budget is negative. A tensor that is within the first parts is within the whole,
    which takes ten evaluations of the reference.
    """
    call = _Comparison(problem, outcome, upstream, options)
    beyond = list(call.pairs)
    found: dict[str, Excess] = {}
    for parts in (ROUNDING, DENSE, WHOLE):
        found = {name: call.excess(name, parts) for name in beyond}
        beyond = [name for name, excess in found.items() if not excess.fraction <= most]
    return {name: found[name] for name in beyond}


def assert_within_budget(problem: Problem, outcome: Outcome, upstream=None, **options) -> None:
    """Check that every term and gradient of `outcome` is within its budget in every row.

    Raises:
        AssertionError: names each tensor above its budget, its error and its budget.
    """
    failed = beyond_budget(problem, outcome, upstream, **options)
    assert not failed, "\n".join(
        f"{name}: error {e.error:.3e} is {e.fraction:.2f} times the budget {e.budget:.3e} at flat "
        f"row {e.at}"
        for name, e in failed.items()
    )


def assert_same_sums(got: Tensor, expected: Tensor, terms: int, what: str = "value") -> None:
    """Check that two float64 evaluations of one formula agree up to the order of their sums.

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
