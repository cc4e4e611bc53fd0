"""The student's projection to the teacher's width in feature space."""

from __future__ import annotations

import warnings

import torch
from torch import nn

from fdd_kernels.hf.model_reader import ModelReader

# Steps that change the student and leave its projection as it is, before a warning.
_PATIENCE = 2


def make_projection(kind: str, student: ModelReader, teacher: ModelReader) -> nn.Linear | None:
    """Make the module that maps the student's states (..., Ds) to the teacher's width (..., Dt).

    It has no bias, so that it maps differences of states as it maps states. Its weight is
    semi-orthogonal: rows or columns of length 1, at right angles. It depends on torch's seed.

    Args:
        kind: "linear", or "auto" for None where the widths are equal.
    """
    if kind == "auto" and student.width == teacher.width:
        return None
    projection = nn.Linear(student.width, teacher.width, bias=False)
    nn.init.orthogonal_(projection.weight)
    own = next(p for p in student.backbone.parameters() if p.is_floating_point())
    return projection.to(student.device or own.device, own.dtype)


def both_projections(decoder: nn.Linear | None, encoder: nn.Linear | None) -> nn.Module | None:
    """Return the one that there is; a module of both, by these names; or None."""
    if decoder is not None and encoder is not None:
        return nn.ModuleDict({"decoder": decoder, "encoder": encoder})
    return decoder if encoder is None else encoder


class ProjectionWatch:
    """Warn once of a projection that is not trained with its student: no optimizer has it.

    The number of a tensor's changes in place tells whether an optimizer has stepped.
    """

    def __init__(self, projection: nn.Linear, student: nn.Module) -> None:
        self._projection, self._student = projection, student
        self._seen: tuple[int, int] | None = None
        self._unchanged = 0

    def look(self) -> None:
        """Look at both after a loss that trains the projection."""
        weight = self._projection.weight
        trained = next((p for p in self._student.parameters() if p.requires_grad), None)
        if self._unchanged >= _PATIENCE or trained is None or not weight.requires_grad:
            return
        seen, self._seen = self._seen, (trained._version, weight._version)
        if not torch.is_grad_enabled() or seen is None or seen[0] == trained._version:
            return
        self._unchanged = self._unchanged + 1 if seen[1] == weight._version else 0
        if self._unchanged == _PATIENCE:
            warnings.warn(
                f"the student has changed {_PATIENCE} times, and distiller.projection has not: "
                "give its parameters to the optimizer too, as in AdamW([*student.parameters(), "
                "*distiller.projection.parameters()]); or freeze it with requires_grad_(False)",
                stacklevel=3,
            )
