"""Random inputs of a workload, built in their own dtype in small pieces so that building them
leaves no mark on the peak.
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
    seed: int = 0,
    draw_on: torch.device | str = "cpu",
) -> Problem:
    """The workload's tensors, the same at every call; `rows` and `columns` keep only the first
    ones.

    `draw_on`: the device whose generator draws them; other devices draw other numbers, a GPU in a
    fraction of the time.
    """
    dtype = getattr(torch, workload.dtype)
    rows = workload.rows if rows is None else min(rows, workload.rows)
    columns = (
        workload.columns
        if columns is None or workload.feature_space
        else min(columns, workload.columns)
    )

    def normal(count: int, width: int, scale: float, stream: int) -> Tensor:
        generator = torch.Generator(draw_on).manual_seed(seed * 1000 + stream)
        out = torch.empty(count, width, dtype=dtype, device=draw_on)
        step = max(1, PIECE // width)
        for first in range(0, count, step):
            piece = torch.randn(
                min(step, count - first), width, generator=generator, device=draw_on
            )
            out[first : first + len(piece)] = piece.mul_(scale)
        return out

    def states(width: int, stream: int) -> list[Tensor]:
        hidden = [normal(rows, width, 1.0, stream)]
        for layer in range(1, workload.layers):
            update = normal(rows, width, 0.6, stream + layer)
            hidden.append(update.add_(hidden[-1], alpha=0.8))
        return hidden

    student_hidden = states(workload.student_width, 100)
    student_weight = normal(
        columns, workload.student_width, SPREAD / math.sqrt(workload.student_width), 1
    )
    teacher_weight = None
    if workload.near is not None:
        teacher_hidden = [
            h * (1 + normal(*h.shape, workload.near, 300 + i)) for i, h in enumerate(student_hidden)
        ]
        teacher_weight = student_weight * (1 + normal(*student_weight.shape, workload.near, 3))
    else:
        teacher_hidden = states(workload.teacher_width, 200)
        if not workload.feature_space:
            teacher_weight = normal(
                columns, workload.teacher_width, SPREAD / math.sqrt(workload.teacher_width), 2
            )
    return Problem(
        student_hidden=tuple([h.to(device).requires_grad_() for h in student_hidden]),
        student_weight=student_weight.to(device).requires_grad_(workload.train_head),
        teacher_hidden=tuple([h.to(device) for h in teacher_hidden]),
        teacher_weight=None if teacher_weight is None else teacher_weight.to(device),
    )
