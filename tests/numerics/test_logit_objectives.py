"""fused_decoupled_kd, fused_topk_kd, selected_logprobs and row_statistics against their formulas in
float64: values and gradients per row, every option, edges.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch

from fdd_kernels import fused_topk_kd, row_statistics, selected_logprobs
from fdd_kernels.backends.torch_stream import blocks, tiling
from fdd_kernels.testing import random_problem, strided, unit_roundoff
from tests.support.logit_objectives import (
    F32,
    F64,
    LOSSES,
    NAMES,
    TEMPERATURES,
    Call,
    assert_exact,
    random_call,
    statistics_arguments,
    upstream_of,
)

BF16, F16 = torch.bfloat16, torch.float16
TOP_K = [
    {"tail": tail, "divergence": divergence}
    for tail in ("bucket", "drop", "renormalize")
    for divergence in ("kl", "reverse_kl", "jsd", "jsd:0.1", "jsd:0", "jsd:1")
]


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


@pytest.mark.parametrize(
    ("name", "options"), [*[(n, {}) for n in NAMES], *[("topk_kd", o) for o in TOP_K[1:9]]], ids=str
)
def test_reference(name, options):
    """Dense, and differentiable twice."""
    call = random_call(name, (2, 3), 9, dtype=F64, bias="padded", options=options)
    assert_exact(call, "reference", upstream_of(call))

    def value(hidden, weight):
        p = replace(call.problem, student_hidden=(hidden,), student_weight=weight)
        return replace(call, problem=p.frozen("student_bias")).value("reference")

    leaves = [*call.problem.student_hidden, call.problem.student_weight]
    assert torch.autograd.gradgradcheck(value, leaves)


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

    @pytest.mark.parametrize("way", ["torch", "reference"])
    @pytest.mark.parametrize("labels", [False, True])
    def test_of_the_student_alone(self, way, labels):
        p = random_problem(layers=1, dtype=F64, bias="plain", labels=labels, mask=True)
        arguments = statistics_arguments(p, backend=way)
        alone = {name: t for name, t in arguments.items() if not name.startswith("teacher_")}
        both, found = row_statistics(**arguments), row_statistics(**alone)
        for name, of_both in both._asdict().items():
            got = getattr(found, name)
            if name in ("lse_t", "entropy_t", "kl", "agree") or of_both is None:
                assert got is None, name
            else:  # the same operations on the same numbers
                assert got.dtype == of_both.dtype
                torch.testing.assert_close(got, of_both, rtol=1e-13, atol=1e-13, msg=name)

    @pytest.mark.parametrize("name", ["teacher_weight", "teacher_bias"])
    def test_half_a_teacher_is_refused(self, name):
        arguments = statistics_arguments(random_problem(layers=1, bias="plain"))
        alone = {n: t for n, t in arguments.items() if not n.startswith("teacher_")}
        with pytest.raises(TypeError, match="teacher_hidden must be a tensor, got NoneType"):
            row_statistics(**alone, **{name: arguments[name]})

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

    @pytest.mark.parametrize("way", ["torch", "reference"])
    @pytest.mark.parametrize("leading", [(0,), (0, 3), (2, 0)], ids=str)
    @pytest.mark.parametrize("per_position", [None, 1, 4])
    def test_selected_without_positions(self, per_position, leading, way):
        """Empty results of the shape of the ids, and gradients of 0."""
        call = random_call("selected", leading, bias="plain")
        shape = leading if per_position is None else (*leading, per_position)
        ids = torch.zeros(shape, dtype=torch.long)
        value, gradients = replace(call, more={"ids": ids}).run(way)
        assert value.shape == shape
        assert [g.shape for g in gradients] == [t.shape for t in call.leaves.values()]
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
        """A row whose teacher says nothing: everything is in the tail of both models, or nothing is
        compared.
        """
        call = random_call("topk_kd", (3,))
        more = {"ids": torch.full((3, 2), -1), "logprobs": torch.full((3, 2), -torch.inf)}
        tails, backends = ("bucket", "drop", "renormalize"), ("torch", "reference")
        for tail, divergence, backend in itertools.product(tails, ("kl", "jsd"), backends):
            options = {"tail": tail, "divergence": divergence}
            value, gradients = replace(call, more=more, options=options).run(backend)
            assert not any(t.any() for t in (value, *gradients)), options  # NaN is true

    @pytest.mark.parametrize("way", ["torch", "reference"])
    def test_a_row_of_padding_beside_others(self, way):
        """Renormalised, it adds 0 to the loss and to every gradient."""
        call = random_call("topk_kd", (4,), dtype=F64, options={"tail": "renormalize"})
        more = {n: t.clone() for n, t in call.more.items()}
        more["ids"][2], more["logprobs"][2] = -1, -torch.inf
        options = call.options | {"reduction": "none"}
        values, gradients = replace(call, more=more, options=options).run(way)
        weights = torch.tensor([1.0, 1.0, 0.0, 1.0], dtype=F64)
        without = replace(call.problem, token_weights=weights)
        expected = replace(call, problem=without, options=options).run(way)
        assert values[2] == 0
        assert not gradients[0][2].any()
        for got, true in zip((values, *gradients), (expected[0], *expected[1])):
            bound = 100 * unit_roundoff(F64) * max(1.0, float(true.abs().max()))
            assert (got - true).abs().max() <= bound

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
