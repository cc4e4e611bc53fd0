"""FDD as the engine sees it: requests, outputs and upstream gradients of one call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fdd_kernels.engine.objective import UpstreamOf
from fdd_kernels.lens.inputs import LensInputs
from fdd_kernels.lens.layout import Statistics
from fdd_kernels.lens.spec import LensSpec
from fdd_kernels.objectives.fdd.options import FDDLossTerms, LossOptions
from fdd_kernels.objectives.fdd.plan import Plan
from fdd_kernels.objectives.fdd.reference import dense_row_terms
from fdd_kernels.objectives.fdd.terms import (
    RowTerms,
    row_terms_from_statistics,
    static_deltas,
    term_weights,
    upstream_gradients,
)
from fdd_kernels.objectives.reduction import reduce_rows


@dataclass(frozen=True)
class FDDObjective:
    """One call's objective; see `fdd_kernels.engine.objective.Objective`.

    Attributes:
        plan: what is computed, and where.
        valid: (R,) bool, or None where every row is valid.
        denominator: of the sums over rows; None for plain sums.
        static: deltas of length 0 (`static_deltas`), or None.
        weights: factors of the rows (R,), or None.
    """

    plan: Plan
    valid: Tensor | None
    denominator: Tensor | float | None
    static: Tensor | None = None
    weights: Tensor | None = None

    @staticmethod
    def of(
        plan: Plan,
        inputs: LensInputs,
        denominator: Tensor | float | None,
        weights: Tensor | None = None,
    ) -> FDDObjective:
        """Make the objective of a call; `inputs` are of the spec's layers."""
        static = static_deltas(plan, inputs.student_hidden, inputs.teacher_hidden)
        return FDDObjective(plan, inputs.valid, denominator, static, weights)

    @property
    def spec(self) -> LensSpec:
        """The plan's requests and pair moments."""
        return self.plan.spec

    @property
    def is_computed(self) -> tuple[bool, ...]:
        """Which of `FDDLossTerms` depend on the student."""
        plan = self.plan
        terms = plan.output_kd is not None, plan.trajectory, plan.derivative, plan.ce is not None
        return (True, *map(bool, terms))

    @property
    def known_upstream(self) -> bool:
        """Whether the loss is one number whose denominator needs no gradient."""
        divides = isinstance(self.denominator, Tensor) and self.denominator.requires_grad
        return self.plan.options.reduction != "none" and not divides

    def outputs(self, statistics: Statistics) -> FDDLossTerms:
        """Compute the loss and its terms."""
        return self._reduced(row_terms_from_statistics(self.plan, *statistics, self.static))

    def dense_outputs(self, inputs: LensInputs) -> FDDLossTerms:
        """Compute the loss and its terms with dense tensors; `inputs` are of all layers."""
        return self._reduced(dense_row_terms(self.plan, inputs))

    def _reduced(self, rows: RowTerms) -> FDDLossTerms:
        plan = self.plan
        return reduce_terms(
            rows, plan.options, self.valid, plan.leading_shape, self.denominator, self.weights
        )

    def upstream(
        self, grad_outputs: Sequence[Tensor | float | None], dtype: torch.dtype
    ) -> UpstreamOf:
        """Return the gradients of the statistics for gradients of the loss and its terms."""
        weights = term_weights(self.plan, self.denominator, grad_outputs, dtype)

        def of_rows(statistics: Statistics, rows: Tensor | None) -> tuple[Tensor, Tensor]:
            static, factors = (
                own if own is None or rows is None else own[..., rows]
                for own in (self.static, self.weights)
            )
            valid = self.valid if rows is None else None
            return upstream_gradients(self.plan, *statistics, valid, weights, static, factors)

        return of_rows


def reduce_terms(
    terms: RowTerms,
    options: LossOptions,
    valid: Tensor | None,
    leading_shape: tuple[int, ...],
    denominator: Tensor | float | None,
    weights: Tensor | None = None,
) -> FDDLossTerms:
    """Reduce the terms over valid rows, and add them up with their weights."""
    like = next(term for term in terms if term is not None)
    shape = leading_shape if options.reduction == "none" else None
    output_kd, trajectory, derivative, ce = (
        like.new_zeros(shape or ())
        if term is None
        else reduce_rows(term, valid, shape, denominator, weights)
        for term in terms
    )
    if options.scale_by_t2:
        output_kd = output_kd * options.output_temperature**2
    loss = (
        options.output_kd_weight * output_kd
        + options.alpha * trajectory
        + options.beta * derivative
        + options.ce_weight * ce
    )
    return FDDLossTerms(loss, output_kd, trajectory, derivative, ce)
