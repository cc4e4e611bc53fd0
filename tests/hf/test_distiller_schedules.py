"""Options that change during training: the distiller at each step against a plain call with the
numbers of that step.
"""

import json
from dataclasses import replace

import pytest
import torch

from fdd_kernels import (
    Distiller,
    FDDConfig,
    GradientBalance,
    Stages,
    TAIDSchedule,
    WeightSchedule,
)
from tests.support.dense import gradients, models
from tests.support.hf_models import tiny_batch

PLAIN = FDDConfig.paper(num_layers=3, ce_weight=0.5)
PHASES = [
    ("dynamics", 2, {"alpha": 1.0, "beta": 1.0, "ce_weight": 0.0, "output_kd_weight": 0.0}),
    ("output", 1, {"alpha": 0.0, "beta": 0.0, "ce_weight": 0.0, "output_kd_weight": 2.0}),
    ("task", None, {"alpha": 0.0, "beta": 0.0, "ce_weight": 1.0, "output_kd_weight": 0.0}),
]


def batches(count: int, parts: int = 1) -> list[list[dict]]:
    """`parts` micro-batches for each of `count` steps."""
    seeds = iter(range(100))
    return [[tiny_batch(seed=next(seeds)) for _ in range(parts)] for _ in range(count)]


def step_of(distiller, student, micro_batches, items=None, **call):
    """Compute the terms and gradients of one step."""
    student.zero_grad()
    found = []
    for batch in micro_batches:
        terms = distiller(batch, num_items_in_batch=items, **call)
        terms.loss.backward()
        found.append(torch.stack(list(terms)).detach())
    return torch.stack(found), gradients(student)


def require_same(found, expected):
    torch.testing.assert_close(found[0], expected[0], rtol=0, atol=0)
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=0, atol=0, msg=name)


WEIGHTS = {
    "alpha": WeightSchedule(0.0, 1.5, 1, 4),
    "beta": WeightSchedule(1.0, 0.0, 0, 3, "cosine"),
    "output_kd_weight": WeightSchedule(2.0, 1.0, 0, 5),
    "temperature": WeightSchedule(1.0, 3.0, 0, 4),
    "derivative_temperature": WeightSchedule(2.0, 1.0, 0, 4),
    "output_temperature": WeightSchedule(4.0, 1.0, 2, 3),
    "teacher_mix": WeightSchedule(0.2, 1.0, 0, 4),
}


@pytest.mark.parametrize("name", [*WEIGHTS, "all"])
def test_a_schedule_gives_a_plain_call_with_its_numbers(name):
    schedules = WEIGHTS if name == "all" else {name: WEIGHTS[name]}
    student, teacher = models()
    distiller = Distiller(student, teacher, replace(PLAIN, schedules=schedules))
    for step, parts in enumerate(batches(6, 2)):
        values = {key: schedule.at(step) for key, schedule in schedules.items()}
        plain = Distiller(student, teacher, replace(PLAIN, **values))
        require_same(step_of(distiller, student, parts, step=step), step_of(plain, student, parts))
        assert distiller.logged() == values


def test_stages_give_a_plain_call_with_their_numbers():
    student, teacher = models()
    distiller = Distiller(student, teacher, replace(PLAIN, ce_weight=0.0, stages=Stages(PHASES)))
    stages = Stages(PHASES)
    for step, parts in enumerate(batches(5)):
        plain = Distiller(student, teacher, replace(PLAIN, **stages.weights))
        found = step_of(distiller, student, parts, step=step)
        require_same(found, step_of(plain, student, parts))
        assert distiller.logged() == stages.weights
        stages.advance()
    # Without gradients: the last step, or the one that is named.
    batch = parts[0]
    with torch.no_grad():
        assert distiller(batch).ce > 0
        assert distiller(batch).trajectory == 0
        assert distiller(batch, step=0).trajectory > 0
        assert distiller(batch).ce > 0
    # Each stage runs no more of the models than it needs.
    assert distiller.teacher_states(batch)[-1] is not None
    assert len(distiller.teacher_states(batch)) == 4


def test_taid_takes_the_mean_of_its_terms_over_the_micro_batches():
    """Micro-batches of unequal numbers of tokens, with and without `num_items_in_batch`."""
    student, teacher = models()
    config = replace(PLAIN, ce_weight=0.0, alpha=0.5)
    for with_items in (True, False):
        schedule = TAIDSchedule(50, rate=0.2)
        distiller = Distiller(
            student, teacher, replace(config, schedules={"teacher_mix": "taid:50,0.4,1,0.2"})
        )
        for step, parts in enumerate(batches(5, 2)):
            parts[1]["labels"][:, :5] = -100
            counts = [int(distiller.count_positions(batch)) for batch in parts]
            assert counts[0] != counts[1]
            plain = Distiller(student, teacher, replace(config, teacher_mix=schedule.t))
            items = sum(counts) if with_items else None
            found = step_of(distiller, student, parts, items, step=step)
            require_same(found, step_of(plain, student, parts, items))
            assert distiller.logged() == {"teacher_mix": schedule.t}
            # The same sums in float64, in another order: a few roundings.
            weights = [1.0, 1.0] if with_items else [count / sum(counts) for count in counts]
            loss = sum(
                weight * (terms[1] + 0.5 * terms[2]) for weight, terms in zip(weights, found[0])
            )
            before = distiller.schedules.state_dict()["teacher_mix"]["previous"]
            assert before == pytest.approx(float(loss), rel=2**-48)
            schedule.update(before)


def only(config, term):
    names = {"output_kd": "output_kd_weight", "trajectory": "alpha", "derivative": "beta"}
    names |= {"ce": "ce_weight"}
    return replace(config, **dict.fromkeys(names.values(), 0.0) | {names[term]: 1.0})


def test_gradient_balance_has_the_weights_of_the_gradients_at_the_states():
    """Measured at steps 0 and 2, of the first micro-batch; its weights multiply the terms' own."""
    student, teacher = models()
    balance = GradientBalance({"output_kd": 1.0, "trajectory": 0.5, "ce": 2.0}, every=2)
    config = replace(PLAIN, alpha=3.0)
    distiller = Distiller(student, teacher, replace(config, gradient_balance=balance))
    expected = GradientBalance({"output_kd": 1.0, "trajectory": 0.5, "ce": 2.0}, every=2)
    for step, parts in enumerate(batches(4, 2)):
        lengths = {}
        for term in expected.ratios if expected.is_due else ():
            plain, states = Distiller(student, teacher, only(config, term)), []
            own = plain._compare.student_side

            def seen(*args, own=own, states=states, **options):
                side = own(*args, **options)
                states.extend(s for s in side.states if s is not None)
                return side

            plain._compare.student_side = seen
            loss = plain(parts[0]).loss
            found = torch.autograd.grad(loss, states, materialize_grads=True)
            lengths[term] = float(torch.stack([g.square().sum() for g in found]).sum().sqrt())
        factors = expected.advance(lengths)
        found = step_of(distiller, student, parts, step=step)
        logged = distiller.logged()
        names = {"output_kd": "output_kd_weight", "trajectory": "alpha", "ce": "ce_weight"}
        own = {"output_kd": 1.0, "trajectory": 3.0, "ce": 0.5}
        # A mean over tokens, and the same lengths by autograd of the same operations in float64.
        assert logged == pytest.approx(
            {names[term]: own[term] * factors[term] for term in names}, rel=2**-40
        )
        plain = Distiller(student, teacher, replace(config, **logged))
        require_same(found, step_of(plain, student, parts))
    assert factors["trajectory"] != 1


EVERYTHING = replace(
    PLAIN,
    ce_weight=0.0,
    schedules={"teacher_mix": TAIDSchedule(60, rate=0.2), "temperature": "cosine:1,2,0,6"},
    stages=Stages(
        [("a", 3, {"alpha": 1.0, "ce_weight": 0.0}), ("b", None, {"alpha": 0.2, "ce_weight": 1.0})]
    ),
    gradient_balance=GradientBalance({"output_kd": 1.0, "trajectory": 0.5}, every=2, smoothing=0.5),
    layer_alignment="monotone",
    alignment_every=3,
)


@pytest.mark.parametrize("stop", [1, 3, 4])
def test_a_state_gives_the_same_numbers(stop):
    student, teacher = models()
    steps = batches(6, 2)
    whole = Distiller(student, teacher, EVERYTHING)
    expected = [step_of(whole, student, parts, step=step) for step, parts in enumerate(steps)]
    first, second = (Distiller(student, teacher, EVERYTHING) for _ in range(2))
    for step, parts in enumerate(steps[:stop]):
        require_same(step_of(first, student, parts, step=step), expected[step])
    saved = json.loads(json.dumps(first.state_dict(), allow_nan=False))
    second.load_state_dict(saved)
    assert second.logged() == first.logged()
    assert second.state_dict() == saved
    for one in (first, second):  # to ask for a state changes nothing
        for step in range(stop, 6):
            require_same(step_of(one, student, steps[step], step=step), expected[step])
        assert one.state_dict() == whole.state_dict()
    # Step 0 begins anew.
    require_same(step_of(second, student, steps[0], step=0), expected[0])


def test_two_distillers_share_no_state():
    student, teacher = models()
    schedule = TAIDSchedule(30, rate=0.5)
    config = FDDConfig.paper(num_layers=3, schedules={"teacher_mix": schedule})
    one, other = (Distiller(student, teacher, config) for _ in range(2))
    for step, parts in enumerate(batches(3)):
        step_of(one, student, parts, step=step)
    assert one.logged()["teacher_mix"] > other.logged()["teacher_mix"] == schedule.t == 0.4


def test_a_stage_without_output_terms_is_told_to_ddp():
    """What gets a gradient at every step: the last stage does not need the sampled layers alone."""
    student, teacher = models()
    with_output = Distiller(student, teacher, FDDConfig.paper(num_layers=2))
    assert with_output.parameters_without_gradient() == []
    stages = "dynamics=3:output_kd_weight=0;both:output_kd_weight=1"
    found = Distiller(student, teacher, FDDConfig.paper(num_layers=2, stages=stages))
    plain = Distiller(student, teacher, FDDConfig.paper(num_layers=2, output_kd_weight=0.0))
    assert found.parameters_without_gradient() == plain.parameters_without_gradient() != []


def test_a_loss_that_is_not_finite_is_left_out_by_taid():
    student, teacher = models()
    distiller = Distiller(
        student, teacher, FDDConfig.paper(num_layers=3, schedules="teacher_mix=taid:9")
    )
    (batch,) = batches(1)[0:1]
    step_of(distiller, student, batch, step=0)
    state = distiller.state_dict()
    weight = student.lm_head.weight
    with torch.no_grad():
        saved = weight.clone()
        weight.fill_(torch.inf)
    distiller(batch[0], step=1)
    with torch.no_grad():
        weight.copy_(saved)
    assert distiller.state_dict()["schedules"]["teacher_mix"] == state["schedules"]["teacher_mix"]


def test_a_stage_without_its_terms_says_nothing_to_taid():
    """Nor does a step whose tokens all have weight 0: the relative drop would divide by 0."""
    student, teacher = models()
    stages = (
        "task=2:alpha=0,output_kd_weight=0,ce_weight=1;both:alpha=1,output_kd_weight=1,ce_weight=1"
    )
    config = FDDConfig.paper(num_layers=3, stages=stages, schedules="teacher_mix=taid:9,0.4,1,0.2")
    distiller, schedule = Distiller(student, teacher, config), TAIDSchedule(9, rate=0.2)
    for step, (batch,) in enumerate(batches(6)):
        if step == 4:
            batch["token_weights"] = torch.zeros(batch["labels"].shape)
        terms = distiller(batch, step=step)
        loss = float((terms.output_kd + terms.trajectory).detach())
        assert (loss == 0) == (step in (0, 1, 4))
        state = distiller.state_dict()["schedules"]["teacher_mix"]
        if loss:
            schedule.update(state["previous"], step=step)
        assert state == schedule.state_dict()
    assert abs(schedule.average) < 1


def test_gradient_balance_measures_until_it_finds_a_gradient():
    student, teacher = models()
    balance = "output_kd=1,trajectory=1;every=50"
    distiller = Distiller(student, teacher, FDDConfig.paper(num_layers=3, gradient_balance=balance))
    found = []
    for step, (batch,) in enumerate(batches(3)):
        if step == 0:
            batch["labels"][:] = -100
        distiller(batch, step=step)
        found.append(distiller.logged())
    assert found[0] == {"output_kd_weight": 1, "alpha": 1} != found[1] == found[2]


def test_errors_are_named():
    student, teacher = models()
    (parts,) = batches(1)
    batch = parts[0]
    distiller = Distiller(student, teacher, EVERYTHING)
    with pytest.raises(
        ValueError,
        match=r"step is missing.*\(schedules, stages, gradient_balance.*\): pass distiller\(batch",
    ):
        distiller(batch)
    with torch.no_grad():
        distiller(batch)
    with pytest.raises(TypeError, match="step must be an int, got float"):
        distiller(batch, step=1.0)
    with pytest.raises(ValueError, match="step=-1 must be at least 0"):
        distiller(batch, step=-1)
    distiller(batch, step=2)
    with pytest.raises(ValueError, match=r"step=1 is before the last one, 2"):
        distiller(batch, step=1)
    plain, before = Distiller(student, teacher, PLAIN), distiller.state_dict()
    paired = Distiller(student, teacher, replace(PLAIN, layer_alignment="monotone"))
    for state, message in (
        (paired.state_dict(), r"the state has \['step', 'values'\], but.*of another config"),
        (plain.state_dict(), "the state has no layer alignment, but.*of another config"),
        ({"step": 1}, r"the state has \['step'\]: it is not of a Distiller"),
    ):
        with pytest.raises(ValueError, match=message):
            distiller.load_state_dict(state)
        assert distiller.state_dict() == before
    weights = Distiller(student, teacher, replace(PLAIN, schedules="alpha=linear:0,1,0,9"))
    weights(batch, step=2)
    weights(batch, step=1)  # depends on the step alone
    assert plain.logged() == {}
    plain(batch, step=3)
