"""Divergences at every parameter, two in one call, and TAID's target: the reference against the
formulas of tests/support/oracles.py, and every backend within its error budget.
"""

from __future__ import annotations

import math
from dataclasses import fields, replace

import pytest
import torch

from fdd_kernels import FDDLossTerms, fdd_loss_reference, fused_fdd_loss
from fdd_kernels.testing import (
    Problem,
    assert_same_sums,
    assert_within_budget,
    beyond_budget,
    evaluate,
    random_problem,
)
from tests.support import oracles
from tests.support.options import DIVERGENCE_TEXTS, skip_what_triton_refuses
from tests.tools.fuzz import SLACK

F64 = torch.float64
SIZES = {"leading": (6,), "columns": 150, "student_width": 16, "teacher_width": 16, "layers": 3}
# What is drawn, and options: models from near agreement to logits of standard deviation 50.
MODELS = {
    "plain": ({"bias": "plain"}, {}),
    "nearly the same": ({"near": 1e-4}, {"output_temperature": 2.0}),
    "close": ({"near": 1e-2, "spread": 5.0}, {"temperature": 0.5}),
    "sharp": ({"spread": 50.0}, {}),
    "sharp and close": ({"spread": 50.0, "near": 1e-2}, {}),
    "cold": ({}, {"temperature": 0.3, "output_temperature": 0.3}),
    "hot": ({"spread": 8.0}, {"temperature": 8.0, "output_temperature": 8.0}),
    "padded": ({"bias": "padded"}, {"vocab_size": 145}),
    "capped": (
        {"spread": 4.0},
        {"student_softcap": 3.0, "teacher_softcap": 5.0, "teacher_logit_scale": 2.0},
    ),
}
FAST = ("plain", "sharp and close")
EACH_MODEL = pytest.mark.parametrize(
    "models", [m if m in FAST else pytest.param(m, marks=pytest.mark.slow) for m in MODELS]
)
# There the formula divides what is left of its digits by a tiny parameter. They have limits, and
# test_registry_accuracy.py.
NEAR_A_POLE = [t for t in DIVERGENCE_TEXTS if t.startswith("alpha_beta") and "1e-" in t]
# Each with the next, which is another divergence or the same with another parameter.
PAIRS = list(zip(DIVERGENCE_TEXTS, [*DIVERGENCE_TEXTS[1:], DIVERGENCE_TEXTS[0]]))


def check(problem: Problem, backend: str, **options) -> None:
    skip_what_triton_refuses(problem, backend, **options)
    upstream = torch.linspace(-1, 2, math.prod(problem.leading_shape))
    upstream = upstream.reshape(problem.leading_shape).to(problem.student_weight.device)
    options |= {"reduction": "none"}
    outcome = evaluate(problem, fused_fdd_loss, upstream, backend=backend, **options)
    # As in tests/tools/fuzz.py: of thousands of rows some exceed the largest of three movements.
    beyond = beyond_budget(problem, outcome, upstream, SLACK, **options)
    assert not beyond, beyond


def logits(problem: Problem, options: dict, layer: int, temperature: float) -> list[torch.Tensor]:
    """Return both models' z at a layer, by hand."""
    found = []
    for side in ("student", "teacher"):
        hidden, weight, bias = (
            getattr(problem, f"{side}_{what}") for what in ("hidden", "weight", "bias")
        )
        u = torch.nn.functional.linear(hidden[layer], weight, bias)[:, : options.get("vocab_size")]
        u, cap = u * options.get(f"{side}_logit_scale", 1.0), options.get(f"{side}_softcap")
        found.append((u if cap is None else cap * torch.tanh(u / cap)) / temperature)
    return found


def oracle(text: str, mix: float = 1.0):
    """Return a function with the signature of the loss that has the output term alone."""

    def loss(*, output_temperature=1.0, return_terms, **arguments) -> FDDLossTerms:
        tensors = {f.name: arguments[f.name] for f in fields(Problem) if f.name in arguments}
        z_s, z_t = logits(Problem(**tensors), arguments, -1, output_temperature)
        log_p = oracles.taid(z_s, z_t, mix).log_softmax(-1)
        rows = oracles.divergence(text, log_p, z_s.log_softmax(-1))
        return FDDLossTerms(rows, rows, *[torch.zeros_like(rows)] * 3)

    return loss


def agree(problem: Problem, text: str, mix: float, additions: int, **options) -> None:
    """The reference has the oracle's values and gradients."""
    options |= {"alpha": 0.0, "beta": 0.0, "reduction": "none"}
    expected = evaluate(problem, oracle(text, mix), **options)
    options |= {"output_divergence": text, "teacher_mix": mix}
    got = evaluate(problem, fdd_loss_reference, **options)
    assert_same_sums(got.terms.output_kd, expected.terms.loss, additions)
    for name, gradient in expected.gradients.items():
        assert_same_sums(got.gradients[name], gradient, 50 * additions, name)


@EACH_MODEL
@pytest.mark.parametrize("text", [text for text in DIVERGENCE_TEXTS if text not in NEAR_A_POLE])
def test_reference_is_the_formula(models, text):
    """In float64, at any sharpness."""
    drawn, options = MODELS[models]
    problem = random_problem(**SIZES, dtype=F64, **drawn)
    agree(problem, text, 1.0, problem.student_weight.numel() + 6, **options)


@pytest.mark.parametrize(
    ("text", "limit"),
    [("alpha_beta:1e-9,0.5", "alpha_beta:0,0.5"), ("alpha_beta:0.5,1e-9", "alpha_beta:0.5,0")],
)
def test_no_pole_at_a_parameter_of_zero(text, limit):
    """There the formula itself has no digits: it is compared with its limit."""
    problem = random_problem(**SIZES, dtype=F64)
    near, at = (
        evaluate(problem, output_divergence=t, alpha=0.0, beta=0.0, backend="torch")
        for t in (text, limit)
    )
    torch.testing.assert_close(near.terms.loss, at.terms.loss, rtol=1e-7, atol=0)
    for name, gradient in at.gradients.items():
        size = float(gradient.abs().max())
        torch.testing.assert_close(near.gradients[name], gradient, rtol=0, atol=1e-7 * size)


@pytest.mark.parametrize(
    "models", ["plain", *[pytest.param(m, marks=pytest.mark.slow) for m in MODELS if m != "plain"]]
)
@pytest.mark.parametrize(("trajectory", "output"), PAIRS)
def test_every_divergence(backend, device, models, trajectory, output):
    """Each on the trajectory, with another one at the output."""
    drawn, options = MODELS[models]
    problem = random_problem(**SIZES, device=device, **drawn)
    options = options | {"trajectory": trajectory, "output_divergence": output, "beta": 0.0}
    check(problem, backend, **options)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("text", DIVERGENCE_TEXTS)
@pytest.mark.parametrize("models", ["plain", "close"])
def test_sixteen_bits(backend, device, models, text, dtype):
    drawn, options = MODELS[models]
    problem = random_problem(**SIZES, device=device, dtype=dtype, **drawn)
    check(problem, backend, **options, trajectory=text, beta=0.0)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize(
    "options",
    [
        {"trajectory": "jsd:0.7", "output_divergence": "jsd:0.1", "output_in_dynamics": True},
        {"trajectory": "jsd:0.7", "output_divergence": "jsd:0.7", "output_in_dynamics": True},
        {"trajectory": "skew_kl:0.3", "output_divergence": "kl", "ce_weight": 0.5},
        {"trajectory": "kl", "output_divergence": "reverse_kl", "output_in_dynamics": True},
        {"trajectory": "mse", "output_divergence": "alpha_beta:0.5,0.5", "scale_by_t2": True},
        {"alpha": 0.0, "output_divergence": "tv", "output_temperature": 3.0},
        {"output_kd_weight": 0.0, "trajectory": "skew_reverse_kl:0.4"},
    ],
    ids=lambda o: ",".join(f"{v}" for v in o.values()),
)
def test_with_cached_logits(backend, device, options, reduction):
    """One number as the loss: gradients are formed in the forward pass where that saves work."""
    problem = random_problem((2, 7), device=device, labels=True, mask=True, bias="plain")
    options = options | {"reduction": reduction, "num_items_in_batch": 5.0}
    skip_what_triton_refuses(problem, backend, **options)
    outcome = evaluate(problem, fused_fdd_loss, 2.0, backend=backend, **options)
    assert_within_budget(problem, outcome, 2.0, **options)


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("text", ["jsd:0.1", "tv", "alpha_beta"])
def test_few_layers(backend, device, text, layers):
    problem = random_problem((5,), device=device, layers=layers)
    check(problem, backend, trajectory=text, output_divergence=text, output_in_dynamics=True)


FINITE = [t for t in DIVERGENCE_TEXTS if t.split(":")[0] not in ("kl", "reverse_kl", "alpha_beta")]


@pytest.mark.trap("-inf logits from padded-vocabulary biases")
@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("text", [*FINITE, "alpha_beta", "alpha_beta:1,1"])
def test_tokens_that_one_model_excludes(backend, device, text, side):
    """Also one to which the other model gives nearly all its weight."""
    problem = random_problem((5,), 60, device=device, bias="plain")
    other = {"student": "teacher", "teacher": "student"}[side]
    getattr(problem, f"{side}_bias").data[50:] = -torch.inf
    getattr(problem, f"{other}_bias").data[55] = 20.0
    check(problem, backend, output_divergence=text, alpha=0.0, beta=0.0)
    agree(problem.to(F64), text, 1.0, 600)


@pytest.mark.trap("identical models")
@pytest.mark.parametrize(
    "text",
    [t if ":" not in t else pytest.param(t, marks=pytest.mark.slow) for t in DIVERGENCE_TEXTS],
)
def test_identical_models(backend, device, text):
    """No loss and no gradient but the rounding of two equal products; nothing is NaN."""
    problem = random_problem(**SIZES, device=device, near=0.0)
    options = {"trajectory": text, "output_divergence": text, "beta": 0.0}
    check(problem, backend, **options)
    outcome = evaluate(problem, backend=backend, **options)
    for tensor in (*outcome.terms, *outcome.gradients.values()):
        assert tensor.abs().max() < 1e-5


# TAID's target


MIXES = [0.0, 1e-3, 0.4, 0.9, 1 - 2.0**-20]


@EACH_MODEL
@pytest.mark.parametrize("mix", MIXES)
def test_reference_of_a_mixture_is_the_formula(models, mix):
    drawn, options = MODELS[models]
    problem = random_problem(**SIZES, dtype=F64, **drawn)
    agree(problem, "kl", mix, problem.student_weight.numel() + 6, **options)


@EACH_MODEL
@pytest.mark.parametrize("mix", MIXES)
def test_every_mixture(backend, device, models, mix):
    drawn, options = MODELS[models]
    problem = random_problem(**SIZES, device=device, labels=True, **drawn)
    problem = replace(problem, labels=problem.labels.clamp(max=130))
    check(problem, backend, teacher_mix=mix, ce_weight=0.3, derivative="cosine", **options)


@pytest.mark.parametrize("mix", [0.0, 0.3, 0.8])
@pytest.mark.parametrize("gap", [30.0, 200.0, 3000.0])
def test_a_mixture_whose_largest_logit_is_far_below_both(backend, device, mix, gap):
    """The student is certain of one token, the teacher of another: nothing may underflow."""
    size = 40
    eye = torch.eye(size, device=device)
    generator = torch.Generator().manual_seed(2)
    student, teacher = (torch.randn(3, size, generator=generator).to(device) for _ in range(2))
    student[:, 3] += gap
    teacher[:, 30] += gap
    student[:, 17] += gap / 2  # the largest of the mixture at t = 1/2, and near it
    teacher[:, 17] += gap / 2 + 3
    problem = Problem((student.requires_grad_(),), eye, (teacher,), eye)
    check(problem, backend, teacher_mix=mix)
    check(problem, backend, teacher_mix=0.5)


def test_a_mixture_leaves_out_what_one_model_excludes(backend, device):
    """The teacher's target has no weight where the student cannot follow: the loss is finite."""
    problem = random_problem((5,), 60, device=device, bias="plain")
    problem.student_bias.data[:7] = -torch.inf
    problem.teacher_bias.data[3] = 9.0  # nearly all of the teacher's weight
    problem.teacher_bias.data[50:] = -torch.inf
    options = {"teacher_mix": 0.6, "beta": 0.0}
    check(problem, backend, **options)
    outcome = evaluate(problem, backend="torch", **options)
    for tensor in (*outcome.terms, *outcome.gradients.values()):
        assert tensor.isfinite().all()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_mixture_with_cached_logits(backend, device, reduction):
    problem = random_problem((2, 7), device=device, labels=True, mask=True, bias="padded")
    options = {"reduction": reduction, "teacher_mix": 0.3, "output_in_dynamics": True}
    skip_what_triton_refuses(problem, backend, **options)
    outcome = evaluate(problem, fused_fdd_loss, -2.0, backend=backend, **options)
    assert_within_budget(problem, outcome, -2.0, **options)
