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
from typing import NamedTuple

import torch
from torch import Tensor

from fdd_kernels.objectives.fdd.api import fdd_loss_reference
from fdd_kernels.objectives.fdd.options import FDDLossTerms
from fdd_kernels.testing.dense_call import UNDERFLOW, unit_roundoff, working_unit
from fdd_kernels.testing.gradient_floors import gradient_floors, row_norms
from fdd_kernels.testing.problems import Outcome, Problem, evaluate, exact
from fdd_kernels.testing.value_floors import value_floors

_UNDERFLOW = UNDERFLOW * torch.finfo(torch.float32).tiny  # per token


class Excess(NamedTuple):
    """The largest error of a tensor, as a fraction of its budget, and where it is."""

    fraction: float
    error: float
    budget: float
    at: int


def excesses(problem: Problem, outcome: Outcome, upstream=None, **options) -> dict[str, Excess]:
    """Compute the error of every term and gradient of `outcome` as a fraction of its budget.

    Errors are per row, against float64; the row with the largest fraction is returned.

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
            + working_unit(problem) * (2 + math.sqrt(math.prod(problem.leading_shape))) * true.abs()
        )
        compare(name, got, true, (low - true).abs(), floor, (got - true).abs())
    floors = gradient_floors(problem, truth, upstream, **options)
    for name, true in truth.gradients.items():
        got, low = outcome.gradients[name], dense.gradients[name]
        assert got.dtype == problem.leaves[name].dtype, f"the gradient of {name} is {got.dtype}"
        compare(name, got, true, row_norms(low - true), floors[name], row_norms(got - true))
    return result


def assert_within_budget(problem: Problem, outcome: Outcome, upstream=None, **options) -> None:
    """Check that every term and gradient of `outcome` is within its budget in every row.

    Raises:
        AssertionError: names each tensor above its budget, its error and its budget.
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
