"""The mistakes that others made, one test each, in the order of the design's list."""

from __future__ import annotations

import inspect
import math
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fdd_kernels import fdd_loss_reference, fused_fdd_loss
from fdd_kernels.backends import BACKENDS, Backend
from fdd_kernels.backends.torch_stream import tiling
from fdd_kernels.backends.torch_stream.problem import TorchProblem
from fdd_kernels.objectives.fdd import api
from fdd_kernels.testing import (
    Problem,
    assert_same_sums,
    assert_within_budget,
    evaluate,
    exact,
    excesses,
    random_problem,
    strided,
    value_floors,
)


def check(problem: Problem, backend: str, **options) -> None:
    assert_within_budget(problem, evaluate(problem, backend=backend, **options), **options)


@pytest.mark.parametrize("trajectory", ["kl", "reverse_kl", "jsd", "skew_kl"])
def test_logits_of_tens_of_thousands_overflow_nothing(backend, trajectory):
    problem = random_problem((12,), 37, 8, 8, layers=2, spread=2e4)
    logits = problem.student_hidden[-1] @ problem.student_weight.T
    assert logits.abs().max() > 6e4
    check(problem, backend, trajectory=trajectory)
    check(problem, backend, trajectory=trajectory, ce_weight=0.0, derivative=None)


def test_bf16_logits_rounded_before_the_softmax(backend):
    """Of models that nearly agree, rounding the logits leaves a gradient that is wrong by tens of
    percent in some row.
    """
    problem = random_problem((24,), 1000, 32, 32, dtype=torch.bfloat16, near=2e-2)
    truth = exact(problem).gradients["student_hidden[0]"]
    outcome = evaluate(problem, backend=backend)

    def worst(gradient):
        return float(((gradient.double() - truth).norm(dim=-1) / truth.norm(dim=-1)).max())

    eye = torch.eye(1000)
    as_logits = {
        side: tuple(
            [
                h.detach() @ getattr(problem, f"{side}_weight").detach().T
                for h in getattr(problem, f"{side}_hidden")
            ]
        )
        for side in ("student", "teacher")
    }
    rounded = [h.float().requires_grad_() for h in as_logits["student"]]
    fdd_loss_reference(rounded, eye, [h.float() for h in as_logits["teacher"]], eye).backward()
    of_rounded = rounded[0].grad.double() @ problem.student_weight.detach().double()
    assert worst(of_rounded) > 0.1, "rounding would not have mattered: this example shows nothing"
    # Rounded once, to bf16's 8 bits, as a whole.
    assert worst(outcome.gradients["student_hidden[0]"]) < 2**-8
    assert_within_budget(problem, outcome)


def test_zero_padding_the_smaller_vocabulary(backend):
    """Columns beyond vocab_size count for nothing, whatever they hold; unequal vocabularies without
    it are refused.
    """
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


@pytest.mark.parametrize("trajectory", ["kl", "reverse_kl", "jsd", "skew_kl"])
def test_minus_infinity_from_padded_vocabulary_biases(backend, trajectory):
    problem = random_problem(bias="padded", labels=True)
    outcome = evaluate(problem, backend=backend, trajectory=trajectory, ce_weight=1.0)
    for tensor in (*outcome.terms, *outcome.gradients.values()):
        assert tensor.isfinite().all()
    assert_within_budget(problem, outcome, trajectory=trajectory, ce_weight=1.0)


def test_gradients_scaled_in_place_in_backward(backend):
    problem = random_problem()
    loss = fused_fdd_loss(**problem.arguments, backend=backend)
    upstream = torch.full((), 3.0)
    leaves = list(problem.leaves.values())
    first = torch.autograd.grad(loss, leaves, upstream, retain_graph=True)
    kept = [g.clone() for g in first]
    second = torch.autograd.grad(loss, leaves, upstream)
    assert float(upstream) == 3.0
    for a, b, c in zip(first, second, kept):
        assert torch.equal(a, c)
        assert torch.equal(b, c)


@pytest.mark.parametrize("poison", [math.nan, math.inf, 1e30])
def test_mask_not_applied(backend, poison):
    """Ignored rows have no part in the value or in any gradient, not even by 0 * NaN."""
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


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("how", ["mask", "labels"])
@pytest.mark.parametrize("dense", [False, True], ids=["", "reference"])
def test_all_rows_masked(backend, how, reduction, dense):
    problem = random_problem(mask=True, labels=True, bias="plain")
    problem = replace(
        problem,
        **{how: torch.full_like(getattr(problem, how), {"mask": False, "labels": -100}[how])},
    )
    chosen = "reference" if dense else backend
    outcome = evaluate(problem, backend=chosen, reduction=reduction, ce_weight=1.0)
    for tensor in (*outcome.terms, *outcome.gradients.values()):
        assert not tensor.any()  # NaN is true


def test_empty_batch(backend):
    problem = random_problem((0, 4), labels=True)
    outcome = evaluate(problem, backend=backend, ce_weight=1.0)
    for tensor in (*outcome.terms, *outcome.gradients.values()):
        assert not tensor.any()
    assert outcome.gradients["student_hidden[0]"].shape == (0, 4, 8)


def test_mean_of_means_under_gradient_accumulation(backend):
    """Micro-batches of unequal numbers of tokens, each divided by the number of all, add up to the
    whole.
    """
    problem = random_problem((4, 6), labels=True, dtype=torch.float64)
    labels = problem.labels.clone()
    labels[:2, 1:] = -100  # few tokens in the first half
    problem = replace(problem, labels=labels)
    total = (labels != -100).sum()
    backend = "torch"  # in float64, where the sums can be compared closely

    def half(which: slice, **options):
        part = replace(
            problem,
            labels=labels[which],
            student_hidden=tuple([h.detach()[which] for h in problem.student_hidden]),
            teacher_hidden=tuple([h[which] for h in problem.teacher_hidden]),
        )
        return evaluate(part, backend=backend, ce_weight=1.0, **options)

    whole = evaluate(problem, backend=backend, ce_weight=1.0)
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


def test_silent_non_zero_defaults(backend):
    """Without being asked, labels only select rows: no cross-entropy is mixed in, and no tau
    squared.
    """
    defaults = {name: p.default for name, p in inspect.signature(fused_fdd_loss).parameters.items()}
    assert defaults["ce_weight"] == 0.0
    assert defaults["scale_by_t2"] is False
    assert defaults["student_softcap"] is defaults["teacher_softcap"] is defaults["mask"] is None
    problem = random_problem(labels=True)
    terms = evaluate(problem, backend=backend).terms
    other = replace(problem, labels=problem.labels.where(problem.labels < 0, 0))
    assert torch.equal(evaluate(other, backend=backend).terms.loss, terms.loss)
    assert terms.ce == 0
    assert terms.loss == terms.output_kd + terms.trajectory + terms.derivative


@pytest.mark.parametrize(
    "options",
    [
        {"student_softcap": 2.0},
        {"teacher_softcap": 2.0},
        {"student_logit_scale": 0.3},
        {"teacher_logit_scale": 0.3},
        {"temperature": 3.0},
        {"output_temperature": 3.0},
    ],
    ids=",".join,
)
def test_soft_cap_or_logit_scale_ignored(backend, options):
    problem = random_problem(bias="plain")
    plain, changed = (
        evaluate(problem, backend=backend),
        evaluate(problem, backend=backend, **options),
    )
    assert abs(plain.terms.loss - changed.terms.loss) > 1e-2
    assert_within_budget(problem, changed, **options)


def test_final_norm_applied_twice_or_never(backend):
    """The loss itself norms nothing: scaling one state changes it. (Distiller's tests cover who
    norms which state.)
    """
    problem = random_problem(layers=3)
    losses = [evaluate(problem, backend=backend).terms.loss]
    for index in range(3):
        states = list(problem.student_hidden)
        states[index] = (2 * states[index]).detach()
        losses.append(
            evaluate(replace(problem, student_hidden=tuple(states)), backend=backend).terms.loss
        )
    assert len({float(loss) for loss in losses}) == 4


@pytest.mark.parametrize("columns", [1, 2, 127, 128, 129, 32001, 151936])
def test_vocabularies_of_every_size(backend, columns):
    problem = random_problem((3,), columns, 4, 6, layers=2, labels=True)
    # the angle of deltas of 1 or 2 columns is degenerate
    options = {"output_in_dynamics": columns > 2, "ce_weight": 1.0}
    check(problem, backend, **options)


@pytest.mark.parametrize("rows", [1, 2, 15, 17, 31, 63, 65, 129, 257])
def test_rows_not_a_multiple_of_the_tile(backend, rows):
    check(random_problem((rows,), 70, 4, 6, labels=rows > 2), backend, reduction="sum")


@pytest.mark.parametrize(
    "what", ["student_hidden", "teacher_hidden", "student_weight", "teacher_weight"]
)
def test_int32_offsets_past_2_31(backend, what):
    """Two rows more than 2^31 elements apart, in memory that nobody touches between them."""
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
    assert torch.equal(far_outcome.terms.loss, near_outcome.terms.loss)
    for name, gradient in near_outcome.gradients.items():
        assert torch.equal(far_outcome.gradients[name], gradient), name


def test_frozen_head_still_allocating_a_gradient(backend, monkeypatch):
    """The backend is not asked for it, and returns nothing for it. (tests/kernels/test_memory.py
    watches the allocations.)
    """
    asked = []
    real = BACKENDS[backend]

    def grad(inputs, spec, per_row, needed):
        found = real.grad(inputs, spec, per_row, needed)
        asked.append((list(needed), len(found)))
        return found

    monkeypatch.setitem(BACKENDS, backend, Backend(real.stats, grad, real.unavailable))
    problem = random_problem(bias="plain")
    evaluate(problem.frozen("student_weight", "student_bias"), backend=backend)
    evaluate(problem, backend=backend)
    assert asked == [([True] * 3 + [False] * 2, 3), ([True] * 5, 5)]


@pytest.mark.parametrize(
    "kind", ["last_dimension", "transposed_head", "cut_sequence", "expanded", "channels_first"]
)
def test_non_contiguous_inputs_losing_gradient(backend, kind):
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


def test_teacher_that_requires_grad(backend):
    problem = random_problem()
    with pytest.raises(ValueError, match=r"teacher_weight requires grad.*detach"):
        fused_fdd_loss(
            **(
                problem.arguments
                | {"teacher_weight": problem.teacher_weight.clone().requires_grad_()}
            ),
            backend=backend,
        )


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


@pytest.mark.parametrize("rows", [2047, 2048, 2049])
def test_chunk_size_overshooting(rows):
    """No tile is larger than was budgeted for, whatever the remainder, and the sums are those of
    all rows.
    """
    seen = []
    real = TorchProblem.row_blocks

    def watched(self, size, start=0, stop=None):
        for block, first, last in real(self, size, start, stop):
            assert last - first <= size
            seen.append((first, last))
            yield block, first, last

    problem = random_problem((rows,), 130, 4, 4, layers=2, labels=True, dtype=torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiling, "choose_tiles", lambda *_: tiling.Tiles(1024, 100, 1024))
        patch.setattr(TorchProblem, "row_blocks", watched)
        outcome = evaluate(problem, backend="torch", reduction="sum")
    assert max(last for _, last in seen) == int((problem.labels >= 0).sum())
    truth = exact(problem, reduction="sum")
    for name, gradient in truth.gradients.items():
        assert_same_sums(outcome.gradients[name], gradient, rows + 130, name)
    assert_same_sums(outcome.terms.loss, truth.terms.loss, rows + 130)


class Syncs(TorchDispatchMode):
    """The operators that make an accelerator's host wait."""

    WAITING = ("_local_scalar_dense", "nonzero", "item", "is_nonzero", "equal")

    def __init__(self):
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in self.WAITING:
            self.found.append(name)
        return function(*args, **(kwargs or {}))


def test_host_syncs_on_the_hot_path(monkeypatch):
    """Outside the operations nothing is ever read back; inside them only the number of rows that
    count is, once each.
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
        BACKENDS, "torch", Backend(watched(real.stats), watched(real.grad), real.unavailable)
    )
    evaluate(problem, backend="torch", ce_weight=1.0)
    assert inside == [["nonzero"], ["nonzero"]]
    inside.clear()
    evaluate(replace(problem, labels=None, mask=None), backend="torch")
    assert inside == [[], []]
    # Around them nothing is read. (Labels are looked at on a CPU alone, where that waits for
    # nothing.)
    monkeypatch.setattr(api, "check_labels", lambda *_: None)
    monkeypatch.setitem(BACKENDS, "torch", real)
    for reduction in ("mean", "sum", "none"):
        with Syncs() as syncs:
            evaluate(problem, backend="torch", ce_weight=1.0, reduction=reduction)
            evaluate(problem, backend="torch", num_items_in_batch=torch.tensor(3.0))
        assert not syncs.found


@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_double_backward_silently_wrong(backend, beta):
    """Also where the loss is linear in the statistics, and through a layer of the model's own."""
    problem = random_problem()
    layer = torch.nn.Linear(8, 8)
    states = tuple([layer(h.detach()).tanh() for h in problem.student_hidden])
    loss = fused_fdd_loss(
        **replace(problem, student_hidden=states).arguments, beta=beta, backend=backend
    )
    gradient = torch.autograd.grad(loss, layer.weight, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="differentiated once"):
        gradient.square().sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_identical_models(backend, dtype):
    """Deltas of zero length where two layers are the same: no NaN, the cosine term is defined, as
    1.
    """
    problem = random_problem((6,), 40, 8, 8, layers=3, near=0.0, dtype=dtype)
    same = replace(
        problem,
        student_hidden=tuple(
            [problem.student_hidden[0].detach().clone().requires_grad_() for _ in range(3)]
        ),
        teacher_hidden=tuple([problem.student_hidden[0].detach() for _ in range(3)]),
    )
    outcome = evaluate(same, backend=backend, output_in_dynamics=True, reduction="none")
    assert (outcome.terms.derivative == 1).all()
    assert all(g.isfinite().all() for g in outcome.gradients.values())
    # Two models alike whose layers differ: the cosine distance is 0, to the rounding of its two
    # equal vectors' sums.
    outcome = evaluate(problem, backend=backend, reduction="none")
    assert outcome.terms.derivative.abs().max() <= 2.0**-24 * (math.sqrt(40) + 4) * 4
    assert all(g.isfinite().all() for g in outcome.gradients.values())


@pytest.mark.parametrize("offset", [300.0, 3e4])
def test_huge_lse_shifts(backend, offset):
    """Adding a number to all logits of a model changes nothing but the rounding of the logits at
    that size.
    """
    problem = random_problem(bias="plain")
    shifted = replace(
        problem,
        student_bias=torch.full_like(problem.student_bias, offset).requires_grad_(),
        teacher_bias=torch.full_like(problem.teacher_bias, -offset),
    )
    outcome = evaluate(shifted, backend=backend)
    assert all(t.isfinite().all() for t in (*outcome.terms, *outcome.gradients.values()))
    assert_within_budget(shifted, outcome)
    level = replace(
        problem,
        student_bias=torch.zeros_like(problem.student_bias).requires_grad_(),
        teacher_bias=torch.zeros_like(problem.teacher_bias),
    )
    # Bounded by what the rounding of logits of this size can do to the loss.
    difference = abs(outcome.terms.loss.double() - exact(level).terms.loss)
    assert difference <= value_floors(shifted).loss


def test_fixed_tolerances_that_check_nothing():
    """The budgets scale with the problem: a loss a thousand times smaller is checked to a thousand
    times smaller errors.
    """
    problem = random_problem((6,), 50, 8, 8)
    for weight in (1.0, 1e-3, 1e-6):
        options = {"alpha": weight, "beta": weight, "output_kd_weight": weight}
        outcome = evaluate(problem, backend="reference", **options)
        wrong = outcome._replace(gradients={n: g * 1.01 for n, g in outcome.gradients.items()})
        assert (
            min(
                e.fraction
                for n, e in excesses(problem, wrong, **options).items()
                if n in wrong.gradients
            )
            > 1
        )
        right = excesses(problem, outcome, **options)
        assert max(e.fraction for e in right.values()) <= 1
