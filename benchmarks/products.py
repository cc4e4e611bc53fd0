"""The time of the matrix products that no implementation of the objective can avoid: the limit that
figures are held to.

Per layer: h W^T of both models, 2 R V (Ds + Dt) operations, and in the backward pass G W, 2 R V Ds,
and with a trainable head G^T h, another 2 R V Ds. Each is one `torch.mm`, timed as A B and as (B^T
A^T)^T, in the inputs' dtype and, where that is narrower, in float32 too, since on processors
without matrix units float32 is the faster one. A product is timed for one layer and counted once
per layer.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.workloads import Workload
from fdd_kernels.testing import Problem

FORWARD = ("student", "teacher")


def product_shapes(workload: Workload) -> dict[str, tuple[int, int, int]]:
    """(rows, inner, columns) of each product of one layer."""
    rows, columns, width = workload.rows, workload.columns, workload.student_width
    shapes = {"student": (rows, width, columns)}
    if not workload.feature_space:
        shapes["teacher"] = (rows, workload.teacher_width, columns)
    shapes["grad_hidden"] = (rows, columns, width)
    if workload.train_head:
        shapes["grad_head"] = (columns, rows, width)
    return shapes


def operations(workload: Workload) -> dict[str, int]:
    """Floating-point operations of these products, all layers."""
    each = {
        name: 2 * m * k * n * workload.read_layers
        for name, (m, k, n) in product_shapes(workload).items()
    }
    forward = sum(each[name] for name in FORWARD if name in each)
    return {"forward": forward, "total": sum(each.values())}


class BareProducts:
    """The products of a workload on its own tensors; `measure` times each variant once."""

    def __init__(self, workload: Workload, problem: Problem):
        self.workload = workload
        self.dtypes = list(dict.fromkeys([getattr(torch, workload.dtype), torch.float32]))
        self.seconds: dict[tuple[str, str], list[float]] = {}
        self.problem = problem

    def _operands(self, name: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        p = self.problem
        hidden, weight = p.student_hidden[0].detach().to(dtype), p.student_weight.detach()
        if name == "student":
            return hidden, weight.to(dtype).T
        if name == "teacher":
            return p.teacher_hidden[0].to(dtype), p.teacher_weight.to(dtype).T
        gradient = torch.randn(
            self.workload.rows, self.workload.columns, dtype=dtype, device=hidden.device
        )
        return (gradient, weight.to(dtype)) if name == "grad_hidden" else (gradient.T, hidden)

    def measure(self, timed: Callable[[Callable[[], object]], float]) -> None:
        """Time every product in every variant once more; `timed` runs a function and returns
        seconds.
        """
        for name in product_shapes(self.workload):
            for dtype in self.dtypes:
                a, b = self._operands(name, dtype)
                short = str(dtype).removeprefix("torch.")
                for orientation, run in (
                    ("ab", lambda a=a, b=b: a @ b),
                    ("ba", lambda a=a, b=b: b.T @ a.T),
                ):
                    self.seconds.setdefault((name, f"{short} {orientation}"), []).append(timed(run))
                del a, b

    def drop_first(self) -> None:
        """Forget the first measurement of each variant, the warm-up."""
        for values in self.seconds.values():
            del values[0]

    def summary(self) -> dict:
        """Best variant of each product by its median, and the sums for all layers: forward, total,
        seconds.
        """
        medians: dict[str, dict[str, float]] = {}
        for (name, variant), values in self.seconds.items():
            medians.setdefault(name, {})[variant] = float(
                torch.tensor(values, dtype=torch.float64).median()
            )

        def total(names: list[str], allowed: str) -> float:
            best = [min(s for v, s in medians[n].items() if v.startswith(allowed)) for n in names]
            return sum(best) * self.workload.read_layers

        forward = [n for n in medians if n in FORWARD]
        return {
            "operations": operations(self.workload),
            "best": {name: min(variants, key=variants.get) for name, variants in medians.items()},
            "seconds_of_one_layer": medians,
            "forward": total(forward, ""),
            "total": total(list(medians), ""),
            "input_dtype_forward": total(forward, self.workload.dtype),
            "input_dtype_total": total(list(medians), self.workload.dtype),
            "repeats": len(next(iter(self.seconds.values()))),
        }
