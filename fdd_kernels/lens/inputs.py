"""The tensors of one call as the kernels take them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class LensInputs(NamedTuple):
    """The tensors of one call, in the order of the operators' schema.

    Each model has hidden states (R, D), as many of both models or not. Heads are (V', D) and biases
    (V',) with V' >= V, the number of tokens that are compared. `teacher_weight` None stands for the
    identity. `valid` is (R,) bool, or None where every row is valid. `labels` is (R,) int, for NLL
    requests alone.
    """

    student_hidden: list[Tensor]
    student_weight: Tensor
    student_bias: Tensor | None
    teacher_hidden: list[Tensor]
    teacher_weight: Tensor | None
    teacher_bias: Tensor | None
    valid: Tensor | None
    labels: Tensor | None

    @property
    def depths(self) -> tuple[int, int]:
        """Count the hidden states of the student and of the teacher."""
        return len(self.student_hidden), len(self.teacher_hidden)

    @property
    def layers(self) -> int:
        """Count the hidden states of the model that has more of them: L."""
        return max(self.depths)

    @property
    def rows(self) -> int:
        """Count the rows, valid or not: R."""
        return self.student_hidden[0].shape[0]

    @property
    def device(self) -> torch.device:
        """Return the device of all tensors."""
        return self.student_weight.device

    @property
    def statistics_dtype(self) -> torch.dtype:
        """Choose the dtype of GEMMs, sums and statistics: float64 if any input is, else float32."""
        tensors = (
            *self.student_hidden,
            self.student_weight,
            *self.teacher_hidden,
            self.teacher_weight,
        )
        is_double = any(t is not None and t.dtype == torch.float64 for t in tensors)
        return torch.float64 if is_double else torch.float32

    def at(self, rows: Tensor) -> LensInputs:
        """Select `rows`, int64 positions that are all valid."""
        student, teacher = (
            [h[rows] for h in states] for states in (self.student_hidden, self.teacher_hidden)
        )
        labels = None if self.labels is None else self.labels[rows]
        return self._replace(
            student_hidden=student, teacher_hidden=teacher, valid=None, labels=labels
        )

    def with_equal_layers(self, needed: Sequence[bool] = ()) -> tuple[LensInputs, list[bool]]:
        """Repeat the last state of the model that has fewer, for kernels that take L of both.

        No request looks at a repeated state, none is copied, and none needs a gradient: `needed`
        marks those of [*student_hidden, student_weight, student_bias].
        """
        count = len(self.student_hidden)
        lacking, lacking_teacher = self.layers - count, self.layers - len(self.teacher_hidden)
        extended = self._replace(
            student_hidden=[*self.student_hidden, *self.student_hidden[-1:] * lacking],
            teacher_hidden=[*self.teacher_hidden, *self.teacher_hidden[-1:] * lacking_teacher],
        )
        return extended, [*needed[:count], *[False] * lacking, *needed[count:]]

    def of_layers(self, students: Sequence[int], teachers: Sequence[int]) -> LensInputs:
        """Select some layers of each model."""
        return self._replace(
            student_hidden=[self.student_hidden[layer] for layer in students],
            teacher_hidden=[self.teacher_hidden[layer] for layer in teachers],
        )
