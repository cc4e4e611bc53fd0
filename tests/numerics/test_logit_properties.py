"""Properties that the objectives of the logits have for any input."""

from __future__ import annotations

from dataclasses import replace

import torch
from hypothesis import given
from hypothesis import strategies as st

from fdd_kernels import row_statistics, selected_logprobs
from tests.support.logit_objectives import (
    F64,
    LOSSES,
    TEMPERATURES,
    random_call,
    statistics_arguments,
)


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
            scale = max(1.0, float(a.detach().abs().max()))
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
        assert (a - b).abs().max() <= 1e-13 * max(1.0, float(a.detach().abs().max()))

    @given(call=small_calls("decoupled_kd"))
    def test_statistics_and_selected_tokens_agree(self, call):
        p = call.problem
        found = row_statistics(**statistics_arguments(p))
        hidden, weight = p.student_hidden[0], p.student_weight
        own = selected_logprobs(hidden, weight, p.labels, bias=p.student_bias)
        assert torch.equal(found.label_logprob, own.detach())
