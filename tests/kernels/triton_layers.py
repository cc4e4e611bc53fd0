"""Teacher layers of the Triton backend, and specs that it refuses; run by
tests/kernels/test_triton_interpreter.py with TRITON_INTERPRET=1.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fdd_kernels import fused_fdd_loss, layer_costs
from fdd_kernels.backends import BACKENDS, check_spec
from fdd_kernels.backends.triton import config, strategy
from fdd_kernels.lens.divergences import DIVERGENCES
from fdd_kernels.lens.inputs import LensInputs
from fdd_kernels.lens.layout import (
    COUNT,
    GRAD_SUM,
    LSE_T,
    M_DD,
    M_SS,
    M_ST,
    M_TT,
    MEAN_S,
    MEAN_T,
    MOMENT_STATS,
    REQUEST_STATS,
    Statistics,
)
from fdd_kernels.lens.spec import (
    NLL,
    Layers,
    LensSpec,
    PairMoments,
    Request,
    of_pair,
    of_request,
)
from fdd_kernels.testing import assert_within_budget, evaluate, random_problem

TOKENS = config.INTERPRETED_ROW_LAUNCH.block  # of a tile


@pytest.fixture(params=strategy.STRATEGIES[1:])
def named(request, monkeypatch):
    """Each strategy, with slabs of one tile."""
    monkeypatch.setattr(strategy, "SLAB_TOKENS", TOKENS)
    monkeypatch.setenv(strategy.STRATEGY, request.param)
    return request.param


def lens_problem(teacher_of: tuple[int, ...], **options) -> tuple[LensInputs, LensSpec]:
    """Build a small call that compares student layer i with teacher layer teacher_of[i].

    Every request, in two temperatures, one divergence with two parameters; a layer alone, and two
    pairs, each at its temperature.
    """
    problem = random_problem((3,), TOKENS + 9, layers=3, dtype=torch.float32, labels=True)
    layers = [Layers(i, teacher) for i, teacher in enumerate(teacher_of)]
    requests = (
        Request(*layers[0], 1.0, "kl"),
        Request(*layers[0], 2.0, "jsd", (0.5,)),
        Request(*layers[2], 2.0, "jsd", (0.5,)),
        Request(*layers[2], 2.0, "jsd", (0.1,)),
        Request(*layers[2], 1.0, None),
        Request(2, 0, 1.0, NLL),
    )
    moments = (
        PairMoments(None, layers[0]),
        PairMoments(layers[0], layers[1], 2.0),
        PairMoments(layers[1], layers[2], 0.5),
    )
    numbers = {"student_softcap": None, "teacher_softcap": None}
    spec = LensSpec(TOKENS + 9, requests, moments, 1.0, teacher_logit_scale=0.5, **numbers)
    spec = replace(spec, **options)
    student, teacher = (
        [h.detach() for h in states[:3]]
        for states in (problem.student_hidden, problem.teacher_hidden)
    )
    heads = problem.student_weight.detach(), None, teacher, problem.teacher_weight.detach(), None
    valid = torch.tensor([True, False, True])
    return LensInputs(student, *heads, valid, problem.labels), spec


def comparable(inputs: LensInputs, spec: LensSpec, statistics: Statistics) -> list[torch.Tensor]:
    """Take what does not depend on the shifts of layers without a request."""
    _, requests, moments = statistics
    means = []
    for pair, found in zip(spec.moments, moments):
        shifts = of_pair(statistics.shifts, pair) / pair.temperature
        means.append(found[[MEAN_S, MEAN_T]] + shifts)
    shifts = [of_request(statistics.shifts, r) for r in spec.requests if r.divergence == "kl"]
    rest = [COUNT, M_SS, M_TT, M_ST, M_DD]
    found = [requests, moments[:, rest], torch.stack(means), torch.stack(shifts)]
    return [t[..., inputs.valid] for t in found]


def found_by(name: str, inputs: LensInputs, spec: LensSpec, upstream: tuple, needed: list[bool]):
    """Compute statistics and gradients by a backend, or by a strategy of "triton"."""
    if name == "cached":
        gradients, statistics = BACKENDS["triton"].stats_and_grad(
            inputs,
            spec,
            2,
            lambda rows, *own: (*own, *[t[..., rows] for t in upstream]),
            needed,
            True,
        )
        return comparable(inputs, spec, Statistics(*statistics)), gradients
    backend = BACKENDS["torch" if name == "torch" else "triton"]
    statistics = Statistics(*backend.stats(inputs, spec))
    gradients = backend.grad(inputs, spec, (*statistics, *upstream), needed)
    return comparable(inputs, spec, statistics), gradients


@pytest.mark.parametrize(
    "teacher_of",
    [
        (2, 0, 1),
        pytest.param((1, 1, 0), marks=pytest.mark.slow),
        pytest.param((0, 2, 2), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_each_student_layer_may_have_any_teacher_layer(named, teacher_of):
    """Also a teacher layer that two student layers share, one of them without a softmax request."""
    inputs, spec = lens_problem(teacher_of)
    assert BACKENDS["triton"].refusal(spec) is None
    generator = torch.Generator().manual_seed(0)
    upstream = (
        torch.randn(len(spec.requests), REQUEST_STATS, inputs.rows, generator=generator),
        torch.randn(len(spec.moments), MOMENT_STATS, inputs.rows, generator=generator),
    )
    # Of the student's statistics alone: no gradient flows to the teacher, nor to a constant.
    upstream[0][:, [LSE_T, GRAD_SUM]] = 0
    upstream[1][:, [COUNT, MEAN_T, M_TT]] = 0
    needed = [True] * 4 + [False]
    expected, of_torch = found_by("torch", inputs, spec, upstream, needed)
    found, of_triton = found_by(named, inputs, spec, upstream, needed)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    for a, b in zip(of_triton, of_torch, strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm()


def test_specs_that_are_refused_by_name(monkeypatch):
    _, spec = lens_problem((0, 1, 2))
    refusal = BACKENDS["triton"].refusal
    first, *others = spec.requests

    def with_first(**changes) -> LensSpec:
        return replace(spec, requests=(first._replace(**changes), *others))

    monkeypatch.setitem(DIVERGENCES, "alpha", DIVERGENCES["kl"])
    assert "'alpha' has no Triton kernel" in refusal(with_first(divergence="alpha"))
    assert refusal(with_first(teacher_mix=0.5)) is None
    mixed = with_first(divergence="jsd", parameters=(0.5,), teacher_mix=0.5)
    assert "'jsd' with a teacher that is mixed with the student (teacher_mix=0.5)" in refusal(mixed)
    assert "besides kl in one call, jsd and reverse_kl" in refusal(
        with_first(divergence="reverse_kl")
    )
    assert "student layer 0 with teacher layers" in refusal(with_first(teacher_layer=2))
    apart = replace(spec, moments=(PairMoments(Layers(0, 0), Layers(2, 2)),))
    assert "student layers 0 and 2, which are not consecutive" in refusal(apart)
    with pytest.raises(ValueError, match=r'backend="triton" cannot compute this: .* reference, '):
        check_spec("triton", apart)


@pytest.mark.parametrize("cost", ["kl", "mse"])
def test_student_layers_that_share_the_only_teacher_layer(named, cost):
    """The student has more hidden states than the teacher."""
    problem = random_problem((3,), TOKENS + 9, layers=2, mask=True)
    arguments = problem.arguments | {"teacher_hidden": problem.teacher_hidden[:1], "cost": cost}
    leaves = list(problem.leaves.values())
    found = []
    for backend in ("triton", "reference"):
        costs = layer_costs(**arguments, backend=backend)
        found.append(
            [costs, *torch.autograd.grad((costs * torch.tensor([[1.0], [-2.0]])).sum(), leaves)]
        )
    for a, b in zip(*found):
        assert (a - b).norm() <= 1e-5 * b.norm()


def test_weights_of_pairs_with_one_teacher_layer_each(named):
    """The teacher has more layers; two layers of the student share one of them."""
    problem = random_problem((3,), TOKENS + 9, layers=4, teacher_layers=5, labels=True)
    weights = ((0.0, 1.0, 0.0, 0.0), (0.0, 0.0, 2.0, 0.0), (0.0, 0.0, 0.5, 0.0))
    outcome = evaluate(problem, backend="triton", layer_weights=weights)
    assert_within_budget(problem, outcome, layer_weights=weights)


def test_several_teacher_layers_are_refused_before_any_work():
    problem = random_problem((3,), TOKENS + 9, layers=2, teacher_layers=3)
    message = r'backend="triton" cannot compute this: student layer 0 .* reference, cpu, torch'
    with pytest.raises(ValueError, match=message):
        fused_fdd_loss(**problem.arguments, backend="triton", layer_weights=[[1.0, 0.5]])
