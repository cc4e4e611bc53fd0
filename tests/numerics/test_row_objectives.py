"""fused_rows, fused_logit_kd and fused_rank_kd against their formulas in float64: values and
gradients per row, every option, several teachers, edges.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from fdd_kernels import fused_logit_kd, fused_rank_kd, fused_rows
from fdd_kernels.backends.torch_stream import blocks, tiling
from fdd_kernels.testing import assert_same_sums, random_problem, strided
from tests.support.logit_objectives import F32, F64, Call, assert_exact, upstream_of
from tests.support.row_objectives import (
    DIVERGENCE_TEXTS,
    NAMES,
    least_distance_to_ties,
    logit_kd_formula,
)
from tests.support.row_objectives import random_row_call as random_call

BF16, F16 = torch.bfloat16, torch.float16
# Relative errors of float32 logits of these problems, and of the probabilities, stay below it.
TIE = 1e-5


def check(call: Call, backend: str = "torch") -> None:
    assert least_distance_to_ties(call) > TIE, "choose another seed: the formula jumps nearby"
    assert_exact(call, backend, upstream_of(call))


class TestFormulas:
    @pytest.mark.parametrize("dtype", [F32, F64], ids=str)
    @pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0, "std"])
    @pytest.mark.parametrize("bias", [None, "padded"])
    @pytest.mark.parametrize("name", NAMES)
    def test_temperatures(self, name, bias, temperature, dtype):
        options = {"temperature": temperature}
        check(random_call(name, bias=bias, dtype=dtype, options=options))

    @pytest.mark.parametrize("text", [*DIVERGENCE_TEXTS, "jsd:0.2", "skew_reverse_kl", "tv"])
    @pytest.mark.parametrize("dtype", [F32, F64], ids=str)
    @pytest.mark.parametrize("temperature", [2.0, "std"])
    def test_divergences(self, text, temperature, dtype):
        options = {"divergence": text, "temperature": temperature}
        check(random_call("logit_kd", bias="plain", dtype=dtype, options=options))

    @pytest.mark.parametrize("text", DIVERGENCE_TEXTS)
    def test_divergences_with_a_padded_vocabulary(self, text):
        check(random_call("logit_kd", bias="padded", options={"divergence": text}))

    @pytest.mark.parametrize("k", [1, 5, 37])
    def test_the_first_k_of_a_ranking(self, k):
        check(random_call("listmle", options={"k": k}, bias="plain"))

    @pytest.mark.parametrize("low", [BF16, F16], ids=str)
    @pytest.mark.parametrize("name", NAMES)
    def test_16_bits(self, name, low):
        check(random_call(name, bias="plain", dtype=low))

    @pytest.mark.parametrize("name", NAMES)
    def test_the_budget_catches_logits_of_16_bits(self, name, monkeypatch):
        logits = blocks._logits
        monkeypatch.setattr(blocks, "_logits", lambda *a: logits(*a).bfloat16().float())
        with pytest.raises(AssertionError, match="is above"):
            check(random_call(name))

    @pytest.mark.trap("soft cap or logit scale ignored")
    @pytest.mark.parametrize("temperature", [2.0, "std"])
    @pytest.mark.parametrize("name", NAMES)
    def test_transforms_of_the_logits(self, name, temperature):
        options = {"student_softcap": 3.0, "teacher_softcap": 2.5, "temperature": temperature}
        options |= {"student_logit_scale": 0.7, "teacher_logit_scale": 1.2}
        check(random_call(name, options=options, bias="plain"))

    @pytest.mark.trap("zero-padding the smaller vocabulary")
    @pytest.mark.parametrize("name", NAMES)
    def test_vocab_size(self, name):
        options = {"vocab_size": 30}
        if name in ("rows", "uld"):  # each model has its own
            options["teacher_vocab_size"] = 30
        call = random_call(name, options=options)
        check(call)
        _, gradients = call.run("torch")
        assert not gradients[1][30:].any()

    @pytest.mark.parametrize("name", NAMES)
    @pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
    @pytest.mark.parametrize("weights", [False, True])
    @pytest.mark.parametrize("shift", [False, True])
    def test_reductions_masks_and_weights(self, name, reduction, weights, shift):
        options = {"reduction": reduction, "shift": shift, "scale_by_t2": True, "temperature": 2.0}
        more = {"token_weights": weights, "labels": True, "mask": True, "options": options}
        check(random_call(name, (3, 7), **more))

    @pytest.mark.parametrize("name", NAMES)
    @pytest.mark.parametrize("items", [3, torch.tensor(11)], ids=str)
    def test_num_items(self, name, items):
        check(random_call(name, labels=True, options={"num_items_in_batch": items}))

    @pytest.mark.parametrize("leading", [(), (1,), (2, 2, 3)], ids=str)
    @pytest.mark.parametrize("name", NAMES)
    def test_leading_shapes(self, name, leading):
        check(random_call(name, leading, options={"reduction": "none"}))

    @pytest.mark.parametrize("name", NAMES)
    def test_strided_tensors(self, name):
        call = random_call(name, contiguous=False)
        check(replace(call, more={n: strided(t) for n, t in call.more.items()}))

    @pytest.mark.parametrize("name", NAMES)
    @pytest.mark.parametrize("low", [F32, BF16], ids=str)
    @pytest.mark.parametrize("rows", [1, 3])
    @pytest.mark.parametrize("reduction", ["mean", "none"])
    def test_blocks_and_tiles_of_every_kind(self, name, low, rows, reduction, monkeypatch):
        monkeypatch.setattr(blocks, "block_rows", lambda *_: rows)
        monkeypatch.setattr(tiling, "OPERAND_BYTES", 4 * 8 * 5)
        options = {"reduction": reduction, "student_softcap": 4.0}
        check(random_call(name, (11,), bias="plain", dtype=low, mask=True, options=options))

    @pytest.mark.parametrize("name", NAMES)
    @pytest.mark.parametrize("trained", ["student_hidden", "student_weight", "student_bias"])
    def test_only_the_gradients_that_are_needed(self, name, trained):
        names = {"student_hidden", "student_weight", "student_bias"} - {trained}
        call = random_call(name, bias="plain")
        one = replace(call, problem=call.problem.frozen(*names))
        (found,) = one.run("torch")[1]
        everything = dict(zip(call.leaves, call.run("torch")[1]))
        assert torch.equal(found, everything[next(iter(one.leaves))])


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("rows", {}),
        ("uld", {}),
        ("listmle", {"k": 4}),
        *[("logit_kd", {"divergence": d}) for d in DIVERGENCE_TEXTS],
    ],
    ids=str,
)
@pytest.mark.parametrize("temperature", [1.0, "std"])
def test_reference(name, options, temperature):
    """Dense, and differentiable twice."""
    options = options | {"temperature": temperature}
    call = random_call(name, (2, 3), 9, dtype=F64, bias="padded", options=options)
    check(call, "reference")

    def value(hidden, weight):
        p = replace(call.problem, student_hidden=(hidden,), student_weight=weight)
        return replace(call, problem=p.frozen("student_bias")).value("reference")

    if options.get("divergence", "").partition(":")[0] == "akl":
        return  # its weights are constants
    leaves = [*call.problem.student_hidden, call.problem.student_weight]
    assert torch.autograd.gradgradcheck(value, leaves)


def models(count: int, columns=37, width=6, dtype=F64, seed=5):
    """The student of a problem, and several teachers with biases, the second without."""
    p = random_problem((2, 5), columns, layers=1, dtype=dtype, bias="plain", mask=True)
    generator = torch.Generator().manual_seed(seed)
    teachers = [(p.teacher_hidden[0], p.teacher_weight, p.teacher_bias)]
    for m in range(1, count):
        h = torch.randn((2, 5, width + m), generator=generator, dtype=F64)
        w = torch.randn((columns, width + m), generator=generator, dtype=F64)
        teachers.append((h.to(dtype), w.to(dtype), *([p.teacher_bias * m] if m > 1 else [])))
    student = {"student_hidden": p.student_hidden[0], "student_weight": p.student_weight}
    return student | {"student_bias": p.student_bias, "mask": p.mask}, teachers, p


def distribution(teacher, temperature: float):
    h, w, *bias = teacher
    z = h.double() @ w.double().T + (bias[0].double() if bias else 0.0)
    return (z / temperature).softmax(-1)


class TestSeveralTeachers:
    @pytest.mark.parametrize("per_row", [False, True])
    @pytest.mark.parametrize("text", ["kl", "akl", "jsd:0.3"])
    @pytest.mark.parametrize("way", ["torch", "reference"])
    def test_a_mixture(self, text, per_row, way):
        student, teachers, p = models(3)
        weights = torch.tensor([1.0, 0.0, 3.0])
        if per_row:
            weights = torch.rand((3, 2, 5), generator=torch.Generator().manual_seed(0))
        value = fused_logit_kd(
            **student,
            teachers=teachers,
            teacher_weights=weights,
            divergence=text,
            temperature=2.0,
            backend=way,
        )
        gradients = torch.autograd.grad(value, list(p.leaves.values()))
        share = weights.double() / weights.double().sum(0)
        share = share.view(3, *(1, 1) if not per_row else (2, 5), 1)
        mixed = sum(w * distribution(t, 2.0) for w, t in zip(share, teachers))
        z = p.student_hidden[0] @ p.student_weight.T + p.student_bias
        call = replace(random_call("logit_kd"), options={"divergence": text})
        rows = logit_kd_formula(z[p.mask] / 2, mixed[p.mask].log(), call, {})
        expected = rows.mean()
        of_expected = torch.autograd.grad(expected, list(p.leaves.values()))
        for got, true in zip((value, *gradients), (expected, *of_expected)):
            assert_same_sums(got.detach(), true.detach(), 37 * 10)

    def test_the_gradient_is_that_of_a_mean_of_kls(self):
        student, teachers, p = models(3)
        weights = torch.tensor([0.5, 0.2, 0.3], dtype=F64)
        mixture = fused_logit_kd(**student, teachers=teachers, teacher_weights=weights)
        each = [fused_logit_kd(**student, teachers=[teacher]) for teacher in teachers]
        mean = sum(w * value for w, value in zip(weights, each))
        assert mean > mixture
        leaves = list(p.leaves.values())
        for a, b in zip(torch.autograd.grad(mixture, leaves), torch.autograd.grad(mean, leaves)):
            assert_same_sums(a, b, 37 * 10)

    def test_one_teacher_is_the_plain_call(self):
        student, (teacher, _), _ = models(2)
        h, w, b = teacher
        one = fused_logit_kd(**student, teachers=[teacher], temperature="std")
        plain = fused_logit_kd(
            **student, teacher_hidden=h, teacher_weight=w, teacher_bias=b, temperature="std"
        )
        assert_same_sums(one.detach(), plain.detach(), 37 * 10)

    def test_equal_weights_if_none_and_16_bit_heads_in_tiles(self, monkeypatch):
        monkeypatch.setattr(tiling, "OPERAND_BYTES", 4 * 8 * 5)
        student, teachers, _ = models(3, dtype=BF16)
        found = fused_logit_kd(**student, teachers=teachers)
        even = torch.tensor([2.0, 2.0, 2.0])
        assert torch.equal(
            found, fused_logit_kd(**student, teachers=teachers, teacher_weights=even)
        )
        wide = [tuple([t.double() for t in teacher]) for teacher in teachers]
        exact = fused_logit_kd(
            **{n: t.double() if t.is_floating_point() else t for n, t in student.items()},
            teachers=wide,
        )
        # Logits below 2^4 of float32, sums of 16 products and of 37 tokens.
        assert abs(float((found - exact).detach())) <= 2 * (16 + 37) * 2.0**-24 * 16

    def test_a_masked_position_may_have_no_weights(self):
        student, teachers, p = models(2)
        weights = torch.ones((2, 2, 5)).masked_fill(~p.mask, 0.0)
        value = fused_logit_kd(**student, teachers=teachers, teacher_weights=weights)
        (gradient,) = torch.autograd.grad(value, p.student_hidden[0])
        assert gradient.isfinite().all()


class TestVocabulariesOfTheirOwn:
    @pytest.mark.parametrize("sizes", [(37, 20), (20, 37), (1, 5)])
    @pytest.mark.parametrize("way", ["torch", "reference"])
    def test_uld(self, sizes, way):
        generator = torch.Generator().manual_seed(1)
        h, w, t, wt = (
            torch.randn(shape, generator=generator, dtype=F64)
            for shape in ((6, 4), (sizes[0], 4), (6, 5), (sizes[1], 5))
        )
        h.requires_grad_(), w.requires_grad_()
        found = fused_rank_kd(h, w, t, wt, kind="uld", backend=way)
        q, p = (
            torch.nn.functional.pad(
                (a @ b.T).softmax(-1).sort(-1, descending=True).values, (0, 37 - len(b))
            )
            for a, b in ((h, w), (t, wt))
        )
        expected = (q - p).abs().sum(-1).mean()
        for got, true in zip(
            (found, *torch.autograd.grad(found, [h, w])),
            (expected, *torch.autograd.grad(expected, [h, w])),
        ):
            assert_same_sums(got.detach(), true.detach(), 37 * 10)

    def test_rows(self):
        """And without a teacher."""
        h, w = torch.randn(6, 4, requires_grad=True), torch.randn(11, 4)
        t, wt = torch.randn(6, 3), torch.randn(7, 3)

        def fn(z_s, z_t):
            assert z_s.shape[1] == 11
            assert z_t.shape[1] == 5
            return z_s.sum(-1)

        fused_rows(fn, h, w, t, wt, teacher_vocab_size=5).backward()
        given = h.grad

        def alone(z_s, z_t):
            assert z_t is None
            return z_s.sum(-1)

        h.grad = None
        fused_rows(alone, h, w).backward()
        assert torch.equal(h.grad, given)


class TestEdges:
    @pytest.mark.trap("all rows masked")
    @pytest.mark.parametrize("name", NAMES)
    @pytest.mark.parametrize("reduction", ["mean", "none"])
    @pytest.mark.parametrize("way", ["torch", "reference"])
    @pytest.mark.parametrize("how", ["mask", "empty"])
    def test_no_valid_row_gives_zeros(self, name, reduction, how, way):
        leading = (0, 5) if how == "empty" else (2, 5)
        call = random_call(name, leading, mask=True, options={"reduction": reduction})
        problem = replace(call.problem, mask=torch.zeros_like(call.problem.mask))
        value, gradients = replace(call, problem=problem).run(way)
        assert value.shape == (leading if reduction == "none" else ())
        for tensor in (value, *gradients):
            assert not tensor.any()

    @pytest.mark.trap("mask not applied")
    @pytest.mark.parametrize("name", NAMES)
    @pytest.mark.parametrize("poison", [math.nan, math.inf])
    @pytest.mark.parametrize("way", ["torch", "reference"])
    def test_rows_left_out_change_nothing(self, name, poison, way):
        call = random_call(name, (12,), mask=True, token_weights=True, bias="plain")
        p = call.problem
        dead = ~p.mask | (p.token_weights == 0)
        clean = call.run(way)

        def poisoned(states):
            (h,) = states
            return (h.detach().masked_fill(dead[:, None], poison).requires_grad_(h.requires_grad),)

        dirty = replace(
            p, student_hidden=poisoned(p.student_hidden), teacher_hidden=poisoned(p.teacher_hidden)
        )
        value, gradients = replace(call, problem=dirty).run(way)
        assert torch.equal(value, clean[0])
        for got, expected in zip(gradients, clean[1]):
            assert torch.equal(got, expected)

    @pytest.mark.parametrize("text", [t for t in DIVERGENCE_TEXTS if t != "relative_mse"])
    @pytest.mark.parametrize("temperature", [1.0, "std"])
    @pytest.mark.parametrize("way", ["torch", "reference"])
    def test_equal_models(self, text, temperature, way):
        """akl's weight is 0 / 0 there: 1/2. The gradient is 0 up to rounding of p and q."""
        p = random_problem(layers=1, dtype=F64, near=0.0, teacher_width=8)
        value = fused_logit_kd(
            p.student_hidden[0],
            p.student_weight,
            p.teacher_hidden[0],
            p.teacher_weight,
            divergence=text,
            temperature=temperature,
            backend=way,
        )
        assert value == 0
        for gradient in torch.autograd.grad(value, list(p.leaves.values())):
            assert gradient.abs().max() <= 37 * 2.0**-53

    def test_uld_of_equal_models_has_no_gradient(self):
        """sign(0) is 0."""
        p = random_problem(layers=1, near=0.0, teacher_width=8)
        arguments = p.student_hidden[0], p.student_weight, p.teacher_hidden[0], p.teacher_weight
        value = fused_rank_kd(*arguments, kind="uld")
        assert value == 0
        assert not any(g.any() for g in torch.autograd.grad(value, list(p.leaves.values())))

    @pytest.mark.parametrize("kind", ["uld", "listmle"])
    @pytest.mark.parametrize("way", ["torch", "reference"])
    def test_ties_have_finite_gradients(self, kind, way):
        """All logits of a row are equal: any order is right, and "std" is 1."""
        h, head = torch.ones(3, 2, dtype=F64, requires_grad=True), torch.ones(7, 2, dtype=F64)
        for temperature in (1.0, "std"):
            value = fused_rank_kd(
                h,
                head,
                torch.ones(3, 2, dtype=F64),
                head,
                kind=kind,
                temperature=temperature,
                backend=way,
            )
            (gradient,) = torch.autograd.grad(value, h)
            expected = 0.0 if kind == "uld" else sum(math.log(i) for i in range(1, 8))
            assert abs(float(value.detach()) - expected) <= 100 * 2.0**-53
            assert gradient.abs().max() <= 100 * 2.0**-53

    @pytest.mark.parametrize("mu", [0, 1])
    def test_heads_of_akl_at_both_ends(self, mu):
        """mu = 0: the likeliest token alone; mu = 1: all, up to rounding of the sum."""
        options = {"divergence": f"akl:{mu}"}
        call = random_call("logit_kd", dtype=F64, options=options)
        if mu == 0:
            check(call)
        value = call.value()
        kl = random_call("logit_kd", dtype=F64).value()
        assert value.isfinite()
        if mu == 1:
            assert abs(float(value - kl)) <= 1e-2 * float(kl)

    def test_a_teacher_of_zeros_has_no_relative_error(self):
        h, w = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4)
        value = fused_logit_kd(h, w, torch.zeros(3, 4), w, divergence="relative_mse")
        (gradient,) = torch.autograd.grad(value, h)
        assert value == 0
        assert not gradient.any()

    @pytest.mark.parametrize("name", NAMES[1:])
    @pytest.mark.parametrize("way", ["torch", "reference"])
    @pytest.mark.parametrize("temperature", [1.0, "std"])
    def test_a_vocabulary_of_one(self, name, way, temperature):
        options = {"temperature": temperature}
        value, gradients = random_call(name, (3,), 1, dtype=F64, options=options).run(way)
        for tensor in (value, *gradients):
            assert tensor.abs().max() <= 4 * 2.0**-53
