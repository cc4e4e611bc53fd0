"""Accuracy of every backend in hard cases for float32, per row, against float64.

The budgets of fdd_kernels.testing are twice the error of the dense computation with float32 logits
plus a derived floor. The last tests show that budgets are narrow enough to catch the mistakes they
are for.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from fdd_kernels import fdd_loss_reference, fused_fdd_loss
from fdd_kernels.backends import why_unavailable
from fdd_kernels.lens.divergences import DERIVATIVES, DIVERGENCES, TRAJECTORIES
from fdd_kernels.testing import (
    Problem,
    assert_within_budget,
    beyond_budget,
    budgets,
    evaluate,
    exact,
    excesses,
    random_problem,
    unit_roundoff,
)

DTYPES = pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)],
    ids=str,
)
BIG = {"leading": (24,), "columns": 1111, "student_width": 48, "teacher_width": 80, "layers": 4}
SAME_WIDTHS = BIG | {"teacher_width": 48}


def check(problem: Problem, backend: str, **options) -> None:
    upstream = torch.linspace(-1, 2, math.prod(problem.leading_shape)).reshape(
        problem.leading_shape
    )
    upstream = upstream.to(problem.student_weight.device)
    outcome = evaluate(
        problem, fused_fdd_loss, upstream, backend=backend, reduction="none", **options
    )
    assert_within_budget(problem, outcome, upstream, reduction="none", **options)


@DTYPES
@pytest.mark.parametrize("trajectory", ["kl", "reverse_kl", "jsd", "skew_kl", "mse", "cosine"])
def test_dtypes(backend, device, dtype, trajectory):
    problem = random_problem(**BIG, dtype=dtype, device=device, labels=True, bias="plain")
    check(problem, backend, trajectory=trajectory, ce_weight=0.5)


@DTYPES
@pytest.mark.parametrize("derivative", ["cosine", "centered_cosine", "mse"])
def test_derivatives(backend, device, dtype, derivative):
    check(
        random_problem(**BIG, dtype=dtype, device=device),
        backend,
        derivative=derivative,
        output_in_dynamics=True,
    )


@DTYPES
def test_feature_space(backend, device, dtype):
    problem = random_problem(
        **BIG | {"columns": 80}, dtype=dtype, device=device, feature_space=True
    )
    check(problem, backend, trajectory="mse", derivative="cosine")
    check(problem, backend, trajectory="cosine", derivative="mse")


def test_feature_space_with_a_common_offset(backend, device):
    """Features of mean 100: centred distances see their spread alone."""
    problem = random_problem(**BIG | {"columns": 80}, device=device, feature_space=True)
    offset = 100 * torch.arange(1, 5, device=device)
    problem = replace(
        problem,
        teacher_hidden=tuple([h + o for h, o in zip(problem.teacher_hidden, offset)]),
        student_bias=torch.full((80,), 50.0, device=device),
    )
    check(problem, backend, trajectory="mse", derivative="centered_cosine")


@pytest.mark.trap("bf16 logits rounded before the softmax")
@pytest.mark.parametrize(
    "near",
    [pytest.param(1e-1, marks=pytest.mark.slow), 1e-2, pytest.param(1e-3, marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("trajectory", ["kl", "reverse_kl", "jsd", "skew_kl"])
@DTYPES
def test_models_that_nearly_agree(backend, device, dtype, trajectory, near):
    problem = random_problem(**SAME_WIDTHS, dtype=dtype, device=device, near=near)
    check(problem, backend, trajectory=trajectory, derivative="cosine")


@pytest.mark.trap("huge log-sum-exp shifts")
@DTYPES
@pytest.mark.parametrize("offset", [1e2, 1e4])
def test_huge_common_shift_of_the_logits(backend, device, dtype, offset):
    """A bias of 1e4 in every column: log-sum-exps are huge, and all differences are as they
    were.
    """
    problem = random_problem(**BIG, dtype=dtype, device=device, bias="plain")
    problem = replace(
        problem,
        student_bias=torch.full_like(problem.student_bias, offset).requires_grad_(),
        teacher_bias=torch.full_like(problem.teacher_bias, -offset),
    )
    check(problem, backend, trajectory="jsd", ce_weight=0.0)


@DTYPES
def test_layers_with_very_different_log_sum_exps(backend, device, dtype):
    """Shift all logits alike, by hundreds, differently for each layer.

    The common part of a delta is then far larger than its spread. It cancels when deltas are
    centred, or through the log-sum-exp.
    """
    problem = random_problem(**BIG, dtype=dtype, device=device)

    def with_direction(hidden, weight, size):
        ones = torch.ones_like(weight[:, :1])
        steps = [torch.full_like(h[..., :1], size * (i + 1)) for i, h in enumerate(hidden)]
        grown = [
            torch.cat([h.detach(), s], -1).requires_grad_(h.requires_grad)
            for h, s in zip(hidden, steps)
        ]
        return tuple(grown), torch.cat([weight.detach(), ones], -1).requires_grad_(
            weight.requires_grad
        )

    student_hidden, student_weight = with_direction(
        problem.student_hidden, problem.student_weight, 256.0
    )
    teacher_hidden, teacher_weight = with_direction(
        problem.teacher_hidden, problem.teacher_weight, -512.0
    )
    problem = replace(
        problem,
        student_hidden=student_hidden,
        student_weight=student_weight,
        teacher_hidden=teacher_hidden,
        teacher_weight=teacher_weight,
    )
    check(problem, backend, derivative="cosine")
    check(problem, backend, derivative="centered_cosine")
    check(problem, backend, derivative="mse")


@pytest.mark.trap("-inf logits from padded-vocabulary biases")
@DTYPES
@pytest.mark.parametrize(
    "trajectory",
    [
        *["kl", "jsd", "cosine"],
        *[pytest.param(t, marks=pytest.mark.slow) for t in ("reverse_kl", "skew_kl", "mse")],
    ],
)
def test_columns_of_minus_infinity(backend, device, dtype, trajectory):
    problem = random_problem(**BIG, dtype=dtype, device=device, bias="padded", labels=True)
    check(problem, backend, trajectory=trajectory, derivative="cosine", ce_weight=0.5)
    check(problem, backend, trajectory=trajectory, derivative="centered_cosine")


def test_a_column_tile_of_nothing_but_minus_infinity(backend, device):
    """The columns before the live ones are dead too: the first tile has no finite logit at all."""
    problem = random_problem((5,), 2500, device=device, bias="plain", layers=3)
    for bias in (problem.student_bias, problem.teacher_bias):
        bias.data[:2490] = -torch.inf
    check(problem, backend)
    check(problem, backend, trajectory="jsd", derivative="centered_cosine")


@pytest.mark.slow
@pytest.mark.parametrize("trajectory", ["kl", "reverse_kl", "jsd", "skew_kl", "mse", "cosine"])
def test_a_sharp_teacher(backend, device, trajectory):
    """Logits of standard deviation 40: nearly all probabilities underflow."""
    check(random_problem(**BIG, device=device, spread=40.0), backend, trajectory=trajectory)


@pytest.mark.trap("logits that overflow")
@pytest.mark.parametrize(
    "temperature",
    [0.1, 3.0, *[pytest.param(t, marks=pytest.mark.slow) for t in (0.3, 10.0)]],
)
@pytest.mark.parametrize(
    ("spread", "near", "dtype"),
    [
        (10, 0.1, torch.float32),
        (40, 0.1, torch.float32),
        (100, 0.01, torch.bfloat16),
        (1000, None, torch.float32),
    ],
    ids=str,
)
def test_confident_models_at_any_temperature(backend, device, temperature, spread, near, dtype):
    """Logits / temperature up to 10^5 with a maximum far from the first tile: needs each row's
    own shift.
    """
    problem = random_problem(
        (12,), 200, 48, 48, 3, spread=spread, near=near, dtype=dtype, device=device
    )
    for trajectory in DIVERGENCES:
        check(
            problem,
            backend,
            trajectory=trajectory,
            temperature=temperature,
            output_temperature=temperature,
        )


def test_two_certain_models_have_no_gradient(backend, device):
    """One row, both certain of a column beyond the first ones: e^-317 is 0, and so is p - q."""
    eye = torch.eye(200, device=device)
    student, teacher = (torch.zeros(1, 200, device=device) for _ in range(2))
    student[0, 150], teacher[0, 150] = 33.3, 31.7
    student.requires_grad_()
    fused_fdd_loss(student, eye, teacher, eye, output_temperature=0.1, backend=backend).backward()
    assert not student.grad.any()


# Triton's one-pass kernels sum the plain form.
@pytest.mark.parametrize("of", ["cpu", "torch", "reference"])
@pytest.mark.parametrize("trajectory", list(DIVERGENCES))
@pytest.mark.parametrize(("near", "most"), [(3e-2, 2e-4), (3e-3, 2e-3), (3e-4, 2e-2)])
def test_value_of_models_that_nearly_agree(of, trajectory, near, most):
    """Relative errors at KL of about 3e-5, 3e-7 and 3e-9: the plain sum's were 1e-2, 1 and more,
    with values below 0.
    """
    if why_unavailable(of, torch.device("cpu")):
        pytest.skip("not built")
    problem = random_problem((8,), 4000, 32, 32, 2, near=None, spread=1.0)
    noise = torch.randn(4000, 32, generator=torch.Generator().manual_seed(1))
    teacher_weight = problem.student_weight.detach() + near * noise / math.sqrt(32) / 4
    problem = replace(
        problem,
        teacher_weight=teacher_weight,
        teacher_hidden=tuple(h.detach() for h in problem.student_hidden),
    )
    options = {"trajectory": trajectory, "reduction": "none", "beta": 0.0}
    terms, truth = evaluate(problem, backend=of, **options).terms, exact(problem, **options).terms
    for name in ("trajectory", "output_kd"):
        got, true = getattr(terms, name).double(), getattr(truth, name)
        assert (got >= 0).all()
        if (name, trajectory) == ("trajectory", "tv"):  # of first order, the others of second
            assert 1e-5 < true.mean() < 1e-2
        else:
            assert 1e-10 < true.mean() < 1e-4
        assert ((got - true).abs() / true).max() < most, name


@pytest.mark.parametrize("where", ["student", "teacher"])
@pytest.mark.parametrize("of", ["cpu", "torch", "reference"])
@pytest.mark.parametrize("trajectory", [*TRAJECTORIES, None])
@pytest.mark.parametrize("derivative", DERIVATIVES)
def test_nan_stays_nan(of, where, trajectory, derivative):
    """A NaN in a row's states gives NaN in its loss, whichever terms are on; other rows stay
    finite.
    """
    if why_unavailable(of, torch.device("cpu")):
        pytest.skip("not built")
    problem = random_problem((5,), 150, 8, 12, 3, bias="padded")
    getattr(problem, f"{where}_hidden")[1].data[2, 3] = torch.nan
    options = {"output_kd_weight": 0.0, "derivative": derivative, "reduction": "none"}
    options |= {"alpha": 0.0} if trajectory is None else {"trajectory": trajectory, "beta": 0.0}
    outcome = evaluate(problem, backend=of, **options)
    assert outcome.terms.loss.isnan().tolist() == [False, False, True, False, False]
    assert outcome.gradients["student_hidden[1]"][2].isnan().all()


@pytest.mark.trap("identical models")
@DTYPES
@pytest.mark.parametrize("trajectory", ["kl", "reverse_kl", "jsd", "skew_kl", "mse", "cosine"])
@pytest.mark.parametrize("derivative", ["cosine", "centered_cosine", "mse"])
def test_identical_models(backend, device, dtype, trajectory, derivative):
    """Every term and gradient is 0 up to the rounding of cancelling sums."""
    problem = random_problem(**SAME_WIDTHS, dtype=dtype, device=device, near=0.0)
    outcome = evaluate(
        problem, backend=backend, trajectory=trajectory, derivative=derivative, reduction="none"
    )
    unit = unit_roundoff(torch.float32)
    # KL: log-sum-exps of size log C + the shift. 1 - cos of vectors equal up to rounding: the
    # square of the rounding, plus u.
    for name, term in outcome.terms._asdict().items():
        assert term.abs().max() <= unit * (math.sqrt(1111) + math.log(1111) + 4) * 4, name
    # (p - q) W with p and q equal up to the same relative error, over a head of rows of length
    # about `spread`, by 2-norms.
    relative = unit * (math.sqrt(1111) + math.sqrt(48) + 4) * 4
    size = float(problem.student_weight.detach().float().norm())
    for name, gradient in outcome.gradients.items():
        assert gradient.float().abs().max() <= relative * size, name


@pytest.mark.trap("identical models")
@pytest.mark.parametrize("derivative", ["cosine", "centered_cosine", "mse"])
@pytest.mark.parametrize("side", ["student", "teacher", "both"])
def test_static_layers(backend, device, derivative, side):
    """A model whose sampled layers are the same has deltas of length 0: cosine 0, distance 1, no
    gradient, no NaN.
    """
    problem = random_problem((6,), 50, 8, 12, layers=3, device=device)
    for model in ("student", "teacher"):
        if side in (model, "both"):
            first, _, last = getattr(problem, f"{model}_hidden")
            twin = first.detach().clone().requires_grad_(model == "student")
            problem = replace(problem, **{f"{model}_hidden": (first, twin, last)})
    options = {"alpha": 0.0, "output_kd_weight": 0.0, "derivative": derivative, "reduction": "none"}
    outcome = evaluate(problem, backend=backend, **options)
    truth = exact(problem, **options)
    if derivative == "mse":
        # The squared difference of deltas, one or both of them 0: budgets as everywhere.
        assert_within_budget(problem, outcome, **options)
        return
    assert (outcome.terms.derivative == 1).all()
    assert (truth.terms.derivative == 1).all()
    for name, gradient in outcome.gradients.items():
        assert not gradient.any(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_static_layers_of_any_shape(backend, dtype):
    """Equal states in other memory, whose logits round differently in a stacked GEMM: still no
    length, no gradient.
    """
    options = {
        "alpha": 0.0,
        "output_kd_weight": 0.0,
        "reduction": "none",
        "backend": backend,
        "temperature": 0.9,
    }
    for rows in (1, 2, 7):
        for columns in (5, 67, 128) if backend != "triton" else (67,):
            for width in (3, 16, 67) if backend != "triton" else (16,):
                problem = random_problem((rows,), columns, width, width, 3, dtype=dtype)
                first, _, last = problem.student_hidden
                twin = first.detach().clone().requires_grad_()
                problem = replace(problem, student_hidden=(first, twin, last))
                outcome = evaluate(problem, **options)
                assert (outcome.terms.derivative == 1).all()
                assert not any(gradient.any() for gradient in outcome.gradients.values())


@pytest.mark.parametrize("derivative", ["cosine", "centered_cosine"])
def test_a_head_of_zeros_has_no_deltas(backend, derivative):
    """As it may be initialised: all layers have the same logits, the bias, though their states
    differ.
    """
    problem = random_problem((4,), 150, 8, 12, 4, bias="plain", spread=0.0)
    options = {
        "derivative": derivative,
        "reduction": "none",
        "backend": backend,
        "temperature": 0.9,
        "alpha": 0.0,
    }
    outcome = evaluate(problem, output_kd_weight=0.0, **options)
    assert (outcome.terms.derivative == 1).all()
    assert not any(gradient.any() for gradient in outcome.gradients.values())


# Budgets are narrow.


def rounded_logits(bits_of: torch.dtype):
    """Return the dense loss with logits rounded to 16 bits, as a GEMM with 16-bit output gives
    them.
    """

    def loss(*, student_hidden, student_weight, teacher_hidden, teacher_weight, **keywords):
        def logits(hidden, weight):
            return tuple([(h @ weight.T).to(bits_of).float() for h in hidden])

        eye = torch.eye(len(student_weight), device=student_weight.device)
        student, teacher = (
            logits(student_hidden, student_weight),
            logits(teacher_hidden, teacher_weight),
        )
        return fdd_loss_reference(student, eye, teacher, eye, **keywords)

    return loss


@pytest.mark.trap("bf16 logits rounded before the softmax")
@pytest.mark.parametrize("bits_of", [torch.bfloat16, torch.float16], ids=str)
def test_budget_catches_rounded_logits(bits_of):
    problem = random_problem((24,), 400, 48, 48, layers=3, near=1e-2)
    caught = excesses(problem, evaluate(problem, rounded_logits(bits_of)))
    if bits_of is torch.bfloat16:  # a value moves by the square of its gradient's change
        assert caught["trajectory"].fraction > 1
    for name in ("student_hidden[0]", "student_hidden[1]", "student_hidden[2]", "student_weight"):
        assert caught[name].fraction > 10, name


@pytest.mark.parametrize("factor", [1 + 1e-3, 1 - 1e-3])
def test_budget_catches_a_gradient_off_by_a_thousandth(factor):
    problem = random_problem(**BIG, bias="plain")
    outcome = evaluate(problem, backend="reference")
    wrong = {name: g * factor for name, g in outcome.gradients.items()}
    for name, excess in excesses(problem, outcome._replace(gradients=wrong)).items():
        if name in wrong:
            assert excess.fraction > 1, name


def test_budget_catches_one_wrong_row():
    problem = random_problem(**BIG)
    outcome = evaluate(problem, backend="reference")
    outcome.gradients["student_weight"][17] *= 1.01
    caught = {name for name, excess in excesses(problem, outcome).items() if excess.fraction > 1}
    assert caught == {"student_weight"}
    assert excesses(problem, outcome)["student_weight"].at == 17


def test_a_budget_that_is_not_a_number_is_exceeded(monkeypatch):
    """Or a fault of the budget would hide one of the outcome."""
    problem = random_problem((2,), 20, 8, 8, layers=2)
    outcome = evaluate(problem, backend="reference")
    outcome.gradients["student_weight"][3] *= 1.01
    nothing = {name: torch.tensor(torch.nan) for name in outcome.gradients}
    monkeypatch.setattr(budgets, "gradient_floors", lambda *args, **options: nothing)
    found = beyond_budget(problem, outcome)
    assert {name: excess.fraction for name, excess in found.items()} == {"student_weight": math.inf}


@pytest.mark.parametrize("scale", [1.0, 0.1, 1e-3])
@pytest.mark.parametrize("most", [0.5, 1.0, 2.0])
def test_the_first_parts_of_a_budget_decide_as_all_of_it(scale, most):
    """Errors of every size, from rounding to a thousandth, in one tensor each."""
    problem = random_problem((6,), 200, 16, 16, near=1e-2)
    outcome = evaluate(problem, backend="reference")
    sizes = torch.logspace(-8, -3, len(outcome.gradients)) * scale
    wrong = {n: g * (1 + float(x)) for (n, g), x in zip(outcome.gradients.items(), sizes)}
    outcome = outcome._replace(gradients=wrong)
    above = {n: e for n, e in excesses(problem, outcome).items() if not e.fraction <= most}
    assert beyond_budget(problem, outcome, most=most) == above


@pytest.mark.trap("fixed tolerances that check nothing")
def test_budgets_scale_with_the_problem():
    """A loss a thousand times smaller is checked to a thousand times smaller errors."""
    problem = random_problem((6,), 50, 8, 8)
    for weight in (1.0, 1e-3, 1e-6):
        options = {"alpha": weight, "beta": weight, "output_kd_weight": weight}
        outcome = evaluate(problem, backend="reference", **options)
        wrong = outcome._replace(gradients={n: g * 1.01 for n, g in outcome.gradients.items()})
        assert (
            min(
                e.fraction
                for n, e in excesses(problem, wrong, **options).items()
                if n in wrong.gradients
            )
            > 1
        )
        right = excesses(problem, outcome, **options)
        assert max(e.fraction for e in right.values()) <= 1
