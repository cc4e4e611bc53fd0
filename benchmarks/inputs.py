"""Random inputs of a workload, drawn in their own dtype piece by piece so that building them leaves
no mark on the peak of memory.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from benchmarks.call import Call
from benchmarks.workloads import Workload

SPREAD = 2.0  # standard deviation of the logits
PIECE = 2**20  # numbers drawn at a time
TOP_K = 64  # tokens of `ids`


def build_problem(
    workload: Workload,
    device: torch.device | str = "cpu",
    *,
    rows: int | None = None,
    columns: int | None = None,
    draw_on: torch.device | str = "cpu",
) -> Call:
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

    def states(width: int, layers: int, stream: int) -> list[Tensor]:
        hidden = [normal(rows, width, 1.0, stream)]
        for layer in range(1, layers):
            update = normal(rows, width, 0.6, stream + layer)
            hidden.append(update.add_(hidden[-1], alpha=0.8))
        return hidden

    def head(width: int, stream: int) -> Tensor:
        # Attention divides its scores by the root of a head's width itself.
        scale = SPREAD if workload.heads else SPREAD / math.sqrt(width)
        return normal(columns, width, scale, stream)

    def beside(tensor: Tensor, stream: int) -> Tensor:
        return tensor * (1 + normal(*tensor.shape, workload.near, stream))

    student_hidden, student_weight = (
        states(workload.student_width, workload.layers, 100),
        head(workload.student_width, 1),
    )
    teacher_weight = None
    if workload.near is not None:
        teacher_hidden = [beside(h, 300 + i) for i, h in enumerate(student_hidden)]
        teacher_weight = beside(student_weight, 3)
    else:
        teacher_layers = workload.teacher_layers or workload.layers
        teacher_hidden = states(workload.teacher_width, teacher_layers, 200)
        if not workload.feature_space:
            teacher_weight = head(workload.teacher_width, 2)
    call = Call(
        student_hidden=tuple([h.to(device).requires_grad_() for h in student_hidden]),
        student_weight=student_weight.to(device).requires_grad_(workload.train_head),
        teacher_hidden=tuple([h.to(device) for h in teacher_hidden]),
        teacher_weight=None if teacher_weight is None else teacher_weight.to(device),
        objective=workload.objective,
        heads=workload.heads,
    )
    return replace(call, **_per_token(call, workload))


def _per_token(call: Call, workload: Workload) -> dict[str, Tensor]:
    """Draw the tensors that `workload.tensors` names, of one number or K per row."""
    generator, device = torch.Generator().manual_seed(4), call.student_weight.device
    columns, count = len(call.student_weight), call.row_count
    found = {}
    if "labels" in workload.tensors:
        found["labels"] = torch.randint(columns, (count,), generator=generator).to(device)
    if "own" in workload.tensors:
        found["labels"] = torch.arange(count, device=device)
    if "token_weights" in workload.tensors:
        found["token_weights"] = torch.rand(count, generator=generator).to(device)
    if "ids" in workload.tensors:
        pieces, temperature = [], workload.loss_options.get("temperature", 1.0)
        for h in call.teacher_hidden[-1].split(max(1, 64 * PIECE // columns)):
            logits = (h @ call.teacher_weight.T).float() / temperature
            pieces.append(logits.log_softmax(-1).topk(min(TOP_K, columns // 2)))
        found["logprobs"], found["ids"] = (torch.cat(parts) for parts in zip(*pieces))
    return found
