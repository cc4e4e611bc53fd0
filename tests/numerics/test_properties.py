"""Any shape, dtype, mask and set of options: every backend against the float64 reference, within
its error budget.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from hypothesis import given
from hypothesis import strategies as st

from fdd_kernels.lens.divergences import DIVERGENCES, FEATURE_DISTANCES
from fdd_kernels.testing import assert_within_budget, evaluate
from tests.support.options import FEATURE_DERIVATIVES
from tests.support.strategies import WEIGHTS, calls, problems, reductions


@given(call=calls())
def test_logit_lens(backend, call):
    problem, options, upstream = call
    assert_within_budget(
        problem,
        evaluate(problem, upstream=upstream, backend=backend, **options),
        upstream,
        **options,
    )


@st.composite
def feature_calls(draw):
    problem = draw(problems(feature_space=True))
    options, upstream = reductions(draw, problem.leading_shape)
    options |= {
        "trajectory": draw(st.sampled_from(FEATURE_DISTANCES)),
        "derivative": draw(st.sampled_from([*FEATURE_DERIVATIVES, None])),
        "output_in_dynamics": len(problem.student_hidden) == 1 or draw(st.booleans()),
        "alpha": draw(st.sampled_from([0.5, 1.0])),
        "beta": draw(WEIGHTS),
    }
    if problem.student_weight.shape[1] == 1:
        # A projection of width 1 has one direction: gradients of angles are 0 up to rounding.
        options |= {"trajectory": "mse", "derivative": "mse"}
    return problem, options, upstream


@given(call=feature_calls())
def test_feature_space(backend, call):
    problem, options, upstream = call
    assert_within_budget(
        problem,
        evaluate(problem, upstream=upstream, backend=backend, **options),
        upstream,
        **options,
    )


@given(problem=problems(), trajectory=st.sampled_from(list(DIVERGENCES)))
def test_divergences_are_not_negative_and_zero_for_one_model(problem, trajectory):
    wide = problem.to(torch.float64)
    options = {
        "trajectory": trajectory,
        "output_in_dynamics": True,
        "reduction": "none",
        "backend": "torch",
    }
    lowest = evaluate(wide, **options).terms.trajectory.min()
    # Non-negative up to the rounding of sums over the columns of numbers of the size of the logits.
    columns = wide.student_weight.shape[0]
    assert lowest >= -(columns + 40) * 2.0**-53 * 40
    twin = replace(
        wide,
        teacher_hidden=tuple([h.detach() for h in wide.student_hidden]),
        teacher_weight=wide.student_weight.detach(),
        teacher_bias=None if wide.student_bias is None else wide.student_bias.detach(),
    )
    assert evaluate(twin, **options).terms.trajectory.abs().max() <= (columns + 40) * 2.0**-53 * 40


@given(problem=problems(), order=st.randoms(use_true_random=False))
def test_rows_do_not_see_one_another(problem, order):
    """Permuting the rows permutes the losses."""
    options = {"reduction": "none", "backend": "torch", "output_in_dynamics": True}
    wide = problem.to(torch.float64)
    rows = math.prod(wide.leading_shape)
    shuffled = list(range(rows))
    order.shuffle(shuffled)

    def permuted(value):
        if isinstance(value, tuple):
            return tuple([h.detach().reshape(rows, -1)[shuffled] for h in value])
        return None if value is None else value.reshape(rows)[shuffled]

    names = ("student_hidden", "teacher_hidden", "labels", "mask")
    moved = replace(wide, **{name: permuted(getattr(wide, name)) for name in names})
    expected = evaluate(wide.frozen("student_hidden"), **options).terms.loss.reshape(rows)[shuffled]
    got = evaluate(moved, **options).terms.loss
    bound = (wide.student_weight.numel() + 40) * 2.0**-53 * 40
    assert (got - expected).abs().max() <= bound
