"""Compare every backend available here with the float64 reference: every term, gradient and
option.

Problems are tiny, so an interpreted kernel can take part; tests/numerics/test_accuracy.py has
larger ones.
"""

from __future__ import annotations

import functools
import inspect
import math
from dataclasses import replace

import pytest
import torch

from fdd_kernels import fused_fdd_loss
from fdd_kernels.backends.torch_stream import tiling
from fdd_kernels.lens.divergences import DERIVATIVES, TRAJECTORIES
from fdd_kernels.testing import Problem, assert_within_budget, evaluate, random_problem
from tests.support.options import FEATURE_DERIVATIVES, INTERPRETED, skip_what_triton_refuses

F32, F64 = torch.float32, torch.float64
# Most of an interpreted kernel's programs own a row: few rows, four of them valid under a mask, one
# of these without a label. tests/kernels/triton_*.py cross the edges of tiles.
drawn = functools.partial(random_problem, (2, 3), seed=1) if INTERPRETED else random_problem


def check(problem: Problem, backend: str, upstream=None, **options) -> None:
    """The backend is within its error budget, row by row."""
    if options.get("reduction") == "none" and upstream is None:
        upstream = torch.linspace(-1, 2, math.prod(problem.leading_shape)).reshape(
            problem.leading_shape
        )
        upstream = upstream.to(problem.student_weight.device)
    outcome = evaluate(problem, fused_fdd_loss, upstream, backend=backend, **options)
    assert_within_budget(problem, outcome, upstream, **options)


# Together: every option of the loss, each once with a value other than its default.
SMOKE = {
    "weights": {
        "alpha": 0.3,
        "beta": 0.7,
        "output_kd_weight": 1.9,
        "ce_weight": 0.4,
        "temperature": 2.0,
        "output_temperature": 3.0,
        "scale_by_t2": True,
        "reduction": "none",
    },
    "logits": {
        "trajectory": "jsd",
        "derivative": "centered_cosine",
        "student_softcap": 3.0,
        "teacher_softcap": 2.0,
        "student_logit_scale": 0.5,
        "teacher_logit_scale": 2.0,
        "output_in_dynamics": True,
        "num_items_in_batch": 3.5,
    },
    "tokens": {
        "trajectory": "reverse_kl",
        "derivative": "mse",
        "vocab_size": 30,
        "shift": True,
        "ignore_index": 7,
        "reduction": "sum",
    },
    "skew": {"trajectory": "skew_kl", "derivative": None},
    "angles": {"trajectory": "cosine", "temperature": 2.0},
    "features": {"trajectory": "mse", "output_in_dynamics": True},
    "output": {
        "trajectory": "jsd:0.7",
        "output_divergence": "jsd:0.1",
        "derivative": "weighted_cosine",
        "derivative_temperature": 0.5,
        "temperature": 2.0,
    },
    "layers": {"trajectory": "tv", "layer_weights": (0.5, 2.0), "derivative": None},
    "pairs": {
        "layer_weights": ((1.0, 0.5), (0.0, 2.0)),
        "derivative_layers": (0, 0),
        "derivative": "centered_cosine",
    },
    "powers": {"trajectory": "alpha_beta:0.4,0.8", "output_kd_weight": 0.0, "derivative": None},
    "reverse": {"trajectory": "skew_reverse_kl", "derivative": "weighted_cosine"},
    "mixture": {"teacher_mix": 0.4, "output_temperature": 2.0, "derivative": None},
}
WITH_TOKEN_WEIGHTS = ("output", "tokens")


def test_smoke_has_every_option():
    named = {name for options in SMOKE.values() for name in options}
    not_options = {*random_problem().arguments, "backend", "return_terms", "vocab_group"}
    assert named == set(inspect.signature(fused_fdd_loss).parameters) - not_options
    assert {*WITH_TOKEN_WEIGHTS} <= {*SMOKE}
    of = {name: {o.get(name) for o in SMOKE.values()} for name in ("trajectory", "derivative")}
    trajectories = {text.partition(":")[0] for text in of["trajectory"] if text}
    assert {*TRAJECTORIES} <= trajectories | {"kl"}
    assert {*DERIVATIVES, None} <= of["derivative"] | {"cosine"}


@pytest.mark.parametrize("name", SMOKE)
def test_smoke(backend, device, name):
    """Use every option in few calls: `make test` runs no more of an interpreted kernel."""
    options, features = SMOKE[name], name == "features"
    problem = drawn(
        device=device,
        columns=12 if features else 37,
        feature_space=features,
        bias=None if features else "plain",
        labels=True,
        mask=True,
        token_weights=name in WITH_TOKEN_WEIGHTS,
    )
    skip_what_triton_refuses(problem, backend, **options)
    if "ignore_index" in options:
        labels = problem.labels.where(problem.labels >= 0, options["ignore_index"])
        problem = replace(problem, labels=labels.clamp(max=options["vocab_size"] - 1))
    check(problem, backend, **options)


# No kernel knows the distance of the derivative, only sums of deltas with weights or without.
BESIDE_EVERY_TRAJECTORY = ("cosine", "weighted_cosine")
BESIDE_EVERY_DERIVATIVE = ("kl", "jsd", "mse")  # one pass, two passes, no softmax


@pytest.mark.parametrize("derivative", [*DERIVATIVES, None])
@pytest.mark.parametrize("trajectory", TRAJECTORIES)
def test_every_trajectory_and_derivative(backend, device, precision, trajectory, derivative):
    """Interpreted kernels, which take seconds, run the pairs that lead through other code."""
    if (
        INTERPRETED
        and trajectory not in BESIDE_EVERY_DERIVATIVE
        and derivative not in BESIDE_EVERY_TRAJECTORY
    ):
        pytest.skip("its kernels form the same sums as beside another trajectory")
    problem = drawn(dtype=precision, device=device, layers=3 if INTERPRETED else 4)
    check(problem, backend, trajectory=trajectory, derivative=derivative, reduction="none")


OF_LOGITS = {
    f"{side}_{what}" for side in ("student", "teacher") for what in ("softcap", "logit_scale")
}
OF_LOGITS |= {"vocab_size", "teacher_mix", "temperature"}


@pytest.mark.trap("soft cap or logit scale ignored")
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"alpha": 0.3, "beta": 0.7, "output_kd_weight": 1.9, "ce_weight": 0.4},
        {"alpha": 0.0},
        {"beta": 0.0},
        {"output_kd_weight": 0.0},
        {"alpha": 0.0, "beta": 0.0, "output_kd_weight": 0.0, "ce_weight": 1.0},
        {"temperature": 2.5},
        {"temperature": 2.0, "derivative": "centered_cosine"},
        {"temperature": 2.0, "trajectory": "mse", "derivative": "mse"},
        {"temperature": 2.0, "trajectory": "cosine"},
        {"temperature": 2.0, "output_temperature": 2.0, "output_in_dynamics": True},
        {"output_temperature": 0.6},
        {"output_temperature": 3.0, "scale_by_t2": True},
        {"student_softcap": 3.0},
        {"teacher_softcap": 2.0, "temperature": 0.5},
        {"student_softcap": 3.0, "teacher_softcap": 2.0, "trajectory": "jsd"},
        {"student_logit_scale": 0.25, "teacher_logit_scale": 4.0},
        {"student_logit_scale": 0.5, "student_softcap": 1.5, "ce_weight": 1.0},
        {"output_in_dynamics": True, "trajectory": "reverse_kl"},
        {"vocab_size": 20},
        {"shift": True, "ce_weight": 1.0},
        {"ignore_index": 7, "ce_weight": 1.0},
        {"reduction": "sum"},
        {"reduction": "none"},
        {"num_items_in_batch": 3.5},
        {"output_divergence": "skew_kl:0.4", "trajectory": "cosine"},
        {"output_divergence": "tv", "alpha": 0.0, "output_temperature": 2.0},
        {"derivative_temperature": 0.4, "temperature": 2.0},
        {"derivative_temperature": 3.0, "derivative": "weighted_cosine"},
        {"derivative_temperature": 2.0, "trajectory": "mse", "derivative": "mse"},
        {"layer_weights": (0.0, 2.5)},
        {"layer_weights": (0.0, 0.0), "beta": 0.0},
        {"layer_weights": (3.0, 0.5, 1.5), "output_in_dynamics": True, "trajectory": "mse"},
        {"layer_weights": (2.0, 1.0, 0.5), "output_in_dynamics": True, "output_temperature": 1.0},
        {"teacher_mix": 0.3, "output_in_dynamics": True},
        {"teacher_mix": 0.0, "temperature": 2.0, "derivative": "weighted_cosine"},
    ],
    ids=lambda options: ",".join(options) or "defaults",
)
@pytest.mark.parametrize("bias", [pytest.param(None, marks=pytest.mark.slow), "padded"])
def test_every_option(backend, device, precision, options, bias):
    """Interpreted kernels run without a bias the options of the logits that it is added to."""
    if INTERPRETED and bias is None and not OF_LOGITS & {*options}:
        pytest.skip("its kernels add the bias before they look at these options")
    problem = drawn(dtype=precision, device=device, bias=bias, labels=True, mask=True)
    skip_what_triton_refuses(problem, backend, **options)
    if "ignore_index" in options:
        problem = replace(
            problem, labels=problem.labels.where(problem.labels >= 0, options["ignore_index"])
        )
    check(problem, backend, **options)


@pytest.mark.parametrize(
    "options",
    [
        {"ce_weight": 0.7},
        {"reduction": "sum", "output_in_dynamics": True},
        {"reduction": "none", "ce_weight": 0.7, "trajectory": "cosine"},
        {"num_items_in_batch": 4.0, "derivative": "weighted_cosine", "trajectory": "jsd:0.3"},
        {"shift": True, "ce_weight": 1.0, "layer_weights": (2.0, 0.5)},
    ],
    ids=lambda options: ",".join(options),
)
def test_token_weights(backend, device, precision, options):
    problem = drawn(
        dtype=precision, device=device, labels=True, mask=True, token_weights=True, bias="padded"
    )
    assert 0 < int((problem.token_weights == 0).sum()) < problem.token_weights.numel()
    check(problem, backend, **options)


@pytest.mark.trap("mask not applied")
def test_a_token_of_weight_zero_may_hold_anything(backend, device):
    """Its states change neither value nor gradient, not even by 0 * NaN; the divisor counts it."""
    problem = random_problem((6,), device=device)
    weights = torch.tensor([1.0, 0.0, 2.0, 0.0, 1.0, 0.5], device=device)
    clean = evaluate(replace(problem, token_weights=weights), backend=backend)
    for side in ("student", "teacher"):
        for h in getattr(problem, f"{side}_hidden"):
            h.data[[1, 3]] = torch.nan
    dirty = evaluate(replace(problem, token_weights=weights), backend=backend)
    assert torch.equal(dirty.terms.loss, clean.terms.loss)
    for name, gradient in clean.gradients.items():
        assert torch.equal(dirty.gradients[name], gradient), name


@pytest.mark.parametrize(
    "names", [("student_bias",), ("teacher_bias",)], ids=lambda n: f"without_{n[0]}"
)
def test_one_bias_alone(backend, device, precision, names):
    problem = drawn(dtype=precision, device=device, bias="plain")
    check(replace(problem, **dict.fromkeys(names)), backend)


@pytest.mark.parametrize("output_in_dynamics", [False, True])
@pytest.mark.parametrize("derivative", [*FEATURE_DERIVATIVES, None])
@pytest.mark.parametrize("trajectory", ["mse", "cosine"])
def test_feature_space(backend, device, precision, trajectory, derivative, output_in_dynamics):
    """Interpreted kernels run every pair of two of the three options."""
    parity = output_in_dynamics + (trajectory == "mse") + (derivative in ("mse", None))
    if INTERPRETED and parity % 2:
        pytest.skip("every pair of its options is in another case")
    problem = drawn(
        dtype=precision, device=device, columns=12, layers=4, feature_space=True, mask=True
    )
    check(
        problem,
        backend,
        trajectory=trajectory,
        derivative=derivative,
        output_in_dynamics=output_in_dynamics,
    )


@pytest.mark.parametrize("layers", [1, 2, 3, 6])
@pytest.mark.parametrize("output_in_dynamics", [False, True])
def test_numbers_of_layers(backend, device, precision, layers, output_in_dynamics):
    check(
        drawn(dtype=precision, device=device, layers=layers),
        backend,
        output_in_dynamics=output_in_dynamics,
    )


@pytest.mark.parametrize("leading", [(), (1,), (7,), (2, 2, 3)], ids=str)
def test_leading_shapes(backend, device, precision, leading):
    check(random_problem(leading, dtype=precision, device=device), backend, reduction="none")


@pytest.mark.parametrize("widths", [(1, 1), (3, 70), (70, 3), (33, 33)], ids=str)
def test_widths(backend, device, precision, widths):
    check(random_problem((3,), 19, *widths, dtype=precision, device=device), backend)


@pytest.mark.parametrize(
    ("trained", "frozen"),
    [
        ("hidden", ("student_weight", "student_bias")),
        ("weight", ("student_hidden", "student_bias")),
        ("bias", ("student_hidden", "student_weight")),
        ("hidden_and_bias", ("student_weight",)),
    ],
)
def test_only_the_gradients_that_are_needed(backend, device, precision, trained, frozen):
    problem = drawn(dtype=precision, device=device, bias="plain").frozen(*frozen)
    assert problem.leaves
    check(problem, backend)


def test_one_layer_of_the_student_requires_grad(backend, device):
    problem = drawn(device=device, layers=4)
    first, *others = problem.student_hidden
    others[0] = others[0].detach()
    check(replace(problem, student_hidden=(first, *others)), backend)


@pytest.mark.parametrize("seed", range(3))
def test_any_upstream_gradient(backend, device, seed):
    problem = drawn(device=device, labels=True, bias="plain")
    upstream = torch.randn(problem.leading_shape, generator=torch.Generator().manual_seed(seed)).to(
        device
    )
    upstream[0, seed] = 0.0
    check(problem, backend, upstream, reduction="none", ce_weight=0.5, output_in_dynamics=True)


def test_float64_inputs_are_computed_in_float64(device):
    problem = random_problem(dtype=F64, device=device)
    outcome = evaluate(problem, backend="auto")
    assert outcome.terms.loss.dtype == F64
    assert_within_budget(problem, outcome)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"derivative": "cosine", "ce_weight": 0.5},
        {"trajectory": "jsd", "derivative": "centered_cosine", "temperature": 2.0},
        {"trajectory": "reverse_kl", "derivative": "mse", "student_softcap": 2.0},
        {"trajectory": "skew_kl", "derivative": None, "student_logit_scale": 0.5},
        {"trajectory": "mse", "output_in_dynamics": True},
        {"trajectory": "cosine", "output_temperature": 3.0},
        {"derivative": "weighted_cosine", "derivative_temperature": 0.6, "trajectory": "jsd:0.2"},
        {"output_divergence": "alpha_beta", "trajectory": "skew_reverse_kl:0.3"},
    ],
    ids=lambda o: f"{o.get('trajectory', 'kl')}-{o.get('derivative', 'cosine')}",
)
def test_gradcheck(device, options):
    problem = random_problem(
        (3,), 7, 3, 4, layers=4, dtype=F64, device=device, bias="plain", labels=True
    )
    count = len(problem.student_hidden)

    def loss(*leaves):
        hidden, (weight, bias) = leaves[:count], leaves[count:]
        call = replace(problem, student_hidden=hidden, student_weight=weight, student_bias=bias)
        return fused_fdd_loss(**call.arguments, **options, backend="torch")

    assert torch.autograd.gradcheck(loss, list(problem.leaves.values()))


def test_gradcheck_feature_space(device):
    problem = random_problem((3,), 5, 3, layers=4, dtype=F64, device=device, feature_space=True)

    def loss(*leaves):
        call = replace(problem, student_hidden=leaves[:-1], student_weight=leaves[-1])
        return fused_fdd_loss(
            **call.arguments, trajectory="mse", derivative="cosine", backend="torch"
        )

    assert torch.autograd.gradcheck(loss, list(problem.leaves.values()))


@pytest.mark.trap("chunk size overshooting")
@pytest.mark.parametrize("resident", [2, 4, 1000])
@pytest.mark.parametrize("accumulator_bytes", [0, 2**20])
@pytest.mark.parametrize("low", [F32, torch.bfloat16], ids=str)
def test_torch_tiles_of_every_kind(device, monkeypatch, resident, accumulator_bytes, low):
    """Tiles that divide neither rows nor vocabulary, several sets of resident rows, both sums of
    a head's gradient.
    """
    monkeypatch.setattr(tiling, "choose_tiles", lambda *_: tiling.TorchTiles(2, 5, resident))
    monkeypatch.setattr(tiling, "ACCUMULATOR_BYTES", accumulator_bytes)
    problem = random_problem((11,), dtype=low, device=device, labels=True, bias="padded", layers=4)
    check(problem, "torch", ce_weight=0.5, trajectory="jsd", reduction="none")
    check(problem, "torch", ce_weight=0.5, vocab_size=33, derivative="mse", reduction="none")
