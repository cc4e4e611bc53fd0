"""Split the vocabulary into parts, one thread a rank: merged statistics and gradients against
float64.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fdd_kernels.engine.shards import merge_statistics
from fdd_kernels.lens.divergences import DERIVATIVES, DIVERGENCES, TRAJECTORIES, needs_second_pass
from fdd_kernels.lens.layout import COUNT, LSE_S, LSE_T, MEAN_S, MOMENT_STATS, VALUE
from fdd_kernels.lens.spec import Layers, LensSpec, PairMoments, Request
from fdd_kernels.testing import (
    Problem,
    assert_same_sums,
    assert_within_budget,
    evaluate,
    random_problem,
)
from tests.support.options import skip_what_triton_refuses
from tests.support.strategies import calls
from tests.support.vocab_threads import in_parts

RAGGED = (0, 1, 17, 18, 37)


def check(problem: Problem, bounds=RAGGED, **options) -> None:
    outcome, _ = in_parts(problem, bounds, **options)
    assert_within_budget(problem, outcome, **options)


@pytest.mark.parametrize("derivative", [*DERIVATIVES, None])
@pytest.mark.parametrize("trajectory", TRAJECTORIES)
def test_float64_sums_agree(trajectory, derivative):
    """The same sums in another order: no digit is lost by taking them in parts."""
    problem = random_problem(dtype=torch.float64, labels=True, mask=True, bias="padded", layers=4)
    options = {
        "trajectory": trajectory,
        "derivative": derivative,
        "ce_weight": 0.5,
        "temperature": 2.0,
        "backend": "torch",
    }
    whole = evaluate(problem, **options)
    outcome, _ = in_parts(problem, RAGGED, **options)
    terms = problem.student_weight.numel() * 10
    for name, a, b in zip(whole.terms._fields, outcome.terms, whole.terms):
        assert_same_sums(a, b, terms, name)
    for name, gradient in whole.gradients.items():
        assert_same_sums(outcome.gradients[name], gradient, terms, name)


@pytest.mark.parametrize("trajectory", TRAJECTORIES)
def test_float32_is_within_the_budget_of_one_process(backend, trajectory):
    problem = random_problem(labels=True, bias="padded", layers=4)
    check(problem, backend=backend, trajectory=trajectory, ce_weight=0.5)


@pytest.mark.parametrize(
    "options",
    [
        {"trajectory": "jsd:0.2", "output_divergence": "alpha_beta:0.3,0.9"},
        {"trajectory": "tv", "output_divergence": "skew_reverse_kl:0.4", "layer_weights": (2, 0)},
        {"teacher_mix": 0.0, "derivative": "centered_cosine"},
        {"teacher_mix": 0.6, "temperature": 2.0, "output_in_dynamics": True},
        {"derivative": "weighted_cosine", "derivative_temperature": 0.3},
    ],
    ids=lambda options: ",".join(options),
)
@pytest.mark.parametrize("drawn", [{}, {"spread": 20.0}, {"near": 1e-3}], ids=str)
def test_options(backend, options, drawn):
    problem = random_problem((2, 9), labels=True, bias="plain", token_weights=True, **drawn)
    skip_what_triton_refuses(problem, backend, **options)
    check(problem, backend=backend, ce_weight=0.5, **options)


@pytest.mark.parametrize("top", [0, 1, 17, 36])
@pytest.mark.parametrize("gap", [5.0, 20.0, 45.0])
def test_the_likeliest_token_in_any_part(backend, gap, top):
    """Of the weights of the weighted cosine; with another part that has no weight to speak of."""
    problem = random_problem(bias="plain", layers=4)
    problem.teacher_bias[top] += gap
    options = {"derivative": "weighted_cosine", "alpha": 0.0, "output_kd_weight": 0.0}
    skip_what_triton_refuses(problem, backend, **options)
    check(problem, backend=backend, **options)


@pytest.mark.parametrize("side", ["student", "teacher", "both"])
@pytest.mark.parametrize(
    "options",
    [
        {"derivative": "weighted_cosine", "alpha": 0.0, "output_kd_weight": 0.0},
        {"teacher_mix": 0.5, "beta": 0.0},
        {"trajectory": "jsd:0.3", "output_divergence": "tv", "beta": 0.0},
    ],
    ids=lambda options: ",".join(options),
)
def test_a_part_of_excluded_tokens_alone(backend, options, side):
    problem = random_problem(bias="plain", layers=4)
    for model in ("student", "teacher"):
        if side in (model, "both"):
            getattr(problem, f"{model}_bias").data[17:] = -torch.inf
    if side == "student" and "teacher_mix" not in options:
        options = options | {"trajectory": "jsd:0.3"}
    skip_what_triton_refuses(problem, backend, **options)
    check(problem, backend=backend, **options)
    check(problem, (0, 17, 37), backend=backend, **options)


def test_no_token_has_a_weight(backend):
    problem = random_problem(token_weights=True)
    problem.token_weights.zero_()
    outcome, _ = in_parts(problem, RAGGED, backend=backend)
    for tensor in (*outcome.terms, *outcome.gradients.values()):
        assert not tensor.any()


@pytest.mark.parametrize("trajectory", ["kl", "reverse_kl", "jsd"])
def test_models_that_nearly_agree(backend, trajectory):
    check(random_problem(near=1e-3), backend=backend, trajectory=trajectory)


@pytest.mark.parametrize(
    "offsets", [(0.0, 1e4, -1e4, 30.0), (-1e4, -1e4, 0.0, -1e4), (50.0, 0.0, 0.0, 0.0)]
)
def test_parts_far_apart(backend, offsets):
    """Shifts that differ by 1e4: most parts then have no probability left, and deltas still use
    all of them.
    """
    problem = random_problem(bias="plain", labels=True)
    far = torch.cat([torch.full((b - a,), o) for a, b, o in zip(RAGGED, RAGGED[1:], offsets)])
    problem = replace(
        problem,
        student_bias=(problem.student_bias.detach() + far).requires_grad_(),
        teacher_bias=problem.teacher_bias + far,
    )
    check(problem, backend=backend, ce_weight=0.5)
    check(problem, backend=backend, trajectory="reverse_kl", derivative="mse")


@pytest.mark.parametrize("trajectory", list(DIVERGENCES))
def test_a_part_without_a_finite_column(backend, trajectory):
    problem = random_problem(bias="plain", labels=True, seed=3)
    dead = slice(17, 37)
    biases = [
        b.detach().index_fill(0, torch.arange(37)[dead], -torch.inf)
        for b in (problem.student_bias, problem.teacher_bias)
    ]
    alive = problem.labels.where(problem.labels < 17, 5)
    problem = replace(
        problem, student_bias=biases[0].requires_grad_(), teacher_bias=biases[1], labels=alive
    )
    check(problem, backend=backend, trajectory=trajectory, ce_weight=0.5)


def test_a_part_that_is_possible_for_the_teacher_alone():
    """KL is infinite, as for one process; the other way round it is not."""
    problem = random_problem(bias="plain", dtype=torch.float64, layers=1)
    problem = replace(
        problem,
        student_bias=problem.student_bias.detach().index_fill(0, torch.arange(17, 37), -torch.inf),
    )
    outcome, _ = in_parts(problem, RAGGED, backend="torch")
    assert outcome.terms.output_kd == torch.inf
    options = {
        "trajectory": "reverse_kl",
        "output_kd_weight": 0.0,
        "output_in_dynamics": True,
        "backend": "torch",
    }
    whole, (parts, _) = evaluate(problem, **options), in_parts(problem, RAGGED, **options)
    assert_same_sums(parts.terms.loss, whole.terms.loss, 400)
    for name, gradient in whole.gradients.items():
        assert_same_sums(parts.gradients[name], gradient, 400, name)


def test_a_part_without_a_finite_column_does_not_move_the_shift():
    """Its shift is 0 because there is none: taken for real, it would cost numbers around -1e4 their
    digits.
    """
    spec = LensSpec(
        8,
        (Request(0, 0, 1.0, "kl"),),
        (PairMoments(None, Layers(0, 0)),),
        1.0,
        None,
        1.0,
        None,
    )
    shifts = torch.tensor([[-1e4, -2e4], [0.0, 0.0]]).view(2, 2, 1, 1)
    requests, moments = torch.zeros(2, 1, 3, 1), torch.zeros(2, 1, MOMENT_STATS, 1)
    requests[0, 0, :, 0] = torch.tensor([0.5, 0.25, 0.125])
    requests[1, 0, :, 0] = torch.tensor([-torch.inf, -torch.inf, torch.nan])
    moments[0, 0, [COUNT, MEAN_S], 0] = torch.tensor([4.0, -0.75])
    common, request, moment = merge_statistics(spec, shifts, requests, moments)
    assert common.flatten().tolist() == [-1e4, -2e4]
    assert request[0, [LSE_S, LSE_T, VALUE], 0].tolist() == [0.5, 0.25, 0.125]
    assert moment[0, [COUNT, MEAN_S], 0].tolist() == [4.0, -0.75]


@st.composite
def calls_in_parts(draw):
    problem, options, upstream = draw(calls())
    # in 16 bits each share is rounded: see test_vocab_parallel.py
    problem = problem.to(torch.float32)
    if options["reduction"] == "none":
        options, upstream = options | {"reduction": "mean"}, torch.tensor(1.5)
    columns = min(options.get("vocab_size", math.inf), len(problem.student_weight))
    for name in ("trajectory", "output_divergence") if columns == 1 else ():
        if needs_second_pass(options[name].partition(":")[0]):
            # With one token every divergence is exactly 0, and its budget too; their second pass
            # has GEMMs of its own.
            options[name] = "kl"
    cuts = draw(st.sets(st.integers(1, columns - 1), max_size=4)) if columns > 1 else ()
    return problem, options, upstream, (0, *sorted(cuts), columns)


@settings(max_examples=25)
@given(call=calls_in_parts())
def test_any_call(backend, call):
    problem, options, upstream, bounds = call
    outcome, _ = in_parts(problem, bounds, float(upstream), backend=backend, **options)
    assert_within_budget(problem, outcome, upstream, **options)
