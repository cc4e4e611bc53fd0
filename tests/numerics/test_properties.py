"""Any shape, dtype, mask and set of options: every backend against the float64 reference, within
its error budget.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fdd_kernels.lens.divergences import FEATURE_DISTANCES
from fdd_kernels.testing import assert_within_budget, evaluate, value_floors
from tests.support.options import DIVERGENCE_TEXTS, FEATURE_DERIVATIVES
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


@given(problem=problems(), trajectory=st.sampled_from(DIVERGENCE_TEXTS))
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

    names = ("student_hidden", "teacher_hidden", "labels", "mask", "token_weights")
    moved = replace(wide, **{name: permuted(getattr(wide, name)) for name in names})
    expected = evaluate(wide.frozen("student_hidden"), **options).terms.loss.reshape(rows)[shuffled]
    got = evaluate(moved, **options).terms.loss
    bound = (wide.student_weight.numel() + 40) * 2.0**-53 * 40
    assert (got - expected).abs().max() <= bound


ALONE = {"alpha": 0.0, "beta": 0.0, "reduction": "none", "backend": "torch"}
SHARES = st.floats(1e-3, 1 - 1e-3)


def close(a: torch.Tensor, b: torch.Tensor, problem, what: str = "") -> None:
    """Compare two float64 evaluations of numbers of the size of the logits."""
    bound = (problem.student_weight.numel() + 40) * 2.0**-53 * 40
    assert (a - b).abs().max() <= bound * max(1.0, float(b.abs().max())), what


def swapped(problem):
    """Let the models change places."""
    teacher = {n: getattr(problem, f"teacher_{n}") for n in ("hidden", "weight", "bias")}
    student = {n: getattr(problem, f"student_{n}") for n in teacher}
    new = {f"student_{n}": t for n, t in teacher.items()}
    return replace(problem, **new, **{f"teacher_{n}": t for n, t in student.items()})


@settings(max_examples=15)
@given(problem=problems(), share=SHARES)
def test_jsd_is_symmetric_in_the_models(problem, share):
    """Swapping the models and beta for 1 - beta changes nothing; nor for total variation."""
    wide = problem.to(torch.float64).frozen("student_hidden", "student_weight", "student_bias")
    for text, other in ((f"jsd:{share!r}", f"jsd:{1 - share!r}"), ("tv", "tv")):
        a = evaluate(wide, output_divergence=text, **ALONE).terms.loss
        b = evaluate(swapped(wide), output_divergence=other, **ALONE).terms.loss
        close(a, b, problem, text)


@settings(max_examples=15)
@given(
    problem=problems(),
    offset=st.floats(-50, 50) | st.floats(-1e4, 1e4),
    scale=st.sampled_from([2.0**k for k in range(-3, 4)]),
)
def test_weighted_cosine_sees_directions_alone(backend, precision, problem, offset, scale):
    """It is in [0, 2], whatever is added to all logits, and whatever length the student's deltas
    have: up to the roundings of the logits, without another term or with one.
    """
    if len(problem.student_hidden) == 1 or problem.student_weight.shape[0] < 4:
        return
    options = ALONE | {"beta": 1.0, "derivative": "weighted_cosine", "output_kd_weight": 0.0}
    options |= {"output_in_dynamics": True, "backend": backend}
    original = problem.to(precision).frozen("student_hidden", "student_weight", "student_bias")
    original = replace(original, token_weights=None)
    zeros = torch.zeros(original.student_weight.shape[0], dtype=precision)
    moved = {
        f"{side}_bias": (zeros if bias is None else bias) + sign * offset
        for side, sign, bias in (
            ("student", 1, original.student_bias),
            ("teacher", -2, original.teacher_bias),
        )
    }
    scaled = tuple([h * scale for h in original.student_hidden])
    expected, floor_of_expected = None, None
    for changed in (
        original,
        replace(original, student_hidden=scaled),
        replace(original, **moved),
    ):
        found = evaluate(changed, **options).terms.derivative.double()
        floor = value_floors(changed, **options).derivative
        assert (found >= -floor).all()
        assert (found <= 2 + floor).all()
        if expected is None:
            expected, floor_of_expected = found, floor
        assert ((found - expected).abs() <= floor + floor_of_expected).all()


@settings(max_examples=15)
@given(problem=problems(), options=st.sampled_from([{}, {"derivative": "weighted_cosine"}]))
def test_weights_that_change_nothing(problem, options):
    """teacher_mix=1, layer weights of 1 and token weights of 1 are as none."""
    wide = problem.to(torch.float64)
    wide = replace(wide, token_weights=None)
    layers = len(wide.student_hidden)
    options = options | {"output_in_dynamics": True, "backend": "torch"}
    expected = evaluate(wide, **options)
    ones = torch.ones(wide.leading_shape)
    for found in (
        evaluate(wide, teacher_mix=1.0, layer_weights=(1,) * layers, **options),
        evaluate(replace(wide, token_weights=ones), **options),
    ):
        close(found.terms.loss, expected.terms.loss, problem)
        for name, gradient in expected.gradients.items():
            close(found.gradients[name], gradient, problem, name)


@settings(max_examples=15)
@given(problem=problems(), seed=st.integers(0, 99))
def test_token_weights_are_linear(problem, seed):
    """Twice the weights are twice the loss; weights of 0 and 1 are a mask, for sums."""
    wide = problem.to(torch.float64)
    weights = torch.rand(wide.leading_shape, generator=torch.Generator().manual_seed(seed))
    options = {"output_in_dynamics": True, "backend": "torch", "reduction": "sum"}
    once, twice = (
        evaluate(replace(wide, token_weights=factor * weights), **options) for factor in (1, 2)
    )
    close(twice.terms.loss, 2 * once.terms.loss, problem)
    for name, gradient in once.gradients.items():
        close(twice.gradients[name], 2 * gradient, problem, name)
    chosen = weights < 0.5
    mask = chosen if wide.mask is None else chosen & (wide.mask != 0)
    masked = evaluate(replace(wide, mask=mask, token_weights=None), **options)
    weighted = evaluate(replace(wide, token_weights=chosen.double()), **options)
    close(weighted.terms.loss, masked.terms.loss, problem)
    for name, gradient in masked.gradients.items():
        close(weighted.gradients[name], gradient, problem, name)
