"""How far a provider's value and gradients are from float64, row by row.

The small check takes the workload's widths, layers and options on a few rows, and as much of the
vocabulary as float64 heads have room for. It holds the value, the gradients of the hidden states
and that of the head to the error budgets of `fdd_kernels.testing`: twice the error of the dense
loss with float32 logits, plus the rounding of the arithmetic (of the inputs' dtype where a provider
rounds its logits to it). The check of the timed call compares gradients of a few rows at full size,
coarsely: it proves that the call computed the loss at all.
"""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from benchmarks.call import LOSS, Call
from benchmarks.inputs import build_problem
from benchmarks.objectives import OBJECTIVES, dense_rows
from benchmarks.providers import Provider, gradients_of
from benchmarks.workloads import Workload
from fdd_kernels import fdd_loss_reference
from fdd_kernels.testing import (
    Outcome,
    evaluate,
    exact,
    gradient_floors,
    unit_roundoff,
    value_floors,
)

HEAD_ELEMENTS = 2**27  # of both heads together in the small check: 1 GiB in float64
ROW_ELEMENTS = 2**20  # rows x columns
MOST_ROWS = 16
# Relative error of a row's gradient in the timed call: above the rounding of outputs, below any
# missing term or factor.
COARSE, COARSE_ROUNDED = 0.02, 0.2


def sample_shape(workload: Workload) -> tuple[int, int]:
    """Choose rows and columns of the small check."""
    if workload.heads:
        rows = min(workload.rows, math.isqrt(ROW_ELEMENTS // workload.heads))
        return rows, rows
    columns = workload.columns
    if not workload.feature_space:
        columns = min(columns, HEAD_ELEMENTS // (workload.student_width + workload.teacher_width))
    return max(2, min(workload.rows, MOST_ROWS, ROW_ELEMENTS // columns)), columns


class SmallCheck:
    """The small check of one workload; float64 results are computed once per part of the loss."""

    def __init__(self, workload: Workload, device: torch.device):
        self.workload = workload
        self.rows, self.columns = sample_shape(workload)
        self.problem = build_problem(workload, device, rows=self.rows, columns=self.columns)
        self._truth: dict[str, Outcome] = {}
        self._budgets: dict[tuple[str, float], dict[str, Tensor]] = {}

    def truth(self, options: dict[str, Any]) -> Outcome:
        """Compute terms per row and gradients of the mean, in float64."""
        key = repr(sorted(options.items()))
        if key not in self._truth:
            self._truth[key] = exact(self.problem, 1 / self.rows, reduction="none", **options)
        return self._truth[key]

    def budgets(self, options: dict[str, Any], unit: float) -> dict[str, Tensor]:
        """Compute the allowed error of the value per row, and of each gradient per row."""
        key = (repr(sorted(options.items())), unit)
        if key not in self._budgets:
            truth, call = self.truth(options), options | {"reduction": "none"}
            dense = evaluate(self.problem, fdd_loss_reference, 1 / self.rows, **call)
            floor = value_floors(self.problem, unit, **call).loss
            floors = gradient_floors(self.problem, truth, 1 / self.rows, unit, **call)
            budgets = {"value": 2 * (dense.terms.loss.double() - truth.terms.loss).abs() + floor}
            for name, true in truth.gradients.items():
                error = (dense.gradients[name].double() - true).norm(dim=-1)
                budgets[name] = 2 * error + floors[name]
            self._budgets[key] = budgets
        return self._budgets[key]

    def run(self, provider: Provider) -> dict[str, Any]:
        """Measure errors, and the largest as a fraction of its budget, in the form of records."""
        options = provider.options(self.workload)
        rounded = getattr(torch, self.workload.dtype if provider.rounds_logits else "float32")
        truth, budgets = self.truth(options), self.budgets(options, unit_roundoff(rounded))
        rows = self._row_values(provider, options)
        _, found = gradients_of(provider.loss, self.problem.map(lambda t: t), options)
        errors = {"value": (rows.double() - truth.terms.loss).abs()}
        norms = {"value": truth.terms.loss.abs()}
        for name, gradient in found.items():
            errors[name] = (gradient.double() - truth.gradients[name]).norm(dim=-1)
            norms[name] = truth.gradients[name].norm(dim=-1)
        fractions = {name: _largest(errors[name] / budgets[name], errors[name]) for name in errors}
        worst = max(fractions, key=fractions.get)
        hidden = [n for n in errors if n.startswith("student_hidden")]
        head = None
        if "student_weight" in errors:
            head = float(errors["student_weight"].norm() / norms["student_weight"].norm())
        return {
            "rows": self.rows,
            "columns": self.columns,
            "whole": (self.rows, self.columns) == (self.workload.rows, self.workload.columns),
            "value_error": float(errors["value"].max()),
            "value_relative": _relative(errors["value"], norms["value"]),
            "grad_hidden_relative": max(
                [_relative(errors[n], norms[n]) for n in hidden], default=None
            ),
            "grad_head_relative": head,
            "of_budget": fractions[worst],
            "worst": worst,
            "rounds_logits": provider.rounds_logits and self.workload.itemsize < 4,
            "passed": fractions[worst] <= 1,
        }

    @torch.no_grad()
    def _row_values(self, provider: Provider, options: dict[str, Any]) -> Tensor:
        if provider.rows is not None:
            return provider.rows(self.problem, options).detach()
        single = [_rows_of(self.problem, slice(i, i + 1)) for i in range(self.rows)]
        with torch.enable_grad():  # some compute their gradients in the forward pass
            return torch.stack([provider.loss(p, options).detach().reshape(()) for p in single])


def _largest(fraction: Tensor, error: Tensor) -> float:
    value = float(torch.where(error == 0, 0.0, fraction).max())
    return value if math.isfinite(value) else float("inf")


def _relative(error: Tensor, norm: Tensor) -> float:
    """Return the largest relative error of a row; rows without error may have norm 0."""
    smallest = torch.finfo(torch.float64).tiny
    return float((error / norm.clamp(min=smallest)).where(error > 0, 0.0).max())


def _rows_of(call: Call, rows: slice) -> Call:
    """Cut some rows out of a call, with leaves of its own."""
    return call.rows(rows).map(lambda t: t)


class CoarseCheck(SmallCheck):
    """The small check of an objective that has no error budgets: against its dense form in float64,
    coarsely.
    """

    def truth(self, options: dict[str, Any]) -> Outcome:
        """Compute numbers per row and gradients of their mean, in float64."""
        if "truth" not in self._truth:
            call = self.problem.to(torch.float64)
            rows = dense_rows(call, options).detach()
            gradients = gradients_of(lambda *c: dense_rows(*c).mean(), call, options)[1]
            self._truth["truth"] = Outcome(SimpleNamespace(loss=rows), gradients)
        return self._truth["truth"]

    def budgets(self, options: dict[str, Any], unit: float) -> dict[str, Tensor]:
        """Allow a part of every number and of every row of a gradient, and twice the error of the
        dense form with the logits of the workload's dtype: a gradient may jump, as that of |q - p|.
        """
        truth = self.truth(options)
        part = COARSE if unit <= unit_roundoff(torch.float32) else COARSE_ROUNDED
        allowed = {"value": part * truth.terms.loss.abs()}
        dense = gradients_of(lambda *c: dense_rows(*c).mean(), self.problem, options)[1]
        for name, true in truth.gradients.items():
            error = (dense[name].double() - true).norm(dim=-1)
            allowed[name] = part * true.norm(dim=-1) + 2 * error
        return allowed


def small_check(workload: Workload, device: torch.device) -> SmallCheck:
    """Choose the small check of a workload."""
    return (SmallCheck if workload.objective == LOSS else CoarseCheck)(workload, device)


class TimedCallCheck:
    """Compare gradients of the hidden states of the last few rows of the timed call with float64;
    of all rows where these depend on one another.
    """

    def __init__(self, workload: Workload, problem: Call):
        self.workload, self.problem = workload, problem
        self.rows = max(1, min(workload.rows, 4))
        if not OBJECTIVES[workload.objective].rows_alone:
            self.rows = workload.rows
        self.part = slice(workload.rows - self.rows, workload.rows)
        self._truth: dict[str, dict[str, Tensor]] = {}

    def run(self, provider: Provider, gradients: dict[str, Tensor]) -> dict[str, Any]:
        """Find the largest relative error of a row and whether it is small enough."""
        options = provider.options(self.workload)
        key = repr(sorted(options.items()))
        if key not in self._truth:
            some = _rows_of(self.problem, self.part).frozen("student_weight")
            if some.objective == LOSS:
                upstream = 1 / self.workload.rows
                truth = exact(some, upstream, reduction="sum", **options).gradients
            else:
                part = self.rows / self.workload.rows
                loss_of = lambda *call: dense_rows(*call).mean() * part  # noqa: E731
                truth = gradients_of(loss_of, some.to(torch.float64), options)[1]
            self._truth[key] = truth
        worst = 0.0
        for name, true in self._truth[key].items():
            error = (gradients[name][self.part].double() - true).norm(dim=-1)
            worst = max(worst, _relative(error, true.norm(dim=-1)))
        limit = COARSE_ROUNDED if provider.rounds_logits and self.workload.itemsize < 4 else COARSE
        return {"rows": self.rows, "error": worst, "limit": limit, "passed": worst <= limit}
