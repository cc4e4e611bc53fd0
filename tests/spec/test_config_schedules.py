"""Schedules in `FDDConfig`: texts, equality, and errors that name what does not go together."""

import json
import pickle
from dataclasses import asdict, replace

import pytest

from fdd_kernels import FDDConfig, GradientBalance, Stages, TAIDSchedule, WeightSchedule


class Own(WeightSchedule):
    """A schedule whose text does not say what it does."""

    def at(self, step: int) -> float:
        return 0.5


LINEAR = WeightSchedule(0, 1, 0, 9)
WRONG = [
    ({"schedules": {"alpha": Own(0, 1, 0, 9)}}, TypeError, "a WeightSchedule or its text, got Own"),
    ({"schedules": ""}, ValueError, "schedules='' has a part without a name: write name="),
    ({"schedules": "alpha=linear:0,1,0,5;"}, ValueError, "has a part without a name"),
    ({"stages": "a=5:;b:"}, ValueError, "stages='a=5:;b:' names no option"),
    ({"schedules": 3}, TypeError, "schedules must be a mapping of names to schedules"),
    ({"schedules": {"alpha": 3}}, TypeError, "schedules: alpha must be a WeightSchedule or its"),
    ({"schedules": "alpha"}, ValueError, "schedules: alpha: '' is no WeightSchedule: write linear"),
    (
        {"schedules": "teacher_mix=tait:9"},
        ValueError,
        r"schedules: teacher_mix: 'tait:9' is no WeightSchedule: write linear:.*; or a "
        r"TAIDSchedule: taid:total_steps\[,start",
    ),
    ({"schedules": "teacher_mix=taid"}, ValueError, "'taid' is no TAIDSchedule: write taid:total"),
    ({"schedules": "alpha=linear:0,1,0,5;alpha=linear:0,1,0,5"}, ValueError, "an option twice"),
    ({"schedules": {"num_layers": LINEAR}}, ValueError, "schedules names 'num_layers', which is"),
    ({"schedules": {"alpha": TAIDSchedule(9)}}, ValueError, "gives alpha a TAIDSchedule, which"),
    ({"schedules": {"alpha": LINEAR}, "alpha": 0.3}, ValueError, "alpha=0.3 was given beside"),
    (
        {"schedules": {"alpha": LINEAR}, "stages": "a:alpha=1"},
        ValueError,
        "alpha is in schedules and in stages",
    ),
    ({"stages": "a:backend=1"}, ValueError, "stages names 'backend', which is not one of alpha"),
    ({"stages": LINEAR}, TypeError, "stages must be a Stages or its text, got WeightSchedule"),
    ({"stages": "a=5:temperature=1;b:temperature=0"}, ValueError, r"temperature=0.*at step 5\)"),
    ({"schedules": {"temperature": LINEAR}}, ValueError, r"temperature=0.*at step 0\)"),
    ({"schedules": "teacher_mix=linear:1,2,0,1"}, ValueError, r"teacher_mix=2.*at step 1\)"),
    (
        {"schedules": "teacher_mix=taid:9", "trajectory": "jsd"},
        ValueError,
        r"teacher_mix=0.4 mixes the target of KL, but trajectory='jsd'.*at step 0\)",
    ),
    (
        {"schedules": {"alpha": LINEAR}, "output_kd_weight": 0, "beta": 0},
        ValueError,
        "at step 0 the schedule gives output_kd_weight=0, alpha=0.*there is nothing to learn",
    ),
    (
        {"schedules": {"output_kd_weight": LINEAR}, "num_layers": 0},
        ValueError,
        "output_kd_weight=0, alpha=1, beta=1, ce_weight=0 and there are 0 layers",
    ),
    ({"gradient_balance": "loss=1"}, ValueError, "names 'loss', which is not one of output_kd"),
    ({"gradient_balance": "ce=1,alpha=2"}, ValueError, "names 'alpha', which is not one of"),
    ({"gradient_balance": "ce=1"}, ValueError, "names ce, which has no weight at any step"),
    (
        {"gradient_balance": "derivative=1", "num_layers": 1},
        ValueError,
        "names derivative, which has no weight",
    ),
    ({"gradient_balance": "derivative=1", "derivative": None}, ValueError, "names derivative"),
    ({"gradient_balance": 3}, TypeError, "gradient_balance must be a GradientBalance or its text"),
]


@pytest.mark.parametrize(
    ("options", "error", "message"), WRONG, ids=[str(w[0])[:60] for w in WRONG]
)
def test_bad_schedules_are_named(options, error, message):
    with pytest.raises(error, match=message):
        FDDConfig(**options)


def test_a_config_has_its_schedules_as_text():
    """Objects and texts make equal configs; what they were made of is not shared."""
    given = {
        "schedules": {"alpha": WeightSchedule(0, 1, 2, 9), "teacher_mix": TAIDSchedule(8)},
        "stages": Stages([("a", 4, {"ce_weight": 0}), ("b", None, {"ce_weight": 0.5})]),
        "gradient_balance": GradientBalance({"output_kd": 1, "ce": 0.5}, every=7),
    }
    texts = {
        "schedules": "alpha=linear:0,1,2,9;teacher_mix=taid:8",
        "stages": "a=4:ce_weight=0;b:ce_weight=0.5",
        "gradient_balance": "ce=0.5,output_kd=1;every=7",
    }
    config = FDDConfig(**given)
    assert config == FDDConfig(**texts)
    assert {name: getattr(config, name) for name in texts} == texts
    for found in (
        FDDConfig(**json.loads(json.dumps(asdict(config)))),
        pickle.loads(pickle.dumps(config)),
        replace(config),
        eval(repr(config), {"FDDConfig": FDDConfig}),
    ):
        assert found == config
        assert hash(found) == hash(config)
    assert config != FDDConfig(**texts | {"stages": "a:ce_weight=0.5"})
    other_order = {
        "schedules": "teacher_mix=taid:8;alpha=linear:0,1,2,9",
        "gradient_balance": "output_kd=1,ce=0.5;every=7",
    }
    assert FDDConfig(**texts | other_order) == config
    first, second = (f"a=4:{w};b:{w}" for w in ("alpha=1,ce_weight=0", "ce_weight=0,alpha=1"))
    assert FDDConfig(stages=first) == FDDConfig(stages=second) != FDDConfig(stages=first[:-1] + "1")
    assert config.changes == tuple(texts)
    assert FDDConfig().changes == ()
    assert (config.ever("alpha"), config.ever("ce_weight"), config.ever("beta")) == (1, 0.5, 1)
    given["schedules"]["teacher_mix"].update(1.0)
    with pytest.raises(ValueError, match=r"teacher_mix=.* has a state .*load_state_dict"):
        FDDConfig(**given)


def test_only_turns_matter():
    """A weight is 0 at the steps where its schedule is at an end that is 0, and nowhere else."""
    config = FDDConfig(
        schedules="alpha=linear:0,1,3,9;beta=cosine:1,0,0,5", stages="a=4:ce_weight=1;b:ce_weight=0"
    )
    found = [(v["alpha"] > 0, v["beta"] > 0, v["ce_weight"] > 0) for v in config.values_at_turns()]
    alpha, beta = WeightSchedule(0, 1, 3, 9), WeightSchedule(1, 0, 0, 5, "cosine")
    every = {(alpha.at(s) > 0, beta.at(s) > 0, s < 4) for s in range(20)}
    assert set(found) == every
