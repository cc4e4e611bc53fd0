"""Draw random problems for tests and benchmarks, and check error budgets."""

from fdd_kernels.testing.budgets import (
    Excess,
    assert_same_sums,
    assert_within_budget,
    beyond_budget,
    excesses,
)
from fdd_kernels.testing.dense_call import unit_roundoff
from fdd_kernels.testing.gradient_floors import PERTURBATIONS, gradient_floors
from fdd_kernels.testing.problems import (
    Outcome,
    Problem,
    evaluate,
    exact,
    random_problem,
    strided,
)
from fdd_kernels.testing.value_floors import value_floors

__all__ = [
    "PERTURBATIONS",
    "Excess",
    "Outcome",
    "Problem",
    "assert_same_sums",
    "assert_within_budget",
    "beyond_budget",
    "evaluate",
    "exact",
    "excesses",
    "gradient_floors",
    "random_problem",
    "strided",
    "unit_roundoff",
    "value_floors",
]
