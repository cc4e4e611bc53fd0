"""Test the engine's use of `cached_rows` and `stats_and_grad`: gradients formed in the forward
pass.
"""

from __future__ import annotations

import contextlib
from dataclasses import replace

import pytest
import torch

from fdd_kernels import fused_fdd_loss
from fdd_kernels.backends import BACKENDS, torch_stream
from fdd_kernels.engine.evaluate import Call
from fdd_kernels.engine.evaluate import evaluate as evaluate_call
from fdd_kernels.lens.inputs import LensInputs
from fdd_kernels.lens.layout import MOMENT_STATS, REQUEST_STATS, VALUE
from fdd_kernels.objectives.fdd.loss import used_by
from fdd_kernels.objectives.fdd.objective import FDDObjective
from fdd_kernels.objectives.fdd.options import LossOptions
from fdd_kernels.objectives.fdd.plan import make_plan
from fdd_kernels.objectives.numbers import check_labels
from fdd_kernels.objectives.reduction import loss_denominator
from fdd_kernels.testing import assert_within_budget, evaluate, exact, random_problem, unit_roundoff

ROWS = 3  # of a block
TERMS = {"ce_weight": 0.5, "output_in_dynamics": True}


class Keeping:
    """The backend "torch" as one that caches logits; invalid rows are among its blocks' rows.

    `wide`: it returns float32 gradients. `refined`: what it makes of each VALUE.
    """

    def __init__(self, wide: bool = False, refined=lambda value: value):
        self.wide, self.refined, self.blocks = wide, refined, []

    def stats_and_grad(self, inputs, spec, block_rows, upstream_of, needed, refine):
        whole = [torch.zeros_like(s) for s in torch_stream.stats(inputs, spec)]
        sources = (*inputs.student_hidden, inputs.student_weight, inputs.student_bias)
        found = [
            torch.zeros_like(t, dtype=torch.float32) for t, need in zip(sources, needed) if need
        ]
        for rows in torch.arange(inputs.rows).split(block_rows):
            of_block = inputs.at(rows)._replace(
                valid=None if inputs.valid is None else inputs.valid[rows]
            )
            per_row = upstream_of(rows, *torch_stream.stats(of_block, spec))
            self.blocks.append(len(rows))
            gradients = iter(torch_stream.grad(self.float32(of_block), spec, per_row, needed))
            for of_all, (i, _) in zip(found, [(i, n) for i, n in enumerate(needed) if n]):
                if i < len(inputs.student_hidden):
                    of_all[rows] = next(gradients)
                else:
                    of_all += next(gradients)
            for statistics, of_rows in zip(whole, per_row):
                statistics[..., rows] = of_rows
        assert refine
        whole[1][:, VALUE] = self.refined(whole[1][:, VALUE])
        if not self.wide:
            found = [
                g.to(t.dtype) for g, t in zip(found, [t for t, n in zip(sources, needed) if n])
            ]
        return found, tuple(whole)

    @staticmethod
    def float32(inputs: LensInputs) -> LensInputs:
        weight, bias = (t if t is None else t.float() for t in inputs[1:3])
        return inputs._replace(
            student_hidden=[h.float() for h in inputs.student_hidden],
            student_weight=weight,
            student_bias=bias,
        )


@pytest.fixture
def keep(monkeypatch):
    """keep(...) lets the backend "torch" cache the logits of `ROWS` rows at a time."""

    def install(**options) -> Keeping:
        keeping = Keeping(**options)
        backend = replace(
            BACKENDS["torch"], cached_rows=lambda *_: ROWS, stats_and_grad=keeping.stats_and_grad
        )
        monkeypatch.setitem(BACKENDS, "torch", backend)
        return keeping

    return install


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_blocks_with_rows_that_do_not_count(keep, wide, reduction):
    keeping = keep(wide=wide)
    problem = random_problem(labels=True, mask=True, bias="padded", dtype=torch.bfloat16)
    options = TERMS | {"reduction": reduction}
    assert_within_budget(problem, evaluate(problem, backend="torch", **options), **options)
    assert keeping.blocks == [3, 3, 3, 1]


def test_values_are_those_that_the_backend_returns(keep):
    """A backend may replace VALUE after the gradients are formed; the gradients stay as they
    are.
    """
    problem = random_problem(labels=True, mask=True)
    keep()
    before = evaluate(problem, backend="torch", **TERMS)
    keep(refined=lambda value: 2 * value)
    after = evaluate(problem, backend="torch", **TERMS)
    for name in ("output_kd", "trajectory", "ce"):
        torch.testing.assert_close(getattr(after.terms, name), 2 * getattr(before.terms, name))
    assert torch.equal(after.terms.derivative, before.terms.derivative)
    assert all(
        torch.equal(gradient, before.gradients[name]) for name, gradient in after.gradients.items()
    )


@pytest.mark.parametrize("upstream", [1.0, -0.25, 3.0, 1 / 3])
@pytest.mark.parametrize("wide", [False, True])
def test_gradients_of_16_bits_are_rounded_once(keep, wide, upstream):
    """Each is within half a unit of its last place of the float32 gradient; rounded twice a sixth
    of them would not be.
    """
    keep(wide=wide)
    problem = random_problem((10,), 50, 16, 16, dtype=torch.bfloat16)
    loss = fused_fdd_loss(**problem.arguments, backend="torch")
    found = torch.autograd.grad(loss * upstream, list(problem.leaves.values()), retain_graph=True)
    again = torch.autograd.grad(loss * upstream, list(problem.leaves.values()))
    truth = exact(problem, upstream).gradients
    for gradient, second, true in zip(found, again, truth.values()):
        half = unit_roundoff(torch.bfloat16) / 2 * 2.0 ** torch.frexp(true).exponent.double()
        # The float32 error may move a number over a midpoint beside it.
        bound = half + 1e-5 * true.abs().amax()
        assert (gradient.double() - true).abs().le(bound).all()
        assert torch.equal(second, gradient)


def test_a_step_on_a_device_reads_nothing_back(monkeypatch):
    """The host waits for no value, so that a step can be captured as a CUDA graph: tensors on
    "meta" have none to read.
    """

    def stats_and_grad(inputs, spec, block_rows, upstream_of, needed, refine):
        rows, new = torch.arange(inputs.rows, device=inputs.device), inputs.student_weight.new_zeros
        shapes = [(2, len(inputs.student_hidden)), (len(spec.requests), REQUEST_STATS)]
        shapes.append((len(spec.moments), MOMENT_STATS))
        statistics = [new((*shape, inputs.rows), dtype=torch.float32) for shape in shapes]
        for block in rows.split(block_rows):
            upstream_of(block, *[s[..., block] for s in statistics])
        sources = (*inputs.student_hidden, inputs.student_weight, inputs.student_bias)
        return [torch.zeros_like(t) for t, need in zip(sources, needed) if need], tuple(statistics)

    monkeypatch.setitem(
        BACKENDS, "torch", replace(BACKENDS["torch"], stats_and_grad=stats_and_grad)
    )
    # knows no "meta"
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    p = random_problem(labels=True, mask=True, bias="plain", dtype=torch.bfloat16)
    options = LossOptions(**TERMS, backend="torch", shift=True)
    plan, _ = make_plan(options, p)
    p = replace(p.map(lambda t: t.to("meta")), labels=p.labels.to("meta"), mask=p.mask.to("meta"))
    for items in (None, 7, torch.empty((), dtype=torch.float64, device="meta")):
        tensors = p.shifted(-100).flattened(-100, plan.student_layers, plan.teacher_layers)
        check_labels(tensors.labels, -100, plan.spec.columns)
        inputs = used_by(plan, tensors)
        denominator = loss_denominator(
            options.reduction, inputs.rows, inputs.valid, inputs.device, items
        )
        objective = FDDObjective.of(plan, inputs, denominator)
        loss = evaluate_call(Call(objective, inputs, "torch", ROWS))[0]
        leaves = list(p.leaves.values())
        for _ in range(2):  # the gradients formed in forward, then recomputed ones
            found = torch.autograd.grad(
                loss, leaves, torch.empty((), device="meta"), retain_graph=True
            )
            assert [g.dtype for g in found] == [t.dtype for t in leaves]
