"""Problems whose head rows have a direction in common."""

from __future__ import annotations

from dataclasses import replace

import torch

from fdd_kernels.testing import Problem


def with_common_direction(problem: Problem, size: float) -> Problem:
    """Add one vector to all rows of the student's head, `size` times as long as they are."""
    weight = problem.student_weight.detach().float()
    vector = torch.randn(weight.shape[1], generator=torch.Generator().manual_seed(1))
    vector *= size * weight.norm(dim=1).mean() / vector.norm()
    moved = (weight + vector).to(problem.student_weight.dtype)
    return replace(problem, student_weight=moved.requires_grad_())
