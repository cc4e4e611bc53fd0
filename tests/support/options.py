"""Options of the loss that several tests go through."""

from __future__ import annotations

import os

import pytest

from fdd_kernels.backends import BACKENDS
from fdd_kernels.lens.distances import DISTANCES
from fdd_kernels.lens.divergences import DIVERGENCES
from fdd_kernels.objectives.fdd.options import LossOptions
from fdd_kernels.objectives.fdd.plan import build_plan
from fdd_kernels.testing import Problem

# Only Triton kernels run then.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")

# Parameters at the ends of their ranges: weights of a mixture far below float32's unit roundoff, or
# that close to 1; large powers beside none.
ENDS = [
    *["jsd:1e-9", "jsd:1e-6", "jsd:0.999999"],
    *["skew_kl:1e-9", "skew_kl:1e-6", "skew_kl:0.999999"],
    *["skew_reverse_kl:1e-9", "skew_reverse_kl:1e-6", "skew_reverse_kl:0.999999"],
    *["alpha_beta:5,0", "alpha_beta:0,3", "alpha_beta:1e-6,1"],
]

# Every divergence, at its defaults and at other parameters: near an end, at a pole that is not one.
DIVERGENCE_TEXTS = [
    *DIVERGENCES,
    *["jsd:0.1", "jsd:0.9", "jsd:1e-3", "skew_kl:0.5", "skew_kl:0.99", "skew_reverse_kl:0.5"],
    *["alpha_beta:1,1", "alpha_beta:0,1.5", "alpha_beta:0.5,0", "alpha_beta:1e-9,0.5"],
    *["alpha_beta:0.5,1e-9", "alpha_beta:0.3,0.3", "alpha_beta:2,0.5"],
    *ENDS,
]

FEATURE_DERIVATIVES = [name for name, distance in DISTANCES.items() if not distance.weighted]


def skip_what_triton_refuses(problem: Problem, backend: str, **options) -> None:
    """Skip a call that the Triton kernels refuse, with their reason; other backends refuse none."""
    if backend != "triton":
        return
    options = LossOptions(**{k: v for k, v in options.items() if k != "num_items_in_batch"})
    columns = len(problem.student_weight)
    states = len(problem.student_hidden), len(problem.teacher_hidden)
    plan = build_plan(options, columns, *states, feature_space=problem.feature_space)
    reason = BACKENDS[backend].refusal(plan.spec)
    if reason is not None:
        pytest.skip(reason)
