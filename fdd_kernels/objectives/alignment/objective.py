"""The costs of all pairs of layers as the engine sees them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fdd_kernels.lens.distances import DISTANCES
from fdd_kernels.lens.divergence_text import parse_divergence
from fdd_kernels.lens.inputs import LensInputs
from fdd_kernels.lens.layout import COUNT, MEAN_S, MEAN_T, VALUE, Statistics
from fdd_kernels.lens.spec import Layers, LensSpec, PairMoments, Request
from fdd_kernels.objectives.alignment.options import CostOptions
from fdd_kernels.objectives.fdd.reference import dense_models, distance_of
from fdd_kernels.objectives.reduction import reduce_rows
from fdd_kernels.objectives.vectors import about_zero, shifts_of


def cost_spec(options: CostOptions, columns: int, students: int, teachers: int) -> LensSpec:
    """Ask for the cost of every pair of layers, the teacher's layers within the student's."""
    pairs = [Layers(i, j) for i in range(students) for j in range(teachers)]
    requests, moments = [], []
    if options.cost in DISTANCES:
        moments = [PairMoments(None, pair, options.temperature) for pair in pairs]
    else:
        named = parse_divergence(options.cost)
        requests = [Request(*pair, options.temperature, *named) for pair in pairs]
    return LensSpec(
        columns=columns,
        requests=tuple(requests),
        moments=tuple(moments),
        student_logit_scale=options.student_logit_scale,
        student_softcap=options.student_softcap,
        teacher_logit_scale=options.teacher_logit_scale,
        teacher_softcap=options.teacher_softcap,
    )


@dataclass(frozen=True)
class CostObjective:
    """One call's costs; see `fdd_kernels.engine.objective.Objective`.

    What a caller makes of the costs, and with it the upstream gradient, is known in backward alone:
    the costs always take the two operations.

    Attributes:
        options: which cost, of what.
        spec: one request or pair moments per pair of layers.
        layers: hidden states of student and teacher.
        leading_shape: of the costs per row, or None for their means.
        valid: (R,) bool, or None where every row is valid.
        denominator: of the sums over rows; None for the costs per row.
        weights: factors of the rows (R,), or None.
    """

    options: CostOptions
    spec: LensSpec
    layers: tuple[int, int]
    leading_shape: tuple[int, ...] | None
    valid: Tensor | None
    denominator: Tensor | float | None
    weights: Tensor | None

    is_computed = (True,)
    known_upstream = False

    def outputs(self, statistics: Statistics) -> tuple[Tensor]:
        """Compute the costs (Ls, Lt), or (Ls, Lt, ...) per row."""
        if self.spec.requests:
            return self._reduced(statistics.requests[:, VALUE])
        shifts = shifts_of(statistics.shifts, [pair.second for pair in self.spec.moments])
        moments = statistics.moments
        offset = moments[:, MEAN_S : MEAN_T + 1] + shifts / self.options.temperature
        sums = about_zero(moments, moments[:, COUNT], offset).sums
        return self._reduced(DISTANCES[self.options.cost].value(sums))

    def dense_outputs(self, inputs: LensInputs) -> tuple[Tensor]:
        """Compute the costs with dense tensors, (R, V) for every layer."""
        cost, temperature = self.options.cost, self.options.temperature
        with torch.autocast(inputs.device.type, enabled=False):
            *models, live = dense_models(inputs, self.spec)
            z_s, z_t = ([u / temperature for u in model] for model in models)
            if cost in DISTANCES:
                values = [distance_of(cost, s, t, live) for s in z_s for t in z_t]
            else:
                log_q, log_p = ([z.log_softmax(-1) for z in model] for model in (z_s, z_t))
                value = parse_divergence(cost).value
                values = [value(q, p).sum(-1) for q in log_q for p in log_p]
        return self._reduced(torch.stack(values))

    def _reduced(self, values: Tensor) -> tuple[Tensor]:
        """Reduce values (Ls * Lt, R) to the costs."""
        reduced = reduce_rows(
            values, self.valid, self.leading_shape, self.denominator, self.weights
        )
        return (reduced.view(*self.layers, *reduced.shape[1:]),)
