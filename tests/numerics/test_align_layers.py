"""The weights of pairs of layers: sums, optimality against brute force, the formulas in float64,
gradients, and errors.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from fdd_kernels import align_layers
from fdd_kernels.objectives.alignment.matching import METHODS, SMOOTH, TRANSPORT

U = 2.0**-53
UNIT = 2.0**-50  # masses and costs of "emd" are rounded to this part of their range


@st.composite
def cost_matrices(draw, most: int = 6) -> Tensor:
    rows, columns = draw(st.integers(1, most)), draw(st.integers(1, most))
    # Integers make ties.
    numbers = draw(
        st.sampled_from([st.floats(-3, 10), st.integers(0, 3).map(float), st.floats(0, 1e-6)])
    )
    return torch.tensor(
        draw(
            st.lists(
                st.lists(numbers, min_size=columns, max_size=columns), min_size=rows, max_size=rows
            )
        ),
        dtype=torch.float64,
    )


@st.composite
def masses_of(draw, count: int) -> Tensor:
    numbers = st.sampled_from([0.0, 0.1, 0.5, 1.0, 3.0])
    found = torch.tensor(draw(st.lists(numbers, min_size=count, max_size=count)))
    assume(found.any())
    return found.double() / found.double().sum()


def uniform(count: int) -> Tensor:
    return torch.full((count,), 1 / count, dtype=torch.float64)


def rounding(costs: Tensor) -> float:
    """Bound the rounding of a sum of weights times costs: each product, and the sum of all."""
    return (costs.numel() + 8) * U * float(costs.abs().max())


@given(data=st.data(), costs=cost_matrices(), method=st.sampled_from(METHODS))
def test_rows_sum_to_their_masses(data, costs, method):
    rows, columns = costs.shape
    student = data.draw(masses_of(rows)) if data.draw(st.booleans()) else None
    teacher = None
    if method in TRANSPORT and data.draw(st.booleans()):
        teacher = data.draw(masses_of(columns))
    weights = align_layers(costs, method, masses=(student, teacher))
    expected = uniform(rows) if student is None else student
    assert weights.shape == costs.shape
    assert weights.dtype == costs.dtype
    assert (weights >= 0).all()
    # "sinkhorn" takes e to a score and two potentials, which are rounded at their own size: costs
    # over a tenth of their standard deviation are below 10 sqrt(2 * 36).
    at_most = 1000 * U * columns if method == "sinkhorn" else columns * (U + UNIT)
    assert ((weights.sum(1) - expected).abs() <= at_most).all()
    if method == "emd":
        expected = uniform(columns) if teacher is None else teacher
        assert ((weights.sum(0) - expected).abs() <= rows * (U + UNIT)).all()


@given(costs=cost_matrices())
def test_argmin_takes_the_cheapest(costs):
    weights = align_layers(costs)
    assert ((weights != 0).sum(1) == 1).all()
    cheapest = costs.amin(1) / len(costs)
    assert (((weights * costs).sum(1) - cheapest).abs() <= 3 * U * cheapest.abs()).all()


@given(data=st.data(), costs=cost_matrices(5))
def test_monotone_is_the_best_of_all_monotone_assignments(data, costs):
    rows, columns = costs.shape
    masses = data.draw(masses_of(rows))
    weights = align_layers(costs, "monotone", masses=(masses, None))
    chosen = weights.argmax(1)[masses > 0]
    assert (chosen[1:] >= chosen[:-1]).all()
    best = min(
        float((masses * costs[range(rows), columns_of]).sum())
        for columns_of in itertools.combinations_with_replacement(range(columns), rows)
    )
    assert float((weights * costs).sum()) <= best + rounding(costs)


@given(data=st.data(), costs=cost_matrices(4))
def test_emd_is_the_best_of_all_assignments_of_unit_masses(data, costs):
    """With masses of whole units it is an assignment of these (Birkhoff)."""
    rows, columns = costs.shape
    total = 6
    owners = []
    for count in (rows, columns):
        cuts = sorted(data.draw(st.integers(0, total)) for _ in range(count - 1))
        sizes = [b - a for a, b in zip([0, *cuts], [*cuts, total])]
        owners.append([layer for layer, size in enumerate(sizes) for _ in range(size)])
    of_student, of_teacher = (torch.tensor(o) for o in owners)
    masses = [
        o.bincount(minlength=n).double() / total
        for o, n in zip((of_student, of_teacher), costs.shape)
    ]
    orders = torch.tensor(list(itertools.permutations(range(total))))
    best = costs[of_student, of_teacher[orders]].mean(1).min()
    weights = align_layers(costs, "emd", masses=tuple(masses))
    spread = float(costs.max() - costs.min())
    of_units = 2 * (rows + columns) * UNIT * (spread + float(costs.abs().max()))
    assert float((weights * costs).sum()) <= float(best) + rounding(costs) + of_units


@given(data=st.data(), costs=cost_matrices(7))
def test_emd_of_any_masses_cannot_be_improved(data, costs):
    """No circle of steps that takes flow back here and adds it there lowers the cost."""
    rows, columns = costs.shape
    masses = data.draw(masses_of(rows)), data.draw(masses_of(columns))
    weights = align_layers(costs, "emd", masses=masses)
    steps = torch.full((rows + columns, rows + columns), torch.inf, dtype=torch.float64)
    steps[:rows, rows:] = costs
    steps[rows:, :rows] = torch.where(weights > 0, -costs, torch.inf).T
    steps.fill_diagonal_(0)
    for via in range(rows + columns):
        steps = torch.minimum(steps, steps[:, via, None] + steps[via])
    spread = float(costs.max() - costs.min())
    of_steps = (rows + columns) * (UNIT * spread + 4 * U * float(costs.abs().max()))
    assert float(steps.diagonal().min()) >= -of_steps


def test_emd_of_many_layers():
    costs = torch.rand(48, 96, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    flow = align_layers(costs, "emd")
    smooth = align_layers(costs, "sinkhorn", epsilon=1e-3, iterations=3000)
    # Regularisation adds at most epsilon times the entropy's range, log(48 * 96).
    assert float((flow * costs).sum()) <= float((smooth * costs).sum()) + 1e-9
    assert float((smooth * costs).sum()) <= float((flow * costs).sum()) + 1e-3 * 8.5


@given(costs=cost_matrices(), iterations=st.integers(1, 8))
def test_sinkhorn_takes_exactly_so_many_steps(costs, iterations):
    rows, columns = costs.shape
    epsilon = 2.0
    kernel = ((costs.min() - costs) / epsilon).exp()
    scale = torch.ones(rows, dtype=torch.float64)
    for _ in range(iterations):
        of_columns = 1 / columns / (scale @ kernel)
        scale = 1 / rows / (kernel @ of_columns)
    expected = scale[:, None] * kernel * of_columns
    got = align_layers(costs, "sinkhorn", epsilon=epsilon, iterations=iterations)
    # A step rounds every potential, numbers below 20, by a sum over a row or column.
    bound = 2 * iterations * (rows + columns + 20) * 20 * U
    assert ((got - expected).abs() <= bound * expected).all()


@given(costs=cost_matrices())
def test_attention_is_the_softmax_at_the_costs_spread(costs):
    spread = costs.std(correction=0)
    expected = ((costs.min() - costs) / (spread if spread > 0 else 1)).softmax(1) / len(costs)
    assert ((align_layers(costs, "attention") - expected).abs() <= 3 * U * expected).all()


@pytest.mark.parametrize("method", METHODS)
def test_neither_unit_nor_offset_of_the_costs_matters(method):
    costs = torch.rand(4, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    weights = align_layers(costs, method)
    for factor, offset in ((1e-6, 0.0), (1e3, 50.0)):
        other = align_layers(factor * costs + offset, method)
        # Costs are rounded at their own size, relative to a spread of 0.1 and more of the factor.
        size = U * (factor + offset) / (0.1 * factor)
        assert ((other - weights).abs() <= 10 * 6 * (10 * size + 1000 * U)).all()


@pytest.mark.parametrize("method", SMOOTH)
def test_gradients_through_the_weights(method):
    costs = torch.rand(3, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    masses = [0.5, 0.25, 0.25], None
    options = {"epsilon": 0.7, "iterations": 5, "masses": masses, "detach": False}
    assert torch.autograd.gradcheck(
        lambda c: align_layers(c, method, **options), costs.requires_grad_()
    )
    assert not align_layers(costs, method).requires_grad


@pytest.mark.parametrize("method", METHODS)
def test_dtypes(method):
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        weights = align_layers(torch.rand(3, 2).to(dtype).requires_grad_(), method)
        assert weights.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert not weights.requires_grad


@pytest.mark.parametrize("method", [m for m in METHODS if m != "emd"])
def test_compiled(method):
    torch._dynamo.reset()
    costs = torch.rand(3, 4, generator=torch.Generator().manual_seed(4))
    function = torch.compile(align_layers, fullgraph=True, backend="aot_eager")
    assert torch.equal(function(costs, method), align_layers(costs, method))


def test_emd_is_left_to_eager_mode():
    torch._dynamo.reset()
    costs = torch.rand(3, 4, generator=torch.Generator().manual_seed(4)).requires_grad_()

    def loss(costs):
        return (align_layers(2 * costs, "emd") * costs).sum()

    found = torch.compile(loss, backend="aot_eager")(costs)
    assert torch.equal(found, loss(costs))
    assert torch.equal(*[torch.autograd.grad(x, costs)[0] for x in (found, loss(costs))])
    torch._dynamo.reset()
    with pytest.raises(RuntimeError, match=r"align_layers is not a graph.*emd.*fullgraph"):
        torch.compile(loss, backend="aot_eager", fullgraph=True)(costs)


def test_masses_of_the_teacher_alone_set_the_sum():
    weights = align_layers(torch.rand(2, 3), "emd", masses=(None, [2.0, 0.0, 1.0]))
    assert torch.equal(weights.sum(1), torch.tensor([1.5, 1.5]))
    assert torch.equal(weights.sum(0), torch.tensor([2.0, 0.0, 1.0]))


COSTS = torch.rand(2, 3, generator=torch.Generator().manual_seed(3))
NAN = COSTS.clone().index_put_((torch.tensor(0), torch.tensor(1)), torch.tensor(torch.nan))
ERRORS = [
    ((COSTS, "hungarian"), {}, ValueError, "method='hungarian' is not one of 'argmin', 'monotone'"),
    ((COSTS.tolist(),), {}, TypeError, "costs must be a tensor, got list"),
    ((COSTS.long(),), {}, TypeError, "pass floating-point costs"),
    ((COSTS[0],), {}, ValueError, r"costs has shape \(3,\): pass \(student layers, teacher"),
    ((COSTS[None],), {}, ValueError, r"costs has shape \(1, 2, 3\)"),
    ((COSTS[:, :0],), {}, ValueError, r"costs has shape \(2, 0\): there must be at least one"),
    ((NAN,), {}, ValueError, "costs has 1 entries that are NaN or infinite"),
    ((NAN, "emd"), {}, ValueError, "costs has 1 entries that are NaN or infinite"),
    ((COSTS, "attention"), {"epsilon": 0.0}, ValueError, "epsilon=0.0 must be finite and greater"),
    ((COSTS, "sinkhorn"), {"epsilon": -1}, ValueError, "epsilon=-1 must be finite and greater"),
    ((COSTS, "emd"), {"epsilon": 1.0}, ValueError, "epsilon=1.0 has no effect on method='emd'"),
    ((COSTS, "sinkhorn"), {"iterations": 0}, ValueError, "iterations=0 must be at least 1"),
    ((COSTS, "sinkhorn"), {"iterations": 2.0}, TypeError, "iterations must be an int"),
    ((COSTS, "emd"), {"detach": False}, ValueError, "those of method='emd' are steps"),
    ((COSTS, "attention"), {"detach": 0}, TypeError, "detach must be a bool"),
    ((COSTS, "emd"), {"masses": [0.5, 0.5, 1.0]}, ValueError, "masses must be a pair"),
    ((COSTS, "emd"), {"masses": ([1.0], None)}, ValueError, r"masses\[0\] has shape \(1,\), but"),
    ((COSTS, "emd"), {"masses": (None, "ab")}, TypeError, r"masses\[1\] must be numbers"),
    ((COSTS, "emd"), {"masses": ([1.0, -1.0], None)}, ValueError, "must be finite and at least 0"),
    ((COSTS, "emd"), {"masses": ([0.0, 0.0], None)}, ValueError, "one of them above 0"),
    (
        (COSTS, "emd"),
        {"masses": ([1.0, 1.0], [1.0, 1.0, 1.0])},
        ValueError,
        "masses sum to 2 over the student's layers and to 3 over the teacher's",
    ),
    (
        (COSTS, "attention"),
        {"masses": (None, [1.0, 1.0, 1.0])},
        ValueError,
        "method='attention' leaves free",
    ),
    (
        (COSTS,),
        {"masses": (torch.ones(2, requires_grad=True), None)},
        ValueError,
        r"masses\[0\] requires grad",
    ),
]


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"), ERRORS, ids=[e[3][:40] for e in ERRORS]
)
def test_errors(arguments, options, error, message):
    with pytest.raises(error, match=message):
        align_layers(*arguments, **options)
