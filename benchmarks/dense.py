"""The loss in plain PyTorch as a reader of the paper would write it: dense logits in the inputs'
dtype, softmax in float32.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fdd_kernels.testing import Problem

CHUNK_ROWS = 128


def row_losses(
    student_hidden: list[Tensor],
    student_weight: Tensor,
    teacher_hidden: list[Tensor],
    teacher_weight: Tensor,
    options: dict,
    *,
    upcast: bool = False,
) -> Tensor:
    """Compute output KD + trajectory (KL) + derivative (cosine) per row, (R,), at temperature 1.

    `upcast` makes the logits float32 before the softmax, as `.float()` in most training code does.
    """

    def log_probabilities(states: list[Tensor], weight: Tensor, cap: float | None) -> list[Tensor]:
        found = []
        for hidden in states:
            logits = F.linear(hidden, weight)
            if cap is not None:
                logits = cap * torch.tanh(logits / cap)
            if upcast:
                logits = logits.float()
            found.append(F.log_softmax(logits, dim=-1, dtype=torch.float32))
        return found

    def kl(q: Tensor, p: Tensor) -> Tensor:
        return F.kl_div(q, p, reduction="none", log_target=True).sum(-1)

    student = log_probabilities(student_hidden, student_weight, options.get("student_softcap"))
    with torch.no_grad():
        teacher = log_probabilities(teacher_hidden, teacher_weight, options.get("teacher_softcap"))
    loss = kl(student[-1], teacher[-1])
    layers = len(student) - 1
    if layers:
        loss = loss + sum(kl(q, p) for q, p in zip(student[:-1], teacher[:-1])) / layers
    for i in range(layers - 1):
        deltas = student[i + 1] - student[i], teacher[i + 1] - teacher[i]
        loss = loss + (1 - F.cosine_similarity(*deltas, dim=-1)) / (layers - 1)
    return loss


def feature_row_losses(
    student_hidden: list[Tensor], projection: Tensor, teacher_hidden: list[Tensor]
) -> Tensor:
    """Compute MSE of projected states and of their differences from layer to layer, per row,
    (R,).
    """
    student = [F.linear(h, projection).float() for h in student_hidden]
    teacher = [h.float() for h in teacher_hidden]
    loss = sum((s - t).square().mean(-1) for s, t in zip(student, teacher)) / len(student)
    for i in range(len(student) - 1):
        delta = (student[i + 1] - student[i]) - (teacher[i + 1] - teacher[i])
        loss = loss + delta.square().mean(-1) / (len(student) - 1)
    return loss


def dense_rows(problem: Problem, options: dict, rows: slice = slice(None)) -> Tensor:
    """Compute the rows' losses of a problem, (R,)."""
    student = [h[rows] for h in problem.student_hidden]
    teacher = [h[rows] for h in problem.teacher_hidden]
    if problem.teacher_weight is None:
        return feature_row_losses(student, problem.student_weight, teacher)
    return row_losses(student, problem.student_weight, teacher, problem.teacher_weight, options)


def chunked_rows(problem: Problem, options: dict) -> Tensor:
    """Compute the same, each chunk of rows under gradient checkpointing: backward recomputes
    logits.
    """
    count = problem.student_hidden[0].shape[0]
    chunks = [slice(first, first + CHUNK_ROWS) for first in range(0, count, CHUNK_ROWS)]
    return torch.cat(
        [checkpoint(dense_rows, problem, options, rows, use_reentrant=False) for rows in chunks]
    )
