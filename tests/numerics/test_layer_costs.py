"""The costs of all pairs of layers: against the formulas in float64, within the error budgets of a
pair compared alone, in bounded memory, and its errors.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fdd_kernels import FDDLossTerms, layer_costs
from fdd_kernels.backends import BACKENDS, torch_stream
from fdd_kernels.backends.torch_stream import tiling
from fdd_kernels.backends.torch_stream.problem import TorchModel
from fdd_kernels.lens.divergences import DIVERGENCES, FEATURE_DISTANCES
from fdd_kernels.objectives.alignment.objective import cost_spec
from fdd_kernels.objectives.alignment.options import CostOptions
from fdd_kernels.testing import (
    Problem,
    assert_same_sums,
    assert_within_budget,
    evaluate,
    random_problem,
)
from tests.support.allocations import Allocations
from tests.support.strategies import SCALES, SEEDS, SOFTCAPS, TEMPERATURES, WIDTHS

COSTS = (*DIVERGENCES, *FEATURE_DISTANCES)
DEPTHS = [(2, 3), (3, 1), (1, 4), (2, 2)]
# One layer of each model compared with FDD's options: what `layer_costs` is for a pair.
ONE_PAIR = {
    "output_in_dynamics": True,
    "output_kd_weight": 0.0,
    "beta": 0.0,
    "reduction": "none",
}


def layered(depths: tuple[int, int], *arguments, **options) -> Problem:
    """Draw a problem with so many layers of student and teacher."""
    problem = random_problem(*arguments, layers=max(depths), **options)
    return replace(
        problem,
        student_hidden=problem.student_hidden[: depths[0]],
        teacher_hidden=problem.teacher_hidden[: depths[1]],
    )


def supported(problem: Problem, backend: str) -> Problem:
    """Leave Triton the one teacher layer that it compares with a student layer."""
    if backend != "triton":
        return problem
    return replace(problem, teacher_hidden=problem.teacher_hidden[:1])


def weighted(problem: Problem) -> Problem:
    """Add token weights, one of them 0."""
    weights = torch.linspace(0, 2, math.prod(problem.leading_shape), dtype=torch.float64)
    return replace(problem, token_weights=weights.view(problem.leading_shape))


def costs_of(problem: Problem, **options) -> Tensor:
    return layer_costs(**problem.arguments, **options)


def gradients(problem: Problem, costs: Tensor) -> list[Tensor]:
    """Differentiate a sum of the costs with weights of both signs."""
    weights = torch.linspace(-1, 2, costs.numel(), dtype=costs.dtype).view_as(costs)
    return list(torch.autograd.grad((weights * costs).sum(), list(problem.leaves.values())))


def dense_costs(problem: Problem, cost: str, temperature: float = 1.0) -> Tensor:
    """The oracle of the specification, per row: (Ls, Lt, ...), rows that are not valid too."""
    S, T = (
        [(h @ weight.T + (0.0 if bias is None else bias)) / temperature for h in states]
        for states, weight, bias in (
            (problem.student_hidden, problem.student_weight, problem.student_bias),
            (problem.teacher_hidden, problem.teacher_weight, problem.teacher_bias),
        )
    )
    of_pair = {
        "kl": lambda s, t: F.kl_div(
            s.log_softmax(-1), t.log_softmax(-1), reduction="none", log_target=True
        ).sum(-1),
        "jsd:0.3": lambda s, t: _jsd(s.log_softmax(-1), t.log_softmax(-1), 0.3),
        "mse": lambda s, t: (s - t).square().mean(-1),
        "cosine": lambda s, t: 1 - F.cosine_similarity(s, t, dim=-1),
    }[cost]
    return torch.stack([torch.stack([of_pair(s, t) for t in T]) for s in S])


def _jsd(log_q: Tensor, log_p: Tensor, beta: float) -> Tensor:
    m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
    return (beta * log_p.exp() * (log_p - m) + (1 - beta) * log_q.exp() * (log_q - m)).sum(-1)


@pytest.mark.parametrize("implementation", ["reference", "torch"])
@pytest.mark.parametrize("cost", ["kl", "jsd:0.3", "mse", "cosine"])
@pytest.mark.parametrize("depths", DEPTHS, ids=lambda d: "x".join(map(str, d)))
class TestOracle:
    def problem(self, depths) -> Problem:
        return layered(depths, bias="plain", labels=True, mask=True, dtype=torch.float64)

    def additions(self, problem: Problem) -> int:
        return problem.student_weight.numel() + 12 * math.prod(problem.leading_shape)

    def test_per_row(self, depths, cost, implementation):
        problem = weighted(self.problem(depths))
        options = {"cost": cost, "temperature": 1.7}
        valid = (problem.labels != -100) & problem.mask
        expected = dense_costs(problem, cost, 1.7) * problem.token_weights
        expected = expected.where(valid, 0.0)
        got = costs_of(problem, **options, per_row=True, backend=implementation)
        assert got.shape == (*depths, *problem.leading_shape)
        assert_same_sums(got.detach(), expected.detach(), self.additions(problem))
        for a, b in zip(gradients(problem, got), gradients(problem, expected)):
            assert_same_sums(a, b, self.additions(problem), "gradient")

    def test_means(self, depths, cost, implementation):
        problem = self.problem(depths)
        valid = (problem.labels != -100) & problem.mask
        expected = dense_costs(problem, cost).where(valid, 0.0).sum((-2, -1)) / valid.sum()
        got = costs_of(problem, cost=cost, backend=implementation)
        assert got.shape == depths
        assert_same_sums(got.detach(), expected.detach(), self.additions(problem))
        for a, b in zip(gradients(problem, got), gradients(problem, expected)):
            assert_same_sums(a, b, self.additions(problem), "gradient")


def of_pair(problem: Problem, i: int, j: int):
    """One pair's costs, of a call with all layers, as FDD's terms."""

    def function(student_hidden, student_weight, student_bias, return_terms, **options):
        states = [h.detach() for h in problem.student_hidden]
        states[i] = student_hidden[0]
        options = {k: v for k, v in options.items() if k not in (*ONE_PAIR, "trajectory")} | {
            "teacher_hidden": problem.teacher_hidden,
            "cost": options["trajectory"],
            "per_row": True,
        }
        costs = layer_costs(states, student_weight, student_bias=student_bias, **options)[i, j]
        zero = torch.zeros_like(costs)
        return FDDLossTerms(costs, zero, costs, zero, zero)

    return function


def assert_pairs_within_budget(problem: Problem, backend: str, upstream=None, **options) -> None:
    """Compare each pair with float64, values and gradients per row."""
    options, problem = options | ONE_PAIR, supported(problem, backend)
    for i, student in enumerate(problem.student_hidden):
        for j, teacher in enumerate(problem.teacher_hidden):
            pair = replace(problem, student_hidden=(student,), teacher_hidden=(teacher,))
            function = of_pair(problem, i, j)
            outcome = evaluate(pair, function, upstream, backend=backend, **options)
            assert_within_budget(pair, outcome, upstream, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("cost", COSTS)
def test_every_cost_is_within_its_budget(backend, cost, dtype):
    problem = layered((2, 3), (9,), 70, labels=True, mask=True, bias="padded", dtype=dtype)
    assert_pairs_within_budget(problem, backend, trajectory=cost, temperature=2.0)


@pytest.mark.parametrize("cost", ["kl", "jsd", "cosine"])
@pytest.mark.parametrize("depths", [(1, 4), (4, 1)], ids=lambda d: "x".join(map(str, d)))
def test_any_number_of_layers_is_within_its_budget(backend, depths, cost):
    problem = layered(depths, (9,), 300, labels=True, mask=True, bias="plain")
    assert_pairs_within_budget(problem, backend, trajectory=cost)


@pytest.mark.parametrize("cost", ["kl", "mse", "cosine"])
@pytest.mark.parametrize("near", [1e-2, 1e-4])
def test_costs_are_exact_where_the_models_nearly_agree(backend, cost, near):
    problem = layered((2, 1), (9,), 300, near=near, teacher_width=8)
    assert_pairs_within_budget(problem, backend, trajectory=cost)


@pytest.mark.parametrize("cost", FEATURE_DISTANCES)
@pytest.mark.parametrize("depths", DEPTHS, ids=lambda d: "x".join(map(str, d)))
def test_feature_space(backend, cost, depths):
    problem = layered(depths, (9,), 24, feature_space=True, mask=True)
    assert_pairs_within_budget(problem, backend, trajectory=cost)


@st.composite
def cost_calls(draw):
    depths = draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    problem = layered(
        depths,
        draw(st.sampled_from([(), (1,), (7,), (2, 3)])),
        draw(st.integers(1, 60)),
        draw(WIDTHS),
        draw(WIDTHS),
        dtype=draw(st.sampled_from([torch.float32, torch.bfloat16])),
        seed=draw(SEEDS),
        bias=draw(st.sampled_from([None, "plain", "padded"])),
        labels=draw(st.booleans()),
        mask=draw(st.booleans()),
        contiguous=draw(st.booleans()),
    )
    options = {
        "trajectory": draw(st.sampled_from(COSTS)),
        "temperature": draw(TEMPERATURES),
        "student_softcap": draw(SOFTCAPS),
        "teacher_softcap": draw(SOFTCAPS),
        "student_logit_scale": draw(SCALES),
        "teacher_logit_scale": draw(SCALES),
    }
    if problem.labels is not None and problem.leading_shape:
        options["shift"] = draw(st.booleans())
    return problem, options


@given(call=cost_calls())
def test_any_call(backend, call):
    problem, options = call
    upstream = torch.linspace(-1, 2, math.prod(problem.leading_shape)).view(problem.leading_shape)
    assert_pairs_within_budget(problem, backend, upstream, **options)


def test_reductions(backend):
    problem = weighted(layered((2, 3), labels=True)).map(lambda t: t.float())
    problem = supported(problem, backend)
    per_row = costs_of(problem, per_row=True, backend=backend).double()
    total, count = per_row.sum((-2, -1)), (problem.labels != -100).sum()
    nothing = torch.tensor(0)
    for items, divisor in ((None, count), (7, 7), (torch.tensor(2.5), 2.5), (nothing, torch.inf)):
        expected = total / divisor
        got = costs_of(problem, num_items_in_batch=items, backend=backend)
        bound = (per_row[0, 0].numel() + 2) * 2.0**-24 * expected.abs()
        assert ((got - expected).abs() <= bound).all()
    padded = replace(
        problem,
        teacher_weight=torch.cat([problem.teacher_weight, torch.ones_like(problem.teacher_weight)]),
    )
    cut = costs_of(padded, vocab_size=len(problem.student_weight), backend=backend)
    bound = len(problem.student_weight) * 2.0**-24 * cut.abs()
    assert ((cut - costs_of(problem, backend=backend)).abs() <= bound).all()


@pytest.mark.parametrize("implementation", ["reference", "torch"])
def test_without_a_valid_token_costs_are_zero(implementation):
    problem = replace(layered((2, 1)), mask=torch.zeros(2, 5, dtype=torch.bool))
    for options in ({}, {"per_row": True}):
        costs = costs_of(problem, backend=implementation, **options)
        assert not costs.any()
        assert not any(g.any() for g in gradients(problem, costs))


@pytest.mark.parametrize("cost", ["kl", "jsd", "mse"])
def test_logits_are_computed_once_a_layer_and_never_held(monkeypatch, cost):
    monkeypatch.setattr(tiling, "choose_tiles", lambda *_: tiling.TorchTiles(4, 16, 8))
    seen, logits = Allocations(), []
    own = replace(
        BACKENDS["torch"],
        stats=seen.watching(torch_stream.stats),
        grad=seen.watching(torch_stream.grad),
    )
    monkeypatch.setitem(BACKENDS, "torch", own)
    compute = TorchModel.logits

    def counting(*arguments):
        logits.append(compute(*arguments))
        return logits[-1]

    monkeypatch.setattr(TorchModel, "logits", counting)
    students, teachers, rows, columns = 3, 4, 12, 144
    problem = layered((students, teachers), (rows,), columns, 3, 5)
    costs = costs_of(problem, cost=cost, backend="torch")
    passes = 2 if cost == "jsd" else 1
    assert sum(u.numel() for u in logits) == passes * (students + teachers) * rows * columns
    costs.sum().backward()
    assert (columns, 3) in seen.shapes, "the head's gradient was not seen: this test sees nothing"
    # Tiles are 4 layers of 4 x 16; statistics 9 numbers of 12 pairs for each of 12 rows.
    largest = max(torch.Size(shape).numel() for shape in seen.shapes if shape[-1:] != (3,))
    assert largest <= 9 * students * teachers * rows < rows * columns


@pytest.mark.parametrize("depths", [(2, 3), (3, 1)], ids=lambda d: "x".join(map(str, d)))
@pytest.mark.parametrize("cost", ["kl", "cosine"])
def test_compiled(depths, cost):
    torch._dynamo.reset()
    problem = layered(depths, labels=True)
    function = torch.compile(layer_costs, fullgraph=True, backend="aot_eager")
    expected = costs_of(problem, cost=cost, backend="torch")
    got = function(**problem.arguments, cost=cost, backend="torch")
    assert torch.equal(got, expected)
    for a, b in zip(gradients(problem, got), gradients(problem, expected)):
        assert torch.equal(a, b)


def test_differentiated_once_and_never_into_the_teacher():
    problem = layered((1, 2))
    costs = costs_of(problem, backend="torch").sum()
    (gradient,) = torch.autograd.grad(costs, problem.student_weight, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated once"):
        gradient.sum().backward()
    wide = problem.to(torch.float64)
    costs = costs_of(wide, backend="reference").sum()
    (gradient,) = torch.autograd.grad(costs, wide.student_weight, create_graph=True)
    gradient.sum().backward()


def test_autocast():
    problem = layered((2, 1))
    with torch.autocast("cpu", torch.bfloat16):
        got = costs_of(problem, backend="torch")
    rounded = problem.map(lambda t: t.to(torch.bfloat16))
    assert got.dtype == torch.float32
    assert torch.equal(got, costs_of(rounded, backend="torch"))


def test_triton_refuses_several_teacher_layers_by_name():
    refusal = BACKENDS["triton"].refusal
    assert "teacher layers 0 and 1" in refusal(cost_spec(CostOptions(), 37, 1, 2))
    assert refusal(cost_spec(CostOptions(), 37, 2, 1)) is None
    assert "teacher layers 0 and 1" in refusal(cost_spec(CostOptions(cost="mse"), 37, 2, 2))


ERRORS = [
    ({"cost": "kld"}, ValueError, "cost='kld' is not one of"),
    ({"cost": "jsd:2"}, ValueError, "cost='jsd:2' has beta"),
    ({"cost": "centered_cosine"}, ValueError, "cost='centered_cosine' is not one of"),
    ({"cost": 3}, TypeError, "cost must be a string"),
    ({"temperature": 0.0}, ValueError, "temperature=0.0 must be finite and greater than 0"),
    ({"student_logit_scale": -1.0}, ValueError, "student_logit_scale=-1.0"),
    ({"teacher_softcap": 0.0}, ValueError, "teacher_softcap=0.0"),
    ({"backend": "numpy"}, ValueError, "backend='numpy' is not one of"),
    ({"vocab_size": 99}, ValueError, "vocab_size=99 is larger than a vocabulary"),
    ({"shift": True}, ValueError, "shift=True shifts the labels"),
    ({"ignore_index": 0.5}, TypeError, "ignore_index must be an int"),
    ({"per_row": True, "num_items_in_batch": 3}, ValueError, "per_row=True returns one cost"),
    ({"num_items_in_batch": 0}, ValueError, "num_items_in_batch=0 must be greater than 0"),
    ({"teacher_hidden": []}, ValueError, "teacher_hidden is empty"),
    ({"teacher_hidden": [torch.ones(2, 4, 12)]}, ValueError, "must have seen the same tokens"),
    ({"teacher_weight": None}, ValueError, "must project to the teacher's width 12"),
    ({"labels": torch.full((2, 5), 37)}, ValueError, "labels contains 37"),
    ({"mask": torch.ones(5)}, TypeError, "mask is a float32 tensor"),
    ({"token_weights": torch.full((2, 5), -1.0)}, ValueError, "token_weights contains -1.0"),
]


@pytest.mark.parametrize(("changed", "error", "message"), ERRORS, ids=[e[2][:30] for e in ERRORS])
def test_errors(changed, error, message):
    arguments = layered((2, 3)).arguments | changed
    if changed.get("teacher_weight", 0) is None:
        arguments["cost"] = "mse"
    with pytest.raises(error, match=message.replace("(", r"\(")):
        layer_costs(**arguments)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cost": "kl"}, "cost='kl' compares distributions"),
        ({"cost": "mse", "temperature": 2.0}, "temperature=2.0 was given with teacher_weight=None"),
        ({"cost": "mse", "teacher_softcap": 3.0}, "teacher_softcap=3.0 was given"),
        ({"cost": "mse", "vocab_size": 3}, "vocab_size=3 was given with teacher_weight=None"),
    ],
)
def test_errors_of_feature_space(options, message):
    with pytest.raises(ValueError, match=message):
        costs_of(layered((2, 3), columns=12, feature_space=True), **options)
