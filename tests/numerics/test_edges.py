"""Edges of the input: padded vocabularies, masked rows, sizes, layouts, dtypes, host syncs."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fdd_kernels import fdd_loss_reference, fused_fdd_loss
from fdd_kernels.backends import BACKENDS
from fdd_kernels.objectives.fdd import loss as fdd_loss
from fdd_kernels.testing import (
    Problem,
    assert_same_sums,
    assert_within_budget,
    evaluate,
    random_problem,
    strided,
)


def check(problem: Problem, backend: str, **options) -> None:
    assert_within_budget(problem, evaluate(problem, backend=backend, **options), **options)


@pytest.mark.trap("zero-padding the smaller vocabulary")
def test_columns_beyond_vocab_size_change_nothing(backend):
    """Columns beyond vocab_size may hold anything; unequal vocabularies without it are refused."""
    problem = random_problem(columns=40, labels=True)
    problem = replace(problem, labels=problem.labels.clamp(max=34))
    smaller = replace(problem, teacher_weight=problem.teacher_weight[:35].contiguous())
    with pytest.raises(ValueError, match="vocab_size"):
        fused_fdd_loss(**smaller.arguments, backend=backend)
    check(smaller, backend, vocab_size=35, ce_weight=1.0)
    outcome = evaluate(smaller, backend=backend, vocab_size=35)
    assert not outcome.gradients["student_weight"][35:].any()
    poisoned = problem.map(lambda t: t.clone())
    poisoned.student_weight.data[35:] = torch.nan
    assert torch.equal(
        evaluate(poisoned, backend=backend, vocab_size=35).terms.loss, outcome.terms.loss
    )


@pytest.mark.trap("mask not applied")
@pytest.mark.parametrize("poison", [math.nan, math.inf, 1e30])
def test_ignored_rows_change_nothing(backend, poison):
    """Ignored rows change neither value nor gradient, not even by 0 * NaN."""
    problem = random_problem((12,), mask=True, labels=True, bias="plain")
    dead = ~problem.mask | (problem.labels == -100)
    assert 0 < int(dead.sum()) < 12
    clean = evaluate(problem, backend=backend, ce_weight=1.0)

    def poisoned(states):
        return tuple(
            [
                h.detach().masked_fill(dead[:, None], poison).requires_grad_(h.requires_grad)
                for h in states
            ]
        )

    dirty = replace(
        problem,
        student_hidden=poisoned(problem.student_hidden),
        teacher_hidden=poisoned(problem.teacher_hidden),
    )
    outcome = evaluate(dirty, backend=backend, ce_weight=1.0)
    assert torch.equal(outcome.terms.loss, clean.terms.loss)
    for name, gradient in clean.gradients.items():
        assert torch.equal(outcome.gradients[name], gradient), name
        if name.startswith("student_hidden"):
            assert not gradient[dead].any()
    reference = evaluate(dirty, fdd_loss_reference, ce_weight=1.0)
    assert all(g.isfinite().all() for g in (*reference.terms, *reference.gradients.values()))


@pytest.mark.trap("mask not applied")
@pytest.mark.parametrize("trajectory", ["kl", "jsd", "mse"])
@pytest.mark.parametrize("side", ["student", "teacher", "both"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dense", [False, True], ids=["", "reference"])
def test_a_layer_of_weight_zero_may_hold_anything(
    backend, device, trajectory, side, reduction, dense
):
    """NaN in its states changes neither terms nor gradients, and it gets no gradient itself."""
    problem = random_problem((7,), device=device, layers=4, bias="plain", labels=True)
    options = {"trajectory": trajectory, "layer_weights": (2.0, 0.0, 0.5), "beta": 0.0}
    options |= {"reduction": reduction, "ce_weight": 0.5}
    dirty = problem.map(lambda t: t.clone())
    for model in ("student", "teacher") if side == "both" else (side,):
        getattr(dirty, f"{model}_hidden")[1].data[...] = torch.nan
    outcome = evaluate(dirty, backend="reference" if dense else backend, **options)
    for tensor in (*outcome.terms, *outcome.gradients.values()):
        assert tensor.isfinite().all()
    assert not outcome.gradients["student_hidden[1]"].any()
    assert_within_budget(problem, outcome, **options)


@pytest.mark.trap("all rows masked")
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("how", ["mask", "labels"])
@pytest.mark.parametrize("dense", [False, True], ids=["", "reference"])
def test_no_valid_row_gives_zeros(backend, how, reduction, dense):
    problem = random_problem(mask=True, labels=True, bias="plain")
    problem = replace(
        problem,
        **{how: torch.full_like(getattr(problem, how), {"mask": False, "labels": -100}[how])},
    )
    chosen = "reference" if dense else backend
    outcome = evaluate(problem, backend=chosen, reduction=reduction, ce_weight=1.0)
    for tensor in (*outcome.terms, *outcome.gradients.values()):
        assert not tensor.any()  # NaN is true


@pytest.mark.trap("mean of means under gradient accumulation")
def test_micro_batches_of_unequal_size_add_up():
    """Divide each micro-batch by the tokens of all: the sum is the whole batch.

    In float64, computed by the torch backend alone, sums can be compared closely.
    """
    problem = random_problem((4, 6), labels=True, dtype=torch.float64)
    labels = problem.labels.clone()
    labels[:2, 1:] = -100  # few tokens in the first half
    problem = replace(problem, labels=labels)
    total = (labels != -100).sum()

    def half(which: slice, **options):
        part = replace(
            problem,
            labels=labels[which],
            student_hidden=tuple([h.detach()[which] for h in problem.student_hidden]),
            teacher_hidden=tuple([h[which] for h in problem.teacher_hidden]),
        )
        return evaluate(part, backend="torch", ce_weight=1.0, **options)

    whole = evaluate(problem, backend="torch", ce_weight=1.0)
    halves = [half(which, num_items_in_batch=total) for which in (slice(0, 2), slice(2, 4))]
    terms = problem.student_weight.numel() + 24
    assert_same_sums(sum(h.terms.loss for h in halves), whole.terms.loss, terms)
    assert_same_sums(
        sum(h.gradients["student_weight"] for h in halves), whole.gradients["student_weight"], terms
    )
    means = [half(which) for which in (slice(0, 2), slice(2, 4))]
    assert abs(sum(m.terms.loss for m in means) / 2 - whole.terms.loss) > 1e-3, (
        "the example shows nothing"
    )


@pytest.mark.trap("silent non-zero defaults")
def test_labels_alone_only_select_rows(backend):
    """Mix in no cross-entropy unless asked: other labels of the same rows give the same loss."""
    problem = random_problem(labels=True)
    terms = evaluate(problem, backend=backend).terms
    other = replace(problem, labels=problem.labels.where(problem.labels < 0, 0))
    assert torch.equal(evaluate(other, backend=backend).terms.loss, terms.loss)
    assert terms.ce == 0
    assert terms.loss == terms.output_kd + terms.trajectory + terms.derivative


@pytest.mark.trap("vocabulary sizes")
@pytest.mark.parametrize(
    "columns", [1, 2, 127, 128, 129, 32001, pytest.param(151936, marks=pytest.mark.slow)]
)
def test_vocabularies_of_every_size(backend, columns):
    problem = random_problem((3,), columns, 4, 6, layers=2, labels=True)
    # the angle of deltas of 1 or 2 columns is degenerate
    options = {"output_in_dynamics": columns > 2, "ce_weight": 1.0}
    check(problem, backend, **options)


@pytest.mark.trap("rows not a multiple of the tile")
@pytest.mark.parametrize("rows", [1, 2, 15, 17, 31, 63, 65, 129, 257])
def test_rows_not_a_multiple_of_the_tile(backend, rows):
    check(random_problem((rows,), 70, 4, 6, labels=rows > 2), backend, reduction="sum")


@pytest.mark.trap("int32 offsets past 2^31")
@pytest.mark.parametrize(
    "what", ["student_hidden", "teacher_hidden", "student_weight", "teacher_weight"]
)
def test_rows_more_than_2_31_elements_apart(backend, what):
    """Two rows more than 2^31 elements apart; the memory between them is never touched."""
    problem = random_problem((2,), 2 if "weight" in what else 37, 4, 4, layers=2)

    def apart(tensor):
        stride = 2**31 + 64
        far = torch.empty(stride + tensor.shape[1], dtype=torch.float16).as_strided(
            tensor.shape, (stride, 1)
        )
        return far.copy_(tensor.detach()).requires_grad_(tensor.requires_grad)

    half = problem.to(torch.float16)
    value = getattr(half, what)
    far = tuple([apart(h) for h in value]) if isinstance(value, tuple) else apart(value)
    options = {"output_in_dynamics": False}
    near_outcome = evaluate(half, backend=backend, **options)
    far_outcome = evaluate(replace(half, **{what: far}), backend=backend, **options)
    # up to rounding: a matrix library may take other kernels for other strides
    torch.testing.assert_close(far_outcome.terms.loss, near_outcome.terms.loss)
    for name, gradient in near_outcome.gradients.items():
        size = float(gradient.abs().max())
        torch.testing.assert_close(
            far_outcome.gradients[name], gradient, rtol=2e-3, atol=1e-4 * size, msg=name
        )


@pytest.mark.trap("frozen head still allocating a gradient")
def test_a_frozen_head_is_not_asked_for_a_gradient(backend, monkeypatch):
    """Neither in `grad` nor, where the backend has it, in `stats_and_grad`; nothing comes back.

    tests/kernels/test_memory.py watches the allocations.
    """
    asked, real = [], BACKENDS[backend]

    def grad(inputs, spec, per_row, needed):
        found = real.grad(inputs, spec, per_row, needed)
        asked.append((list(needed), len(found)))
        return found

    def stats_and_grad(*arguments):
        gradients, statistics = real.stats_and_grad(*arguments)
        asked.append((list(arguments[4]), len(gradients)))
        return gradients, statistics

    both = real.stats_and_grad and stats_and_grad
    problem = random_problem(bias="plain")
    for changes in ({"stats_and_grad": both}, {"stats_and_grad": None, "cached_rows": None}):
        monkeypatch.setitem(BACKENDS, backend, replace(real, grad=grad, **changes))
        asked.clear()
        evaluate(problem.frozen("student_weight", "student_bias"), backend=backend)
        evaluate(problem, backend=backend)
        assert asked == [([True] * 3 + [False] * 2, 3), ([True] * 5, 5)]


@pytest.mark.trap("non-contiguous inputs losing gradient")
@pytest.mark.parametrize(
    "kind", ["last_dimension", "transposed_head", "cut_sequence", "expanded", "channels_first"]
)
def test_inputs_that_are_not_contiguous(backend, kind):
    problem = random_problem((2, 5), labels=True, mask=True, bias="plain")
    layouts = {
        "last_dimension": strided,
        "transposed_head": lambda t: t.T.contiguous().T if t.ndim == 2 else t,
        "cut_sequence": lambda t: torch.cat([t, t], 1)[:, : t.shape[1]] if t.ndim == 3 else t,
        "expanded": lambda t: t[:1].expand_as(t) if t.ndim == 3 else t,
        "channels_first": lambda t: t.transpose(0, -1).contiguous().transpose(0, -1),
    }
    other = problem.map(layouts[kind])
    if kind == "last_dimension":
        other = replace(other, labels=strided(problem.labels), mask=strided(problem.mask))
    assert any(not t.is_contiguous() for t in (*other.student_hidden, other.student_weight))
    outcome = evaluate(other, backend=backend, ce_weight=1.0)
    assert_within_budget(other, outcome, ce_weight=1.0)


@pytest.mark.trap("mixed dtypes")
@pytest.mark.parametrize("pairs", [("bf16", "f32"), ("f32", "bf16"), ("f16", "bf16")], ids="-".join)
@pytest.mark.parametrize("split", ["student_teacher", "hidden_weight", "bias"])
def test_mixed_dtypes(backend, pairs, split):
    names = {"bf16": torch.bfloat16, "f32": torch.float32, "f16": torch.float16}
    first, second = (names[p] for p in pairs)
    problem = random_problem(bias="plain")
    one, two = problem.to(first), problem.to(second)
    fields = {
        "student_teacher": ("teacher_hidden", "teacher_weight", "teacher_bias"),
        "hidden_weight": ("student_weight", "teacher_weight"),
        "bias": ("student_bias", "teacher_bias"),
    }[split]
    mixed = replace(one, **{name: getattr(two, name) for name in fields})
    check(mixed, backend)


def test_mixed_dtypes_between_layers(backend):
    problem = random_problem()
    states = tuple(
        [
            h.detach().to(d)
            for h, d in zip(problem.student_hidden, (torch.float16, torch.float32, torch.bfloat16))
        ]
    )
    check(replace(problem, student_hidden=tuple([h.requires_grad_() for h in states])), backend)


class Syncs(TorchDispatchMode):
    """Record the operators for which an accelerator's host waits."""

    WAITING = ("_local_scalar_dense", "nonzero", "item", "is_nonzero", "equal")

    def __init__(self):
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in self.WAITING:
            self.found.append(name)
        return function(*args, **(kwargs or {}))


@pytest.mark.trap("host syncs on the hot path")
def test_host_waits_for_nothing_but_the_number_of_valid_rows(monkeypatch):
    """Outside the operations the host never waits; inside them only for the number of valid rows,
    once each. tests/kernels/test_keeping.py watches the path with cached logits.
    """
    problem = random_problem(labels=True, mask=True, bias="plain")
    inside = []
    real = BACKENDS["torch"]

    def watched(operation):
        def run(*args):
            with Syncs() as syncs:
                result = operation(*args)
            inside.append(syncs.found)
            return result

        return run

    monkeypatch.setitem(
        BACKENDS, "torch", replace(real, stats=watched(real.stats), grad=watched(real.grad))
    )
    evaluate(problem, backend="torch", ce_weight=1.0)
    assert inside == [["nonzero"], ["nonzero"]]
    inside.clear()
    evaluate(replace(problem, labels=None, mask=None), backend="torch")
    assert inside == [[], []]
    # Labels are checked on a CPU alone, where the host waits for nothing.
    monkeypatch.setattr(fdd_loss, "check_labels", lambda *_: None)
    monkeypatch.setitem(BACKENDS, "torch", real)
    for reduction in ("mean", "sum", "none"):
        with Syncs() as syncs:
            evaluate(problem, backend="torch", ce_weight=1.0, reduction=reduction)
            evaluate(problem, backend="torch", num_items_in_batch=torch.tensor(3.0))
        assert not syncs.found
