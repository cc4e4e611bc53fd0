"""fused_decoupled_kd, fused_topk_kd, selected_logprobs and row_statistics against their formulas in
float64: values and gradients per row, every option, edges, transforms, memory.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from fdd_kernels import fused_topk_kd, row_statistics, selected_logprobs
from fdd_kernels.backends.torch_stream import blocks, tiling
from fdd_kernels.engine.row_blocks import row_blocks as operator
from fdd_kernels.lens.row_blocks import MATRICES, RowSpec
from fdd_kernels.lens.spec import LensSpec
from fdd_kernels.testing import random_problem, strided, unit_roundoff
from tests.support.allocations import allocated_peak
from tests.support.logit_objectives import F32, F64, Call, assert_exact, random_call

NAMES = ["decoupled_kd", "topk_kd", "selected"]
LOSSES = NAMES[:2]
BF16, F16 = torch.bfloat16, torch.float16
TEMPERATURES = [0.5, 1.0, 2.0, 8.0]
TOP_K = [
    {"tail": tail, "divergence": divergence}
    for tail in ("bucket", "drop", "renormalize")
    for divergence in ("kl", "reverse_kl", "jsd", "jsd:0.1", "jsd:0", "jsd:1")
]


def cap(name: str) -> str:
    return "softcap" if name == "selected" else "student_softcap"


def upstream_of(call: Call) -> torch.Tensor | None:
    """Differing upstream gradients for results per position."""
    if call.is_loss and call.options.get("reduction") != "none":
        return None
    shape = call.problem.leading_shape if call.is_loss else call.more["ids"].shape
    return torch.linspace(-1, 2, math.prod(shape)).reshape(shape)


def check(call: Call) -> None:
    assert_exact(call, "torch", upstream_of(call))


class TestFormulas:
    @pytest.mark.parametrize("dtype", [F32, F64], ids=str)
    @pytest.mark.parametrize("temperature", TEMPERATURES)
    @pytest.mark.parametrize("bias", [None, "padded"])
    @pytest.mark.parametrize("name", NAMES)
    def test_temperatures(self, name, bias, temperature, dtype):
        options = {"temperature": temperature}
        check(random_call(name, bias=bias, dtype=dtype, options=options))

    @pytest.mark.parametrize("options", TOP_K, ids=lambda o: "-".join(o.values()))
    @pytest.mark.parametrize("dtype", [F32, F64], ids=str)
    def test_top_k(self, options, dtype):
        call = random_call("topk_kd", bias="plain", dtype=dtype, labels=True, options=options)
        if options["divergence"] in ("jsd:0", "jsd:1"):  # special cases, as in TRL
            same = {"jsd:0": "kl", "jsd:1": "reverse_kl"}[options["divergence"]]
            other = replace(call, options=options | {"divergence": same})
            for a, b in zip(*[[v, *g] for v, g in (call.run("torch"), other.run("torch"))]):
                assert torch.equal(a, b)
        else:
            check(call)

    @pytest.mark.parametrize(
        "options",
        [{"target_weight": 0.0}, {"nontarget_weight": 0}, {"target_weight": 2.5}],
        ids=str,
    )
    def test_weights_of_the_two_parts(self, options):
        check(random_call("decoupled_kd", options=options))

    @pytest.mark.parametrize("low", [BF16, F16], ids=str)
    @pytest.mark.parametrize("name", NAMES)
    def test_16_bits(self, name, low):
        """Logits and sums are float32, and every gradient is rounded once."""
        check(random_call(name, bias="plain", dtype=low))

    @pytest.mark.parametrize("name", NAMES)
    def test_the_budget_catches_logits_of_16_bits(self, name, monkeypatch):
        """Else it would prove little."""
        logits = blocks._logits
        monkeypatch.setattr(blocks, "_logits", lambda *a: logits(*a).bfloat16().float())
        with pytest.raises(AssertionError, match="is above"):
            check(random_call(name))

    @pytest.mark.trap("soft cap or logit scale ignored")
    @pytest.mark.parametrize("name", NAMES)
    def test_transforms_of_the_logits(self, name):
        prefixes = (
            ("",) if name == "selected" else ("student_", "teacher_")[: 1 + (name == NAMES[0])]
        )
        options = {f"{p}softcap": 2.0 + len(p) for p in prefixes}
        options |= {f"{p}logit_scale": 0.5 + len(p) / 10 for p in prefixes}
        check(random_call(name, options=options, bias="plain"))

    @pytest.mark.trap("zero-padding the smaller vocabulary")
    @pytest.mark.parametrize("name", NAMES)
    def test_vocab_size(self, name):
        call = random_call(name, options={"vocab_size": 30})
        labels = call.problem.labels
        if labels is not None:
            call = replace(call, problem=replace(call.problem, labels=labels.clamp(max=29)))
        check(call)
        _, gradients = call.run("torch")
        assert not gradients[1][30:].any()

    @pytest.mark.parametrize("name", LOSSES)
    @pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
    @pytest.mark.parametrize("weights", [False, True])
    @pytest.mark.parametrize("shift", [False, True])
    def test_reductions_masks_and_weights(self, name, reduction, weights, shift):
        options = {"reduction": reduction, "shift": shift, "scale_by_t2": True, "temperature": 2.0}
        more = {"weights": weights, "labels": True, "mask": True, "options": options}
        check(random_call(name, (3, 7), **more))

    @pytest.mark.parametrize("name", LOSSES)
    @pytest.mark.parametrize(
        "items", [3, 17.5, torch.tensor(11), torch.tensor([2.5], dtype=F64)], ids=str
    )
    def test_num_items(self, name, items):
        check(random_call(name, labels=True, options={"num_items_in_batch": items}))

    @pytest.mark.parametrize("leading", [(), (1,), (7,), (2, 2, 3)], ids=str)
    @pytest.mark.parametrize("name", NAMES)
    def test_leading_shapes(self, name, leading):
        options = {} if name == "selected" else {"reduction": "none"}
        check(random_call(name, leading, labels=name == NAMES[0], options=options))

    @pytest.mark.parametrize("name", NAMES)
    def test_strided_tensors_and_int32(self, name):
        call = random_call(name, contiguous=False)
        more = {n: strided(t) for n, t in call.more.items()}
        if "ids" in more:
            more["ids"] = more["ids"].int()
        labels = call.problem.labels
        problem = replace(call.problem, labels=None if labels is None else labels.int())
        check(replace(call, more=more, problem=problem))

    def test_one_id_per_position(self):
        call = random_call("selected", tokens=1)
        single = call.more["ids"][..., 0]
        hidden, weight = call.problem.student_hidden[0], call.problem.student_weight
        found = selected_logprobs(hidden, weight, single)
        assert found.shape == single.shape
        assert torch.equal(found, selected_logprobs(hidden, weight, call.more["ids"])[..., 0])

    def test_a_token_may_be_asked_for_twice(self):
        call = random_call("selected", (5,), tokens=3)
        ids = call.more["ids"].clone()
        ids[:, 2] = ids[:, 0]
        check(replace(call, more={"ids": ids}))

    @pytest.mark.parametrize("name", NAMES)
    @pytest.mark.parametrize("trained", ["student_hidden", "student_weight", "student_bias"])
    def test_only_the_gradients_that_are_needed(self, name, trained):
        names = {"student_hidden", "student_weight", "student_bias"} - {trained}
        call = random_call(name, bias="plain")
        one = replace(call, problem=call.problem.frozen(*names))
        (found,) = one.run("torch", upstream_of(call))[1]
        everything = dict(zip(call.leaves, call.run("torch", upstream_of(call))[1]))
        assert torch.equal(found, everything[next(iter(one.leaves))])

    @pytest.mark.parametrize("name", NAMES)
    @pytest.mark.parametrize("low", [F32, BF16], ids=str)
    @pytest.mark.parametrize("rows", [1, 3, 4])
    def test_blocks_and_tiles_of_every_kind(self, name, low, rows, monkeypatch):
        monkeypatch.setattr(blocks, "block_rows", lambda *_: rows)
        monkeypatch.setattr(tiling, "OPERAND_BYTES", 4 * 8 * 5)
        check(random_call(name, (11,), bias="plain", dtype=low, mask=name != "selected"))


@pytest.mark.parametrize("options", [{}, *TOP_K[:3], TOP_K[6]], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_reference(name, options):
    """Dense, and differentiable twice."""
    if options and name != "topk_kd":
        pytest.skip("options of fused_topk_kd")
    call = random_call(name, (2, 3), 9, dtype=F64, bias="padded", options=options)
    assert_exact(call, "reference", upstream_of(call))

    def value(hidden, weight):
        p = replace(call.problem, student_hidden=(hidden,), student_weight=weight)
        return replace(call, problem=p.frozen("student_bias")).value("reference")

    leaves = [*call.problem.student_hidden, call.problem.student_weight]
    assert torch.autograd.gradgradcheck(value, leaves)


def statistics_arguments(problem, **more):
    return {
        "student_hidden": problem.student_hidden[0],
        "student_weight": problem.student_weight,
        "teacher_hidden": problem.teacher_hidden[0],
        "teacher_weight": problem.teacher_weight,
        "labels": problem.labels,
        "student_bias": problem.student_bias,
        "teacher_bias": problem.teacher_bias,
        "mask": problem.mask,
        **more,
    }


class TestRowStatistics:
    @pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
    @pytest.mark.parametrize("way", ["torch", "reference"])
    @pytest.mark.parametrize("shift", [False, True])
    def test_values(self, way, temperature, shift):
        p = random_problem(layers=1, dtype=F64, bias="plain", labels=True, mask=True)
        found = row_statistics(
            **statistics_arguments(p, temperature=temperature, shift=shift, backend=way)
        )
        z_s, z_t = (
            (h[0] @ w.T + b).detach() / temperature
            for h, w, b in (
                (p.student_hidden, p.student_weight, p.student_bias),
                (p.teacher_hidden, p.teacher_weight, p.teacher_bias),
            )
        )
        labels = (
            torch.nn.functional.pad(p.labels[..., 1:], (0, 1), value=-100) if shift else p.labels
        )
        valid, log_q, log_p = p.mask & (labels >= 0), z_s.log_softmax(-1), z_t.log_softmax(-1)
        expected = {
            "lse_s": z_s.logsumexp(-1),
            "lse_t": z_t.logsumexp(-1),
            "entropy_s": -(log_q.exp() * log_q).sum(-1),
            "entropy_t": -(log_p.exp() * log_p).sum(-1),
            "kl": (log_p.exp() * (log_p - log_q)).sum(-1),
            "agree": z_s.argmax(-1) == z_t.argmax(-1),
            "label_logprob": log_q.gather(-1, labels.clamp(min=0)[..., None])[..., 0],
            "correct": z_s.argmax(-1) == labels,
        }
        assert set(expected) == set(found._fields)
        for name, true in expected.items():
            got = getattr(found, name)
            assert got.dtype == true.dtype
            true = true & valid if true.dtype == torch.bool else torch.where(valid, true, 0.0)
            bound = (37 + 20) * 2 * 2.0**-53 * max(1.0, float(true.double().abs().max()))
            assert (got.double() - true.double()).abs().max() <= bound, name

    def test_without_labels_and_of_low_precision(self):
        p = random_problem(layers=1, dtype=BF16, bias="padded")
        found = row_statistics(**statistics_arguments(p))
        exact = row_statistics(**statistics_arguments(p.to(F64)))
        assert found.label_logprob is None
        assert found.correct is None
        assert found.agree.dtype == torch.bool
        # Logits are inner products of 8 or 12 numbers in float32.
        for got, true in zip(found[:5], exact[:5]):
            assert got.dtype == F32
            assert (got - true).abs().max() <= 200 * unit_roundoff(F32) * 10
        assert not any(t.requires_grad for t in found[:6])

    def test_equal_models(self):
        p = random_problem(layers=1, near=0.0, teacher_width=8)
        found = row_statistics(**statistics_arguments(p))
        assert found.agree.all()
        assert not found.kl.any()
        assert torch.equal(found.entropy_s, found.entropy_t)


class TestEdges:
    @pytest.mark.trap("all rows masked")
    @pytest.mark.parametrize("name", LOSSES)
    @pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
    @pytest.mark.parametrize("way", ["torch", "reference"])
    @pytest.mark.parametrize("how", ["mask", "labels", "weights", "empty"])
    def test_no_valid_row_gives_zeros(self, name, reduction, how, way):
        leading = (0, 5) if how == "empty" else (2, 5)
        call = random_call(name, leading, labels=True, mask=True, options={"reduction": reduction})
        p = call.problem
        changed = {
            "mask": {"mask": torch.zeros_like(p.mask)},
            "labels": {"labels": torch.full_like(p.labels, -100)},
            "weights": {"token_weights": torch.zeros(leading)},
            "empty": {},
        }[how]
        value, gradients = replace(call, problem=replace(p, **changed)).run(way)
        assert value.shape == (leading if reduction == "none" else ())
        for tensor in (value, *gradients):
            assert not tensor.any()

    @pytest.mark.parametrize("way", ["torch", "reference"])
    def test_ids_that_are_all_ignored(self, way):
        call = random_call("selected")
        ids = torch.full_like(call.more["ids"], -100)
        value, gradients = replace(call, more={"ids": ids}).run(way)
        assert not any(t.any() for t in (value, *gradients))

    @pytest.mark.trap("mask not applied")
    @pytest.mark.parametrize("name", LOSSES)
    @pytest.mark.parametrize("poison", [math.nan, math.inf, 1e30])
    @pytest.mark.parametrize("way", ["torch", "reference"])
    def test_rows_left_out_change_nothing(self, name, poison, way):
        """Not even by 0 * NaN; nor rows of weight 0, or ids of rows that are left out."""
        call = random_call(name, (12,), labels=True, mask=True, weights=True, bias="plain")
        p = call.problem
        dead = ~p.mask | (p.labels < 0) | (p.token_weights == 0)
        clean = call.run(way)

        def poisoned(states):
            (h,) = states
            return (h.detach().masked_fill(dead[:, None], poison).requires_grad_(h.requires_grad),)

        dirty = replace(
            p, student_hidden=poisoned(p.student_hidden), teacher_hidden=poisoned(p.teacher_hidden)
        )
        more = {n: t.masked_fill(dead[:, None], 99) for n, t in call.more.items()}
        value, gradients = replace(call, problem=dirty, more=more).run(way)
        assert torch.equal(value, clean[0])
        for got, expected in zip(gradients, clean[1]):
            assert torch.equal(got, expected)

    @pytest.mark.parametrize("dtype", [F32, F64], ids=str)
    @pytest.mark.parametrize("way", ["torch", "reference"])
    def test_a_vocabulary_of_one(self, dtype, way):
        for name in NAMES:
            value, gradients = random_call(name, (3,), 1, dtype=dtype).run(way)
            for tensor in (value, *gradients):
                assert not tensor.any(), name

    @pytest.mark.parametrize("tail", ["bucket", "drop", "renormalize"])
    @pytest.mark.parametrize("way", ["torch", "reference"])
    def test_ids_that_are_the_whole_vocabulary(self, tail, way):
        """There is no tail, whatever rounding leaves of the teacher's."""
        call = random_call("topk_kd", (4,), 6, tokens=6, dtype=F64, options={"tail": tail})
        z = (call.problem.teacher_hidden[0] @ call.problem.teacher_weight.T).log_softmax(-1)
        ids = torch.arange(6).expand(4, 6)
        whole = replace(call, more={"ids": ids, "logprobs": z.float()})
        value, gradients = whole.run(way)
        q = call.problem.student_hidden[0] @ call.problem.student_weight.T
        p = z.float().double().log_softmax(-1)
        expected = (p.exp() * (p - q.log_softmax(-1))).sum(-1).mean()
        assert abs((value - expected).item()) <= 100 * 2.0**-53 * max(1.0, expected.item())
        assert all(g.isfinite().all() for g in gradients)

    def test_padding_alone(self):
        """A row whose teacher says nothing: everything is in the tail, of both models."""
        call = random_call("topk_kd", (3,))
        more = {"ids": torch.full((3, 2), -1), "logprobs": torch.full((3, 2), -torch.inf)}
        for tail, backend in itertools.product(("bucket", "drop"), ("torch", "reference")):
            value, gradients = replace(call, more=more, options={"tail": tail}).run(backend)
            assert not any(t.any() for t in (value, *gradients))

    def test_padding_and_the_order_of_ids_change_nothing(self):
        call = random_call("topk_kd", (6,), tokens=5, dtype=F64)
        ids, logprobs = call.more["ids"], call.more["logprobs"]
        order = torch.tensor([3, 1, 4, 0, 2])
        more = {
            "ids": torch.cat([ids[:, order], torch.full((6, 2), -1)], -1),
            "logprobs": torch.cat([logprobs[:, order], torch.full((6, 2), -torch.inf)], -1),
        }
        for tail in ("bucket", "drop", "renormalize"):
            a = replace(call, options={"tail": tail}).run("torch")
            b = replace(call, options={"tail": tail}, more=more).run("torch")
            for x, y in zip((a[0], *a[1]), (b[0], *b[1])):
                assert (x - y).abs().max() <= 100 * 2.0**-53 * max(1.0, float(x.abs().max()))

    @pytest.mark.parametrize("tail", ["bucket", "drop", "renormalize"])
    @pytest.mark.parametrize("divergence", ["kl", "reverse_kl", "jsd"])
    def test_sums_above_one_within_the_rounding_of_bfloat16(self, tail, divergence):
        """Values stay near those of exact probabilities, and not negative."""
        generator = torch.Generator().manual_seed(5)
        z = 4 * torch.randn((50, 12), generator=generator, dtype=F64)
        logprobs, ids = z.log_softmax(-1).topk(11, -1)
        low = logprobs.bfloat16()
        assert (low.double().exp().sum(-1) > 1).any()
        hidden, head = z.requires_grad_(), torch.eye(12, dtype=F64)
        options = {"tail": tail, "divergence": divergence, "reduction": "none"}
        for teacher, most in ((logprobs, 1e-6), (low, 0.2)):
            loss = fused_topk_kd(hidden, head, ids, teacher, **options)
            (grad,) = torch.autograd.grad(loss.sum(), hidden)
            assert grad.isfinite().all()
            assert loss.abs().max() <= most
            if tail != "drop":
                assert loss.min() >= -1e-15

    @pytest.mark.parametrize("name", NAMES)
    def test_tokens_that_cannot_occur(self, name):
        """-inf in the student's bias: no NaN, and no gradient there beyond the teacher's share."""
        call = random_call(name, bias="padded")
        value, gradients = call.run("torch", upstream_of(call))
        assert value.isfinite().all()
        assert all(g.isfinite().all() for g in gradients)
        assert not gradients[2][call.problem.student_bias.isinf()].any()

    def test_a_tensor_of_no_items_gives_zero(self):
        for name in LOSSES:
            call = random_call(name, options={"num_items_in_batch": torch.tensor(0)})
            value, gradients = call.run("torch")
            assert not any(t.any() for t in (value, *gradients))

    @pytest.mark.parametrize("name", NAMES)
    def test_under_no_grad_and_inference_mode(self, name):
        call = random_call(name)
        expected = call.run("torch", upstream_of(call))[0]
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                found = call.value()
            assert not found.requires_grad
            assert (found - expected).abs().max() <= 1e-5 * max(1.0, float(expected.abs().max()))


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
    arguments += [torch.tensor([True, False, True, True]), None, per_row, *spec.encode(), "torch"]
    for upstream, needed in (
        (None, [False] * 3),
        (torch.rand(4, outputs), [True] * 3),
        (torch.rand(4, outputs), [True, False, True]),
    ):
        torch.library.opcheck(operator, (*arguments, upstream, needed))


class TestAutograd:
    @pytest.mark.parametrize("name", NAMES)
    def test_repeated_backward(self, name):
        """The second one forms the gradients again."""
        call = random_call(name)
        value, leaves = call.value(), list(call.leaves.values())
        first = torch.autograd.grad(value.sum(), leaves, retain_graph=True)
        second = torch.autograd.grad(3 * value.sum(), leaves)
        for a, b in zip(first, second):
            assert (3 * a - b).abs().max() <= 4 * unit_roundoff(F32) * float((3 * a).abs().max())

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
        for a, b in zip(divided, thirds.run("torch")[1]):
            off = (a.float() - b.float()).abs()
            # At most a tie of float32 goes the other way.
            assert (off <= torch.finfo(low).eps * b.float().abs() + torch.finfo(low).tiny).all()
            assert (off > 0).float().mean() <= 0.01

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


class TestMemory:
    ROWS, COLUMNS = 512, 2048
    MATRIX = 4 * ROWS * COLUMNS  # bytes of one (R, V) tensor: 4 MiB

    @pytest.mark.parametrize("low", [F32, BF16], ids=str)
    @pytest.mark.parametrize("options", [{}, {"reduction": "none"}], ids=str)
    @pytest.mark.parametrize("name", [*NAMES, "statistics"])
    def test_no_tensor_of_rows_by_columns(self, name, options, low, monkeypatch):
        """One block, within its bytes; with the head's gradient it is far below one matrix."""
        budget = 2**20
        monkeypatch.setitem(blocks.BLOCK_BYTES, "cpu", budget)
        if name in ("selected", "statistics") and options:
            pytest.skip("has no reduction")
        shape = {"columns": self.COLUMNS, "student_width": 4, "teacher_width": 4, "dtype": low}
        if name == "statistics":
            p = random_problem((self.ROWS,), layers=1, **shape)
            peak = allocated_peak(lambda: row_statistics(**statistics_arguments(p)))
        else:
            call = random_call(name, (self.ROWS,), **shape, options=options)
            peak = allocated_peak(lambda: call.run("torch"))
        # Gradients twice (sums and results), converted heads, and numbers per row.
        others = 4 * 4 * 2 * (2 * self.COLUMNS + 2 * self.ROWS) + 4 * 64 * self.ROWS
        assert peak <= budget + others, f"{peak / 2**20:.2f} MiB"
        assert budget + others < self.MATRIX / 2

    @pytest.mark.parametrize("name", [*NAMES, "statistics"])
    def test_the_matrices_that_a_row_function_holds(self, name):
        """At most `MATRICES` of a block's size, whatever else there is."""
        rows, columns = 64, 8192
        matrix = 4 * rows * columns
        shape = {"columns": columns, "student_width": 2, "teacher_width": 2}
        if name == "statistics":
            p = random_problem((rows,), layers=1, **shape)
            peak = allocated_peak(lambda: row_statistics(**statistics_arguments(p)))
        else:
            call = random_call(name, (rows,), **shape, options={cap(name): 30.0})
            peak = allocated_peak(lambda: call.run("torch"))
        assert peak <= (MATRICES + blocks._OWN_MATRICES) * matrix, peak / matrix

    @pytest.mark.parametrize("columns", [1, 1000, 152064, 10**7])
    @pytest.mark.parametrize("device", ["cpu", "cuda"])
    def test_blocks_fit_their_bytes(self, columns, device):
        rows = blocks.block_rows(columns, 4, device)
        budget = blocks.BLOCK_BYTES.get(device, blocks.ACCELERATOR_BLOCK_BYTES)
        whole = rows * columns * 4 * (MATRICES + blocks._OWN_MATRICES)
        assert rows == 1 or whole <= budget


@st.composite
def small_calls(draw, name):
    options = {"temperature": draw(st.sampled_from(TEMPERATURES)), "reduction": "none"}
    if name == "topk_kd":
        options["tail"] = draw(st.sampled_from(["bucket", "renormalize"]))
        options["divergence"] = draw(st.sampled_from(["kl", "reverse_kl", "jsd:0.2", "jsd"]))
    return random_call(
        name,
        draw(st.sampled_from([(3,), (2, 2)])),
        draw(st.integers(2, 40)),
        tokens=draw(st.integers(1, 5)),
        student_width=8,
        teacher_width=8,
        spread=draw(st.sampled_from([0.1, 2.0, 10.0])),
        seed=draw(st.integers(0, 2**16)),
        bias=draw(st.sampled_from(["plain", "padded"])),
        near=draw(st.sampled_from([None, 1e-2])),
        dtype=F64,
        options=options,
    )


class TestProperties:
    @given(call=st.sampled_from(LOSSES).flatmap(small_calls))
    def test_not_negative(self, call):
        assert call.value().min() >= -1e-13

    @given(call=st.sampled_from(LOSSES).flatmap(small_calls), shift=st.floats(-50, 50))
    def test_a_constant_added_to_all_logits_changes_nothing(self, call, shift):
        """By the biases, of each model another one."""
        p = call.problem
        moved = replace(
            p,
            student_bias=(p.student_bias + shift).detach().requires_grad_(),
            teacher_bias=p.teacher_bias - shift / 2,
        )
        upstream = torch.ones(p.leading_shape)
        before, after = (
            call.run("torch", upstream),
            replace(call, problem=moved).run("torch", upstream),
        )
        # Logits of up to 50 + 10 spread are stored with 2^-53 of themselves.
        for a, b in zip((before[0], *before[1]), (after[0], *after[1])):
            scale = max(1.0, float(a.abs().max()))
            assert (a - b).abs().max() <= 2.0**-53 * (200 / 0.5 + 100) * 40 * scale

    @given(call=small_calls("decoupled_kd"))
    def test_zero_where_the_models_are_equal(self, call):
        p = call.problem
        twin = replace(
            p,
            teacher_hidden=tuple(h.detach() for h in p.student_hidden),
            teacher_weight=p.student_weight.detach(),
            teacher_bias=p.student_bias.detach(),
        )
        value, gradients = replace(call, problem=twin).run("torch", torch.ones(p.leading_shape))
        assert not value.any()
        for gradient in gradients:
            assert gradient.abs().max() <= 1e-13

    @given(call=small_calls("topk_kd"))
    def test_zero_where_the_students_own_probabilities_are_given(self, call):
        p, ids = call.problem, call.more["ids"]
        z = (p.student_hidden[0] @ p.student_weight.T + p.student_bias).detach()
        log_q = (z / call.temperature).log_softmax(-1)
        own = log_q.gather(-1, ids.clamp(min=0)).where(ids >= 0, -torch.inf)
        value = replace(call, more={"ids": ids, "logprobs": own}).value()
        # The tail of the given numbers is off by u over its size.
        tail = (1 - own.exp().sum(-1)).clamp(min=2.0**-40)
        assert (value <= 1e-12 + 2.0**-50 * 40 / tail).all()

    @given(call=small_calls("topk_kd"), order=st.randoms(use_true_random=False))
    def test_the_order_of_ids_does_not_matter(self, call, order):
        columns = list(range(call.more["ids"].shape[-1]))
        order.shuffle(columns)
        moved = {n: t[..., columns] for n, t in call.more.items()}
        a, b = call.value(), replace(call, more=moved).value()
        assert (a - b).abs().max() <= 1e-13 * max(1.0, float(a.abs().max()))

    @given(call=small_calls("decoupled_kd"))
    def test_statistics_and_selected_tokens_agree(self, call):
        p = call.problem
        found = row_statistics(**statistics_arguments(p))
        hidden, weight = p.student_hidden[0], p.student_weight
        own = selected_logprobs(hidden, weight, p.labels, bias=p.student_bias)
        assert torch.equal(found.label_logprob, own.detach())
