"""The two sides of a contrastive call: a side is the rows of one direction and the columns of the
other.

Shape suffixes: N entries of a side, D the student's width, M teachers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

_LEAST_NORM = 1e-12


@dataclass(frozen=True)
class Side:
    """One side.

    Attributes:
        student: (N, D).
        teachers: M constants (N, Dm).
        tags: (N,) int.
        present: (N,) bool; entries that are not are left out.
        own: (N,) int64, the index of each entry's partner among the columns.
        whole: whether it is known, without looking, that all entries are present.
    """

    student: Tensor
    teachers: tuple[Tensor, ...]
    tags: Tensor
    present: Tensor
    own: Tensor
    whole: bool

    def ready(self, normalize: bool) -> Side:
        """Return the side in float32 or float64, with vectors of length 1 if so asked."""
        tensors = self.student, *self.teachers
        double = any(t.dtype == torch.float64 for t in tensors)
        tensors = [t.to(torch.float64 if double else torch.float32) for t in tensors]
        if not self.whole:  # what is left out may be NaN
            tensors = [torch.where(self.present[:, None], t, 0.0) for t in tensors]
        student, *teachers = (_ready(t, normalize) for t in tensors)
        return replace(self, student=student, teachers=tuple(teachers))

    def scaled(self, scale: Tensor | float, teacher_scales: tuple[float, ...]) -> Side:
        """Multiply the vectors, such that scores with the other side are multiplied."""
        if isinstance(scale, Tensor):
            scale = scale.reshape(()).to(self.student)
        teachers = tuple([t * s for t, s in zip(self.teachers, teacher_scales)])
        return replace(self, student=self.student * scale, teachers=teachers)

    def gathered(self, group) -> Side:
        """Return the entries of all processes of the group, in the order of ranks.

        Gradients of the student's vectors are added up and sent back to their processes.
        """
        import torch.distributed as dist
        from torch.distributed.nn import functional as collectives  # differentiable

        def constant(tensor: Tensor) -> Tensor:
            parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))]
            dist.all_gather(parts, tensor.contiguous(), group=group)
            return torch.cat(parts)

        if torch.is_grad_enabled() and self.student.requires_grad:
            student = torch.cat(collectives.all_gather(self.student, group=group))
        else:
            student = constant(self.student)
        return replace(
            self,
            student=student,
            teachers=tuple([constant(t) for t in self.teachers]),
            tags=constant(self.tags),
            present=constant(self.present.to(torch.uint8)) != 0,
            whole=False,  # another process may have a mask
        )


def _ready(rows: Tensor, normalize: bool) -> Tensor:
    """Normalise vectors (N, D) if so asked; one of length 0 has gradient 0."""
    if not normalize:
        return rows
    is_zero = torch.linalg.vector_norm(rows.detach(), torch.inf, dim=-1, keepdim=True) == 0
    length = torch.linalg.vector_norm(rows, dim=-1, keepdim=True).clamp(min=_LEAST_NORM)
    # Of a vector of zeros autograd would take g / _LEAST_NORM for the gradient.
    return rows / torch.where(is_zero, torch.inf, length)


def own_offset(group, device: torch.device, counts: tuple[int, int]) -> int:
    """Return the index of this process's first column among those of the group.

    `counts` are this process's numbers of entries of both sides. The hosts wait for one another.

    Raises:
        ValueError: on every process, where numbers differ, or this process is not in the group.
    """
    import torch.distributed as dist

    rank = dist.get_rank(group)
    if rank < 0:
        raise ValueError(
            "process_group does not have this process: call on the group's processes only"
        )
    mine = torch.tensor(counts, device=device)
    found = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(found, mine, group=group)
    different = {tuple(f.tolist()) for f in found}
    if len(different) > 1:
        raise ValueError(
            f"student_a and student_b have {sorted(different)} rows on the processes of "
            "process_group: give every process as many, and mark what is too much in mask and "
            "column_mask"
        )
    return rank
