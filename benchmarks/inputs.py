"""Random inputs of a workload, drawn in their own dtype piece by piece so that building them leaves
no mark on the peak of memory.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from benchmarks.workloads import Workload
from fdd_kernels.testing import Problem

SPREAD = 2.0  # standard deviation of the logits
PIECE = 2**20  # numbers drawn at a time


def build_problem(
    workload: Workload,
    device: torch.device | str = "cpu",
    *,
    rows: int | None = None,
    columns: int | None = None,
    draw_on: torch.device | str = "cpu",
) -> Problem:
    """Draw the workload's tensors, the same at every call; `rows` and `columns` limit their sizes.

    The generator of `draw_on` draws them: a GPU in a fraction of the time, but other numbers.
    """
    dtype = getattr(torch, workload.dtype)
    rows = min(rows or workload.rows, workload.rows)
    if workload.feature_space or columns is None:
        columns = workload.columns
    columns = min(columns, workload.columns)

    def normal(count: int, width: int, scale: float, stream: int) -> Tensor:
        generator = torch.Generator(draw_on).manual_seed(stream)
        out = torch.empty(count, width, dtype=dtype, device=draw_on)
        for piece in out.split(max(1, PIECE // width)):
            drawn = torch.randn(piece.shape, generator=generator, device=draw_on)
            piece.copy_(drawn.mul_(scale))
        return out

    def states(width: int, stream: int) -> list[Tensor]:
        hidden = [normal(rows, width, 1.0, stream)]
        for layer in range(1, workload.layers):
            update = normal(rows, width, 0.6, stream + layer)
            hidden.append(update.add_(hidden[-1], alpha=0.8))
        return hidden

    def head(width: int, stream: int) -> Tensor:
        return normal(columns, width, SPREAD / math.sqrt(width), stream)

    def beside(tensor: Tensor, stream: int) -> Tensor:
        return tensor * (1 + normal(*tensor.shape, workload.near, stream))

    student_hidden, student_weight = (
        states(workload.student_width, 100),
        head(workload.student_width, 1),
    )
    teacher_weight = None
    if workload.near is not None:
        teacher_hidden = [beside(h, 300 + i) for i, h in enumerate(student_hidden)]
        teacher_weight = beside(student_weight, 3)
    else:
        teacher_hidden = states(workload.teacher_width, 200)
        if not workload.feature_space:
            teacher_weight = head(workload.teacher_width, 2)
    return Problem(
        student_hidden=tuple([h.to(device).requires_grad_() for h in student_hidden]),
        student_weight=student_weight.to(device).requires_grad_(workload.train_head),
        teacher_hidden=tuple([h.to(device) for h in teacher_hidden]),
        teacher_weight=None if teacher_weight is None else teacher_weight.to(device),
    )
