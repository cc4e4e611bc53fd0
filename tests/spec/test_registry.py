"""The recipes of CONTRIBUTING.md: a divergence and a distance that are registered at run time."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fdd_kernels import FusedFDDLoss, fdd_loss_reference, fused_fdd_loss
from fdd_kernels.backends import BACKENDS, check_spec, why_unavailable
from fdd_kernels.lens import divergences
from fdd_kernels.lens.distances import DISTANCES, Distance
from fdd_kernels.lens.divergences import DIVERGENCES, Divergence, Parameter
from fdd_kernels.lens.spec import LensSpec, Request
from fdd_kernels.testing import (
    assert_same_sums,
    assert_within_budget,
    evaluate,
    random_problem,
    value_floors,
)

CPU = torch.device("cpu")


def hellinger(log_q, log_p, weight):
    return weight * (torch.exp(log_p / 2) - torch.exp(log_q / 2)).square()


def hellinger_grad(log_q, log_p, weight):
    return weight * (log_q.exp() - torch.exp((log_p + log_q) / 2))


def root_mean_square(sums):
    return (sums.difference / sums.count).sqrt()


def write_root_mean_square_grad(sums, of_ss, of_st, of_dd):
    torch.rsqrt(4 * sums.difference * sums.count, out=of_dd)


@pytest.fixture
def registered(monkeypatch):
    """A divergence with a parameter and a distance, as a user of the package would add them."""
    entry = Divergence(hellinger, hellinger_grad, parameters=(Parameter("weight", 3.0),))
    monkeypatch.setitem(DIVERGENCES, "hellinger", entry)
    entry = Distance(root_mean_square, write_root_mean_square_grad, of_features=True)
    monkeypatch.setitem(DISTANCES, "rms", entry)


def agree(problem, backend, **options) -> None:
    """Compare terms and gradients with the reference, which differentiates `value`."""
    got = evaluate(problem, fused_fdd_loss, backend=backend, **options)
    expected = evaluate(problem, fdd_loss_reference, **options)
    additions = problem.student_weight.numel() + len(problem.student_hidden[0])
    for name, a, b in zip(got.terms._fields, got.terms, expected.terms):
        assert_same_sums(a, b, additions, name)
    for name, gradient in expected.gradients.items():
        assert gradient.abs().max() > 0
        assert_same_sums(got.gradients[name], gradient, additions, name)


@pytest.mark.parametrize("feature_space", [False, True])
def test_a_registered_entry_is_all_that_it_takes(registered, feature_space):
    """Both on the backend "torch"; the distance on every backend, since no kernel knows it."""
    options = {"derivative": "rms", "trajectory": "rms" if feature_space else "hellinger"}
    options["output_in_dynamics"] = True
    problem = random_problem(
        (6,), 40, 8, 5, layers=4, dtype=torch.float64, feature_space=feature_space
    )
    agree(problem, "torch", **options)
    if not feature_space:
        options["trajectory"] = "kl"
    others = [name for name in BACKENDS if why_unavailable(name, CPU) is None]
    narrow = random_problem((6,), 40, 8, 5, layers=4, feature_space=feature_space)
    expected = evaluate(narrow.to(torch.float64), fdd_loss_reference, **options)
    for backend in others:
        found = evaluate(narrow, fused_fdd_loss, backend=backend, **options)
        for a, b in zip(found.terms, expected.terms):
            torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-6)


def test_budgets_take_parameters_and_properties_from_the_registries(registered):
    """An entry's defaults reach `value` and `grad`; a distance without direction is no cosine."""
    options = {"trajectory": "hellinger", "derivative": "rms"}
    problem = random_problem((6,), 40, 8, 5, layers=4)
    got = evaluate(problem, fused_fdd_loss, backend="torch", **options)
    assert_within_budget(problem, got, **options)
    options["output_kd_weight"] = options["alpha"] = 0.0
    floor = value_floors(problem, **options).derivative
    DISTANCES["rms"] = replace(DISTANCES["rms"], directional=True)
    assert value_floors(problem, **options).derivative > floor


def test_kernels_without_a_divergence_refuse_it_by_name(registered):
    spec = LensSpec(40, (Request(0, 0, 1.0, "hellinger", (3.0,)),), (), 1.0, None, 1.0, None)
    for backend in ("cpu", "triton"):
        with pytest.raises(
            ValueError,
            match=f'backend="{backend}" cannot compute this: .*hellinger.*'
            "Backends that can: reference, torch",
        ):
            check_spec(backend, spec)
    check_spec("torch", spec)
    check_spec("reference", spec)
    if why_unavailable("cpu", CPU) is None:
        arguments = random_problem((6,), 40, 8, 5).arguments
        with pytest.raises(ValueError, match=r'backend="cpu" cannot compute this: .*hellinger'):
            fused_fdd_loss(**arguments, trajectory="hellinger", backend="cpu")


@pytest.mark.parametrize("of", list(BACKENDS))
@pytest.mark.parametrize("name", list(DIVERGENCES))
def test_every_backend_has_every_divergence(of, name):
    """With the default parameters, and with others if it has any."""
    defaults = DIVERGENCES[name].defaults
    for parameters in {defaults, tuple([x / 2 for x in defaults])}:
        request = Request(0, 0, 1.0, name, parameters)
        check_spec(of, LensSpec(40, (request,), (), 1.0, None, 1.0, None))


def test_names_follow_the_registries(registered):
    assert {"hellinger", "rms"} <= set(divergences.TRAJECTORIES)
    assert "rms" in divergences.DERIVATIVES
    assert "rms" in divergences.FEATURE_DISTANCES
    assert "centered_cosine" not in divergences.TRAJECTORIES
    with pytest.raises(ValueError, match="hellinger"):  # the names to choose from
        FusedFDDLoss(trajectory="no such")
    with pytest.raises(ValueError, match="rms"):
        FusedFDDLoss(derivative="no such")
