"""Schedules: the numbers of their formulas, and the same numbers after a resume in the middle."""

import json
import math

import pytest
import torch

from fdd_kernels import GradientBalance, Stages, TAIDSchedule, WeightSchedule, fused_fdd_loss
from fdd_kernels.testing import random_problem

PHASES = [
    ("dynamics", 3, {"alpha": 1.0, "ce_weight": 0.0}),
    ("both", 2, {"alpha": 0.5, "ce_weight": 0.5}),
    ("task", None, {"alpha": 0.0, "ce_weight": 1.0}),
]


def test_a_linear_and_a_cosine_weight():
    linear = WeightSchedule(1.0, 0.5, start=2, end=6)
    assert [linear.at(step) for step in range(8)] == [1, 1, 1, 0.875, 0.75, 0.625, 0.5, 0.5]
    cosine = WeightSchedule(0.0, 2.0, start=0, end=4, shape="cosine")
    expected = [1 - math.cos(math.pi * step / 4) for step in range(5)]
    assert [cosine.at(step) for step in range(5)] == pytest.approx(expected, rel=2**-50, abs=2**-50)
    assert cosine.at(9) == 2


def test_stages():
    stages, names = Stages(PHASES), []
    for _ in range(7):
        names.append(stages.name)
        assert stages.weights == next(w for name, _, w in PHASES if name == stages.name)
        stages.advance()
    assert names == ["dynamics"] * 3 + ["both"] * 2 + ["task"] * 2
    stages.weights["alpha"] = 7.0  # of a copy
    assert stages.weights["alpha"] == 0.0
    assert Stages([("only", 1, {})]).name == "only"


def taid_reference(losses, total, start=0.4, end=1.0, rate=5e-4, momentum=0.99):
    """The authors' update, in float64."""
    t, average, previous, found = start, 0.0, math.inf, []
    for step, loss in enumerate(losses):
        if math.isinf(previous):
            previous = loss
        else:
            change = (previous - loss) / (previous + 1e-15)
            average = momentum * average + (1 - momentum) * change
            delta = rate / (1 + math.exp(-average)) * (1 - t)
            t = min(end, max(start + (end - start) * step / total, t + delta))
            previous = loss
        found.append(t)
    return found


@pytest.mark.parametrize("rate", [0.0, 5e-4, 0.5])
def test_taid(rate):
    losses = [3.0 / (1 + step) + 0.1 * math.sin(5 * step) for step in range(40)]
    schedule = TAIDSchedule(40, rate=rate)
    assert schedule.t == 0.4
    got = [schedule.update(torch.tensor(loss, dtype=torch.float64)) for loss in losses]
    assert got == pytest.approx(taid_reference(losses, 40, rate=rate), rel=2**-45)
    assert got[0] == 0.4
    assert got == sorted(got)
    if rate == 0:
        assert got[20] == pytest.approx(0.4 + 0.6 * 20 / 40, rel=2**-50)
    for _ in range(3):
        schedule.update(0.1)
    assert schedule.t == 1.0


def test_taid_with_steps_of_several_updates():
    schedule = TAIDSchedule(10, rate=0.0)
    for update in range(8):
        schedule.update(1.0, step=update // 2)
    assert schedule.t == pytest.approx(0.4 + 0.6 * 3 / 10, rel=2**-50)
    assert TAIDSchedule(10, rate=0.0).update(0.0) == 0.4
    sharp = TAIDSchedule(10)
    assert all(math.isfinite(sharp.update(loss)) for loss in (1e-30, 1e9, 0.0, 0.0))


def quadratic(state, factors):
    """Terms whose gradients at the state are `factor` times the state."""
    return {name: factor * state.square().sum() / 2 for name, factor in factors.items()}


def test_gradient_balance():
    state = torch.tensor([3.0, 4.0], dtype=torch.float64, requires_grad=True)
    balance = GradientBalance({"a": 1.0, "b": 1.0, "c": 3.0}, every=2)
    weights = balance.update(quadratic(state, {"a": 1.0, "b": 2.0, "c": 6.0}), state)
    assert weights == pytest.approx(
        {"a": 3.0, "b": 1.5, "c": 1.5}, rel=2**-50
    )  # mean 15, 5, 10, 30
    # measured again at step 2 only
    other = {"a": 6.0, "b": 6.0, "c": 6.0}
    assert balance.update(quadratic(state, other), state) == weights
    again = balance.update(quadratic(state, other), state)
    assert again == pytest.approx({"a": 1.0, "b": 1.0, "c": 3.0}, rel=2**-50)
    terms = quadratic(state, {"a": 1.0, "b": 2.0, "c": 6.0})
    balance = GradientBalance(balance.ratios)
    total = sum(balance.update(terms, [state])[name] * terms[name] for name in terms)
    total.backward()  # the graph is still there
    assert state.grad.norm() == pytest.approx(15 + 15 + 45, rel=2**-50)


def test_gradient_balance_of_several_states_and_smoothing():
    states = [torch.full((4,), float(k), requires_grad=True) for k in (1, 2)]
    balance = GradientBalance({"a": 1.0, "b": 1.0}, every=1, smoothing=0.5)

    def terms(a, b):
        return {"a": a * sum(s.sum() for s in states), "b": b * states[1].sum()}

    balance.update(terms(1.0, 1.0), states)
    assert balance.lengths == pytest.approx({"a": math.sqrt(8), "b": 2.0}, rel=2**-50)
    balance.update(terms(3.0, 1.0), states)
    assert balance.lengths == pytest.approx({"a": 2 * math.sqrt(8), "b": 2.0}, rel=2**-50)


def test_a_term_without_gradient_keeps_its_weight():
    state = torch.ones(3, requires_grad=True)
    balance = GradientBalance({"a": 1.0, "b": 1.0}, every=1)
    terms = quadratic(state, {"a": 1.0, "b": 3.0})
    first = balance.update(terms, state)
    for nothing in (torch.zeros(()), 0 * state.sum(), torch.inf * state.sum()):
        weights = balance.update(terms | {"a": nothing}, state)
        assert weights == first
    balance = GradientBalance({"a": 1.0, "b": 2.0})
    assert balance.update(terms | {"a": torch.zeros(())}, state) == {"a": 1.0, "b": 2.0}
    balance = GradientBalance({"a": 1.0})
    assert balance.update({"a": torch.zeros(())}, state) == {"a": 1.0}


def test_the_terms_of_the_fused_loss_are_balanced(backend):
    """The gradient of each weighted term has one length, and the loss still has its gradient."""
    problem = random_problem(dtype=torch.float64)
    terms = fused_fdd_loss(**problem.arguments, backend=backend, return_terms=True)
    measured = {"output_kd": terms.output_kd, "trajectory": terms.trajectory}
    states = problem.student_hidden
    weights = GradientBalance(dict.fromkeys(measured, 1.0)).update(measured, states)
    lengths = []
    for name, term in measured.items():
        found = torch.autograd.grad(
            weights[name] * term, states, retain_graph=True, materialize_grads=True
        )
        lengths.append(math.sqrt(sum(float(g.square().sum()) for g in found)))
    assert lengths[0] == pytest.approx(lengths[1], rel=2**-40)
    assert torch.autograd.grad(terms.loss, states)[0].norm() > 0


def runs():
    """Pairs of how a schedule is made, and what one step does and returns."""
    state = torch.linspace(1, 2, 5, dtype=torch.float64, requires_grad=True)

    def balance(schedule, step):
        factors = {"a": 1.0 + step, "b": 2.0 + math.sin(step)}
        return schedule.update(quadratic(state, factors), state)

    def advance(schedule, step):
        now = schedule.value if isinstance(schedule, WeightSchedule) else schedule.weights
        schedule.advance()
        return now

    return [
        (lambda: WeightSchedule(0.1, 0.7, 2, 17, "cosine"), advance),
        (lambda: Stages(PHASES), advance),
        (lambda: GradientBalance({"a": 1.0, "b": 0.3}, every=3, smoothing=0.9), balance),
        (lambda: TAIDSchedule(20), lambda schedule, step: schedule.update(1 / (1 + step))),
    ]


@pytest.mark.parametrize("index", range(4))
@pytest.mark.parametrize("stop", [0, 1, 7, 20])
def test_a_resume_gives_the_same_numbers(index, stop):
    make, take = runs()[index]
    whole = make()
    expected = [take(whole, step) for step in range(20)]
    first = make()
    got = [take(first, step) for step in range(stop)]
    saved = json.loads(json.dumps(first.state_dict()))
    second = make()
    second.load_state_dict(saved)
    got += [take(second, step) for step in range(stop, 20)]
    assert got == expected
    assert second.state_dict() == whole.state_dict()
    if stop < 20:
        assert first.state_dict() == saved  # nothing is shared


TEXTS = [
    (WeightSchedule(0, 1, 0, 500), "linear:0,1,0,500"),
    (WeightSchedule(0.1, 1e-30, 3, 4, "cosine"), "cosine:0.1,1e-30,3,4"),
    (TAIDSchedule(1000), "taid:1000"),
    (TAIDSchedule(9, rate=0), "taid:9,0.4,1,0,0.99"),
    (
        Stages(PHASES),
        "dynamics=3:alpha=1,ce_weight=0;both=2:alpha=0.5,ce_weight=0.5;task:alpha=0,ce_weight=1",
    ),
    (Stages([("only", 1, {})]), "only=1:"),
    (GradientBalance({"b": 0.3, "a": 1}), "a=1,b=0.3"),
    (
        GradientBalance({"output_kd": 2}, every=7, smoothing=0.9),
        "output_kd=2;every=7;smoothing=0.9",
    ),
]


@pytest.mark.parametrize(("schedule", "text"), TEXTS, ids=[text for _, text in TEXTS])
def test_a_schedule_is_its_text(schedule, text):
    """Equality and hash are by the text; the state has no part in them."""
    kind = type(schedule)
    assert str(schedule) == text
    parsed = kind.parse(text)
    assert parsed == schedule
    assert hash(parsed) == hash(schedule)
    assert eval(repr(parsed), {kind.__name__: kind}) == schedule
    assert parsed.state_dict() == schedule.state_dict()
    parsed.step += 1
    assert parsed == schedule
    assert all((other == schedule) == (other is schedule) for other, _ in TEXTS)
    assert schedule != text


def test_the_text_of_a_number_has_its_bits():
    for value in (0.1 + 0.2, 1 / 3, 5e-324, 1.7e308, 1e16, 12345678.9):
        schedule = WeightSchedule(value, 0.0, 0, 1)
        assert WeightSchedule.parse(str(schedule)).initial == value
    assert TAIDSchedule.parse("taid:20,0.3,0.9").end == 0.9
    assert Stages.parse(" a = 3 : alpha = 1 ; b : alpha = 0 ") == Stages.parse(
        "a=3:alpha=1;b:alpha=0"
    )


def test_the_steps_of_stages():
    stages = Stages(PHASES)
    assert stages.begins == [0, 3, 5]
    assert [stages.at(step)["alpha"] for step in range(7)] == [1, 1, 1, 0.5, 0.5, 0, 0]
    assert stages.step == 0


WRONG = [
    *(
        (
            lambda kind=kind, text=text: kind.parse(text),
            ValueError,
            f"{text!r} is no {kind.__name__}: write",
        )
        for kind, texts in (
            (WeightSchedule, ("", "linear", "linear:0,1,0", "linear:0,1,0,x", "step:0,1,0,1")),
            (TAIDSchedule, ("taid", "taid:", "taid:1.5", "tait:5", "taid:5,0.4,1,0,0.99,1")),
            (Stages, ("", "a", "a=1", "a=x:alpha=1", "a:alpha", "a:alpha=1,alpha=2", "a:alpha=x")),
            (
                GradientBalance,
                ("a", "a=x", "a=1;every", "a=1;every=1.5", "a=1;each=3", "a=1;every=5;every=7"),
            ),
        )
        for text in texts
    ),
    (lambda: WeightSchedule.parse("linear:0,-1,0,9"), ValueError, "final=-1.0 must be finite"),
    (lambda: Stages([("a=b", 1, {})]), ValueError, 'use names without "=", ":" and ";"'),
    (lambda: WeightSchedule(-1, 0, 0, 1), ValueError, "initial=-1 must be finite and at least 0"),
    (lambda: WeightSchedule(1, math.nan, 0, 1), ValueError, "final=nan"),
    (lambda: WeightSchedule(1, 0, 3, 3), ValueError, "end=3 must be after start=3"),
    (lambda: WeightSchedule(1, 0, 0, 1.5), TypeError, "end must be an int, got float"),
    (lambda: WeightSchedule(1, 0, 0, 1, "step"), ValueError, "shape='step'.*'linear', 'cosine'"),
    (lambda: Stages([]), ValueError, "phases is empty"),
    (lambda: Stages([("a", 1, {}), ("a", 1, {})]), ValueError, "each must have its own"),
    (lambda: Stages([("a", None, {}), ("b", 1, {})]), TypeError, "steps of phase 'a' must be an"),
    (lambda: Stages([("a", 0, {})]), ValueError, "steps of phase 'a'=0 must be at least 1"),
    (
        lambda: Stages([("a", 1, {"alpha": 1}), ("b", 1, {"beta": 1})]),
        ValueError,
        "phase 'b' has weights .'beta'.*name the same",
    ),
    (lambda: Stages([("a", 1, {"alpha": -1})]), ValueError, "alpha of phase 'a'=-1"),
    (lambda: GradientBalance({}), ValueError, "ratios is empty"),
    (lambda: GradientBalance({"a": 0}), ValueError, "ratio of 'a'=0 must be.*greater than 0"),
    (lambda: GradientBalance({"a": 1}, every=0), ValueError, "every=0 must be at least 1"),
    (lambda: GradientBalance({"a": 1}, smoothing=1), ValueError, "smoothing=1 must be below 1"),
    (lambda: GradientBalance({"a": 1}).update({}, []), ValueError, r"terms are \[\], ratios"),
    (lambda: TAIDSchedule(0), ValueError, "total_steps=0 must be at least 1"),
    (lambda: TAIDSchedule(9, start=1.5), ValueError, r"start=1.5 must be in \[0, 1\]"),
    (lambda: TAIDSchedule(9, momentum=1), ValueError, r"momentum=1 must be in \[0, 1\)"),
    (lambda: TAIDSchedule(9, start=0.5, end=0.5), ValueError, "end=0.5 must be greater"),
    (lambda: TAIDSchedule(9).update(math.nan), ValueError, "loss=nan must be finite"),
    (lambda: TAIDSchedule(9).update(1.0, step=-1), ValueError, "step=-1 must be at least 0"),
    (
        lambda: TAIDSchedule(9).load_state_dict(Stages(PHASES).state_dict()),
        ValueError,
        r"the state has \['step'\], but TAIDSchedule has .*of another schedule",
    ),
]


@pytest.mark.parametrize(("make", "error", "message"), WRONG)
def test_bad_input_is_named(make, error, message):
    with pytest.raises(error, match=message):
        make()
