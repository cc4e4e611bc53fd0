"""The loss from a teacher's sufficient statistics against the loss from the teacher itself."""

from dataclasses import replace

import pytest
import torch

from fdd_kernels import fused_fdd_loss
from fdd_kernels.backends import torch_stream
from fdd_kernels.objectives.fdd.options import FDDLossTerms, LossOptions
from fdd_kernels.objectives.fdd.summary import SummaryLoss, SummaryMaker, summary_widths
from fdd_kernels.testing import Outcome, assert_same_sums, assert_within_budget, random_problem

OPTIONS = [
    {},
    {"ce_weight": 0.5, "labels": True},
    {"temperature": 2.0, "output_temperature": 3.0, "scale_by_t2": True, "alpha": 0.5, "beta": 2.0},
    {"derivative": "centered_cosine"},
    {"derivative": "mse", "output_in_dynamics": True},
    {"derivative": None},
    {"alpha": 0.0},
    {"beta": 0.0, "output_kd_weight": 0.0},
    {"student_logit_scale": 0.5, "teacher_logit_scale": 2.0, "teacher_softcap": 3.0},
    {"bias": "plain"},
    {"bias": "padded", "ce_weight": 1.0, "labels": True},
    {"vocab_size": 29},
    {"derivative_temperature": 2.0},
    {
        "temperature": 2.0,
        "derivative_temperature": 0.5,
        "output_temperature": 0.5,
        "output_in_dynamics": True,
        "bias": "plain",
    },
    {"derivative_temperature": 2.0, "derivative": "centered_cosine"},
    {"derivative_temperature": 3.0, "alpha": 0.0},
    {"layer_weights": (0.5, 0.0, 2.0)},
    {"trajectory": "jsd:0", "output_divergence": "jsd:0"},
    {"beta": 0.0, "derivative": "weighted_cosine"},
    {"alpha": 0.0, "trajectory": "tv"},
    {"output_kd_weight": 0.0, "output_divergence": "tv"},
]


def _split(options: dict) -> tuple[dict, dict]:
    """Split settings into those of `random_problem` and those of the loss."""
    mine = ("bias", "labels")
    return {k: v for k, v in options.items() if k in mine}, {
        k: v for k, v in options.items() if k not in mine
    }


def _rows(problem):
    """Return the problem with its valid rows alone, as (R, D)."""
    keep = (
        torch.ones(problem.leading_shape, dtype=torch.bool)
        if problem.labels is None
        else problem.labels != -100
    )

    def pick(hidden):
        return tuple(h.detach()[keep].requires_grad_(h.requires_grad) for h in hidden)

    labels = None if problem.labels is None else problem.labels[keep]
    return replace(
        problem,
        student_hidden=pick(problem.student_hidden),
        teacher_hidden=pick(problem.teacher_hidden),
        labels=labels,
    ).frozen("student_weight", "student_bias")


def _problem(options: dict, **changes):
    made, _ = _split(options)
    return _rows(random_problem((3, 5), **({"layers": 4, "columns": 37} | made | changes)))


def _from_statistics(problem, **options) -> Outcome:
    options = LossOptions(**options)
    hidden = [h.detach().requires_grad_() for h in problem.student_hidden]
    make = SummaryMaker(options, problem.student_weight, problem.student_bias)
    statistics = make(problem.teacher_hidden, problem.teacher_weight, problem.teacher_bias)
    loss = SummaryLoss(options, len(hidden), problem.student_weight, problem.student_bias)
    terms = loss(hidden, statistics, problem.labels, token_weights=problem.token_weights)
    gradients = torch.autograd.grad(terms.loss, hidden, materialize_grads=True)
    names = [f"student_hidden[{i}]" for i in range(len(hidden))]
    return Outcome(FDDLossTerms(*(t.detach() for t in terms)), dict(zip(names, gradients)))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_in_float64_it_is_the_same_loss(options):
    problem, (_, loss) = _problem(options, dtype=torch.float64), _split(options)
    _compare_in_float64(problem, loss)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_token_weights(dtype):
    """Also one of 0, whose row may hold anything."""
    options = {"ce_weight": 0.5, "labels": True}
    problem, (_, loss) = _problem(options, dtype=torch.float64), _split(options)
    weights = torch.rand(len(problem.labels), generator=torch.Generator().manual_seed(5))
    weights = weights.to(dtype)
    weights[2] = 0.0
    problem = replace(problem, token_weights=weights)
    _compare_in_float64(problem, loss)
    expected = _from_statistics(problem, **loss)
    with torch.no_grad():
        problem.student_hidden[1][2] = torch.nan
    found = _from_statistics(problem, **loss)
    for mine, theirs in zip(found.terms, expected.terms):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)
    for mine, theirs in zip(found.gradients.values(), expected.gradients.values()):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)
        assert not mine[2].any()


def _compare_in_float64(problem, loss):
    got = _from_statistics(problem, **loss)
    hidden = [h.detach().requires_grad_() for h in problem.student_hidden]
    arguments = problem.arguments | {"student_hidden": hidden}
    expected = fused_fdd_loss(**arguments, **loss, backend="reference", return_terms=True)
    gradients = torch.autograd.grad(expected.loss, hidden, materialize_grads=True)
    for name, mine, theirs in zip(FDDLossTerms._fields, got.terms, expected):
        assert_same_sums(mine, theirs.detach(), 10 * 37, name)
    for mine, theirs in zip(got.gradients.values(), gradients):
        assert_same_sums(mine, theirs, 10 * 37, "gradient")


@pytest.mark.parametrize("way", ["torch", "cpu", "reference"])
@pytest.mark.parametrize("columns", [1, 37, 513])
@pytest.mark.parametrize(
    "options", [{}, {"bias": "plain", "ce_weight": 1.0, "labels": True}], ids=str
)
def test_errors_are_those_of_float32(way, columns, options):
    problem, (_, loss) = _problem(options, columns=columns), _split(options)
    assert_within_budget(problem, _from_statistics(problem, **loss, backend=way), **loss)


def test_a_large_vocabulary_in_tiles(monkeypatch):
    problem = _problem({}, columns=701)
    monkeypatch.setattr("fdd_kernels.backends.torch_stream.tiling.TILE_BYTES", {"cpu": 2**15})
    monkeypatch.setattr("fdd_kernels.backends.torch_stream.tiling.OPERAND_BYTES", 2**12)
    monkeypatch.setattr("fdd_kernels.objectives.fdd.summary.maker._HEAD_BYTES", 2**12)
    assert torch_stream.choose_tiles((4, 4), 1, 701, 8, 8, 4, "cpu").columns < 701, (
        "this test sees one tile"
    )
    assert_within_budget(problem, _from_statistics(problem))


def test_half_precision_states_are_compared_in_float32():
    problem = _problem({}, dtype=torch.bfloat16)
    assert_within_budget(problem, _from_statistics(problem))


def test_a_common_shift_of_the_teachers_logits_changes_nothing():
    problem = _problem({"bias": "plain"})
    # exact for most, and the rest is in the truth
    shifted = replace(problem, teacher_bias=problem.teacher_bias + 4096.0)
    assert_within_budget(shifted, _from_statistics(shifted))


def test_widths_are_those_of_the_arrays():
    options, problem = LossOptions(output_temperature=2.0), _problem({})
    make = SummaryMaker(options, problem.student_weight)
    found = make(problem.teacher_hidden, problem.teacher_weight)
    assert {name: array.shape[1] for name, array in found.items()} == summary_widths(options, 4, 8)
    assert len(found) == 4 + 2 + 1  # 3 sampled layers and the output, 2 pairs, scalars
    # three log-sum-exps more, and no expectation
    apart = summary_widths(replace(options, derivative_temperature=3.0), 4, 8)
    assert sum(apart.values()) == sum(array.shape[1] for array in found.values()) + 3 * 3
    empty = make([h[:0] for h in problem.teacher_hidden], problem.teacher_weight)
    assert {name: array.shape for name, array in empty.items()} == {
        n: (0, w.shape[1]) for n, w in found.items()
    }


def test_a_maker_serves_one_teacher_after_another():
    """The cached part of the student's head depends on the tokens that the teacher's bias
    excludes.
    """
    plain, padded = _problem({}), _problem({"bias": "padded"})
    make = SummaryMaker(LossOptions(), plain.student_weight)
    for problem in (plain, padded, plain):
        teacher = (problem.teacher_hidden, problem.teacher_weight, problem.teacher_bias)
        found, expected = (
            make(*teacher),
            SummaryMaker(LossOptions(), plain.student_weight)(*teacher),
        )
        assert all(torch.equal(found[name], array) for name, array in expected.items())


def test_no_rows_and_evaluation():
    problem = _problem({})
    loss = SummaryLoss(LossOptions(), 4, problem.student_weight)
    make = SummaryMaker(LossOptions(), problem.student_weight)
    statistics = make([h[:0] for h in problem.teacher_hidden], problem.teacher_weight)
    hidden = [h.detach()[:0].requires_grad_() for h in problem.student_hidden]
    terms = loss(hidden, statistics)
    terms.loss.backward()
    assert terms.loss == 0
    assert hidden[0].grad.shape == hidden[0].shape
    with torch.no_grad():
        assert not loss(hidden, statistics).loss.requires_grad


def test_second_derivatives_are_refused():
    problem = _problem({})
    statistics = SummaryMaker(LossOptions(), problem.student_weight)(
        problem.teacher_hidden, problem.teacher_weight
    )
    hidden = [h.detach().requires_grad_() for h in problem.student_hidden]
    terms = SummaryLoss(LossOptions(backend="torch"), 4, problem.student_weight)(hidden, statistics)
    (gradient,) = torch.autograd.grad(terms.loss, hidden[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated once"):
        gradient.sum().backward()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"trajectory": "jsd"}, "trajectory='jsd'"),
        ({"trajectory": "mse"}, "trajectory='mse'"),
        ({"output_divergence": "jsd:0.1"}, "output_divergence='jsd:0.1'"),
        ({"derivative": "weighted_cosine"}, "derivative='weighted_cosine'"),
        ({"teacher_mix": 0.5}, "teacher_mix=0.5"),
        ({"student_softcap": 30.0}, "student_softcap=30.0"),
        ({"layer_weights": ((1.0, 0.5),)}, "layer_weights=.*layers of the teacher than its own"),
        ({"derivative_layers": (0, 0)}, "derivative_layers=.*layers of the teacher than its own"),
    ],
)
def test_objectives_that_cannot_be_served_are_refused(options, message):
    message = f"{message}(?s:.*)cache of (the teacher's|its) hidden states"
    with pytest.raises(ValueError, match=message):
        SummaryLoss(LossOptions(**options), 3, torch.zeros(5, 2))
    with pytest.raises(ValueError, match=message):
        SummaryMaker(LossOptions(**options), torch.zeros(5, 2))


def test_other_heads_are_refused():
    problem = _problem({})
    with pytest.raises(ValueError, match="student_weight requires grad"):
        SummaryLoss(LossOptions(), 4, problem.student_weight.clone().requires_grad_())
    statistics = SummaryMaker(LossOptions(), problem.student_weight)(
        problem.teacher_hidden, problem.teacher_weight
    )
    weight = problem.student_weight.clone()
    loss = SummaryLoss(LossOptions(), 4, weight)
    weight.mul_(2)
    with pytest.raises(ValueError, match="has changed"):
        loss(problem.student_hidden, statistics)
    with pytest.raises(ValueError, match="needs labels"):
        SummaryLoss(LossOptions(ce_weight=1.0), 4, weight)(problem.student_hidden, statistics)


def test_columns_that_the_teachers_bias_alone_leaves_out_are_refused():
    """At any call, also after an empty one and a correct one."""
    plain, padded = _problem({}), _problem({"bias": "padded"})
    make = SummaryMaker(LossOptions(), plain.student_weight)
    right, wrong = (
        make(p.teacher_hidden, p.teacher_weight, p.teacher_bias) for p in (plain, padded)
    )
    loss = SummaryLoss(LossOptions(), 4, plain.student_weight)
    loss([h[:0] for h in plain.student_hidden], {name: array[:0] for name, array in wrong.items()})
    for _ in range(2):
        with pytest.raises(ValueError, match="leaves out other tokens"):
            loss(plain.student_hidden, wrong)
        loss(plain.student_hidden, right)


def test_no_items_are_refused_or_a_loss_of_zero():
    problem = _problem({})
    make = SummaryMaker(LossOptions(), problem.student_weight)
    loss = SummaryLoss(LossOptions(), len(problem.student_hidden), problem.student_weight)
    arguments = problem.student_hidden, make(problem.teacher_hidden, problem.teacher_weight)
    with pytest.raises(ValueError, match="num_items_in_batch=0 must be greater than 0"):
        loss(*arguments, num_items_in_batch=0)
    of_none = loss(*arguments, num_items_in_batch=torch.zeros((), dtype=torch.float64)).loss
    assert of_none == 0
    assert of_none.dtype == torch.float32
    assert not any(g.any() for g in torch.autograd.grad(of_none, problem.student_hidden))
