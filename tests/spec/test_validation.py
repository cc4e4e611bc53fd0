"""Errors for bad input name the argument, before any work."""

from __future__ import annotations

import json
import pickle
import re
import warnings
from dataclasses import asdict, dataclass, replace

import pytest
import torch

from fdd_kernels import FDDConfig, FusedFDDLoss, backends, fdd_loss_reference, fused_fdd_loss
from fdd_kernels.objectives.fdd import api
from fdd_kernels.objectives.fdd.options import LossOptions
from fdd_kernels.objectives.numbers import DEBUG_SWITCH
from fdd_kernels.testing import evaluate, random_problem

INF, NAN = float("inf"), float("nan")
BASE = random_problem(layers=3, bias="plain", labels=True, mask=True)
FEATURES = random_problem(columns=12, layers=3, feature_space=True)
META = torch.device("meta")


@pytest.fixture
def _no_work(monkeypatch):
    """Nothing may be computed: not the operations, not the reference."""

    def fail(*_, **__):
        raise AssertionError("work was done before the arguments were checked")

    monkeypatch.setattr(api, "evaluate", fail)


def at(states, index, state):
    return (*states[:index], state, *states[index + 1 :])


WRONG_TENSORS = [
    # changed arguments, error, part of its message
    ({"student_hidden": ()}, ValueError, "student_hidden is empty"),
    (
        {"student_hidden": 3},
        TypeError,
        "student_hidden must be a tensor or a sequence of tensors, got int",
    ),
    ({"teacher_hidden": "abc"}, TypeError, r"teacher_hidden\[0\] must be a tensor, got str"),
    (
        {"student_hidden": at(BASE.student_hidden, 1, None)},
        TypeError,
        r"student_hidden\[1\] must be a tensor, got NoneType",
    ),
    (
        {"student_hidden": at(BASE.student_hidden, 2, BASE.student_hidden[2].long())},
        TypeError,
        r"student_hidden\[2\] is a int64 tensor of shape \(2, 5, 8\)",
    ),
    (
        {"student_hidden": at(BASE.student_hidden, 1, BASE.student_hidden[1][:1])},
        ValueError,
        r"student_hidden\[1\] has shape \(1, 5, 8\), student_hidden\[0\] has \(2, 5, 8\)",
    ),
    (
        {"teacher_hidden": at(BASE.teacher_hidden, 2, BASE.teacher_hidden[2][..., :4])},
        ValueError,
        r"teacher_hidden\[2\] has shape",
    ),
    (
        {"student_hidden": tuple(h[..., :0] for h in BASE.student_hidden)},
        ValueError,
        "student_hidden has width 0",
    ),
    ({"student_hidden": torch.tensor(1.0)}, ValueError, "student_hidden"),
    (
        {"student_hidden": BASE.student_hidden[:2]},
        ValueError,
        "student_hidden has 2 layers and teacher_hidden 3",
    ),
    (
        {"teacher_hidden": tuple(h[:, :4] for h in BASE.teacher_hidden)},
        ValueError,
        r"teacher_hidden has leading shape \(2, 4\), student_hidden \(2, 5\)",
    ),
    ({"student_weight": None}, TypeError, "student_weight is None"),
    (
        {"student_weight": BASE.student_weight.tolist()},
        TypeError,
        "student_weight must be a tensor, got list",
    ),
    (
        {"student_weight": BASE.student_weight.to(torch.int8)},
        TypeError,
        "student_weight is a int8 tensor.*dequantise",
    ),
    (
        {"student_weight": BASE.student_weight.detach().to_sparse()},
        TypeError,
        "student_weight has layout",
    ),
    ({"student_weight": BASE.student_weight.T}, ValueError, r"student_weight has shape \(8, 37\)"),
    (
        {"student_weight": BASE.student_weight[:, :5]},
        ValueError,
        r"student_weight has shape \(37, 5\).*width 8",
    ),
    ({"student_weight": BASE.student_weight[0]}, ValueError, r"student_weight has shape \(8,\)"),
    ({"student_weight": BASE.student_weight[:0]}, ValueError, r"student_weight has shape \(0, 8\)"),
    (
        {"teacher_weight": BASE.teacher_weight[:30], "teacher_bias": None},
        ValueError,
        "student_weight has 37 rows and teacher_weight 30.*vocab_size",
    ),
    ({"student_bias": BASE.student_bias[:5]}, ValueError, r"student_bias has shape \(5,\)"),
    ({"teacher_bias": BASE.teacher_bias[None]}, ValueError, r"teacher_bias has shape \(1, 37\)"),
    ({"student_bias": 0.5}, TypeError, "student_bias must be a tensor, got float"),
    ({"student_weight": BASE.student_weight.to(META)}, ValueError, "student_weight is on meta"),
    (
        {"teacher_hidden": at(BASE.teacher_hidden, 1, BASE.teacher_hidden[1].to(META))},
        ValueError,
        r"teacher_hidden\[1\] is on meta",
    ),
    ({"teacher_bias": BASE.teacher_bias.to(META)}, ValueError, "teacher_bias is on meta"),
    ({"labels": BASE.labels.to(META)}, ValueError, "labels is on meta"),
    ({"mask": BASE.mask.to(META)}, ValueError, "mask is on meta"),
    ({"labels": BASE.labels.float()}, TypeError, "labels is a float32 tensor.*int64"),
    ({"labels": BASE.labels.tolist()}, TypeError, "labels must be a tensor, got list"),
    ({"labels": BASE.labels[:, :3]}, ValueError, r"labels has shape \(2, 3\).*\(2, 5\)"),
    ({"labels": BASE.labels.reshape(-1)}, ValueError, r"labels has shape \(10,\)"),
    ({"mask": BASE.mask.float()}, TypeError, "mask is a float32 tensor.*bool"),
    ({"mask": BASE.mask[:1]}, ValueError, r"mask has shape \(1, 5\)"),
    (
        {"token_weights": torch.ones(2, 4)},
        ValueError,
        r"token_weights has shape \(2, 4\), .*\(2, 5\)",
    ),
    ({"token_weights": 1.0}, TypeError, "token_weights must be a tensor, got float"),
    (
        {"token_weights": torch.ones(2, 5, dtype=torch.int64)},
        TypeError,
        "token_weights is a int64 tensor",
    ),
    ({"token_weights": torch.full((2, 5), NAN)}, ValueError, "token_weights contains nan"),
    ({"token_weights": torch.full((2, 5), INF)}, ValueError, "token_weights contains inf"),
    ({"token_weights": torch.full((2, 5), -1.0)}, ValueError, "token_weights contains -1.0"),
    (
        {"token_weights": torch.ones(2, 5, requires_grad=True)},
        ValueError,
        "token_weights requires grad",
    ),
    ({"token_weights": torch.ones(2, 5).to(META)}, ValueError, "token_weights is on meta"),
    (
        {"labels": BASE.labels.where(BASE.labels >= 0, 37)},
        ValueError,
        r"labels contains 37.*\[0, 37\)",
    ),
    (
        {"labels": torch.full_like(BASE.labels, -1)},
        ValueError,
        "labels contains -1, which is neither ignore_index=-100",
    ),
    (
        {"teacher_weight": BASE.teacher_weight.clone().requires_grad_()},
        ValueError,
        "teacher_weight requires grad",
    ),
    (
        {"teacher_bias": BASE.teacher_bias.clone().requires_grad_()},
        ValueError,
        "teacher_bias requires grad",
    ),
    (
        {
            "teacher_hidden": at(
                BASE.teacher_hidden, 1, BASE.teacher_hidden[1].clone().requires_grad_()
            )
        },
        ValueError,
        r"teacher_hidden\[1\] requires grad.*detach",
    ),
]

WRONG_OPTIONS = [
    *[
        ({name: -0.1}, ValueError, f"{name}=-0.1")
        for name in ("alpha", "beta", "output_kd_weight", "ce_weight")
    ],
    *[
        ({name: NAN}, ValueError, f"{name}=nan")
        for name in ("alpha", "beta", "output_kd_weight", "ce_weight")
    ],
    *[
        ({name: True}, TypeError, f"{name} must be a number, got bool")
        for name in ("alpha", "temperature")
    ],
    *[
        ({name: value}, ValueError, f"{name}={value}")
        for name in (
            "temperature",
            "output_temperature",
            "student_softcap",
            "teacher_softcap",
            "student_logit_scale",
            "teacher_logit_scale",
        )
        for value in (0, -1.0, INF, NAN)
    ],
    ({"temperature": "hot"}, TypeError, "temperature must be a number, got str"),
    ({"temperature": torch.tensor(2.0)}, TypeError, "temperature must be a number, got Tensor"),
    ({"temperature": None}, TypeError, "temperature must be a number, got NoneType"),
    ({"trajectory": "js"}, ValueError, "trajectory='js' is not one of kl, reverse_kl.* or cosine"),
    ({"trajectory": None}, TypeError, 'trajectory must be a string such as "kl", got NoneType'),
    ({"trajectory": "jsd:2"}, ValueError, r"trajectory='jsd:2' has beta 2, .*\[0, 1\]$"),
    ({"trajectory": "jsd:"}, ValueError, "trajectory='jsd:' has a parameter that is no number"),
    ({"trajectory": "kl:1"}, ValueError, "trajectory='kl:1' gives 1 parameter.* kl takes 0"),
    ({"trajectory": "skew_kl:nan"}, ValueError, "trajectory='skew_kl:nan' has alpha nan"),
    (
        {"output_divergence": "alpha_beta:inf,1"},
        ValueError,
        r"output_divergence='alpha_beta:inf,1' has alpha inf, which is not in \[0, 100\]",
    ),
    *[
        ({name: text}, ValueError, f"{name}='{text}'{message}")
        for name, text, message in (
            ("output_divergence", "jsd:-0.1", r" has beta -0.1, which is not in \[0, 1\]"),
            ("trajectory", "skew_kl:1", r" has alpha 1, which is not in \[0, 1\)"),
            ("output_divergence", "skew_reverse_kl:-1", r" has alpha -1, .*\[0, 1\)"),
            ("trajectory", "alpha_beta:0,0", ": alpha and beta are both 0: one of them must be"),
            ("trajectory", "alpha_beta:101,1", r" has alpha 101, which is not in \[0, 100\]"),
            ("output_divergence", "alpha_beta:1,1e3", r" has beta 1000, .*\[0, 100\]"),
            ("trajectory", "jsd:0.1,0.2", r" gives 2 .*jsd takes 1: write jsd\[:beta\]"),
            ("output_divergence", "alpha_beta:0.2", r" gives 1 .*alpha_beta takes 2: write alpha_"),
            ("output_divergence", "jsd:half", " has a parameter that is no number: write jsd"),
        )
    ],
    *[
        ({"derivative_temperature": value}, ValueError, f"derivative_temperature={value} must be")
        for value in (-1.0, INF, NAN)
    ],
    ({"derivative_temperature": "1"}, TypeError, "derivative_temperature must be a number"),
    ({"layer_weights": (1, 1), "output_in_dynamics": True}, ValueError, "the trajectory 3 layers"),
    ({"layer_weights": ()}, ValueError, "has 0 entries and the trajectory 2 layers: give one"),
    ({"teacher_mix": NAN}, ValueError, "teacher_mix=nan must be"),
    ({"teacher_mix": None}, TypeError, "teacher_mix must be a number, got NoneType"),
    (
        {"teacher_mix": 0.5, "trajectory": "mse"},
        ValueError,
        "but trajectory='mse': use trajectory=.kl., a weight of 0 for that term, or teacher_mix",
    ),
    ({"output_divergence": "mse"}, ValueError, "output_divergence='mse' is not one of kl"),
    ({"layer_weights": 1.0}, TypeError, "layer_weights must be a sequence of numbers, got 1.0"),
    ({"layer_weights": "1,2"}, TypeError, "layer_weights must be a sequence of numbers, got '1,2'"),
    ({"layer_weights": (1, 2, 3)}, ValueError, "layer_weights=.* 3 entries and the trajectory 2"),
    ({"layer_weights": (1, NAN)}, ValueError, "layer_weights entry=nan"),
    ({"layer_weights": (1, -1.0)}, ValueError, "layer_weights entry=-1.0"),
    ({"layer_weights": (1, "x")}, TypeError, "layer_weights entry must be a number, got str"),
    ({"derivative_temperature": 0.0}, ValueError, "derivative_temperature=0.0"),
    ({"teacher_mix": 1.1}, ValueError, r"teacher_mix=1.1 must be in \[0, 1\]"),
    ({"teacher_mix": -0.1}, ValueError, "teacher_mix=-0.1"),
    (
        {"teacher_mix": 0.5, "trajectory": "jsd"},
        ValueError,
        "teacher_mix=0.5 mixes the target of KL, but trajectory='jsd'",
    ),
    (
        {"teacher_mix": 0.5, "output_divergence": "tv"},
        ValueError,
        "teacher_mix=0.5 mixes the target of KL, but output_divergence='tv'",
    ),
    ({"derivative": "l2"}, ValueError, "derivative='l2' is not one of 'cosine'"),
    ({"reduction": "batchmean"}, ValueError, "reduction='batchmean' is not one of 'mean'"),
    ({"backend": "cuda"}, ValueError, "backend='cuda' is not one of 'auto'"),
    ({"ignore_index": 1.5}, TypeError, "ignore_index must be an int, got float"),
    ({"vocab_size": 38}, ValueError, "vocab_size=38 is larger than a vocabulary"),
    ({"vocab_size": 0}, ValueError, "vocab_size=0 must be at least 1"),
    ({"vocab_size": 12.0}, TypeError, "vocab_size must be an int, got float"),
    ({"vocab_size": 20, "ce_weight": 1.0}, ValueError, r"labels contains .*\[0, 20\)"),
    ({"num_items_in_batch": 0}, ValueError, "num_items_in_batch=0 must be greater than 0"),
    ({"num_items_in_batch": -3.0}, ValueError, "num_items_in_batch=-3.0"),
    ({"num_items_in_batch": NAN}, ValueError, "num_items_in_batch=nan"),
    (
        {"num_items_in_batch": "7"},
        TypeError,
        "num_items_in_batch must be a number or a tensor, got str",
    ),
    (
        {"num_items_in_batch": True},
        TypeError,
        "num_items_in_batch must be a number or a tensor, got bool",
    ),
    ({"num_items_in_batch": torch.ones(2)}, ValueError, r"num_items_in_batch has shape \(2,\)"),
    (
        {"num_items_in_batch": 2, "reduction": "none"},
        ValueError,
        'num_items_in_batch divides a sum, but reduction="none"',
    ),
    ({"labels": None, "ce_weight": 1.0}, ValueError, "ce_weight=1.0 needs labels"),
    ({"labels": None, "shift": True}, ValueError, "shift=True shifts the labels"),
    ({"alpha": 0, "beta": 0, "output_kd_weight": 0}, ValueError, "nothing to compute.*alpha=0"),
]

WRONG_FEATURES = [
    ({}, ValueError, "trajectory='kl' compares distributions"),
    (
        {"trajectory": "mse", "temperature": 2.0},
        ValueError,
        "temperature=2.0 was given with teacher_weight=None",
    ),
    ({"trajectory": "mse", "output_temperature": 2.0}, ValueError, "output_temperature=2.0"),
    (
        {"trajectory": "mse", "derivative_temperature": 2.0},
        ValueError,
        "derivative_temperature=2.0 was given with teacher_weight=None",
    ),
    (
        {"trajectory": "mse", "derivative": "weighted_cosine"},
        ValueError,
        "derivative='weighted_cosine' weighs tokens .* teacher_weight=None",
    ),
    (
        {"alpha": 0.0, "output_kd_weight": 0.0, "derivative": "mse", "teacher_mix": 0.5},
        ValueError,
        "teacher_mix=0.5 was given with teacher_weight=None",
    ),
    ({"trajectory": "mse", "student_softcap": 2.0}, ValueError, "student_softcap=2.0"),
    ({"trajectory": "mse", "teacher_logit_scale": 2.0}, ValueError, "teacher_logit_scale=2.0"),
    (
        {"trajectory": "mse", "vocab_size": 5},
        ValueError,
        "vocab_size=5 was given with teacher_weight=None",
    ),
    (
        {"trajectory": "mse", "ce_weight": 1.0, "labels": BASE.labels.clamp(0, 3)},
        ValueError,
        "ce_weight=1.0 needs logits",
    ),
    (
        {"trajectory": "mse", "teacher_bias": torch.zeros(12)},
        ValueError,
        "teacher_bias was given without teacher_weight",
    ),
    (
        {"trajectory": "mse", "student_weight": FEATURES.student_weight[:5]},
        ValueError,
        "student_weight has shape .*teacher's width 12",
    ),
    (
        {
            "trajectory": "mse",
            "student_hidden": FEATURES.student_hidden[-1],
            "teacher_hidden": FEATURES.teacher_hidden[-1],
        },
        ValueError,
        "feature space.*last hidden state alone",
    ),
]


def name_of(case) -> str:
    return ",".join(case) if isinstance(case, dict) else None


@pytest.mark.trap("teacher that requires grad")
@pytest.mark.usefixtures("_no_work")
@pytest.mark.parametrize("function", [fused_fdd_loss, fdd_loss_reference])
class TestErrors:
    @pytest.mark.parametrize(("change", "error", "message"), WRONG_TENSORS, ids=name_of)
    def test_tensors(self, function, change, error, message):
        with pytest.raises(error, match=f"(?s){message}"):
            function(**(BASE.arguments | change))

    @pytest.mark.parametrize(("change", "error", "message"), WRONG_OPTIONS, ids=name_of)
    def test_options(self, function, change, error, message):
        if function is fdd_loss_reference and "backend" in change:
            pytest.skip("the reference ignores backend")
        with pytest.raises(error, match=f"(?s){message}"):
            function(**(BASE.arguments | change))

    @pytest.mark.parametrize(("change", "error", "message"), WRONG_FEATURES, ids=name_of)
    def test_feature_space(self, function, change, error, message):
        with pytest.raises(error, match=f"(?s){message}"):
            function(**(FEATURES.arguments | change))


@pytest.mark.parametrize("trained", [True, False])
def test_a_teacher_that_requires_grad_is_fine_where_there_is_no_gradient(trained):
    teacher = {"teacher_weight": BASE.teacher_weight.clone().requires_grad_(trained)}
    with torch.no_grad():
        loss = fused_fdd_loss(**(BASE.arguments | teacher))
    assert loss == fused_fdd_loss(**BASE.arguments)


def test_wrong_labels_at_ignored_index_are_no_error():
    labels = torch.full_like(BASE.labels, 5)
    assert fused_fdd_loss(**(BASE.arguments | {"labels": labels}), ignore_index=5) == 0


def test_module_checks_its_options_when_it_is_built():
    with pytest.raises(ValueError, match="temperature=0 must be finite and greater than 0"):
        FusedFDDLoss(temperature=0)
    with pytest.raises(TypeError, match="tau"):
        FusedFDDLoss(tau=2.0)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"temperature": -1.0}, ValueError, "temperature=-1.0"),
        ({"trajectory": "l1"}, ValueError, "trajectory='l1'"),
        ({"num_layers": -1}, ValueError, "num_layers=-1"),
        ({"num_layers": 2.0}, TypeError, "num_layers must be an int"),
        ({"layer_grid": "ceil"}, ValueError, "layer_grid='ceil' is not one of 'floor', 'linspace'"),
        (
            {"student_layers": (1, 2)},
            ValueError,
            "student_layers and teacher_layers must be given together",
        ),
        (
            {"student_layers": (1, 2), "teacher_layers": (1,)},
            ValueError,
            r"student_layers=\(1, 2\) and teacher_layers=\(1,\) are unequal numbers of layers",
        ),
        (
            {"student_layers": (1.5,), "teacher_layers": (1,)},
            TypeError,
            "student_layers entry must be an int",
        ),
        ({"student_logit_scale": 0.0}, ValueError, "student_logit_scale=0.0"),
        (
            {"layer_weights": [1, 2]},
            ValueError,
            r"layer_weights=\(1, 2\) has 2 entries and the trajectory 4 layers",
        ),
        (
            {
                "layer_weights": [1],
                "student_layers": (2,),
                "teacher_layers": (3,),
                "output_in_dynamics": True,
            },
            ValueError,
            r"layer_weights=\(1,\) has 1 entries and the trajectory 2 layers",
        ),
        ({"layer_weights": ()}, ValueError, r"layer_weights"),
        ({"layer_weights": []}, ValueError, r"layer_weights"),
        ({"reduction": "none"}, ValueError, 'reduction="none" has no meaning for a training step'),
        ({"unknown": 1}, TypeError, "unknown"),
    ],
    ids=name_of,
)
def test_config(options, error, message):
    with pytest.raises(error, match=message):
        FDDConfig(**options)


def test_the_published_setting_does_not_depend_on_the_defaults():
    published = {"output_kd_weight": 1, "alpha": 1, "beta": 1, "ce_weight": 0, "trajectory": "kl"}
    published |= {"derivative": "cosine", "output_divergence": "kl", "num_layers": 4}
    published |= {"layer_grid": "floor", "temperature": 1, "output_temperature": 1}
    assert FDDConfig.paper() == FDDConfig(**published)

    @dataclass(frozen=True)
    class Other(FDDConfig):
        beta: float = 0.5
        derivative: str | None = "none"
        layer_grid: str = "linspace"

    assert asdict(Other.paper()) == asdict(FDDConfig.paper())
    changed = FDDConfig.paper(beta=0.0, apply_final_norm=False)
    assert changed == replace(FDDConfig.paper(), beta=0.0, apply_final_norm=False)
    with pytest.raises(ValueError, match="alpha=-1"):
        FDDConfig.paper(alpha=-1.0)


def test_a_training_has_the_weighted_derivative_unless_another_is_given():
    assert FDDConfig().derivative == "weighted_cosine"
    assert FDDConfig(space="feature", trajectory="mse").derivative == "cosine"  # no probabilities
    for given in ("cosine", "mse", None):
        assert FDDConfig(derivative=given).derivative == given
        assert replace(FDDConfig(), derivative=given).derivative == given
    assert FDDConfig.paper().derivative == LossOptions().derivative == "cosine"


def test_config_is_frozen_and_keeps_lists_as_tuples():
    config = FDDConfig(student_layers=[2, 4], teacher_layers=[9, 18], layer_weights=[1, 0.5])
    assert (config.student_layers, config.teacher_layers) == ((2, 4), (9, 18))
    assert config.layer_weights == (1, 0.5)
    with pytest.raises(AttributeError):
        config.alpha = 2.0


def test_a_config_goes_through_json_and_pickle():
    config = FDDConfig(
        trajectory="jsd:0.1",
        output_divergence="alpha_beta:0.2,0.7",
        derivative="weighted_cosine",
        derivative_temperature=2.0,
        layer_weights=(1.0, 0.5, 0.0, 2.0),
    )
    for found in (
        FDDConfig(**json.loads(json.dumps(asdict(config)))),
        pickle.loads(pickle.dumps(config)),
        replace(config),
    ):
        assert found == config
        assert hash(found) == hash(config)


def test_a_config_pickled_before_an_option_existed_has_its_default():
    config = FDDConfig(beta=0.5)
    for name in (
        *("output_divergence", "layer_weights", "derivative_temperature", "teacher_mix"),
        *("schedules", "stages", "gradient_balance"),
    ):
        del config.__dict__[name]
    assert pickle.loads(pickle.dumps(config)) == FDDConfig(beta=0.5)


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize(
    "name",
    ["student_hidden[1]", "teacher_hidden[2]", "student_weight", "teacher_weight", "teacher_bias"],
)
def test_debug_switch_names_the_tensor_that_is_not_finite(monkeypatch, name, bad):
    problem = BASE.map(lambda t: t.clone())
    field, _, index = name.partition("[")
    tensor = getattr(problem, field)
    tensor = tensor[int(index[:-1])] if index else tensor
    tensor.data.view(-1)[3] = bad
    monkeypatch.setenv(DEBUG_SWITCH, "1")
    if name == "teacher_bias" and bad == -INF:  # an impossible token
        fused_fdd_loss(**problem.arguments)
        return
    with pytest.raises(
        ValueError, match=re.escape(name) + " has 1 entries that are NaN or infinite"
    ):
        fused_fdd_loss(**problem.arguments)


@pytest.mark.parametrize("value", ["", "0"])
def test_debug_switch_off(monkeypatch, value):
    monkeypatch.setenv(DEBUG_SWITCH, value)
    problem = BASE.map(lambda t: t.clone())
    problem.student_weight.data[0, 0] = NAN
    assert fused_fdd_loss(**problem.arguments).isnan()


def test_finite_input_passes_the_debug_switch(monkeypatch):
    expected = fused_fdd_loss(**BASE.arguments)
    monkeypatch.setenv(DEBUG_SWITCH, "1")
    assert fused_fdd_loss(**BASE.arguments) == expected


class TestBackendThatCannotRun:
    REASON = "it needs a flux capacitor; install one"

    @pytest.fixture
    def broken(self, monkeypatch):
        """Make a registry whose "triton" backend is preferred and cannot run."""
        monkeypatch.setitem(
            backends.BACKENDS,
            "triton",
            backends.Backend(None, None, lambda device: self.REASON, devices=("cpu",), priority=99),
        )
        monkeypatch.setattr(backends, "_warned", set())

    @pytest.mark.usefixtures("broken")
    def test_named_raises_reason_and_remedy(self):
        with pytest.raises(
            RuntimeError, match=f'backend="triton" cannot run on device "cpu": {self.REASON}'
        ):
            fused_fdd_loss(**BASE.arguments, backend="triton")

    @pytest.mark.usefixtures("broken")
    def test_auto_falls_back_and_warns_once(self):
        with pytest.warns(
            UserWarning, match=f'"triton" backend is not used on "cpu": {self.REASON}'
        ):
            loss = fused_fdd_loss(**BASE.arguments)
        assert loss == fused_fdd_loss(**BASE.arguments, backend=backends.preference("cpu")[1])
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            fused_fdd_loss(**BASE.arguments)

    def test_unknown(self, monkeypatch):
        monkeypatch.delitem(backends.BACKENDS, "triton")
        with pytest.raises(ValueError, match="backend='triton' is not one of 'auto', 'reference'"):
            fused_fdd_loss(**BASE.arguments, backend="triton")


@pytest.mark.trap("empty batch")
@pytest.mark.parametrize("leading", [(0,), (2, 0), (0, 3)], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dense", [False, True])
def test_empty_batch(backend, leading, reduction, dense):
    backend = "reference" if dense else backend
    problem = random_problem(leading, labels=True, mask=True, bias="plain")
    outcome = evaluate(problem, backend=backend, reduction=reduction, ce_weight=1.0)
    for term in outcome.terms:
        assert term.shape == (leading if reduction == "none" else ())
        assert not term.any()
    assert outcome.gradients.keys() == problem.leaves.keys()
    for name, gradient in outcome.gradients.items():
        assert gradient.shape == problem.leaves[name].shape
        assert not gradient.any()


def test_module_without_grad_makes_no_graph():
    problem = replace(BASE.map(lambda t: t.detach()), student_bias=None).frozen(
        "student_hidden", "student_weight"
    )
    assert not fused_fdd_loss(**problem.arguments).requires_grad
