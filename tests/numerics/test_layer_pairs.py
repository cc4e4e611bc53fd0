"""`layer_weights` of pairs of layers and `derivative_layers`: against formulas written here in
float64, within the error budgets on every backend, and their errors.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from fdd_kernels import (
    FDDLossTerms,
    FusedFDDLoss,
    align_layers,
    backends,
    fused_fdd_loss,
    layer_costs,
)
from fdd_kernels.backends import BACKENDS, resolve_backend
from fdd_kernels.backends.torch_stream.problem import TorchModel
from fdd_kernels.lens.divergences import DERIVATIVES, FEATURE_DISTANCES, TRAJECTORIES
from fdd_kernels.objectives.fdd.options import LossOptions
from fdd_kernels.objectives.fdd.plan import build_plan
from fdd_kernels.objectives.layer_pairs import monotone_path
from fdd_kernels.testing import (
    Outcome,
    Problem,
    assert_same_sums,
    assert_within_budget,
    evaluate,
    random_problem,
)
from tests.support.options import FEATURE_DERIVATIVES, skip_what_triton_refuses
from tests.support.oracles import divergence, taid, weighted_cosine
from tests.support.strategies import paired_calls
from tests.support.vocab_threads import in_parts

# Layers of trajectory and derivative, of student and teacher: fewer, more, as many.
DEPTHS = [(2, 4), (4, 2), (3, 3)]
DEPTH_IDS = [f"{s}x{t}" for s, t in DEPTHS]


def soft(depths: tuple[int, int]) -> tuple[tuple[float, ...], ...]:
    """Weigh every pair, but one row and one column that have no weight at all."""
    students, teachers = depths
    return tuple(
        [
            tuple([0.0 if 0 in (i, j) else 0.3 + i + 0.7 * j for j in range(teachers)])
            for i in range(students)
        ]
    )


def layered(depths: tuple[int, int], output: bool = False, **options) -> Problem:
    """Draw a problem with so many layers in trajectory and derivative."""
    students, teachers = (depth + (not output) for depth in depths)
    options = {"labels": True, "mask": True, "token_weights": True, "bias": "plain"} | options
    return random_problem(layers=students, teacher_layers=teachers, **options)


def upstream_of(problem: Problem, options: dict) -> Tensor | None:
    """Weigh the rows with both signs where the loss is per row."""
    if options.get("reduction") != "none":
        return None
    return torch.linspace(-1, 2, math.prod(problem.leading_shape)).reshape(problem.leading_shape)


def oracle(
    student_hidden,
    student_weight,
    teacher_hidden,
    teacher_weight,
    labels=None,
    student_bias=None,
    teacher_bias=None,
    mask=None,
    token_weights=None,
    *,
    layer_weights,
    derivative_layers,
    trajectory="kl",
    derivative="cosine",
    alpha=1.0,
    beta=1.0,
    temperature=1.0,
    derivative_temperature=1.0,
    teacher_mix=1.0,
    output_in_dynamics=False,
    ce_weight=0.0,
    reduction="mean",
    return_terms=True,
) -> FDDLossTerms:
    """The formulas, dense and per row; `derivative_layers` are given in any case."""

    def distance(kind: str, s: Tensor, t: Tensor, *z: Tensor) -> Tensor:
        if kind == "weighted_cosine":
            return weighted_cosine(t, s, *z)
        if kind == "centered_cosine":
            s, t = (v - v.mean(-1, keepdim=True) for v in (s, t))
        if kind == "mse":
            return (s - t).square().mean(-1)
        still = (s == 0).all(-1) | (t == 0).all(-1)
        s, t = (torch.where(still[..., None], 1.0, v) for v in (s, t))
        return torch.where(still, 1.0, 1 - F.cosine_similarity(s, t, dim=-1))

    z_s = [F.linear(h, student_weight, student_bias) for h in student_hidden]
    z_t = teacher_hidden
    if teacher_weight is not None:
        z_t = [F.linear(h, teacher_weight, teacher_bias) for h in teacher_hidden]
    zero = torch.zeros_like(z_s[0][..., 0])
    kd = ce = along = change = zero
    if teacher_weight is not None:
        q, p = z_s[-1].log_softmax(-1), taid(z_s[-1], z_t[-1], teacher_mix).log_softmax(-1)
        kd = divergence("kl", p, q)
    if ce_weight:
        ce = F.cross_entropy(
            z_s[-1].flatten(0, -2), labels.clamp(min=0).flatten(), reduction="none"
        ).view(labels.shape)
    students = len(layer_weights)
    for i, row in enumerate(layer_weights):
        for j, weight in enumerate(row):
            s, t = z_s[i] / temperature, z_t[j] / temperature
            if trajectory in FEATURE_DISTANCES:
                cost = distance(trajectory, s, t)
            else:
                target = taid(s, t, teacher_mix).log_softmax(-1)
                cost = divergence(trajectory, target, s.log_softmax(-1))
            along = along + weight * cost / students
    if derivative is not None:
        tau = derivative_temperature
        for i in range(students - 1):
            j, k = derivative_layers[i : i + 2]
            ends = z_s[i + 1] / tau, z_s[i] / tau, z_t[k] / tau, z_t[j] / tau
            if teacher_weight is not None:
                ends = [z.log_softmax(-1) for z in ends]
            deltas = ends[0] - ends[1], ends[2] - ends[3]
            z = (z_t[k] / tau,) if derivative == "weighted_cosine" else ()
            change = change + distance(derivative, *deltas, *z) / (students - 1)
    valid = torch.ones_like(zero, dtype=torch.bool)
    valid = valid if labels is None else valid & (labels != -100)
    valid = valid if mask is None else valid & mask
    factors = valid.to(zero) if token_weights is None else torch.where(valid, token_weights, 0.0)
    terms = [factors * term for term in (kd, along, change, ce)]
    if reduction != "none":
        terms = [term.sum() / (valid.sum() if reduction == "mean" else 1) for term in terms]
    loss = terms[0] + alpha * terms[1] + beta * terms[2] + ce_weight * terms[3]
    return FDDLossTerms(loss, *terms)


def agree(problem: Problem, implementation: str, path=None, **options) -> None:
    """Every term and gradient equals the oracle's; no `derivative_layers` stand for `path`."""
    wide, upstream = problem.to(torch.float64), upstream_of(problem, options)
    got = evaluate(wide, upstream=upstream, backend=implementation, **options)
    own = {} if path is None else {"derivative_layers": path}
    expected = evaluate(wide, oracle, upstream, **(options | own))
    # Sums over the vocabulary and the rows, of each pair of layers.
    additions = problem.student_weight.numel() * math.prod(problem.leading_shape)
    for name, a, b in zip(FDDLossTerms._fields, got.terms, expected.terms):
        assert_same_sums(a, b, additions, name)
    for name, b in expected.gradients.items():
        assert_same_sums(got.gradients[name], b, additions, name)


@pytest.mark.parametrize("implementation", ["reference", "torch"])
class TestOracle:
    @pytest.mark.parametrize("depths", DEPTHS, ids=DEPTH_IDS)
    @pytest.mark.parametrize(
        ("trajectory", "derivative"),
        [*itertools.product(["kl", "mse"], DERIVATIVES), *[(name, None) for name in TRAJECTORIES]],
    )
    def test_every_trajectory_and_derivative(self, implementation, depths, trajectory, derivative):
        students, teachers = depths
        options = {
            "layer_weights": soft(depths),
            "derivative_layers": tuple(sorted([i % teachers for i in range(students)])),
            "trajectory": trajectory,
            "derivative": derivative,
            "reduction": "none",
        }
        agree(layered(depths), implementation, **options)

    @pytest.mark.parametrize("derivative_layers", [(0, 1, 3), (1, 1, 2), (0, 0, 0)], ids=str)
    @pytest.mark.parametrize(
        "options",
        [
            {"alpha": 0.3, "beta": 0.7, "ce_weight": 0.4},
            {"temperature": 2.0, "derivative_temperature": 0.5, "reduction": "sum"},
            {"output_in_dynamics": True, "trajectory": "jsd:0.3", "derivative": "mse"},
            {"teacher_mix": 0.4, "reduction": "none", "derivative": "centered_cosine"},
            {"trajectory": "cosine", "temperature": 2.0, "derivative_temperature": 2.0},
        ],
        ids=",".join,
    )
    def test_options(self, implementation, derivative_layers, options):
        depths = (3, 4)
        problem = layered(depths, options.get("output_in_dynamics", False))
        given = {"layer_weights": soft(depths), "derivative_layers": derivative_layers}
        agree(problem, implementation, **given, **options)

    @pytest.mark.parametrize("depths", DEPTHS, ids=DEPTH_IDS)
    @pytest.mark.parametrize("derivative", [*FEATURE_DERIVATIVES, None])
    @pytest.mark.parametrize("trajectory", FEATURE_DISTANCES)
    def test_feature_space(self, implementation, depths, trajectory, derivative):
        students, teachers = depths
        problem = layered(depths, columns=12, feature_space=True, bias=None)
        options = {
            "layer_weights": soft(depths),
            "derivative_layers": tuple(sorted([i % teachers for i in range(students)])),
            "trajectory": trajectory,
            "derivative": derivative,
        }
        agree(problem, implementation, **options)

    @pytest.mark.parametrize(
        ("weights", "path"),
        [
            (((1.0, 0.0, 0.0), (0.2, 0.5, 0.4)), (0, 1)),
            (((0.0, 0.0, 3.0), (1.0, 0.0, 0.0), (0.0, 0.0, 1.0)), (2, 2, 2)),
            (((0.0, 0.0, 0.0), (0.0, 0.0, 0.0), (0.0, 0.0, 0.0)), (0, 1, 2)),
            (((1.0, 1.0),) * 4, (0, 0, 1, 1)),
        ],
        ids=str,
    )
    def test_deltas_follow_the_path_of_most_weight(self, implementation, weights, path):
        problem = layered((len(weights), len(weights[0])))
        agree(problem, implementation, path, layer_weights=weights)

    def test_derivative_layers_alone(self, implementation):
        problem = layered((3, 3))
        by_rank = tuple(map(tuple, torch.eye(3).tolist()))
        options = {"derivative_layers": (0, 2, 2), "derivative": "centered_cosine"}
        got = evaluate(problem.to(torch.float64), backend=implementation, **options)
        expected = evaluate(problem.to(torch.float64), oracle, layer_weights=by_rank, **options)
        additions = problem.student_weight.numel() * math.prod(problem.leading_shape)
        assert_same_sums(got.terms.loss, expected.terms.loss, additions)


def check(problem: Problem, backend: str, **options) -> None:
    skip_what_triton_refuses(problem, backend, **options)
    upstream = upstream_of(problem, options)
    outcome = evaluate(problem, upstream=upstream, backend=backend, **options)
    assert_within_budget(problem, outcome, upstream, **options)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("depths", DEPTHS, ids=DEPTH_IDS)
@pytest.mark.parametrize(
    ("trajectory", "derivative"),
    [*zip(TRAJECTORIES, itertools.cycle(DERIVATIVES)), ("kl", None), ("mse", "weighted_cosine")],
)
def test_within_budget(backend, depths, trajectory, derivative, reduction):
    """Gradients formed in the forward pass ("mean") and in the backward pass ("none")."""
    options = {"trajectory": trajectory, "derivative": derivative, "reduction": reduction}
    check(layered(depths), backend, layer_weights=soft(depths), **options)


@pytest.mark.parametrize(
    "options",
    [
        {"output_in_dynamics": True, "ce_weight": 0.5, "derivative_layers": (0, 2, 3)},
        {"temperature": 2.0, "derivative_temperature": 0.5, "derivative_layers": (1, 1, 2)},
        {"teacher_mix": 0.3, "output_temperature": 2.0, "num_items_in_batch": 7.0},
        {"student_softcap": 3.0, "teacher_softcap": 2.0, "teacher_logit_scale": 0.5},
        {"shift": True, "ce_weight": 1.0, "vocab_size": 30, "reduction": "sum"},
        {"output_kd_weight": 0.0, "alpha": 0.0, "derivative": "weighted_cosine"},
        {"trajectory": "cosine", "derivative": "weighted_cosine", "output_kd_weight": 0.0},
    ],
    ids=",".join,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_options_within_budget(backend, options, dtype):
    depths = (3, 4)
    problem = layered(depths, options.get("output_in_dynamics", False), bias="padded", dtype=dtype)
    if "student_softcap" in options:  # a soft cap in front of -inf
        problem = replace(problem, student_bias=None, teacher_bias=None)
    if "vocab_size" in options:
        problem = replace(problem, labels=problem.labels.clamp(max=29))
    check(problem, backend, layer_weights=soft(depths), **options)


@pytest.mark.parametrize("depths", DEPTHS, ids=DEPTH_IDS)
@pytest.mark.parametrize("trajectory", FEATURE_DISTANCES)
def test_feature_space_within_budget(backend, depths, trajectory):
    problem = layered(depths, columns=12, feature_space=True, bias=None)
    check(problem, backend, layer_weights=soft(depths), trajectory=trajectory, derivative="mse")


@given(call=paired_calls())
def test_any_call(backend, call):
    problem, options, upstream = call
    plan_options = {k: v for k, v in options.items() if k != "num_items_in_batch"}
    states = len(problem.student_hidden), len(problem.teacher_hidden)
    plan = build_plan(LossOptions(**plan_options), len(problem.student_weight), *states)
    assume(BACKENDS[backend].refusal(plan.spec) is None)
    outcome = evaluate(problem, upstream=upstream, backend=backend, **options)
    assert_within_budget(problem, outcome, upstream, **options)


@settings(max_examples=25)
@given(call=paired_calls(), order=st.randoms(use_true_random=False))
def test_teacher_layers_in_another_order_with_their_weights(call, order):
    """Only the sum has another order; twice the weights are exactly twice the trajectory."""
    problem, options, upstream = call
    weights, wide = options["layer_weights"], problem.to(torch.float64)
    assume(any(map(any, weights)))
    options |= {"alpha": 1.0, "beta": 0.0, "output_kd_weight": 0.0, "ce_weight": 0.0}
    if options.get("teacher_mix", 1.0) < 1:
        options["trajectory"] = "kl"
    columns = list(range(len(weights[0])))
    order.shuffle(columns)
    states = wide.teacher_hidden
    moved = replace(wide, teacher_hidden=(*[states[j] for j in columns], *states[len(columns) :]))
    doubled = [[2 * row[j] for j in columns] for row in weights]
    expected = evaluate(wide, upstream=upstream, backend="torch", **options)
    got = evaluate(
        moved, upstream=upstream, backend="torch", **(options | {"layer_weights": doubled})
    )
    terms = problem.student_weight.numel() * math.prod(problem.leading_shape) + 40
    assert_same_sums(got.terms.trajectory, 2 * expected.terms.trajectory, terms)
    for name, gradient in expected.gradients.items():
        assert_same_sums(got.gradients[name], 2 * gradient, terms, name)


def assert_equal(a: Outcome, b: Outcome) -> None:
    assert all(torch.equal(x, y) for x, y in zip(a.terms, b.terms))
    assert all(torch.equal(x, b.gradients[name]) for name, x in a.gradients.items())


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize(
    ("chosen", "teachers"), [((0, 2), 4), ((0, 1, 1), 2), ((0, 1, 2), 3)], ids=str
)
def test_one_teacher_layer_each_is_the_call_that_is_paired_by_rank(
    backend, chosen, teachers, reduction
):
    weights = (0.5, 2.0, 1.5)[: len(chosen)]
    matrix = [[w if j == k else 0.0 for k in range(teachers)] for w, j in zip(weights, chosen)]
    problem = layered((len(chosen), teachers))
    *sampled, final = problem.teacher_hidden
    paired = replace(problem, teacher_hidden=(*[sampled[j] for j in chosen], final))
    options = {"backend": backend, "reduction": reduction, "ce_weight": 0.3}
    upstream = upstream_of(problem, options)
    expected = evaluate(paired, upstream=upstream, layer_weights=weights, **options)
    assert_equal(evaluate(problem, upstream=upstream, layer_weights=matrix, **options), expected)


def test_weights_by_rank_are_a_diagonal_matrix(backend):
    problem = layered((3, 3))
    weights = torch.tensor([0.5, 0.0, 2.0])
    expected = evaluate(problem, backend=backend, layer_weights=weights.tolist())
    matrix = weights.diag()
    assert_equal(evaluate(problem, backend=backend, layer_weights=matrix), expected)
    assert_equal(evaluate(problem, backend=backend, layer_weights=matrix.numpy()), expected)
    by_rank = {"layer_weights": weights, "derivative_layers": torch.arange(3)}
    assert_equal(evaluate(problem, backend=backend, **by_rank), expected)


def test_without_weights_the_output_alone_is_left(backend):
    problem = layered((2, 3))
    options = {"backend": backend, "beta": 0.0}
    found = evaluate(problem, layer_weights=torch.zeros(2, 3), **options)
    output = [states[-1:] for states in (problem.student_hidden, problem.teacher_hidden)]
    alone = replace(problem, student_hidden=output[0], teacher_hidden=output[1])
    assert torch.equal(found.terms.loss, evaluate(alone, alpha=0.0, **options).terms.loss)
    assert not found.terms.trajectory
    assert not any(found.gradients[f"student_hidden[{i}]"].any() for i in range(2))


@pytest.mark.parametrize("derivative", ["cosine", "centered_cosine", "weighted_cosine"])
def test_the_same_teacher_layer_twice_is_a_delta_without_direction(backend, derivative):
    problem = layered((2, 3), labels=False, mask=False, token_weights=False)
    options = {"derivative": derivative, "alpha": 0.0, "output_kd_weight": 0.0}
    options |= {"layer_weights": torch.ones(2, 3), "derivative_layers": (1, 1)}
    found = evaluate(problem, backend=backend, reduction="none", **options)
    assert (found.terms.derivative == 1).all()
    assert not any(gradient.any() for gradient in found.gradients.values())


def test_weights_of_align_layers_make_the_sum_of_costs(backend):
    """With `Ls * align_layers(costs)` the trajectory is sum(weights * costs)."""
    problem = layered((3, 4)).to(torch.float64)
    *students, _ = problem.student_hidden
    *teachers, _ = problem.teacher_hidden
    inputs = problem.arguments | {"student_hidden": students, "teacher_hidden": teachers}
    costs = layer_costs(**inputs).detach()
    for method in ("attention", "monotone"):
        weights = align_layers(costs, method)
        options = {"layer_weights": len(students) * weights, "backend": backend}
        skip_what_triton_refuses(problem, **options)
        trajectory = evaluate(problem, **options).terms.trajectory
        additions = problem.student_weight.numel() * math.prod(problem.leading_shape)
        assert_same_sums(trajectory, (weights * costs).sum(), additions)


@pytest.mark.parametrize("trajectory", ["kl", "jsd", "cosine"])
@pytest.mark.parametrize("bounds", [(0, 17, 37), (0, 1, 20, 36, 37)], ids=str)
def test_in_parts_of_the_vocabulary(bounds, trajectory):
    problem = layered((3, 4))
    options = {"layer_weights": soft((3, 4)), "derivative_layers": (0, 2, 2), "ce_weight": 0.5}
    options["trajectory"] = trajectory
    for backend in ("torch", "auto"):
        outcome, _ = in_parts(problem, bounds, backend=backend, **options)
        assert_within_budget(problem, outcome, **options)


@pytest.mark.parametrize(
    "options", [{}, {"reduction": "none"}, {"trajectory": "mse", "derivative": "weighted_cosine"}]
)
def test_compiled(options):
    torch._dynamo.reset()
    problem = layered((2, 3))
    options = options | {"layer_weights": soft((2, 3)), "backend": "torch"}

    def loss(**arguments):
        return fused_fdd_loss(**arguments, **options)

    function = torch.compile(loss, fullgraph=True, backend="aot_eager")
    upstream = upstream_of(problem, options)
    expected = evaluate(problem, upstream=upstream, **options)
    assert_equal(evaluate(problem, function, upstream), expected)


@pytest.mark.slow
def test_compiled_once_for_all_weights():
    """The first weights alone, then one graph for all others that are not 0."""
    torch._dynamo.reset()
    counter, problem = CompileCounterWithBackend("aot_eager"), layered((2, 3))

    def loss(**arguments):
        return fused_fdd_loss(**arguments)

    function = torch.compile(loss, fullgraph=True, backend=counter)
    for i in range(10):
        weights = ((1.0 + i, 0.3, 0.2 + i / 7), (0.1 + i / 9, 0.5, 3.0 + i))
        options = {"layer_weights": weights, "derivative_layers": (0, 2), "backend": "torch"}
        assert_equal(evaluate(problem, function, **options), evaluate(problem, **options))
    assert counter.frame_count == 2


def test_autocast(backend):
    problem = layered((2, 3), token_weights=False)  # autocast does not round weights
    options = {"layer_weights": soft((2, 3)), "backend": backend}
    skip_what_triton_refuses(problem, **options)
    with torch.autocast("cpu", torch.bfloat16):
        got = evaluate(problem, **options)
    rounded = problem.map(lambda t: t.to(torch.bfloat16))
    assert torch.equal(got.terms.loss, evaluate(rounded, **options).terms.loss)


@pytest.mark.parametrize("trajectory", ["kl", "jsd", "mse"])
def test_logits_are_computed_once_a_layer(monkeypatch, trajectory):
    shapes, compute = [], TorchModel.logits

    def counting(*arguments):
        shapes.append(arguments[1].shape[0])
        return compute(*arguments)

    monkeypatch.setattr(TorchModel, "logits", counting)
    problem = layered((2, 4))
    options = {"layer_weights": torch.ones(2, 4), "trajectory": trajectory, "backend": "torch"}
    with torch.no_grad():
        fused_fdd_loss(**problem.arguments, **options)
    assert sum(shapes) == (2 if trajectory == "jsd" else 1) * (3 + 5)  # the final states too


def test_teacher_layers_without_a_pair_are_not_computed():
    options = LossOptions(layer_weights=((0, 1, 0, 0), (0, 1, 0, 2)), derivative_layers=(1, 3))
    plan = build_plan(options, 37, 3, 5)
    assert plan.student_layers == (0, 1, 2)
    assert plan.teacher_layers == (1, 3, 4)
    assert len(plan.spec.requests) == 4


def test_triton_refuses_several_teacher_layers_and_says_who_can():
    refusal = BACKENDS["triton"].refusal
    plan = build_plan(LossOptions(layer_weights=soft((2, 3))), 37, 3, 4)
    assert "student layer 1 with teacher layers" in refusal(plan.spec)
    one_hot = LossOptions(layer_weights=((0, 1, 0), (0, 0, 2)))
    assert refusal(build_plan(one_hot, 37, 3, 4).spec) is None


def test_auto_passes_over_triton_where_it_cannot(monkeypatch):
    able = replace(BACKENDS["triton"], unavailable=lambda _: None)
    monkeypatch.setitem(BACKENDS, "triton", able)
    monkeypatch.setattr(backends, "_warned", set())
    gpu = torch.device("cuda")
    plan = build_plan(LossOptions(layer_weights=soft((2, 3))), 37, 3, 4)
    with pytest.warns(UserWarning, match='"triton" backend is not used on "cuda": student layer 1'):
        assert resolve_backend("auto", gpu, plan.spec) == "torch"
    one_hot = LossOptions(layer_weights=((0, 1, 0), (0, 0, 2)))
    assert resolve_backend("auto", gpu, build_plan(one_hot, 37, 3, 4).spec) == "triton"


def test_a_module_holds_weights_of_pairs():
    module = FusedFDDLoss(layer_weights=torch.tensor([[1.0, 0.5]]), derivative_layers=[1])
    assert module.options.layer_weights == ((1.0, 0.5),)
    assert "layer_weights=((1.0, 0.5),), derivative_layers=(1,)" in repr(module)
    problem = layered((1, 2))
    expected = fused_fdd_loss(**problem.arguments, layer_weights=[[1.0, 0.5]])
    assert torch.equal(module(**problem.arguments), expected)


@given(
    costs=st.integers(1, 5).flatmap(
        lambda columns: st.lists(
            st.lists(st.integers(0, 3), min_size=columns, max_size=columns), min_size=1, max_size=5
        )
    )
)
def test_the_monotone_path_is_the_best_and_of_equals_the_straightest(costs):
    rows, columns = len(costs), len(costs[0])

    def rank(path: tuple[int, ...]) -> tuple[int, int]:
        off = sum(abs(i * (columns - 1) - j * (rows - 1)) for i, j in enumerate(path))
        return sum(row[j] for row, j in zip(costs, path)), off

    paths = itertools.combinations_with_replacement(range(columns), rows)
    assert rank(monotone_path(costs)) == min(map(rank, paths))
    if columns >= rows:
        path = monotone_path(costs, strictly=True)
        assert rank(path)[0] == min(
            rank(p)[0] for p in itertools.combinations(range(columns), rows)
        )
        assert list(path) == sorted(set(path))


MATRIX = ((1.0, 0.0, 0.5), (0.0, 2.0, 0.0))
ERRORS = [
    ({"layer_weights": MATRIX[0]}, ValueError, "student_hidden has 3 layers and teacher_hidden 4"),
    ({"layer_weights": MATRIX[:1]}, ValueError, r"layer_weights has shape \(1, 3\), but .* 2 lay"),
    ({"layer_weights": torch.ones(2, 4)}, ValueError, r"has shape \(2, 4\), .* 3 of the teacher"),
    ({"layer_weights": MATRIX, "output_in_dynamics": True}, ValueError, "3 layers of the student"),
    ({"layer_weights": ((1.0, 2.0), (1.0,))}, ValueError, "row 1 has 1 numbers and row 0 2"),
    ({"layer_weights": ((), ())}, ValueError, "row 0 has 0 numbers"),
    ({"layer_weights": ((1, 2, -1), (0, 0, 0))}, ValueError, "layer_weights row 0 entry=-1"),
    ({"layer_weights": ((1, 2, 3), (0, math.nan, 0))}, ValueError, "row 1 entry=nan"),
    ({"layer_weights": ((1, 2, 3), (0, math.inf, 0))}, ValueError, "row 1 entry=inf"),
    ({"layer_weights": ((1, 2, 3), 4.0)}, TypeError, "layer_weights row 1 must be a sequence"),
    ({"layer_weights": ((1, 2, "x"),) * 2}, TypeError, "row 0 entry must be a number, got str"),
    ({"layer_weights": torch.ones(2, 3, 1)}, TypeError, "row 0 entry must be a number, got list"),
    (
        {"layer_weights": torch.ones(2, 3, requires_grad=True)},
        ValueError,
        r"layer_weights requires grad, but weights are constants: pass .detach\(\)",
    ),
    ({"layer_weights": torch.tensor(1.0)}, TypeError, "layer_weights must be a sequence of number"),
    ({"derivative_layers": (1, 0)}, ValueError, r"derivative_layers=\(1, 0\) must not decrease"),
    ({"derivative_layers": (0, 3)}, ValueError, "names layer 3 of the teacher, but there are 3"),
    ({"derivative_layers": (-1, 0)}, ValueError, "derivative_layers entry=-1 must be at least 0"),
    ({"derivative_layers": (0, 1, 2)}, ValueError, "has 3 entries and the derivative 2 layers"),
    ({"derivative_layers": (0.0, 1)}, TypeError, "derivative_layers entry must be an int, got flo"),
    ({"derivative_layers": torch.rand(2)}, TypeError, "derivative_layers entry must be an int"),
    ({"derivative_layers": 1}, TypeError, "derivative_layers must be a sequence of ints, got 1"),
    ({"derivative_layers": "01"}, TypeError, "derivative_layers must be a sequence of ints"),
]


@pytest.mark.parametrize(
    ("options", "error", "message"), ERRORS, ids=[f"{i}" for i in range(len(ERRORS))]
)
def test_errors(options, error, message):
    problem = layered((2, 3))
    with pytest.raises(error, match=message):
        fused_fdd_loss(**problem.arguments, **({"layer_weights": MATRIX} | options))


def test_one_layer_has_no_derivative_and_needs_no_work_for_it():
    with pytest.raises(ValueError, match=r"nothing to compute.*or more layers"):
        build_plan(LossOptions(alpha=0, output_kd_weight=0), 7, 2)
    assert len(build_plan(LossOptions(alpha=0), 7, 2).spec.requests) == 1  # the output's
