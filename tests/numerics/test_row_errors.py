"""Errors of fused_rows, fused_logit_kd and fused_rank_kd name argument, value and remedy, before
any work; and properties that the three have for any input.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fdd_kernels import fused_logit_kd, fused_rank_kd, fused_rows
from fdd_kernels.objectives.logits import call as logit_call
from fdd_kernels.objectives.numbers import DEBUG_SWITCH
from fdd_kernels.testing import random_problem
from tests.support.logit_objectives import F64
from tests.support.row_objectives import NAMES
from tests.support.row_objectives import random_row_call as random_call

INF, NAN = float("inf"), float("nan")
P = random_problem(layers=1, bias="plain", labels=True, mask=True)
MODELS = P.student_hidden[0], P.student_weight, P.teacher_hidden[0], P.teacher_weight
TEACHER = MODELS[2:]
CALLS = {name: random_call(name, bias="plain", mask=True, labels=True) for name in NAMES}
GOOD = {name: call.arguments for name, call in CALLS.items()}


@pytest.fixture
def _no_work(monkeypatch):
    def fail(*_, **__):
        raise AssertionError("work was done before the arguments were checked")

    for name in ("row_sum", "row_values", "dense_logits"):
        monkeypatch.setattr(logit_call, name, fail)


def refused(name: str, changes: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        CALLS[name].function(**(GOOD[name] | changes))


@pytest.mark.usefixtures("_no_work")
@pytest.mark.parametrize("name", NAMES)
class TestAll:
    def test_types_and_shapes(self, name):
        refused(name, {"student_hidden": None}, TypeError, "^student_hidden must be a tensor")
        refused(name, {"teacher_weight": None}, TypeError, "^teacher_weight must be a tensor")
        wrong = GOOD[name]["student_weight"][:, :5]
        refused(name, {"student_weight": wrong}, ValueError, r"^student_weight has shape \(37, 5\)")
        wrong = GOOD[name]["teacher_hidden"][:1]
        refused(name, {"teacher_hidden": wrong}, ValueError, "^teacher_hidden has leading shape")
        wrong = {"teacher_weight": GOOD[name]["teacher_weight"].clone().requires_grad_()}
        refused(name, wrong, ValueError, "^teacher_weight requires grad.*detach")
        refused(name, {"mask": P.mask.float()}, TypeError, "^mask is a float32 tensor")

    def test_options(self, name):
        for value in (0, -1.0, INF, NAN):
            refused(name, {"temperature": value}, ValueError, f"^temperature={value} must be fin")
        refused(name, {"temperature": "hot"}, ValueError, "^temperature='hot' is neither a number")
        wrong = {"temperature": "std", "scale_by_t2": True}
        refused(name, wrong, ValueError, "^scale_by_t2=True multiplies.*leave it out")
        refused(name, {"reduction": "batchmean"}, ValueError, "^reduction='batchmean' is not")
        refused(name, {"vocab_size": 38}, ValueError, "^vocab_size=38 is larger than")
        refused(name, {"backend": "triton"}, ValueError, '^backend="triton" does not compute this')
        refused(name, {"shift": True, "labels": None}, ValueError, "^shift=True shifts the labels")


def test_vocabularies():
    smaller = {"teacher_weight": GOOD["uld"]["teacher_weight"][:30], "teacher_bias": None}
    for name in ("logit_kd", "listmle"):
        refused(name, smaller, ValueError, "^student_weight has 37 rows and teacher_weight 30")
    for name in ("rows", "uld"):
        wrong = {"teacher_vocab_size": 38}
        refused(name, wrong, ValueError, "^teacher_vocab_size=38 is larger than the teacher's")
        refused(name, {"teacher_vocab_size": 0}, ValueError, "^teacher_vocab_size=0 must be at l")


@pytest.mark.usefixtures("_no_work")
class TestRank:
    def test_kind_and_k(self):
        refused("uld", {"kind": "ranknet"}, ValueError, "^kind='ranknet' is not one of 'uld', 'li")
        refused("uld", {"k": 3}, ValueError, '^k=3 was given with kind="uld".*leave it out')
        refused("listmle", {"k": 0}, ValueError, "^k=0 must be at least 1")
        refused("listmle", {"k": 2.0}, TypeError, "^k must be an int, got float")
        refused("listmle", {"k": 38}, ValueError, "^k=38 is larger than the vocabulary, of which 3")
        wrong = {"teacher_vocab_size": 30}
        refused("listmle", wrong, ValueError, "^teacher_vocab_size=30 was given.*pass vocab_size")


@pytest.mark.usefixtures("_no_work")
class TestLogitKD:
    def test_divergences(self):
        for text, message in (
            ("akl:2", "^divergence='akl:2' has mu 2, which is not in"),
            ("akl:x", r"^divergence='akl:x' has no number mu: write akl\[:mu\]"),
            ("kl+reverse_kl:-1", "^divergence='kl.reverse_kl:-1' has w -1"),
            ("relative_mse:1", "^divergence='relative_mse:1' gives a parameter"),
            ("akl2", r"^divergence='akl2' is not one of kl, .*akl\[:mu\], kl\+reverse_kl\[:w\]"),
            ("jsd:2", "^divergence='jsd:2' has beta 2"),
        ):
            refused("logit_kd", {"divergence": text}, ValueError, message)
        refused("logit_kd", {"divergence": 0.5}, TypeError, "^divergence must be a string")

    def test_teachers(self):
        def wrong(error, message, **changes):
            none = {"teacher_hidden": None, "teacher_weight": None, "teacher_bias": None}
            refused("logit_kd", none | {"teachers": [TEACHER, TEACHER]} | changes, error, message)

        wrong(ValueError, "^teachers was given together with", teacher_hidden=TEACHER[0])
        wrong(ValueError, "^teachers must be a list of at least one", teachers=[])
        wrong(TypeError, r"^teachers\[1\] must be \(hidden, weight\)", teachers=[TEACHER, 3])
        short = [TEACHER, (TEACHER[0], TEACHER[1][:30])]
        wrong(ValueError, r"^teachers\[1\]: student_weight has 37 rows", teachers=short)
        wrong(ValueError, '^divergence="relative_mse" compares logits', divergence="relative_mse")
        wrong(TypeError, "^teacher_weights must be a tensor of floats", teacher_weights=[1, 2])
        wrong(ValueError, r"^teacher_weights has shape \(3,\)", teacher_weights=torch.ones(3))
        grad = torch.ones(2, requires_grad=True)
        wrong(ValueError, "^teacher_weights requires grad", teacher_weights=grad)
        for values in ([1.0, -1.0], [NAN, 1.0], [0.0, 0.0], [INF, 1.0]):
            weights = torch.tensor(values)
            wrong(ValueError, "^teacher_weights has a position.*correct", teacher_weights=weights)
        refused(
            "logit_kd", {"teacher_weights": torch.ones(2)}, ValueError, "given without teachers"
        )


class TestRows:
    @pytest.mark.usefixtures("_no_work")
    def test_arguments(self):
        for error, message, changes in (
            (TypeError, "^fn must be a function of logits, got str", {"fn": "kl"}),
            (ValueError, "^matrices=0 must be finite and greater", {"matrices": 0}),
        ):
            with pytest.raises(error, match=message):
                fused_rows(changes.pop("fn", torch.sum), *MODELS, **changes)
        for tensor, error, message in (
            (3, TypeError, r"^per_row\[0\] must be a tensor, got int"),
            (
                torch.ones(2, 4),
                ValueError,
                r"^per_row\[0\] has shape \(2, 4\).*with \(2, 5\)",
            ),
            (torch.ones(2, 5, requires_grad=True), ValueError, r"^per_row\[0\] requires grad.*det"),
            (torch.ones(2, 5, device="meta"), ValueError, r"^per_row\[0\] is on meta"),
        ):
            with pytest.raises(error, match=message):
                fused_rows(torch.sum, *MODELS, tensor)
        with pytest.raises(ValueError, match=r"^teacher_bias was given without teacher_hidden"):
            fused_rows(torch.sum, *MODELS[:2], teacher_bias=P.teacher_bias)
        with pytest.raises(ValueError, match=r"^teacher_vocab_size=3 was given without a teacher"):
            fused_rows(torch.sum, *MODELS[:2], teacher_vocab_size=3)

    @pytest.mark.parametrize("way", ["torch", "reference"])
    @pytest.mark.parametrize("reduction", ["mean", "none"])
    @pytest.mark.parametrize(
        ("fn", "error", "message"),
        [
            (lambda z, _: None, TypeError, "^fn returned a NoneType: it must return floats"),
            (lambda z, _: z.argmax(-1), TypeError, "^fn returned a int64 tensor"),
            (lambda z, _: z.sum(), ValueError, r"^fn returned shape \(\) for a block of 10 rows"),
            (lambda z, _: z, ValueError, r"^fn returned shape \(10, 37\).*must return \(10,\)"),
            (lambda z, _: z.detach().sum(-1), ValueError, "^fn returned values without gradient"),
            (lambda z, t: t.sum(-1), ValueError, "^fn returned values without gradient"),
        ],
    )
    def test_what_fn_returns(self, fn, error, message, reduction, way):
        with pytest.raises(error, match=message):
            fused_rows(fn, *MODELS, backend=way, reduction=reduction).sum().backward()

    def test_another_gradient_than_that_of_the_logits(self):
        other = torch.ones((), requires_grad=True)
        with pytest.raises(ValueError, match=r"^fn returned values without gradient"):
            fused_rows(lambda z, t: t.sum(-1) * other, *MODELS)

    def test_no_gradient_is_needed_where_none_is_asked_for(self):
        with torch.no_grad():
            fused_rows(lambda z, t: t.sum(-1), *MODELS)

    def test_infinities_in_debug_mode(self, monkeypatch):
        def fn(z, _):
            return z.sum(-1) / torch.arange(len(z))

        assert fused_rows(fn, *MODELS).isinf()
        monkeypatch.setenv(DEBUG_SWITCH, "1")
        with pytest.raises(ValueError, match=r"^fn returned 1 values that are NaN or infinite, of"):
            fused_rows(fn, *MODELS)


@st.composite
def small_calls(draw, name):
    options = {"temperature": draw(st.sampled_from([0.5, 1.0, 4.0, "std"])), "reduction": "none"}
    if name == "logit_kd":
        choices = ["kl", "akl", "akl:0.9", "kl+reverse_kl:0.3"]
        options["divergence"] = draw(st.sampled_from(choices))
    columns = draw(st.integers(2, 40))
    if name == "listmle":
        options["k"] = draw(st.integers(1, columns))
    return random_call(
        name,
        draw(st.sampled_from([(3,), (2, 2)])),
        columns,
        student_width=8,
        teacher_width=8,
        spread=draw(st.sampled_from([0.1, 2.0, 10.0])),
        seed=draw(st.integers(0, 2**16)),
        bias=draw(st.sampled_from(["plain", "padded"])),
        dtype=F64,
        options=options,
    )


class TestProperties:
    @given(call=st.sampled_from(NAMES[1:]).flatmap(small_calls))
    def test_not_negative(self, call):
        """And "uld" is at most 2; "listmle" where the whole order is ranked at least log n!."""
        value = call.value().detach()
        assert value.min() >= -1e-13
        if call.options.get("kind") == "uld":
            assert value.max() <= 2 + 1e-13

    @given(call=st.sampled_from(NAMES[1:]).flatmap(small_calls), shift=st.floats(-50, 50))
    def test_a_constant_added_to_all_logits_changes_nothing(self, call, shift):
        """Nor does it change a row's standard deviation; gradients sum to 0 over a row."""
        p = call.problem
        moved = replace(
            p,
            student_bias=(p.student_bias + shift).detach().requires_grad_(),
            teacher_bias=p.teacher_bias - shift / 2,
        )
        a, b = call.value().detach(), replace(call, problem=moved).value().detach()
        # Logits of up to 50 + 10 spread are stored with 2^-53 of themselves.
        scale = max(1.0, float(a.abs().max()))
        assert (a - b).abs().max() <= 2.0**-53 * (200 / 0.5 + 100) * 40 * 40 * scale

    @given(call=small_calls("uld"), order=st.randoms(use_true_random=False))
    def test_uld_does_not_know_which_token_is_which(self, call, order):
        columns = list(range(len(call.problem.teacher_weight)))
        order.shuffle(columns)
        p = call.problem
        shuffled = {n: getattr(p, n)[columns] for n in ("teacher_weight", "teacher_bias")}
        a, b = call.value(), replace(call, problem=replace(p, **shuffled)).value()
        assert (a - b).detach().abs().max() <= 1e-13

    @given(call=small_calls("listmle"))
    def test_listmle_grows_with_k(self, call):
        """Each rank adds a loss that is not negative, the last one 0."""
        p, previous = call.problem, 0.0
        used = int((p.student_bias > -torch.inf).sum())
        for k in range(1, len(p.student_weight) + 1):
            value = replace(call, options=call.options | {"k": k}).value().detach()
            assert (value >= previous - 1e-12 * (1 + value.abs())).all()
            if k >= used:
                assert (value - previous).abs().max() <= 1e-12 * (1 + float(value.abs().max()))
            previous = value

    @given(call=small_calls("logit_kd"), scale=st.floats(0.1, 10))
    def test_std_forgets_the_scale_of_logits(self, call, scale):
        options = call.options | {"temperature": "std"}
        scaled = options | {"student_logit_scale": scale, "teacher_logit_scale": 1 / scale}
        a, b = (replace(call, options=o).value().detach() for o in (options, scaled))
        assert (a - b).abs().max() <= 1e-11 * max(1.0, float(a.abs().max()))

    @given(call=small_calls("logit_kd"), weight=st.floats(0, 1))
    def test_one_teacher_twice_is_one_teacher(self, call, weight):
        a = call.arguments
        teacher = tuple([a.pop(f"teacher_{n}") for n in ("hidden", "weight", "bias")])
        weights = torch.tensor([weight, 1 - weight], dtype=F64)
        twice = fused_logit_kd(**a, teachers=[teacher, teacher], teacher_weights=weights)
        once = call.value().detach()
        if call.options["divergence"].startswith("akl"):
            return  # a rounding of p moves tokens across mu
        assert (twice.detach() - once).abs().max() <= 1e-12 * max(1.0, float(once.abs().max()))


def test_ranks_of_one_call_need_no_teacher_bias():
    """The three are importable, and take heads without biases."""
    assert fused_rank_kd(*MODELS, kind="uld").isfinite()
