"""The GEMM-only lower bound: the time of the GEMMs that every implementation of the loss needs.

Per layer: both models' logits, h W^T, 2 R V (Ds + Dt) operations; dH = G W, 2 R V Ds; and with a
trainable head dW = G^T h, another 2 R V Ds. Each is one `torch.mm`, timed as A B and as (B^T
A^T)^T, in the inputs' dtype and, where that is narrower, in float32 too: on processors without
matrix units float32 is faster. A GEMM is timed for one layer and counted once per layer.

Of attention each is one `torch.bmm` over the heads. Causal attention needs half of the scores: the
bound takes half of the rows.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from benchmarks.objectives import OBJECTIVES, has_teacher
from benchmarks.workloads import Workload
from fdd_kernels.testing import Problem

FORWARD = ("student", "teacher")


def gemm_rows(workload: Workload) -> int:
    """Count the rows of all columns that have as many scores as are needed."""
    return -(-workload.rows // 2) if workload.loss_options.get("causal") else workload.rows


def gemm_count(workload: Workload, name: str) -> int:
    """Count the layers that a GEMM is needed for."""
    of_teacher = name == "teacher" and workload.teacher_layers is not None
    return workload.teacher_layers if of_teacher else workload.projected_layers


def gemm_shapes(workload: Workload) -> dict[str, tuple[int, int, int]]:
    """Return (rows, inner, columns) of each GEMM of one layer; of attention, of one head."""
    rows, columns, heads = gemm_rows(workload), workload.columns, workload.heads or 1
    width, teacher_width = (n // heads for n in (workload.student_width, workload.teacher_width))
    shapes = {"student": (rows, width, columns)}
    if has_teacher(workload) and not workload.feature_space:
        shapes["teacher"] = (rows, teacher_width, columns)
    if OBJECTIVES[workload.objective].gradient:
        shapes["grad_hidden"] = (rows, columns, width)
        if workload.train_head:
            shapes["grad_head"] = (columns, rows, width)
    return shapes


def operations(workload: Workload) -> dict[str, int]:
    """Count the floating-point operations of these GEMMs, all layers."""
    shapes, heads = gemm_shapes(workload).items(), workload.heads or 1
    each = {name: 2 * m * k * n * heads * gemm_count(workload, name) for name, (m, k, n) in shapes}
    return {"forward": sum(each.get(name, 0) for name in FORWARD), "total": sum(each.values())}


class GemmTimes:
    """Times of the GEMMs of a workload on its own tensors; `measure` times each variant once."""

    def __init__(self, workload: Workload, problem: Problem):
        self.workload, self.problem = workload, problem
        self.dtypes = list(dict.fromkeys([getattr(torch, workload.dtype), torch.float32]))
        self.seconds: dict[tuple[str, str], list[float]] = {}

    def _operands(self, name: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        p, rows, heads = self.problem, gemm_rows(self.workload), self.workload.heads
        states, weight = p.student_hidden, p.student_weight
        if name == "teacher":
            states, weight = p.teacher_hidden, p.teacher_weight
        hidden, weight = states[0].detach()[:rows].to(dtype), weight.detach().to(dtype)
        if heads is not None:
            hidden, weight = (
                t.unflatten(-1, (heads, -1)).transpose(0, 1) for t in (hidden, weight)
            )
        if name in FORWARD:
            return hidden, weight.mT
        shape = *hidden.shape[:-1], weight.shape[-2]
        gradient = torch.randn(shape, dtype=dtype, device=hidden.device)
        return (gradient, weight) if name == "grad_hidden" else (gradient.mT, hidden)

    def measure(self, timed: Callable[[Callable[[], object]], float]) -> None:
        """Time every GEMM in every variant once more; `timed` runs a function, returns seconds."""
        for name in gemm_shapes(self.workload):
            for dtype in self.dtypes:
                a, b = self._operands(name, dtype)
                variants = {"ab": lambda a=a, b=b: a @ b, "ba": lambda a=a, b=b: b.mT @ a.mT}
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
            return sum(
                gemm_count(self.workload, name)
                * min(s for v, s in medians[name].items() if v.startswith(dtype))
                for name in names
            )

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
