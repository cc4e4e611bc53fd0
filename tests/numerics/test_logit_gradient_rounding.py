"""Why the C++ kernels multiply dL/dlogits as the sum of two bf16 numbers (csrc/gemm.h, SplitGemm).

One rounding of row i of G is off by some 2^-9 of sqrt(sum_j (G_ij |W_j|)^2) in dH = G W, while the
error budget is relative to |dH_i|. Where the rows of the head have a direction in common the
product cancels, since the elements of a row of G sum to 0, and the rounding does not.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from fdd_kernels.objectives.fdd.api import fdd_loss_reference
from fdd_kernels.testing import Outcome, Problem, evaluate, exact, excesses, random_problem
from tests.support.heads_alike import with_common_direction

BF16 = torch.bfloat16
ONE_LAYER = {"alpha": 0.0, "beta": 0.0}  # output KD alone


def logit_gradient(problem: Problem) -> torch.Tensor:
    """Compute dL/dlogits, (R, V), in float64: the gradient of head columns that select a row."""
    wide, rows = problem.to(torch.float64), math.prod(problem.leading_shape)
    hidden, weight = wide.student_hidden[0].detach(), wide.student_weight.detach()
    selected = replace(
        wide,
        student_hidden=(torch.cat([hidden, torch.eye(rows, dtype=torch.float64)], 1),),
        student_weight=torch.cat([weight, weight.new_zeros(len(weight), rows)], 1).requires_grad_(),
    )
    found = evaluate(selected, fdd_loss_reference, **ONE_LAYER)
    return found.gradients["student_weight"][:, weight.shape[1] :].T


def multiplied(problem: Problem, parts: int) -> Outcome:
    """Replace the gradients by exact products of dL/dlogits as a sum of `parts` bf16 numbers."""
    rest = logit_gradient(problem)
    rounded = torch.zeros_like(rest)
    for _ in range(parts):
        rounded += (rest - rounded).to(BF16)
    found, wide = exact(problem, **ONE_LAYER), problem.to(torch.float64)
    gradients = {
        "student_hidden[0]": (rounded @ wide.student_weight.detach()).to(BF16),
        "student_weight": (rounded.T @ wide.student_hidden[0].detach()).to(BF16),
    }
    return found._replace(gradients=gradients)


@pytest.mark.parametrize(("size", "is_enough"), [(0.0, True), (8.0, False)])
def test_one_rounding_is_not_always_enough(size, is_enough):
    problem = random_problem((12,), 300, 32, 32, layers=1, dtype=BF16)
    problem = with_common_direction(problem, size)
    name = "student_hidden[0]"
    once = excesses(problem, multiplied(problem, 1), **ONE_LAYER)[name].fraction
    assert (once <= 1) == is_enough
    twice = excesses(problem, multiplied(problem, 2), **ONE_LAYER)
    assert all(twice[name].fraction <= 1 for name in problem.leaves)
