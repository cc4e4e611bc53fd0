"""Objectives of the logits under torch.compile, autocast, checkpointing, repeated and double
backward.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from fdd_kernels import fused_topk_kd, row_statistics
from fdd_kernels.backends.torch_stream import blocks
from fdd_kernels.engine.row_blocks import Extra, row_sum, row_values
from fdd_kernels.engine.row_blocks import row_blocks as operator
from fdd_kernels.lens.row_blocks import ROW_FUNCTIONS, RowSpec, row_function
from fdd_kernels.lens.softmax import log_softmax_, logit_gradient_
from fdd_kernels.lens.spec import LensSpec
from fdd_kernels.testing import random_problem, unit_roundoff
from tests.support.logit_objectives import (
    F32,
    LOSSES,
    NAMES,
    Call,
    random_call,
    statistics_arguments,
    upstream_of,
)

BF16, F16 = torch.bfloat16, torch.float16


@pytest.fixture
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def as_function(call: Call):
    """The call as a function of its leaves."""

    def function(*leaves):
        names = ("student_hidden", "student_weight", "student_bias")
        changed = dict(zip(names, ((leaves[0],), *leaves[1:])))
        return replace(call, problem=replace(call.problem, **changed)).value()

    return function


@pytest.mark.usefixtures("_fresh_dynamo")
class TestCompile:
    @pytest.mark.parametrize("reduction", ["mean", "none"])
    @pytest.mark.parametrize("name", NAMES)
    def test_a_training_step(self, name, reduction):
        """Whole: a graph break is an error. The result is the eager one."""
        options = {} if name == "selected" else {"reduction": reduction}
        more = {} if name == "selected" else {"mask": True, "weights": True}
        call = random_call(name, bias="plain", options=options, **more)
        arguments = call.arguments

        def step(hidden, weight, bias):
            prefix = "student_" if call.is_loss else ""
            changed = {"hidden": 2 * hidden, "weight": weight, "bias": bias}
            changed = {prefix + key: tensor for key, tensor in changed.items()}
            return (3 * call.function(**(arguments | changed))).sum()

        leaves = list(call.leaves.values())
        outcomes = []
        for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
            value = function(*leaves)
            outcomes.append([value, *torch.autograd.grad(value, leaves)])
        for eager, compiled in zip(*outcomes):
            atol = 1e-6 * float(eager.detach().abs().max())
            torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=atol)

    def test_row_statistics(self):
        p = random_problem(layers=1, labels=True)
        arguments = statistics_arguments(p)
        found = torch.compile(
            lambda: row_statistics(**arguments), fullgraph=True, backend="eager"
        )()
        for got, expected in zip(found, row_statistics(**arguments)):
            assert torch.equal(got, expected)

    @pytest.mark.slow
    def test_changing_numbers_and_shapes_share_one_graph(self):
        counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
        function = torch.compile(fused_topk_kd, fullgraph=True, backend=counter)
        for rows in (4, 6, 9, 11):
            call = random_call("topk_kd", (rows, 3), options={"temperature": 1.5 + rows})
            found = function(**call.arguments)
            assert abs(float(found - call.value())) <= 1e-5
        assert counter.frame_count == 2


@pytest.mark.parametrize("name", NAMES)
def test_the_operator_passes_torchs_own_checks(name):
    call = random_call(name, (4,), bias="plain")
    p = call.problem.frozen("student_hidden", "student_weight", "student_bias")
    words, numbers, outputs, per_row = {
        "decoupled_kd": ((), (1.0, 8.0, 2.0), 1, [p.labels]),
        "topk_kd": (("bucket", "kl"), (2.0,), 1, [t.clone() for t in call.more.values()]),
        "selected": ((), (2.0,), 4, [call.more.get("ids")]),
    }[name]
    if name != "topk_kd":
        per_row = [t.clamp(min=0) for t in per_row]
    registered = {"topk_kd": "top_k"}.get(name, name)
    head = LensSpec(37, (), (), 1.0, None, 1.0, None)
    spec = RowSpec(head, registered, words, numbers, outputs)
    assert RowSpec.decode(*spec.encode()) == spec
    teacher = [[*p.teacher_hidden], p.teacher_weight, p.teacher_bias]
    if name != "decoupled_kd":
        teacher = [[], None, None]
    arguments = [[*p.student_hidden], p.student_weight, p.student_bias, *teacher]
    arguments += [
        torch.tensor([True, False, True, True]),
        None,
        per_row,
        [],
        *spec.encode(),
        "torch",
    ]
    for upstream, needed in (
        (None, [False] * 3),
        (torch.rand(4, outputs), [True] * 3),
        (torch.rand(4, outputs), [True, False, True]),
    ):
        torch.library.opcheck(operator, (*arguments, upstream, needed))


@pytest.fixture
def _sorted_loss():
    """The sum of |q_(k) - p_(k)|, both sorted."""

    @row_function
    def sorted_difference(block, temperature):
        log_q, log_p = block.student.div_(temperature), block.teacher.div_(temperature)
        for z in (log_q, log_p):
            log_softmax_(z)
        q, p = (log.exp().sort(-1) for log in (log_q, log_p))
        values = (q.values - p.values).abs().sum(-1, keepdim=True)

        def grad_of(upstream):
            of_log_q = (q.values - p.values).sign() * q.values
            grad = torch.zeros_like(of_log_q).scatter_(-1, q.indices, of_log_q)
            return logit_gradient_(grad, log_q).mul_(upstream / temperature)

        return values, grad_of

    yield
    del ROW_FUNCTIONS["sorted_difference"]


@pytest.mark.usefixtures("_sorted_loss")
@pytest.mark.parametrize("known", [False, True])
def test_a_row_function_is_all_that_a_sorted_loss_needs(known, monkeypatch):
    monkeypatch.setattr(blocks, "block_rows", lambda *_: 3)
    p = random_problem((8,), layers=1, bias="plain", dtype=torch.float64)
    head = LensSpec(37, (), (), 1.0, None, 1.0, None)
    spec = RowSpec(head, "sorted_difference", (), (2.0,), 1)
    inputs = replace(p, student_hidden=[*p.student_hidden], teacher_hidden=[*p.teacher_hidden])
    inputs = inputs.flattened(-100, (0,), (0,))
    leaves = list(p.leaves.values())
    if known:
        weights = torch.full((8, 1), 0.5, dtype=torch.float64)
        found = row_sum(spec, inputs, Extra(), "torch", weights)
    else:
        found = row_values(spec, inputs, Extra(), "torch").sum() / 2
    gradients = torch.autograd.grad(found, leaves)
    z_s = p.student_hidden[0] @ p.student_weight.T + p.student_bias
    z_t = p.teacher_hidden[0] @ p.teacher_weight.T + p.teacher_bias
    q, p = ((z / 2).softmax(-1).sort(-1).values for z in (z_s, z_t))
    expected = (q - p).abs().sum() / 2
    of_expected = torch.autograd.grad(expected, leaves)
    for got, true in zip((found, *gradients), (expected, *of_expected)):
        scale = max(1.0, float(true.detach().abs().max()))
        assert (got - true).detach().abs().max() <= 100 * 2.0**-53 * scale


class TestAutograd:
    @pytest.mark.parametrize("name", NAMES)
    def test_repeated_backward(self, name):
        """The second one forms the gradients again. A power of two scales them exactly."""
        call = random_call(name)
        value, leaves = call.value(), list(call.leaves.values())
        first = torch.autograd.grad(value.sum(), leaves, retain_graph=True)
        second = torch.autograd.grad(4 * value.sum(), leaves)
        for a, b in zip(first, second):
            assert (4 * a - b).abs().max() <= 4 * unit_roundoff(F32) * float((4 * a).abs().max())

    @pytest.mark.parametrize("low", [BF16, F16], ids=str)
    @pytest.mark.parametrize("name", LOSSES)
    def test_a_loss_divided_by_three_is_rounded_once(self, name, low):
        """The upstream gradient comes after the gradients are formed, which wait in float32."""
        call = random_call(name, dtype=low)
        leaves = list(call.leaves.values())
        divided = torch.autograd.grad(call.value() / 3, leaves)
        thirds = random_call(name, dtype=low, options={"num_items_in_batch": 30.0})
        if name == "decoupled_kd":
            valid = int((call.problem.labels >= 0).sum())
            thirds = random_call(name, dtype=low, options={"num_items_in_batch": 3.0 * valid})
        off = []
        for a, b in zip(divided, thirds.run("torch")[1]):
            off.append((a.float() - b.float()).abs().reshape(-1))
            step = torch.finfo(low).eps * b.float().abs() + torch.finfo(low).tiny
            assert (off[-1] <= step.reshape(-1)).all()
        # float32 is a few units off, of 2^12 or 2^16 to a step of 16 bits: few are rounded the
        # other way. Rounded twice, a third of them would be.
        assert (torch.cat(off) > 0).float().mean() <= 0.05

    @pytest.mark.parametrize("name", NAMES)
    def test_a_second_derivative_raises(self, name):
        call = random_call(name)
        leaves = list(call.leaves.values())
        grads = torch.autograd.grad(call.value().sum(), leaves, create_graph=True)
        with pytest.raises(RuntimeError, match="differentiated once"):
            torch.autograd.grad(sum(g.square().sum() for g in grads), leaves)

    @pytest.mark.parametrize("name", NAMES)
    def test_batches_of_upstream_gradients_are_refused(self, name):
        call = random_call(name)
        value, leaves = call.value(), list(call.leaves.values())
        upstream = torch.ones(2, *value.shape)
        with pytest.raises(RuntimeError, match="batch of upstream gradients"):
            torch.autograd.grad(value, leaves, upstream, is_grads_batched=True)

    @pytest.mark.parametrize("name", NAMES)
    def test_transforms_are_refused(self, name):
        call = random_call(name, bias="plain")
        with pytest.raises(RuntimeError, match=r"hidden is under a transform of torch\.func"):
            torch.func.grad(lambda h: as_function(call)(h, *list(call.leaves.values())[1:]).sum())(
                call.problem.student_hidden[0].detach()
            )
        with forward_ad.dual_level():
            hidden = call.problem.student_hidden[0].detach()
            dual = forward_ad.make_dual(hidden, torch.ones_like(hidden))
            with pytest.raises(RuntimeError, match="forward-mode AD"):
                as_function(call)(dual, call.problem.student_weight, call.problem.student_bias)

    @pytest.mark.parametrize("reentrant", [False, True])
    @pytest.mark.parametrize("name", NAMES)
    def test_checkpointing(self, name, reentrant):
        call = random_call(name, bias="plain")
        leaves = list(call.leaves.values())
        value = checkpoint(as_function(call), *leaves, use_reentrant=reentrant)
        value.sum().backward()
        expected = call.run("torch")[1]
        for leaf, gradient in zip(leaves, expected):
            assert torch.equal(leaf.grad, gradient)

    @pytest.mark.trap("autocast")
    @pytest.mark.parametrize("name", NAMES)
    def test_autocast_is_the_loss_of_bf16_inputs(self, name):
        call = random_call(name, bias="plain")
        with torch.autocast("cpu", torch.bfloat16):
            value, gradients = call.run("torch", upstream_of(call))
        low = call.to(BF16)
        expected, of_low = low.run("torch", upstream_of(low))
        assert value.dtype == F32
        assert torch.equal(value, expected)
        for got, gradient in zip(gradients, of_low):
            assert got.dtype == F32
            assert torch.equal(got.bfloat16(), gradient)

    def test_num_items_with_a_gradient(self):
        """Its gradient is that of a quotient."""
        for name in LOSSES:
            items = torch.tensor(4.0, requires_grad=True)
            call = random_call(name, options={"num_items_in_batch": items})
            value = call.value()
            (grad,) = torch.autograd.grad(value, items)
            assert abs(float(grad + value / 4)) <= 1e-6 * float(value)
