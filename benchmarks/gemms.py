"""The limit: the time of the GEMMs that every implementation of the loss needs, without all else.

Per layer: both models' logits, h W^T, 2 R V (Ds + Dt) operations; dH = G W, 2 R V Ds; and with a
trainable head dW = G^T h, another 2 R V Ds. Each is timed by `torch.mm` and in tiles by the
libraries of the C++ kernels (`benchmarks/tiled_gemms.py`), as A B and as (B^T A^T)^T, in the
inputs' dtype and, where that is narrower, in float32 too: on processors without matrix units
float32 is faster. The limit takes the fastest way of each GEMM. A GEMM is timed for one layer and
counted once per layer.

Of attention each is one `torch.bmm` over the heads. Causal attention needs half of the scores: the
limit takes half of the rows.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator
from functools import partial

import torch
from torch import Tensor

from benchmarks import tiled_gemms
from benchmarks.objectives import OBJECTIVES, has_teacher
from benchmarks.tiled_gemms import BRGEMM, MM
from benchmarks.workloads import Workload
from fdd_kernels.testing import Problem

FORWARD = ("student", "teacher")


def library_of(way: str) -> str:
    """Name the library of a way to compute a GEMM; old records timed torch.mm alone."""
    return BRGEMM if f" {BRGEMM} " in way else MM


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
    """Times of the GEMMs of a workload on its own tensors; `measure` times each way once."""

    def __init__(self, workload: Workload, problem: Problem):
        self.workload, self.problem = workload, problem
        self.dtypes = list(dict.fromkeys([getattr(torch, workload.dtype), torch.float32]))
        self.seconds: dict[tuple[str, str], list[float]] = {}
        self.no_brgemm = tiled_gemms.why_no_brgemm(problem.student_weight.device)

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

    def _ways(self, a: Tensor, b: Tensor) -> Iterator[tuple[str, Callable[[], Tensor]]]:
        """Yield the ways to compute a b, with operands in place and pages that were touched."""
        for orientation in ("ab", "ba"):
            left, right = (a, b) if orientation == "ab" else (b.mT, a.mT)
            out = left.new_empty(*left.shape[:-1], right.shape[-1]).zero_()
            yield f"{MM} {orientation}", partial(torch.matmul, left, right, out=out)
        if a.ndim == 2:
            yield from tiled_gemms.products(a, b)

    def measure(self, timed: Callable[[Callable[[], object]], float]) -> None:
        """Time every GEMM in every way once more; `timed` runs a function, returns seconds.

        Raises:
            ValueError: the first result in tiles is not that of torch.mm.
        """
        for name in gemm_shapes(self.workload):
            for dtype in self.dtypes:
                a, b = self._operands(name, dtype)
                for way, run in self._ways(a, b):
                    key = name, f"{str(dtype).removeprefix('torch.')} {way}"
                    seconds = timed(run)
                    if key not in self.seconds and way.endswith(tiled_gemms.TILINGS):
                        tiled_gemms.check(run(), a, b, a.float() @ b.float())
                    self.seconds.setdefault(key, []).append(seconds)

    def drop_first(self) -> None:
        """Forget the first measurement of each way, the warm-up."""
        for values in self.seconds.values():
            del values[0]

    def summary(self) -> dict:
        """Sum the fastest ways by their medians, all layers, in seconds; in the form of records.

        `total_min` and `total_max` sum the shortest and the longest times of the same ways,
        `by_library` the fastest ways of one library.
        """
        medians: dict[str, dict[str, float]] = {}
        for (name, way), values in self.seconds.items():
            medians.setdefault(name, {})[way] = statistics.median(values)
        best = {name: min(ways, key=ways.get) for name, ways in medians.items()}
        counts = {name: gemm_count(self.workload, name) for name in medians}

        def total(names: Iterable[str], part: str = "") -> float:
            return sum(
                counts[name] * min(s for way, s in medians[name].items() if part in f"{way} ")
                for name in names
            )

        def ends(of: Callable[[list[float]], float]) -> float:
            return sum(counts[name] * of(self.seconds[name, way]) for name, way in best.items())

        forward = [n for n in medians if n in FORWARD]
        libraries = dict.fromkeys(library_of(way) for ways in medians.values() for way in ways)
        return {
            "operations": operations(self.workload),
            "best": best,
            "seconds_of_one_layer": medians,
            "forward": total(forward),
            "total": total(medians),
            "total_min": ends(min),
            "total_max": ends(max),
            "by_library": {library: total(medians, f" {library} ") for library in libraries},
            "no_brgemm": self.no_brgemm,
            "input_dtype_forward": total(forward, f"{self.workload.dtype} "),
            "input_dtype_total": total(medians, f"{self.workload.dtype} "),
            "repeats": len(next(iter(self.seconds.values()))),
        }
