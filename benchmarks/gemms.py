"""The GEMM-only lower bound: the time of the GEMMs that every implementation of the loss needs.

Per layer: both models' logits, h W^T, 2 R V (Ds + Dt) operations; dH = G W, 2 R V Ds; and with a
trainable head dW = G^T h, another 2 R V Ds. Each is one `torch.mm`, timed as A B and as (B^T
A^T)^T, in the inputs' dtype and, where that is narrower, in float32 too: on processors without
matrix units float32 is faster. A GEMM is timed for one layer and counted once per layer.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from benchmarks.objectives import OBJECTIVES
from benchmarks.workloads import Workload
from fdd_kernels.testing import Problem

FORWARD = ("student", "teacher")


def gemm_shapes(workload: Workload) -> dict[str, tuple[int, int, int]]:
    """Return (rows, inner, columns) of each GEMM of one layer."""
    rows, columns, width = workload.rows, workload.columns, workload.student_width
    objective = OBJECTIVES[workload.objective]
    shapes = {"student": (rows, width, columns)}
    if objective.teacher and not workload.feature_space:
        shapes["teacher"] = (rows, workload.teacher_width, columns)
    if objective.gradient:
        shapes["grad_hidden"] = (rows, columns, width)
        if workload.train_head:
            shapes["grad_head"] = (columns, rows, width)
    return shapes


def operations(workload: Workload) -> dict[str, int]:
    """Count the floating-point operations of these GEMMs, all layers."""
    shapes = gemm_shapes(workload).items()
    each = {name: 2 * m * k * n * workload.projected_layers for name, (m, k, n) in shapes}
    return {"forward": sum(each.get(name, 0) for name in FORWARD), "total": sum(each.values())}


class GemmTimes:
    """Times of the GEMMs of a workload on its own tensors; `measure` times each variant once."""

    def __init__(self, workload: Workload, problem: Problem):
        self.workload, self.problem = workload, problem
        self.dtypes = list(dict.fromkeys([getattr(torch, workload.dtype), torch.float32]))
        self.seconds: dict[tuple[str, str], list[float]] = {}

    def _operands(self, name: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        p = self.problem
        hidden, weight = p.student_hidden[0].detach().to(dtype), p.student_weight.detach()
        if name == "student":
            return hidden, weight.to(dtype).T
        if name == "teacher":
            return p.teacher_hidden[0].to(dtype), p.teacher_weight.to(dtype).T
        shape = self.workload.rows, self.workload.columns
        gradient = torch.randn(shape, dtype=dtype, device=hidden.device)
        return (gradient, weight.to(dtype)) if name == "grad_hidden" else (gradient.T, hidden)

    def measure(self, timed: Callable[[Callable[[], object]], float]) -> None:
        """Time every GEMM in every variant once more; `timed` runs a function, returns seconds."""
        for name in gemm_shapes(self.workload):
            for dtype in self.dtypes:
                a, b = self._operands(name, dtype)
                variants = {"ab": lambda a=a, b=b: a @ b, "ba": lambda a=a, b=b: b.T @ a.T}
                for orientation, run in variants.items():
                    key = name, f"{str(dtype).removeprefix('torch.')} {orientation}"
                    self.seconds.setdefault(key, []).append(timed(run))
                del a, b, variants, run

    def drop_first(self) -> None:
        """Forget the first measurement of each variant, the warm-up."""
        for values in self.seconds.values():
            del values[0]

    def summary(self) -> dict:
        """Sum the best variants by their medians, all layers, in seconds; in the form of
        records.
        """
        medians: dict[str, dict[str, float]] = {}
        for (name, variant), values in self.seconds.items():
            medians.setdefault(name, {})[variant] = statistics.median(values)

        def total(names: Iterable[str], dtype: str = "") -> float:
            best = [min(s for v, s in medians[n].items() if v.startswith(dtype)) for n in names]
            return sum(best) * self.workload.projected_layers

        forward = [n for n in medians if n in FORWARD]
        return {
            "operations": operations(self.workload),
            "best": {name: min(variants, key=variants.get) for name, variants in medians.items()},
            "seconds_of_one_layer": medians,
            "forward": total(forward),
            "total": total(medians),
            "input_dtype_forward": total(forward, self.workload.dtype),
            "input_dtype_total": total(medians, self.workload.dtype),
            "repeats": len(next(iter(self.seconds.values()))),
        }
