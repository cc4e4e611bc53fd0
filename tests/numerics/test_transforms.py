"""The loss under torch.compile, autocast, checkpointing, repeated and double backward, and extreme
upstream gradients.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from fdd_kernels import FusedFDDLoss, fdd_loss_reference, fused_fdd_loss
from fdd_kernels.engine import ops
from fdd_kernels.objectives.fdd import loss
from fdd_kernels.objectives.fdd.loss import prepare, used_by
from fdd_kernels.objectives.fdd.options import LossOptions
from fdd_kernels.testing import Problem, assert_within_budget, evaluate, exact, random_problem
from tests.support.options import skip_what_triton_refuses

OPTIONS = {"ce_weight": 0.5, "trajectory": "jsd"}
LATER = {
    "trajectory": "jsd:0.3",
    "output_divergence": "jsd:0.6",
    "derivative": "weighted_cosine",
    "derivative_temperature": 0.5,
    "layer_weights": (0.5, 2.0),
}


def full(**changes) -> Problem:
    return random_problem(labels=True, mask=True, bias="plain", **changes)


@pytest.fixture
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(backend: str = "aot_eager", **compile_options):
    """fused_fdd_loss compiled whole: a graph break is an error."""

    def loss(**arguments):
        return fused_fdd_loss(**arguments)

    return torch.compile(loss, fullgraph=True, backend=backend, **compile_options)


@pytest.mark.usefixtures("_fresh_dynamo")
class TestCompile:
    """The graph is the same whatever the backend is: all backends run once, the rest is for
    "torch".
    """

    def test_values_and_gradients(self, backend):
        problem = full()
        outcome = evaluate(problem, compiled(), backend=backend, **OPTIONS)
        assert_within_budget(problem, outcome, **OPTIONS)

    @pytest.mark.parametrize(
        "options",
        [
            {"shift": True, "reduction": "none", "derivative": "mse"},
            pytest.param(LATER, marks=pytest.mark.slow),
            pytest.param({"teacher_mix": 0.3, "output_in_dynamics": True}, marks=pytest.mark.slow),
            pytest.param(
                {
                    "trajectory": "jsd",
                    "derivative": "centered_cosine",
                    "student_softcap": 3.0,
                    "num_items_in_batch": 7,
                },
                marks=pytest.mark.slow,
            ),
            pytest.param(
                {
                    "output_in_dynamics": True,
                    "vocab_size": 37,
                    "temperature": 2.0,
                    "trajectory": "cosine",
                    "ce_weight": 1.0,
                },
                marks=pytest.mark.slow,
            ),
        ],
        ids=",".join,
    )
    def test_options(self, options):
        problem = full()
        if "layer_weights" in options:
            weights = torch.linspace(0, 2, math.prod(problem.leading_shape))
            problem = replace(problem, token_weights=weights.view(problem.leading_shape))
        assert_within_budget(
            problem, evaluate(problem, compiled(), backend="torch", **options), **options
        )

    @pytest.mark.slow
    def test_inductor(self):
        problem = full()
        assert_within_budget(
            problem, evaluate(problem, compiled("inductor"), backend="torch", **OPTIONS), **OPTIONS
        )

    def test_feature_space(self):
        problem, options = random_problem(columns=12, feature_space=True), {"trajectory": "mse"}
        assert_within_budget(
            problem, evaluate(problem, compiled(), backend="torch", **options), **options
        )

    @pytest.mark.slow
    def test_changing_shapes_share_one_dynamic_graph(self):
        counter = CompileCounterWithBackend("aot_eager")
        function = compiled(counter)
        for leading in ((2, 5), (3, 7), (4, 11), (5, 6)):
            problem = full(leading=leading)
            assert_within_budget(
                problem, evaluate(problem, function, backend="torch", **OPTIONS), **OPTIONS
            )
        assert counter.frame_count == 2  # the first shape alone, then all

    @pytest.mark.slow
    def test_changing_numbers_share_one_graph(self):
        """Twelve values of each at once: the first alone, then one graph for all."""
        counter = CompileCounterWithBackend("aot_eager")
        function = compiled(counter)
        problem = random_problem(labels=True)
        for i in range(12):
            options = {
                "temperature": 1.5 + i / 10,
                "output_temperature": 2.5 + i / 10,
                "student_softcap": 9.0 + i,
                "teacher_softcap": 7.5 + i,
                "student_logit_scale": 0.3 + i / 30,
                "teacher_logit_scale": 0.35 + i / 30,
                "alpha": 0.5 + i / 10,
                "num_items_in_batch": 5 + i,
            }
            outcome = evaluate(problem, function, backend="torch", **options)
            if i in (0, 1, 11):
                assert_within_budget(problem, outcome, **options)
        assert counter.frame_count == 2

    def test_the_module(self):
        problem = random_problem(labels=True)
        loss = torch.compile(
            FusedFDDLoss(backend="torch", temperature=2.0), fullgraph=True, backend="aot_eager"
        )
        expected = fused_fdd_loss(**problem.arguments, temperature=2.0, backend="torch")
        torch.testing.assert_close(loss(**problem.arguments), expected)

    def test_strict_export(self):
        problem = random_problem().map(lambda t: t.detach())
        arguments = tuple(
            [
                getattr(problem, name)
                for name in ("student_hidden", "student_weight", "teacher_hidden", "teacher_weight")
            ]
        )
        loss = FusedFDDLoss(backend="torch")
        with torch.no_grad():
            exported = torch.export.export(loss, arguments, strict=True)
            torch.testing.assert_close(exported.module()(*arguments), loss(*arguments))

    def test_labels_out_of_range_fail_at_run_time(self):
        problem = full()
        problem = replace(problem, labels=problem.labels.where(problem.labels >= 0, 99))
        with pytest.raises(RuntimeError, match="labels outside"):
            compiled("eager")(**problem.arguments, backend="torch")

    def test_errors_name_the_argument(self):
        with pytest.raises(Exception, match="temperature=-1"):  # Dynamo wraps the ValueError
            compiled("eager")(**full().arguments, temperature=-1.0, backend="torch")

    @pytest.mark.slow
    def test_inside_a_training_step(self):
        """The loss at the end of a compiled model: its gradient meets the rest of the graph."""
        problem = random_problem()
        layer = torch.nn.Linear(8, 8)

        def step(hidden):
            states = tuple([layer(h).relu() for h in hidden])
            return fused_fdd_loss(
                **replace(problem, student_hidden=states).arguments, backend="torch"
            )

        hidden = [h.detach() for h in problem.student_hidden]
        step(hidden).backward()
        eager = layer.weight.grad.clone()
        layer.zero_grad()
        torch.compile(step, fullgraph=True, backend="aot_eager")(hidden).backward()
        # Equal up to the order of sums: a compiler may choose another layout for an operand of a
        # GEMM.
        torch.testing.assert_close(
            layer.weight.grad, eager, rtol=1e-5, atol=1e-6 * float(eager.abs().max())
        )


def test_operators_pass_torchs_own_checks(backend):
    problem = full()
    options = LossOptions(**OPTIONS, backend=backend)
    frozen = problem.frozen("student_hidden", "student_weight", "student_bias")
    plan, tensors = prepare(frozen, options)
    arguments = (*used_by(plan, tensors), *plan.spec.encode(), backend)
    torch.library.opcheck(torch.ops.fdd_kernels.lens_stats.default, arguments)
    statistics = ops.lens_stats(*arguments)
    upstream = [torch.randn_like(s) for s in statistics[1:]]
    for needed in ([True] * 5, [False, True, False, False, True]):
        torch.library.opcheck(
            torch.ops.fdd_kernels.lens_grad.default, (*arguments, *statistics, *upstream, needed)
        )


@pytest.mark.trap("autocast")
class TestAutocast:
    def test_is_the_loss_of_bf16_inputs(self, backend):
        """GEMMs have bf16 operands, as nn.Linear has; logits, sums and the loss stay float32."""
        problem = full()
        with torch.autocast("cpu", torch.bfloat16):
            outcome = evaluate(problem, backend=backend, **OPTIONS)
        rounded = problem.to(torch.bfloat16)
        assert outcome.terms.loss.dtype == torch.float32
        as_bf16 = outcome._replace(
            gradients={n: g.bfloat16() for n, g in outcome.gradients.items()}
        )
        assert_within_budget(rounded, as_bf16, **OPTIONS)
        for name, gradient in outcome.gradients.items():
            assert gradient.dtype == torch.float32, name

    def test_reference_does_not_round_its_logits_either(self):
        problem = full()
        with torch.autocast("cpu", torch.bfloat16):
            got = evaluate(problem, fdd_loss_reference, **OPTIONS)
        expected = evaluate(problem.to(torch.bfloat16), fdd_loss_reference, **OPTIONS)
        for a, b in zip(got.terms, expected.terms):
            assert torch.equal(a, b)

    def test_backward_outside_the_context(self, backend):
        problem = full()
        leaves = list(problem.leaves.values())
        with torch.autocast("cpu", torch.bfloat16):
            loss = fused_fdd_loss(**problem.arguments, backend=backend)
            inside = torch.autograd.grad(loss, leaves, retain_graph=True)
        outside = torch.autograd.grad(loss, leaves)
        for a, b in zip(inside, outside):
            assert torch.equal(a, b)

    def test_casts_no_layer_that_nothing_reads(self, backend, monkeypatch):
        problem, seen = full(), []
        real = loss.used_by
        monkeypatch.setattr(
            loss, "used_by", lambda plan, inputs: seen.append(inputs) or real(plan, inputs)
        )
        with torch.autocast("cpu", torch.bfloat16):
            evaluate(problem, backend=backend, output_kd_weight=0.0, beta=0.0)
        for states in (seen[0].student_hidden, seen[0].teacher_hidden):
            assert [h.dtype for h in states] == [torch.bfloat16, torch.bfloat16, torch.float32]

    @pytest.mark.usefixtures("_fresh_dynamo")
    def test_compiled(self):
        problem = full()
        with torch.autocast("cpu", torch.bfloat16):
            eager = evaluate(problem, backend="torch", **OPTIONS)
            outcome = evaluate(problem, compiled(), backend="torch", **OPTIONS)
        torch.testing.assert_close(outcome.terms.loss, eager.terms.loss, rtol=1e-5, atol=0)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(backend, reentrant):
    problem = full()

    def loss(*leaves):
        *hidden, weight, bias = leaves
        changed = replace(
            problem, student_hidden=tuple(hidden), student_weight=weight, student_bias=bias
        )
        return fused_fdd_loss(**changed.arguments, **OPTIONS, backend=backend)

    leaves = list(problem.leaves.values())
    expected = torch.autograd.grad(loss(*leaves), leaves)
    checkpoint(loss, *leaves, use_reentrant=reentrant).backward()
    for leaf, gradient in zip(leaves, expected):
        assert torch.equal(leaf.grad, gradient)


@pytest.mark.trap("gradients scaled in place in backward")
@pytest.mark.parametrize("options", [OPTIONS, LATER, {"teacher_mix": 0.4}], ids=",".join)
def test_backward_under_retain_graph_twice(backend, options):
    problem = full(token_weights=options is LATER)
    skip_what_triton_refuses(problem, backend, **options)
    loss = fused_fdd_loss(**problem.arguments, **options, backend=backend)
    leaves = list(problem.leaves.values())
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    kept = [g.clone() for g in first]
    upstream = torch.full((), 2.0)
    second = torch.autograd.grad(loss, leaves, upstream, retain_graph=True)
    assert float(upstream) == 2.0
    third = torch.autograd.grad(loss, leaves)
    for a, keep, b, c in zip(first, kept, second, third):
        assert torch.equal(a, keep)  # nothing was scaled in place
        assert torch.equal(b, 2 * keep)  # by a power of 2, which rounds nothing
        assert torch.equal(c, keep)


@pytest.mark.trap("double backward silently wrong")
@pytest.mark.parametrize(
    "options",
    [{"beta": 0.0}, {"beta": 1.0}, {"derivative": "weighted_cosine"}, {"teacher_mix": 0.4}],
    ids=["linear_in_the_statistics", "not_linear", "weighted_cosine", "teacher_mix"],
)
def test_double_backward_raises(backend, options):
    """Also of a gradient penalty on layers below the loss, which have second derivatives."""
    problem = random_problem()
    skip_what_triton_refuses(problem, backend, **options)
    first, second = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)
    states = tuple([second(first(h.detach())).tanh() for h in problem.student_hidden])
    loss = fused_fdd_loss(
        **replace(problem, student_hidden=states).arguments, **options, backend=backend
    )
    for leaf in (problem.student_weight, first.weight):
        gradient = torch.autograd.grad(loss, leaf, create_graph=True)[0]
        with pytest.raises(RuntimeError, match=r'differentiated once.*backend="reference"'):
            gradient.square().sum().backward(retain_graph=True)


@pytest.mark.parametrize("exponent", [-20, 16, 40])
def test_upstream_of_a_gradient_scaler(backend, exponent):
    """A loss scaled by a power of 2 has gradients scaled exactly by it: no over- or underflow on
    the way.
    """
    problem = full()
    plain = evaluate(problem, backend=backend, **OPTIONS)
    scaled = evaluate(problem, upstream=2.0**exponent, backend=backend, **OPTIONS)
    for name, gradient in plain.gradients.items():
        # A backend may form its tiles in any order, but in the same one; only tiny values may lose
        # bits.
        assert torch.equal(scaled.gradients[name], gradient * 2.0**exponent), name


def test_float16_gradients_under_a_large_upstream(backend):
    """float16 leaves with a loss scale of 2^10: sums are float32, so gradients within float16's
    range are right.
    """
    problem = full(dtype=torch.float16)
    outcome = evaluate(problem, upstream=1024.0, backend=backend, **OPTIONS)
    truth = exact(problem, 1024.0, **OPTIONS)
    assert all(g.abs().max() < 65504 for g in truth.gradients.values()), (
        "the example itself overflows"
    )
    assert_within_budget(problem, outcome, 1024.0, **OPTIONS)


@pytest.mark.parametrize("kind", ["zeros", "one_hot", "mixed_signs", "expanded"])
def test_reduction_none_with_any_upstream(backend, kind):
    problem = full()
    shape = problem.leading_shape
    upstream = {
        "zeros": torch.zeros(shape),
        "one_hot": torch.zeros(shape).index_put(
            (torch.tensor(1), torch.tensor(2)), torch.tensor(3.0)
        ),
        "mixed_signs": torch.linspace(-5, 5, math.prod(shape)).reshape(shape),
        "expanded": torch.full((), 0.25).expand(shape),
    }[kind]
    outcome = evaluate(problem, upstream=upstream, backend=backend, reduction="none", **OPTIONS)
    if kind == "zeros":
        assert not any(g.any() for g in outcome.gradients.values())
    assert_within_budget(problem, outcome, upstream, reduction="none", **OPTIONS)


def test_each_term_can_be_differentiated_on_its_own(backend):
    problem = full()
    terms = fused_fdd_loss(**problem.arguments, **OPTIONS, backend=backend, return_terms=True)
    leaves = list(problem.leaves.values())
    weights = {"output_kd": 1.0, "trajectory": 1.0, "derivative": 1.0, "ce": 0.5}
    parts = [
        [
            w * g
            for g in torch.autograd.grad(
                getattr(terms, name), leaves, retain_graph=True, materialize_grads=True
            )
        ]
        for name, w in weights.items()
    ]
    summed = dict(zip(problem.leaves, (sum(p) for p in zip(*parts))))
    whole = evaluate(problem, backend=backend, **OPTIONS)
    assert_within_budget(problem, whole._replace(gradients=summed), **OPTIONS)


class TestOtherWays:
    """Other transforms of torch work, or the error names the remedy."""

    def test_teacher_under_inference_mode(self, backend):
        problem = full()
        expected = evaluate(problem, backend=backend, **OPTIONS)
        with torch.inference_mode():
            states = tuple([h.clone() for h in problem.teacher_hidden])
            weight, bias = problem.teacher_weight.clone(), problem.teacher_bias.clone()
        problem = replace(problem, teacher_hidden=states, teacher_weight=weight, teacher_bias=bias)
        leaves = list(problem.leaves.values())
        for reduction in ("mean", "none"):
            loss = fused_fdd_loss(
                **problem.arguments, backend=backend, reduction=reduction, **OPTIONS
            )
            gradients = torch.autograd.grad(loss.sum(), leaves)
            if reduction == "mean":
                for found, wanted in zip(gradients, expected.gradients.values()):
                    assert torch.equal(found, wanted)

    def test_meta_tensors(self, backend):
        problem = random_problem().map(lambda t: t.to("meta"))
        with pytest.raises(
            ValueError, match=r"student_hidden\[0\] is a .* on meta, which holds no numbers"
        ):
            fused_fdd_loss(**problem.arguments, backend=backend)

    def test_transforms_of_functions(self, backend):
        problem = random_problem().map(lambda t: t.detach())

        def loss(hidden, backend=backend):
            return fused_fdd_loss(
                (hidden, *problem.student_hidden[1:]),
                problem.student_weight,
                problem.teacher_hidden,
                problem.teacher_weight,
                backend=backend,
            )

        hidden = problem.student_hidden[0]
        for transformed in (
            lambda: torch.func.vmap(loss)(torch.stack([hidden, hidden])),
            lambda: torch.func.jvp(loss, (hidden,), (hidden,)),
            lambda: torch.func.grad(loss)(hidden),
        ):
            with pytest.raises(
                RuntimeError, match=r'student_hidden\[0\] is under a transform.*backend="reference"'
            ):
                transformed()
        with forward_ad.dual_level(), pytest.raises(RuntimeError, match="is under forward-mode AD"):
            loss(forward_ad.make_dual(hidden, hidden))
        torch.func.grad(lambda h: loss(h, "reference"))(hidden)  # the remedy

    @pytest.mark.parametrize("reduction", ["mean", "none"])
    def test_batches_of_upstream_gradients(self, backend, reduction):
        problem = random_problem()
        loss = fused_fdd_loss(**problem.arguments, backend=backend, reduction=reduction)
        with pytest.raises(RuntimeError, match="one after another"):
            torch.autograd.grad(
                loss, problem.student_weight, torch.ones(2, *loss.shape), is_grads_batched=True
            )
