"""derivative="weighted_cosine": teachers of any sharpness, the likeliest token anywhere, weights on
one token alone; the reference against the formula, every backend token by token.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fdd_kernels import fdd_loss_reference, fused_fdd_loss
from fdd_kernels.testing import (
    Outcome,
    Problem,
    assert_within_budget,
    evaluate,
    exact,
    random_problem,
    unit_roundoff,
    value_floors,
)
from fdd_kernels.testing.gradient_floors import gradient_floors, row_norms
from tests.support.options import skip_what_triton_refuses
from tests.support.oracles import weighted_cosine

F64 = torch.float64
ALONE = {"derivative": "weighted_cosine", "alpha": 0.0, "output_kd_weight": 0.0}
WITH_REDUCTION = pytest.mark.parametrize("reduction", ["none", "sum"], ids=["streamed", "cached"])


def of_logits(student: list[Tensor], teacher: list[Tensor], device="cpu") -> Problem:
    """Make a problem whose hidden states are its logits: gradients are those of the tokens."""
    eye = torch.eye(student[0].shape[-1], device=device, dtype=student[0].dtype)
    return Problem(
        tuple([x.to(device).requires_grad_() for x in student]),
        eye,
        tuple([x.to(device) for x in teacher]),
        eye,
    )


def sharp(
    gap: float, top: int, columns: int = 60, near: float | None = None, rows: int = 3
) -> Problem:
    """The likeliest token of the teacher's later layer is `gap` above all others."""
    generator = torch.Generator().manual_seed(columns + top)
    student, teacher = (
        [torch.randn(rows, columns, generator=generator) for _ in range(3)] for _ in range(2)
    )
    if near is not None:
        student = [t + near * s for s, t in zip(student, teacher)]
    teacher[1][:, top] = teacher[1].amax(-1) + gap
    return of_logits(student, teacher)


def exactly(problem: Problem, temperature: float = 1.0) -> Outcome:
    """Compute the formula in float64."""
    wide = problem.to(F64)
    (s1, s2, _), (t1, t2, _) = (
        [h / temperature for h in states] for states in (wide.student_hidden, wide.teacher_hidden)
    )
    value = weighted_cosine(t2 - t1, s2 - s1, t2)
    grads = torch.autograd.grad(value.sum(), wide.student_hidden[:2])
    return Outcome(value.detach(), dict(zip(("student_hidden[0]", "student_hidden[1]"), grads)))


def token_bounds(problem: Problem, temperature: float, unit: float) -> Tensor:
    """Bound the error of each token's gradient, (R, C), as any arithmetic of this roundoff has it.

    A token's weight and its distance from the means are off by a few roundings of the logits, each
    of the three multiples of vectors that the gradient is a sum of by those of a sum over the
    vocabulary. The likeliest token's distance from the means is the sum of all others': so is its
    error.
    """
    wide = problem.to(F64)
    (s1, s2, _), (t1, t2, _) = (
        [h.detach() / temperature for h in states]
        for states in (wide.student_hidden, wide.teacher_hidden)
    )
    w, top = t2.softmax(-1), t2.argmax(-1, keepdim=True)
    largest = max(float(x.abs().amax()) for x in (s1, s2, t1, t2))
    parts = []
    for vector in (s2 - s1, t2 - t1):
        vector = vector - vector.gather(1, top)
        mean = (w * vector).sum(-1, keepdim=True)
        length = (w * (vector - mean).square()).sum(-1, keepdim=True).sqrt()
        size = (vector - mean).abs() + largest * (vector != 0)
        parts.append((size, length))
    (of_s, length_s), (of_t, length_t) = parts
    sizes = w / length_s / temperature * (of_s / length_s + of_t / length_t)
    others = sizes.scatter(1, top, 0.0)
    sizes = torch.where(w > 0.5, others.sum(-1, keepdim=True), sizes)
    columns = w.shape[-1]
    return unit * (math.sqrt(columns) + math.log(columns) + 16 + 2 * largest) * sizes


def check_tokens(
    problem: Problem, backend: str, dtype: torch.dtype, temperature: float = 1.0, **options
) -> None:
    """Compare value and every token's gradient of a backend with the formula."""
    options = ALONE | {"derivative_temperature": temperature} | options
    skip_what_triton_refuses(problem, backend, **options)
    outcome = evaluate(problem.to(dtype), fused_fdd_loss, backend=backend, **options)
    truth, unit = exactly(problem, temperature), unit_roundoff(dtype)
    bounds = token_bounds(problem, temperature, unit)
    for name, true in truth.gradients.items():
        error = (outcome.gradients[name].double() - true).abs()
        assert (error <= bounds).all(), (name, float((error / bounds).max()))
    value = outcome.terms.derivative.double().reshape(-1)
    expected = truth.terms if len(value) > 1 else truth.terms.sum()
    # 1 - cos moves by the gradient times what the logits' roundings move them by.
    moves = (bounds * (1 + problem.student_hidden[0].detach().abs().amax())).sum(-1)
    moves = moves.sum() if value.numel() == 1 else moves
    assert ((value - expected).abs() <= moves + 200 * unit * (1 + expected)).all()


def test_reference_is_the_formula_of_the_issue():
    """1 - sum w (d_s - mu_s)(d_t - mu_t) / sqrt(sum w (d_s - mu_s)^2 sum w (d_t - mu_t)^2)."""
    problem = random_problem(layers=2, dtype=F64)
    options = ALONE | {"output_in_dynamics": True, "temperature": 1.7, "reduction": "none"}
    got = evaluate(problem, fdd_loss_reference, **options)

    def plain(*, student_hidden, student_weight, teacher_hidden, teacher_weight, **_):
        (s1, s2), (t1, t2) = (
            [h @ weight.T / 1.7 for h in states]
            for states, weight in (
                (student_hidden, student_weight),
                (teacher_hidden, teacher_weight),
            )
        )
        w, d_s, d_t = t2.softmax(-1), s2 - s1, t2 - t1
        mu_s, mu_t = ((w * d).sum(-1, keepdim=True) for d in (d_s, d_t))
        product = (w * (d_s - mu_s) * (d_t - mu_t)).sum(-1)
        squares = [(w * (d - mu).square()).sum(-1) for d, mu in ((d_s, mu_s), (d_t, mu_t))]
        value = 1 - product / (squares[0] * squares[1]).sqrt()
        return got.terms._replace(loss=value, derivative=value)

    expected = evaluate(problem, plain, **options)
    torch.testing.assert_close(got.terms.derivative, expected.terms.derivative)
    for name, gradient in expected.gradients.items():
        torch.testing.assert_close(got.gradients[name], gradient)


# 1 - w_top from 0.5 to 1e-12 and to the end of float32's range
GAPS = [0.0, 3.0, 8.0, 16.0, 28.0, 45.0, 60.0]


@WITH_REDUCTION
@pytest.mark.parametrize("top", [0, pytest.param(31, marks=pytest.mark.slow), 59])
@pytest.mark.parametrize("gap", GAPS)
@pytest.mark.parametrize("near", [None, pytest.param(1e-2, marks=pytest.mark.slow), 1e-4])
def test_sharp_teachers(backend, gap, top, near, reduction):
    check_tokens(sharp(gap, top, near=near), backend, torch.float32, reduction=reduction)


@pytest.mark.parametrize("dense", [False, True], ids=["torch", "reference"])
@pytest.mark.parametrize("gap", [*GAPS, 200.0, 600.0])
def test_sharp_teachers_in_float64(gap, dense):
    chosen = "reference" if dense else "torch"
    for top in (0, 59):
        check_tokens(sharp(gap, top, near=1e-2), chosen, F64, reduction="none")


@pytest.mark.parametrize("temperature", [0.3, 2.0, 8.0])
def test_temperatures_of_the_weights(backend, temperature):
    for gap in (5.0, 18.0):
        check_tokens(sharp(gap, 20), backend, torch.float32, temperature, reduction="none")


@pytest.mark.parametrize(
    "top", [*[pytest.param(top, marks=pytest.mark.slow) for top in (0, 700, 2047)], 2048, 2999]
)
@pytest.mark.parametrize("gap", [pytest.param(4.0, marks=pytest.mark.slow), 35.0])
def test_the_likeliest_token_in_any_tile(backend, gap, top):
    problem = sharp(gap, top, columns=3000, rows=2)
    if backend == "triton":
        pytest.skip("interpreted, these take minutes")
    options = ALONE | {"reduction": "none"}
    outcome = evaluate(problem, backend=backend, **options)
    truth = evaluate(problem.to(F64), fdd_loss_reference, **options)
    bounds = token_bounds(problem, 1.0, unit_roundoff(torch.float32))
    for name in ("student_hidden[0]", "student_hidden[1]"):
        error = (outcome.gradients[name].double() - truth.gradients[name]).abs()
        assert (error <= bounds).all(), (name, float((error / bounds).max()))


def test_two_likely_tokens_of_equal_weight(backend):
    """No token has more than half the weight, and the two are far apart from all others."""
    problem = sharp(30.0, 7)
    problem.teacher_hidden[1][:, 40] = problem.teacher_hidden[1][:, 7]
    check_tokens(problem, backend, torch.float32, reduction="none")


@pytest.mark.trap("logits that overflow")
@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("gap", [68.0, 72.0, 76.0, 85.0, 90.0, 95.0, 100.0, 104.0, 300.0, 1e4])
def test_all_weight_on_one_token_by_underflow(backend, gap, reduction):
    """The term is right, or 1 with a gradient of 0; never NaN on the way there."""
    for top in (0, 59):
        problem = sharp(gap, top, near=1e-3)
        skip_what_triton_refuses(problem, backend, **ALONE)
        options = ALONE | {"reduction": reduction, "backend": backend}
        outcome = evaluate(problem, **options)
        for tensor in (*outcome.terms, *outcome.gradients.values()):
            assert tensor.isfinite().all()
        assert 0 <= outcome.terms.derivative.min() <= outcome.terms.derivative.max() <= 2
        if gap >= 85:
            assert (outcome.terms.derivative == 1).all()
            assert not any(gradient.any() for gradient in outcome.gradients.values())


@pytest.mark.parametrize("live", [0, 1, 2])
@pytest.mark.parametrize("dense", [False, True], ids=["", "reference"])
def test_few_tokens_that_are_not_excluded(backend, live, dense):
    """Without two live tokens the variance is 0: the term is 1 and has no gradient."""
    backend = "reference" if dense else backend
    problem = random_problem((4,), 40, bias="plain")
    problem.student_bias.data[: 20 - live] = -torch.inf
    problem.teacher_bias.data[20:] = -torch.inf
    options = ALONE | {"reduction": "none"}
    skip_what_triton_refuses(problem, backend, **options)
    outcome = evaluate(problem, backend=backend, **options)
    if live == 2:  # two tokens: the deltas are parallel, or opposite
        floors = value_floors(problem, **options).derivative
        if dense:  # 1 - cos as it stands: products, two sums, a root and a quotient of size 1
            floors = floors + 8 * unit_roundoff(torch.float32)
        derivative = outcome.terms.derivative
        assert (torch.minimum(derivative.abs(), (2 - derivative).abs()) <= floors).all()
        return
    assert (outcome.terms.derivative == 1).all()
    assert not any(gradient.any() for gradient in outcome.gradients.values())


@pytest.mark.trap("-inf logits from padded-vocabulary biases")
@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("weight", [0.0, 5.0, 40.0, 300.0])
def test_the_likeliest_token_is_excluded_by_one_model(backend, device, side, weight):
    """It is left out, and its logit does not make the others' weights underflow."""
    problem = random_problem((5,), 60, device=device, bias="plain", layers=4)
    getattr(problem, f"{side}_bias").data[[3, 30, 59]] = -torch.inf
    other = {"student": "teacher", "teacher": "student"}[side]
    getattr(problem, f"{other}_bias").data[[3, 59]] = weight
    options = {"derivative": "weighted_cosine", "trajectory": "mse", "output_kd_weight": 0.0}
    options |= {"reduction": "none", "output_in_dynamics": True, "alpha": 0.0}
    skip_what_triton_refuses(problem, backend, **options)
    outcome = evaluate(problem, backend=backend, **options)
    assert_within_budget(problem, outcome, **options)
    kept = [c for c in range(60) if c not in (3, 30, 59)]
    heads = ("student_weight", "student_bias", "teacher_weight", "teacher_bias")
    smaller = replace(problem, **{name: getattr(problem, name).detach()[kept] for name in heads})
    expected = evaluate(smaller.to(F64), fdd_loss_reference, **options).terms.derivative
    error = (outcome.terms.derivative.double() - expected).abs()
    assert (error <= value_floors(smaller, **options).derivative).all()


CASES = {
    "plain": ({"bias": "plain"}, {}),
    "with other requests": ({}, {"alpha": 1.0, "output_kd_weight": 0.5, "trajectory": "jsd:0.2"}),
    "padded": ({"bias": "padded"}, {"temperature": 0.7}),
    "nearly the same": ({"near": 1e-4}, {}),
    "close": ({"near": 1e-2}, {"derivative_temperature": 0.3}),
    "sharp": ({"spread": 50.0}, {}),
    "sharp and close": ({"spread": 20.0, "near": 1e-2}, {"derivative_temperature": 0.5}),
    "hot": ({"spread": 8.0}, {"derivative_temperature": 8.0}),
    "capped": ({}, {"student_softcap": 2.0, "teacher_softcap": 3.0, "student_logit_scale": 0.5}),
    "fewer tokens": ({}, {"vocab_size": 101, "output_in_dynamics": True}),
}


@pytest.mark.parametrize(
    "reduction", [pytest.param("none", marks=pytest.mark.slow), "sum"], ids=["streamed", "cached"]
)
@pytest.mark.parametrize(
    "dtype",
    [
        torch.float32,
        pytest.param(torch.bfloat16, marks=pytest.mark.slow),
        pytest.param(torch.float16, marks=pytest.mark.slow),
    ],
    ids=str,
)
@pytest.mark.parametrize("case", CASES)
def test_within_budget(backend, device, case, dtype, reduction):
    drawn, options = CASES[case]
    sizes = {"columns": 150, "student_width": 16, "teacher_width": 16, "layers": 4}
    problem = random_problem((2, 5), **sizes, device=device, dtype=dtype, mask=True, **drawn)
    options = ALONE | {"reduction": reduction} | options
    skip_what_triton_refuses(problem, backend, **options)
    outcome = evaluate(problem, backend=backend, **options)
    assert_within_budget(problem, outcome, **options)


@pytest.mark.trap("identical models")
@pytest.mark.parametrize("spread", [2.0, 30.0])
def test_identical_models(backend, device, spread):
    sizes = {"columns": 150, "student_width": 16, "teacher_width": 16, "layers": 4}
    problem = random_problem((6,), **sizes, device=device, near=0.0, spread=spread)
    options = ALONE | {"reduction": "none"}
    skip_what_triton_refuses(problem, backend, **options)
    outcome = evaluate(problem, backend=backend, **options)
    assert (outcome.terms.derivative.abs() <= value_floors(problem, **options).derivative).all()
    floors = gradient_floors(problem, exact(problem, **options), None, **options)
    for name, gradient in outcome.gradients.items():
        assert (row_norms(gradient) <= floors[name]).all(), name


@pytest.mark.parametrize("side", ["student", "teacher", "both"])
def test_equal_hidden_states(backend, device, side):
    problem = random_problem((6,), 50, 8, 12, layers=3, device=device)
    for model in ("student", "teacher"):
        if side in (model, "both"):
            first, _, last = getattr(problem, f"{model}_hidden")
            twin = first.detach().clone().requires_grad_(model == "student")
            problem = replace(problem, **{f"{model}_hidden": (first, twin, last)})
    skip_what_triton_refuses(problem, backend, **ALONE)
    for reduction in ("none", "mean"):
        outcome = evaluate(problem, backend=backend, reduction=reduction, **ALONE)
        assert (outcome.terms.derivative == 1).all()
        assert not any(gradient.any() for gradient in outcome.gradients.values())
