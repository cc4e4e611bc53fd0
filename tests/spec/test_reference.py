"""The float64 reference against formulas written here from the paper's text with
torch.nn.functional alone.

Nothing of the package's plan, terms or divergences is used on this side, so an error there shows.
"""

from __future__ import annotations

import inspect
import math
from dataclasses import replace
from itertools import product

import pytest
import torch
import torch.nn.functional as F

from fdd_kernels import FDDLossTerms, FusedFDDLoss, fdd_loss_reference, fused_fdd_loss
from fdd_kernels.lens.divergence_text import parse_divergence
from fdd_kernels.lens.divergences import DERIVATIVES, DIVERGENCES, TRAJECTORIES
from fdd_kernels.testing import assert_same_sums, evaluate, random_problem
from tests.support.options import DIVERGENCE_TEXTS, FEATURE_DERIVATIVES
from tests.support.oracles import divergence, taid, weighted_cosine

ON_VALUES = {
    "mse": lambda t, s: F.mse_loss(s, t, reduction="none").mean(-1),
    "cosine": lambda t, s: 1 - F.cosine_similarity(s, t, dim=-1),
    "centered_cosine": lambda t, s: (
        1 - F.cosine_similarity(s - s.mean(-1, keepdim=True), t - t.mean(-1, keepdim=True), dim=-1)
    ),
    "weighted_cosine": weighted_cosine,
}


def naive(
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
    ignore_index=-100,
    shift=False,
    alpha=1.0,
    beta=1.0,
    output_kd_weight=1.0,
    ce_weight=0.0,
    trajectory="kl",
    derivative="cosine",
    output_divergence="kl",
    layer_weights=None,
    temperature=1.0,
    derivative_temperature=None,
    output_temperature=1.0,
    teacher_mix=1.0,
    scale_by_t2=False,
    student_softcap=None,
    teacher_softcap=None,
    student_logit_scale=1.0,
    teacher_logit_scale=1.0,
    output_in_dynamics=False,
    reduction="mean",
    num_items_in_batch=None,
    vocab_size=None,
    return_terms=True,
) -> FDDLossTerms:
    """Compute the loss in a plain loop over the valid positions."""
    leading = student_hidden[0].shape[:-1]
    counts = torch.ones(leading, dtype=torch.bool)
    if labels is not None:
        if shift:
            labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
        counts &= labels != ignore_index
    if mask is not None:
        counts &= mask.bool()

    def logits(hidden, weight, bias, cap, scale):
        if weight is None:
            return hidden
        z = scale * F.linear(hidden, weight, bias)[..., :vocab_size]
        return z if cap is None else cap * torch.tanh(z / cap)

    def between(text, z_t, z_s, temperature):
        z_t, z_s = z_t / temperature, z_s / temperature
        log_p = F.log_softmax(taid(z_s, z_t, teacher_mix), -1)
        return divergence(text, log_p, F.log_softmax(z_s, -1))

    def one_position(index):
        zs = [
            logits(h[index], student_weight, student_bias, student_softcap, student_logit_scale)
            for h in student_hidden
        ]
        zt = [
            logits(h[index], teacher_weight, teacher_bias, teacher_softcap, teacher_logit_scale)
            for h in teacher_hidden
        ]
        kd = trajectories = derivatives = ce = torch.zeros((), dtype=zs[0].dtype)
        if teacher_weight is not None and output_kd_weight:
            kd = between(output_divergence, zt[-1], zs[-1], output_temperature)
            kd = kd * output_temperature**2 if scale_by_t2 else kd
        if ce_weight:
            ce = F.cross_entropy(zs[-1][None], labels[index][None])
        layers = range(len(zs) if output_in_dynamics else len(zs) - 1)
        zs, zt = [zs[i] for i in layers], [zt[i] for i in layers]
        if alpha and len(zs):
            for weight, t, s in zip(layer_weights or [1] * len(zs), zt, zs):
                if trajectory in ON_VALUES:
                    of_layer = ON_VALUES[trajectory](t / temperature, s / temperature)
                else:
                    of_layer = between(trajectory, t, s, temperature)
                trajectories = trajectories + weight * of_layer / len(zs)
        if beta and derivative and len(zs) > 1:
            divisor = temperature if derivative_temperature is None else derivative_temperature
            zs, zt = [z / divisor for z in zs], [z / divisor for z in zt]
            ys, yt = zs, zt
            if teacher_weight is not None:
                ys, yt = [F.log_softmax(z, -1) for z in zs], [F.log_softmax(z, -1) for z in zt]
            for i in range(len(zs) - 1):
                deltas = yt[i + 1] - yt[i], ys[i + 1] - ys[i]
                weights = (zt[i + 1],) if derivative == "weighted_cosine" else ()
                of_pair = ON_VALUES[derivative](*deltas, *weights)
                derivatives = derivatives + of_pair / (len(zs) - 1)
        return torch.stack([t.reshape(()) for t in (kd, trajectories, derivatives, ce)])

    nothing = torch.zeros(4, dtype=student_hidden[0].dtype)
    rows = [
        one_position(index) if counts[index] else nothing for index in product(*map(range, leading))
    ]
    terms = torch.stack(rows).reshape(*leading, 4)
    if token_weights is not None:
        terms = terms * token_weights[..., None]
    kd, trajectories, derivatives, ce = terms.unbind(-1)
    if reduction != "none":
        denominator = {"sum": 1, "mean": max(int(counts.sum()), 1)}[reduction]
        if num_items_in_batch is not None:
            denominator = num_items_in_batch
        kd, trajectories, derivatives, ce = (
            t.sum() / denominator for t in (kd, trajectories, derivatives, ce)
        )
    loss = output_kd_weight * kd + alpha * trajectories + beta * derivatives + ce_weight * ce
    return FDDLossTerms(loss, kd, trajectories, derivatives, ce)


def agree(problem, **options) -> FDDLossTerms:
    """The reference equals the naive formulas in every term and gradient; returns the terms."""
    upstream = None
    if options.get("reduction") == "none":
        upstream = torch.linspace(-1, 2, math.prod(problem.leading_shape)).reshape(
            problem.leading_shape
        )
    got = evaluate(problem, fdd_loss_reference, upstream, **options)
    expected = evaluate(problem, naive, upstream, **options)
    additions = problem.student_weight.numel() + math.prod(problem.leading_shape)
    for name, a, b in zip(FDDLossTerms._fields, got.terms, expected.terms):
        assert_same_sums(a, b, additions, name)
    assert expected.gradients["student_weight"].abs().max() > 0, "nothing was compared"
    for name, gradient in expected.gradients.items():
        assert_same_sums(got.gradients[name], gradient, additions, name)
    return got.terms


def double(*args, **kwargs):
    return random_problem(*args, dtype=torch.float64, **kwargs)


@pytest.mark.parametrize("derivative", [*DERIVATIVES, None])
@pytest.mark.parametrize("trajectory", TRAJECTORIES)
def test_every_trajectory_and_derivative(trajectory, derivative):
    terms = agree(double(layers=4), trajectory=trajectory, derivative=derivative)
    assert terms.trajectory > 0
    assert (terms.derivative > 0) == (derivative is not None)


@pytest.mark.parametrize(
    "options",
    [
        {"alpha": 0.3, "beta": 0.7, "output_kd_weight": 1.9, "ce_weight": 0.4},
        {"alpha": 0.0},
        {"beta": 0.0},
        {"output_kd_weight": 0.0},
        {"temperature": 2.5},
        {"output_temperature": 0.6},
        {"output_temperature": 3.0, "scale_by_t2": True},
        {"temperature": 2.0, "scale_by_t2": True},
        {"student_softcap": 3.0},
        {"teacher_softcap": 2.0, "temperature": 0.5},
        {"student_logit_scale": 0.25, "teacher_logit_scale": 4.0},
        {"student_logit_scale": 0.5, "student_softcap": 1.5},
        {"output_in_dynamics": True},
        {"vocab_size": 20, "ce_weight": 1.0},
        {"reduction": "sum"},
        {"reduction": "none"},
        {"num_items_in_batch": 3.5},
        {"reduction": "sum", "num_items_in_batch": 41},
        {"ce_weight": 2.0, "temperature": 3.0, "output_temperature": 4.0},
        {"derivative_temperature": 0.7, "temperature": 2.0},
        {"derivative_temperature": 3.0, "derivative": "weighted_cosine"},
        {"temperature": 0.5, "derivative": "weighted_cosine", "output_in_dynamics": True},
        {"trajectory": "mse", "temperature": 0.5, "derivative_temperature": 2.0},
        {"layer_weights": (0.0, 2.5)},
        {"layer_weights": (1.5, 0.5, 3.0), "output_in_dynamics": True, "trajectory": "cosine"},
        {"teacher_mix": 0.4},
        {"teacher_mix": 0.0, "ce_weight": 1.0},
        {"teacher_mix": 0.7, "temperature": 2.0, "output_temperature": 0.5},
        {"output_divergence": "jsd:0.1", "trajectory": "jsd:0.9"},
        {"output_divergence": "tv", "trajectory": "kl", "scale_by_t2": True},
        {"output_divergence": "alpha_beta:0.2,0.7", "output_in_dynamics": True},
    ],
    ids=lambda options: ",".join(options),
)
def test_every_option(options):
    problem = double(bias="plain", labels=True, mask=True)
    if "vocab_size" in options:
        problem = replace(
            problem, labels=problem.labels.where(problem.labels < options["vocab_size"], -100)
        )
    agree(problem, **options)


@pytest.mark.parametrize("leading", [(), (7,), (2, 3), (2, 2, 3)], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_leading_shapes(leading, reduction):
    assert agree(double(leading), reduction=reduction).loss.shape == (
        leading if reduction == "none" else ()
    )


@pytest.mark.parametrize("leading", [(6,), (3, 5), (2, 1)], ids=str)
def test_shift_compares_position_t_with_the_next_label(leading):
    problem = double(leading, labels=True)
    problem = replace(problem, labels=torch.arange(math.prod(leading)).reshape(leading) % 37)
    if leading[-1] == 1:  # the only position is the last: none is valid
        assert float(evaluate(problem, fdd_loss_reference, shift=True).terms.loss) == 0
        return
    agree(problem, shift=True, ce_weight=1.0, reduction="none")


def test_mask_is_not_shifted():
    problem = double((1, 4))
    problem = replace(
        problem, labels=torch.tensor([[1, 2, 3, 4]]), mask=torch.tensor([[0, 1, 1, 1]])
    )
    rows = agree(problem, shift=True, ce_weight=1.0, reduction="none").loss
    assert (rows != 0).tolist() == [[False, True, True, False]]


@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.int64, torch.int32, torch.uint8])
def test_mask_dtypes(mask_dtype):
    problem = double(mask=True)
    agree(replace(problem, mask=problem.mask.to(mask_dtype)))


def test_ignore_index_of_ones_choice():
    problem = double(labels=True)
    agree(
        replace(problem, labels=problem.labels.where(problem.labels >= 0, 7)),
        ignore_index=7,
        ce_weight=1.0,
    )


def test_int32_labels():
    problem = double(labels=True)
    wide = evaluate(problem, fdd_loss_reference, ce_weight=1.0).terms.loss
    narrow = evaluate(
        replace(problem, labels=problem.labels.int()), fdd_loss_reference, ce_weight=1.0
    ).terms.loss
    assert narrow == wide


def test_unequal_vocabularies_compare_the_common_columns():
    problem = double(columns=40)
    agree(replace(problem, teacher_weight=problem.teacher_weight[:37].contiguous()), vocab_size=35)


@pytest.mark.parametrize("output_in_dynamics", [False, True])
@pytest.mark.parametrize("derivative", [*FEATURE_DERIVATIVES, None])
@pytest.mark.parametrize("trajectory", ["mse", "cosine"])
def test_feature_space(trajectory, derivative, output_in_dynamics):
    problem = double(columns=12, layers=4, feature_space=True, mask=True)
    agree(
        problem, trajectory=trajectory, derivative=derivative, output_in_dynamics=output_in_dynamics
    )


def test_feature_space_with_projection_bias():
    problem = double(columns=12, layers=3, feature_space=True)
    problem = replace(
        problem, student_bias=torch.randn(12, dtype=torch.float64, requires_grad=True)
    )
    agree(problem, trajectory="mse", derivative="mse", output_in_dynamics=True)


def test_a_single_tensor_is_plain_output_distillation():
    problem = double(layers=1)
    terms = agree(problem, output_temperature=2.0)
    assert terms.loss == terms.output_kd
    bare = replace(
        problem, student_hidden=problem.student_hidden[0], teacher_hidden=problem.teacher_hidden[0]
    )
    assert fdd_loss_reference(**bare.arguments, output_temperature=2.0) == terms.loss


def test_one_layer_in_dynamics_has_no_pair():
    terms = agree(double(layers=1), output_in_dynamics=True)
    assert terms.derivative == 0
    assert terms.trajectory == terms.output_kd


@pytest.mark.trap("silent non-zero defaults")
def test_defaults_are_the_papers():
    defaults = {k: p.default for k, p in inspect.signature(fused_fdd_loss).parameters.items()}
    weights = ("output_kd_weight", "alpha", "beta", "ce_weight")
    assert [defaults[name] for name in weights] == [1.0, 1.0, 1.0, 0.0]
    assert (defaults["trajectory"], defaults["derivative"]) == ("kl", "cosine")
    assert defaults["scale_by_t2"] is False
    assert defaults["student_softcap"] is defaults["teacher_softcap"] is defaults["mask"] is None
    assert inspect.signature(fdd_loss_reference) == inspect.signature(fused_fdd_loss)


def test_module_is_the_function_with_fixed_options():
    problem = double(labels=True, mask=True, bias="plain")
    options = {
        "alpha": 0.3,
        "ce_weight": 0.5,
        "temperature": 2.0,
        "trajectory": "jsd",
        "backend": "reference",
    }
    module = FusedFDDLoss(**options, return_terms=True)
    assert module(**problem.arguments, num_items_in_batch=3) == fused_fdd_loss(
        **problem.arguments, **options, num_items_in_batch=3, return_terms=True
    )
    assert "alpha=0.3" in repr(module)
    assert "beta" not in repr(module)


def test_reference_can_be_differentiated_twice():
    problem = double((2,), columns=5, student_width=3, teacher_width=3, layers=3)
    leaves = list(problem.leaves.values())

    def loss(*tensors):
        *hidden, weight = tensors
        return fdd_loss_reference(hidden, weight, problem.teacher_hidden, problem.teacher_weight)

    assert torch.autograd.gradgradcheck(loss, leaves)


def test_impossible_tokens_are_as_if_they_were_not_there():
    # A bias of -inf in both models: the loss of the vocabulary without these tokens, for every
    # divergence.
    problem = double(bias="padded")
    live = int(problem.student_bias.isfinite().sum())
    cut = {
        n: getattr(problem, n).detach()[:live]
        for n in ("student_weight", "teacher_weight", "student_bias", "teacher_bias")
    }
    smaller = replace(problem, **cut)
    for trajectory in TRAJECTORIES:
        for derivative in DERIVATIVES:
            options = {"trajectory": trajectory, "derivative": derivative}
            whole, part = (evaluate(p, fdd_loss_reference, **options) for p in (problem, smaller))
            assert_same_sums(
                whole.terms.loss, part.terms.loss, problem.student_weight.numel(), f"{options}"
            )
            for name, gradient in part.gradients.items():
                assert_same_sums(
                    whole.gradients[name],
                    gradient,
                    problem.student_weight.numel(),
                    f"{options} {name}",
                )
            assert not whole.gradients["student_weight"][live:].any()


SMOOTH = [
    *[name for name in DIVERGENCES if name != "tv"],
    *["jsd:0.9", "skew_kl:0.7", "alpha_beta:1,0.5", "alpha_beta:0,1.5", "alpha_beta:0.5,0"],
]


@pytest.mark.parametrize("trajectory", SMOOTH)
@pytest.mark.parametrize(
    "teacher", [[0, 1, 2, 5], [1, 0, 2, 5], [3, 0, 2, -5], [0, 300, 2, -5]], ids=str
)
def test_first_and_second_derivatives_where_models_agree(trajectory, teacher):
    """Wholly, in some columns, or nowhere: by finite differences."""
    eye = torch.eye(4, dtype=torch.float64)
    teacher = torch.tensor([teacher], dtype=torch.float64)

    def loss(student):
        return fdd_loss_reference(
            [student] * 2,
            eye,
            [teacher] * 2,
            eye,
            trajectory=trajectory,
            output_kd_weight=0.0,
            beta=0.0,
        )

    student = torch.tensor([[0, 1, 2, 5]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(loss, (student,))
    assert torch.autograd.gradgradcheck(loss, (student,))


@pytest.mark.parametrize("text", DIVERGENCE_TEXTS)
def test_grad_is_the_derivative_of_the_value(text):
    """Compare gradients with respect to logits, grad - q sum(grad), also for tokens of
    probability 0, in one model or in both.
    """
    z = torch.tensor([[0.0, 3, -1, 40, -800, -torch.inf]], dtype=torch.float64, requires_grad=True)
    log_p = torch.tensor([[0.5, 3, -9, 39, -1, -torch.inf]], dtype=torch.float64).log_softmax(-1)
    named, log_q = parse_divergence(text), z.log_softmax(-1)
    (by_autograd,) = torch.autograd.grad(named.value(log_q, log_p).sum(), z)
    grad = DIVERGENCES[named.name].grad(log_q.detach(), log_p, *named.parameters)
    assert_same_sums(grad - log_q.detach().exp() * grad.sum(), by_autograd, 6)
