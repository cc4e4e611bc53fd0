"""How far a provider's value and gradients are from float64, row by row, and whether its figures
may be shown.

The small check takes the workload's widths, layers and options on a few rows, and as many columns
as its float64 heads have room for, and holds value, gradients of the hidden states and gradient of
the head to the error budgets of `fdd_kernels.testing`: twice the error of the dense computation
with float32 logits plus the rounding of the arithmetic; for a provider that rounds its logits to
the inputs' dtype, the rounding of that dtype. The check of the timed call compares its gradients of
a few rows at full size with float64, coarsely: that it computed what it is said to compute.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from benchmarks.inputs import build_problem
from benchmarks.providers import Provider
from benchmarks.workloads import Workload
from fdd_kernels import fdd_loss_reference
from fdd_kernels.testing import (
    Outcome,
    Problem,
    evaluate,
    exact,
    gradient_floors,
    unit_roundoff,
    value_floors,
)

HEAD_ELEMENTS = 2**27  # of both heads together in the small check: 1 GiB in float64
ROW_ELEMENTS = 2**20  # rows x columns
MOST_ROWS = 16
# Relative error of a row's gradient in the timed call: above rounding of outputs, below any missing
# term or factor.
COARSE, COARSE_ROUNDED = 0.02, 0.2


def sample_shape(workload: Workload) -> tuple[int, int]:
    """Rows and columns of the small check."""
    width = workload.student_width + (0 if workload.feature_space else workload.teacher_width)
    columns = (
        workload.columns
        if workload.feature_space
        else min(workload.columns, HEAD_ELEMENTS // width)
    )
    return max(2, min(workload.rows, MOST_ROWS, ROW_ELEMENTS // columns)), columns


class SmallCheck:
    """The small check of one workload; what is in float64 is computed once per part of the
    objective.
    """

    def __init__(self, workload: Workload, device: torch.device):
        self.workload = workload
        self.rows, self.columns = sample_shape(workload)
        self.problem = build_problem(workload, device, rows=self.rows, columns=self.columns)
        self._truth: dict[str, Outcome] = {}
        self._budgets: dict[tuple[str, float], dict[str, Tensor]] = {}

    def _upstream(self) -> float:
        return 1 / self.rows

    def truth(self, options: dict[str, Any]) -> Outcome:
        """Terms per row and gradients of the mean in float64."""
        key = repr(sorted(options.items()))
        if key not in self._truth:
            self._truth[key] = exact(self.problem, self._upstream(), reduction="none", **options)
        return self._truth[key]

    def budgets(self, options: dict[str, Any], unit: float) -> dict[str, Tensor]:
        """Allowed error of the value per row, and of each gradient per row."""
        key = (repr(sorted(options.items())), unit)
        if key not in self._budgets:
            truth = self.truth(options)
            dense = evaluate(
                self.problem, fdd_loss_reference, self._upstream(), reduction="none", **options
            )
            floor = value_floors(self.problem, unit, reduction="none", **options).loss
            budgets = {"value": 2 * (dense.terms.loss.double() - truth.terms.loss).abs() + floor}
            floors = gradient_floors(
                self.problem, truth, self._upstream(), unit, reduction="none", **options
            )
            for name, true in truth.gradients.items():
                budgets[name] = (
                    2 * (dense.gradients[name].double() - true).norm(dim=-1) + floors[name]
                )
            self._budgets[key] = budgets
        return self._budgets[key]

    def run(self, provider: Provider) -> dict[str, Any]:
        """Errors of a provider and the largest as a fraction of its budget; `passed` if none
        exceeds it.
        """
        options = provider.options(self.workload)
        truth = self.truth(options)
        unit = unit_roundoff(torch.float32)
        if provider.rounds_logits:
            unit = unit_roundoff(getattr(torch, self.workload.dtype))
        budgets = self.budgets(options, unit)
        rows = self._row_values(provider, options)
        problem = self.problem.map(lambda t: t)
        leaves = problem.leaves
        loss = provider.loss(problem, options)
        found = torch.autograd.grad(
            loss, list(leaves.values()), materialize_grads=True, allow_unused=True
        )
        errors = {"value": (rows.double() - truth.terms.loss).abs()}
        norms = {"value": truth.terms.loss.abs()}
        for name, gradient in zip(leaves, found):
            errors[name] = (gradient.double() - truth.gradients[name]).norm(dim=-1)
            norms[name] = truth.gradients[name].norm(dim=-1)
        fractions = {name: _largest(errors[name] / budgets[name], errors[name]) for name in errors}
        hidden = [name for name in errors if name.startswith("student_hidden")]
        worst = max(fractions, key=fractions.get)
        return {
            "rows": self.rows,
            "columns": self.columns,
            "whole": (self.rows, self.columns) == (self.workload.rows, self.workload.columns),
            "value_error": float(errors["value"].max()),
            "value_relative": _relative(errors["value"], norms["value"]),
            "grad_hidden_relative": max(_relative(errors[n], norms[n]) for n in hidden),
            "grad_head_relative": _frobenius(errors, norms, "student_weight"),
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
    fraction = torch.where(error == 0, 0.0, fraction)
    value = float(fraction.max())
    return value if math.isfinite(value) else float("inf")


def _relative(error: Tensor, norm: Tensor) -> float:
    return float(
        (error / norm.clamp(min=torch.finfo(torch.float64).tiny)).where(error > 0, 0.0).max()
    )


def _frobenius(errors: dict[str, Tensor], norms: dict[str, Tensor], name: str) -> float | None:
    return float(errors[name].norm() / norms[name].norm()) if name in errors else None


def _rows_of(problem: Problem, rows: slice, *, frozen: bool = False) -> Problem:
    """The same problem on some of its rows."""

    def cut(states):
        return tuple([h.detach()[rows].requires_grad_(h.requires_grad) for h in states])

    weight = problem.student_weight.detach()
    return Problem(
        student_hidden=cut(problem.student_hidden),
        student_weight=weight
        if frozen
        else weight.requires_grad_(problem.student_weight.requires_grad),
        teacher_hidden=cut(problem.teacher_hidden),
        teacher_weight=problem.teacher_weight,
    )


class TimedCallCheck:
    """Gradients of the hidden states of a few rows of the timed call against float64, at full
    size.
    """

    def __init__(self, workload: Workload, problem: Problem):
        self.workload, self.problem = workload, problem
        self.rows = max(1, min(workload.rows, 4))
        self._truth: dict[str, dict[str, Tensor]] = {}

    def run(self, provider: Provider, gradients: dict[str, Tensor]) -> dict[str, Any]:
        """The largest relative error of a row and whether it is small enough."""
        options = provider.options(self.workload)
        key = repr(sorted(options.items()))
        if key not in self._truth:
            some = _rows_of(self.problem, slice(0, self.rows), frozen=True)
            self._truth[key] = exact(
                some, 1 / self.workload.rows, reduction="sum", **options
            ).gradients
        errors = []
        for name, true in self._truth[key].items():
            error = (gradients[name][: self.rows].double() - true).norm(dim=-1)
            errors.append(_relative(error, true.norm(dim=-1)) if error.max() > 0 else 0.0)
        limit = COARSE_ROUNDED if provider.rounds_logits and self.workload.itemsize < 4 else COARSE
        worst = max(errors)
        return {"rows": self.rows, "error": worst, "limit": limit, "passed": worst <= limit}
