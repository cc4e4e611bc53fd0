"""fused_rows, fused_logit_kd and fused_rank_kd under torch.compile, autocast, checkpointing,
inference mode, repeated and double backward, and their memory.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from fdd_kernels import fused_logit_kd, fused_rows
from fdd_kernels.backends.torch_stream import blocks
from fdd_kernels.lens.row_blocks import MATRICES, ROW_FUNCTIONS
from fdd_kernels.testing import random_problem, unit_roundoff
from tests.support.allocations import allocated_peak
from tests.support.logit_objectives import F32, Call, upstream_of
from tests.support.row_objectives import DIVERGENCE_TEXTS, NAMES, focal
from tests.support.row_objectives import random_row_call as random_call

BF16 = torch.bfloat16
ROW_FUNCTION = {"logit_kd": "logit_kd", "uld": "uld", "listmle": "listmle"}


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


def step_of(call: Call):
    """A training step, a function of hidden states, head and bias."""
    arguments = call.arguments

    def step(hidden, weight, bias):
        changed = {"student_hidden": 2 * hidden, "student_weight": weight, "student_bias": bias}
        return (3 * call.function(**(arguments | changed))).sum()

    return step


def same(outcomes) -> None:
    for eager, compiled in zip(*outcomes):
        atol = 1e-6 * float(eager.detach().abs().max())
        torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=atol)


@pytest.mark.usefixtures("_fresh_dynamo")
class TestCompile:
    @pytest.mark.parametrize("reduction", ["mean", "none"])
    @pytest.mark.parametrize(
        ("name", "options"),
        [
            ("uld", {}),
            ("listmle", {"k": 5}),
            ("logit_kd", {"temperature": "std"}),
            *[("logit_kd", {"divergence": d}) for d in ("akl", "kl+reverse_kl", "relative_mse")],
        ],
        ids=str,
    )
    def test_a_training_step(self, name, options, reduction):
        """Whole: a graph break is an error. The result is the eager one."""
        options = options | {"reduction": reduction}
        call = random_call(name, bias="plain", options=options, mask=True)
        leaves, step, outcomes = list(call.leaves.values()), step_of(call), []
        for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
            value = function(*leaves)
            outcomes.append([value, *torch.autograd.grad(value, leaves)])
        same(outcomes)

    def test_several_teachers(self):
        p = random_problem(layers=1, bias="plain")
        teacher = p.teacher_hidden[0], p.teacher_weight

        def step(hidden, weight):
            teachers = [teacher, (*teacher, p.teacher_bias)]
            return fused_logit_kd(hidden, weight, teachers=teachers)

        leaves, outcomes = [p.student_hidden[0], p.student_weight], []
        for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
            value = function(*leaves)
            outcomes.append([value, *torch.autograd.grad(value, leaves)])
        same(outcomes)

    @pytest.mark.parametrize("reduction", ["mean", "none"])
    def test_fused_rows_is_left_to_eager_mode(self, reduction):
        """Also its backward pass, within a function that is compiled."""
        call = random_call("rows", bias="plain", options={"reduction": reduction})
        step, outcomes = step_of(call), []

        def train(*leaves):
            value = step(*leaves)
            value.backward()
            return value

        for function in (train, torch.compile(train, backend="aot_eager")):
            leaves = [leaf.detach().clone().requires_grad_() for leaf in call.leaves.values()]
            outcomes.append([function(*leaves).detach(), *[leaf.grad for leaf in leaves]])
        same(outcomes)

    def test_fused_rows_in_a_full_graph_is_an_error(self):
        call = random_call("rows", bias="plain")
        step = torch.compile(step_of(call), fullgraph=True, backend="aot_eager")
        with pytest.raises(
            RuntimeError, match=r"fused_rows is not a graph.*a Python function.*fullgraph"
        ):
            step(*call.leaves.values())


class TestAutograd:
    @pytest.mark.parametrize("name", NAMES)
    def test_repeated_backward(self, name):
        call = random_call(name)
        value, leaves = call.value(), list(call.leaves.values())
        first = torch.autograd.grad(value.sum(), leaves, retain_graph=True)
        second = torch.autograd.grad(3 * value.sum(), leaves)
        for a, b in zip(first, second):
            assert (3 * a - b).abs().max() <= 4 * unit_roundoff(F32) * float((3 * a).abs().max())

    @pytest.mark.parametrize("reduction", ["mean", "none"])
    @pytest.mark.parametrize("name", NAMES)
    def test_a_second_derivative_raises(self, name, reduction):
        call = random_call(name, options={"reduction": reduction})
        leaves = list(call.leaves.values())
        grads = torch.autograd.grad(call.value().sum(), leaves, create_graph=True)
        with pytest.raises(RuntimeError, match="differentiated once"):
            torch.autograd.grad(sum(g.square().sum() for g in grads), leaves)

    @pytest.mark.parametrize("name", NAMES)
    def test_transforms_are_refused(self, name):
        call = random_call(name, bias="plain")
        with pytest.raises(RuntimeError, match=r"hidden is under a transform of torch\.func"):
            torch.func.grad(lambda h: as_function(call)(h, *list(call.leaves.values())[1:]).sum())(
                call.problem.student_hidden[0].detach()
            )

    @pytest.mark.parametrize("reentrant", [False, True])
    @pytest.mark.parametrize("name", NAMES)
    def test_checkpointing(self, name, reentrant):
        call = random_call(name, bias="plain")
        leaves = list(call.leaves.values())
        value = checkpoint(as_function(call), *leaves, use_reentrant=reentrant)
        value.sum().backward()
        for leaf, gradient in zip(leaves, call.run("torch")[1]):
            assert torch.equal(leaf.grad, gradient)

    @pytest.mark.trap("autocast")
    @pytest.mark.parametrize("name", NAMES)
    def test_autocast_is_the_loss_of_bf16_inputs(self, name):
        """A caller's function is not under autocast either."""
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

    def test_autocast_of_several_teachers(self):
        p = random_problem(layers=1)
        arguments = p.student_hidden[0].detach(), p.student_weight.detach()
        teacher = p.teacher_hidden[0], p.teacher_weight
        with torch.autocast("cpu", torch.bfloat16):
            found = fused_logit_kd(*arguments, teachers=[teacher, teacher])
        low = [tuple([t.bfloat16() for t in pair]) for pair in (arguments, teacher)]
        assert torch.equal(found, fused_logit_kd(*low[0], teachers=[low[1], low[1]]))

    @pytest.mark.parametrize("name", NAMES)
    def test_inference_mode(self, name):
        """In it, and with the teacher's tensors and those per row made in it."""
        call = random_call(name)
        expected = call.value()
        with torch.inference_mode():
            found = call.value()
            torch.testing.assert_close(found, expected.detach())
            p = call.problem
            teacher = {"teacher_hidden": (p.teacher_hidden[0].clone(),)}
            teacher["teacher_weight"] = p.teacher_weight.clone()
            more = {n: t.clone() for n, t in call.more.items()}
        made = replace(call, problem=replace(p, **teacher), more=more)
        found, gradients = made.run("torch")
        assert torch.equal(found, expected.detach())
        for got, gradient in zip(gradients, call.run("torch")[1]):
            assert torch.equal(got, gradient)

    @pytest.mark.parametrize("way", ["torch", "reference"])
    def test_fn_runs_on_no_row_that_is_left_out(self, way):
        """And records nothing for autograd without need."""
        p = random_problem((4, 3), layers=1, mask=True)
        seen = []

        def fn(z_s, z_t):
            seen.append((len(z_s), z_s.requires_grad, torch.is_grad_enabled()))
            return z_s.sum(-1)

        models = p.student_hidden[0], p.student_weight, p.teacher_hidden[0], p.teacher_weight
        fused_rows(fn, *models, mask=p.mask, backend=way)
        assert seen == [(int(p.mask.sum()), True, True)]
        seen.clear()
        with torch.no_grad():
            fused_rows(fn, *models, mask=p.mask, backend=way)
        assert seen == [(int(p.mask.sum()), False, False)]
        seen.clear()
        fused_rows(fn, *models, mask=torch.zeros_like(p.mask))
        assert not seen

    def test_a_gradient_that_is_a_view(self):
        """A vocabulary of one: it is what came in, which stays as it is."""
        h, w = torch.randn(5, 3, requires_grad=True), torch.randn(1, 3)
        weights = torch.ones(5)
        options = {"token_weights": weights, "student_logit_scale": 3.0, "temperature": 2.0}
        value = fused_rows(lambda z, _: z.squeeze(-1), h, w, **options)
        for _ in range(2):
            (gradient,) = torch.autograd.grad(value, h, retain_graph=True)
            torch.testing.assert_close(gradient, 1.5 / 5 * w.expand(5, 3))
        assert torch.equal(weights, torch.ones(5))


class TestMemory:
    ROWS, COLUMNS = 512, 2048
    MATRIX = 4 * ROWS * COLUMNS  # bytes of one (R, V) tensor: 4 MiB

    @pytest.mark.parametrize("reduction", ["mean", "none"])
    @pytest.mark.parametrize("low", [F32, BF16], ids=str)
    @pytest.mark.parametrize("name", NAMES)
    def test_no_tensor_of_rows_by_columns(self, name, low, reduction, monkeypatch):
        budget = 2**20
        monkeypatch.setitem(blocks.BLOCK_BYTES, "cpu", budget)
        shape = {"columns": self.COLUMNS, "student_width": 4, "teacher_width": 4, "dtype": low}
        call = random_call(name, (self.ROWS,), **shape, options={"reduction": reduction})
        peak = allocated_peak(lambda: call.run("torch"))
        # Gradients twice (sums and results), converted heads, and numbers per row.
        others = 4 * 4 * 2 * (2 * self.COLUMNS + 2 * self.ROWS) + 4 * 64 * self.ROWS
        assert peak <= budget + others, f"{peak / 2**20:.2f} MiB"
        assert budget + others < self.MATRIX / 2

    @pytest.mark.parametrize("temperature", [2.0, "std"])
    @pytest.mark.parametrize(
        ("name", "options"),
        [
            ("rows", {}),
            ("uld", {}),
            ("listmle", {}),
            *[("logit_kd", {"divergence": d}) for d in (*DIVERGENCE_TEXTS, "jsd")],
        ],
        ids=str,
    )
    def test_the_matrices_that_a_row_function_holds(self, name, options, temperature):
        rows, columns = 64, 8192
        matrix = 4 * rows * columns
        options = options | {"student_softcap": 30.0, "temperature": temperature}
        shape = {"columns": columns, "student_width": 2, "teacher_width": 2}
        call = random_call(name, (rows,), **shape, options=options)
        peak = allocated_peak(lambda: call.run("torch"))
        function = ROW_FUNCTIONS.get(ROW_FUNCTION.get(name))
        # The default of fused_rows, and what it adds for "std".
        allowed = function.matrices if function else 12 + 3 * (temperature == "std")
        assert allowed >= MATRICES
        assert peak <= (allowed + blocks._OWN_MATRICES) * matrix, peak / matrix

    @pytest.mark.parametrize("count", [2, 4])
    def test_several_teachers_are_one_at_a_time(self, count):
        rows, columns = 64, 8192
        matrix = 4 * rows * columns
        p = random_problem((rows,), columns, 2, 2, layers=1)
        teachers = [(p.teacher_hidden[0], p.teacher_weight)] * count
        peak = allocated_peak(
            lambda: fused_logit_kd(
                p.student_hidden[0], p.student_weight, teachers=teachers, divergence="akl"
            )
        )
        allowed = ROW_FUNCTIONS["logit_kd"].matrices + blocks._OWN_MATRICES
        assert peak <= allowed * matrix, peak / matrix

    def test_matrices_set_the_rows_of_a_block(self, monkeypatch):
        monkeypatch.setitem(blocks.BLOCK_BYTES, "cpu", 4 * 100 * 20)
        p, seen = random_problem((64,), 100, layers=1), []

        def fn(z_s, z_t):
            seen.append(len(z_s))
            return z_s.sum(-1)

        models = p.student_hidden[0], p.student_weight, p.teacher_hidden[0], p.teacher_weight
        for matrices, rows in ((9, 2), (4, 4), (0.5, 13), (99, 1)):
            seen.clear()
            fused_rows(fn, *models, matrices=matrices)
            assert seen[0] == rows
            assert sum(seen) == 64


def test_focal_is_what_it_says():
    """The user's loss of these tests mixes no rows."""
    z_s, z_t, focus = torch.randn(4, 9), torch.randn(4, 9), torch.rand(4)
    alone = torch.cat([focal(z_s[i : i + 1], z_t[i : i + 1], focus[i : i + 1]) for i in range(4)])
    torch.testing.assert_close(alone, focal(z_s, z_t, focus))
