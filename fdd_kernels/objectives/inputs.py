"""The tensors of one call of an objective, as the caller gives them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fdd_kernels.lens.inputs import LensInputs


@dataclass(frozen=True)
class LossInputs:
    """The tensors of one call, under the names of the public functions.

    Attributes:
        student_hidden, teacher_hidden: L hidden states (..., Ds) and (..., Dt) in depth order.
        student_weight, teacher_weight: LM heads (V, Ds) and (V, Dt). Without a teacher's head the
            student's projects to the teacher's width, (Dt, Ds).
        labels: tokens (...), or None.
        student_bias, teacher_bias: (V,), or None.
        mask: (...), or None; 0 at positions that are left out.
        num_items_in_batch: the denominator of the sum, or None for the number of valid tokens.
        token_weights: (...), or None; factors of every term of a position.
    """

    student_hidden: Sequence[Tensor] | Tensor
    student_weight: Tensor
    teacher_hidden: Sequence[Tensor] | Tensor
    teacher_weight: Tensor | None
    labels: Tensor | None = None
    student_bias: Tensor | None = None
    teacher_bias: Tensor | None = None
    mask: Tensor | None = None
    num_items_in_batch: Tensor | float | None = None
    token_weights: Tensor | None = None

    @property
    def device(self) -> torch.device:
        """The device of the first hidden state."""
        return self.student_hidden[0].device

    @property
    def leading_shape(self) -> tuple[int, ...]:
        """The shape of the hidden states before their width."""
        return tuple(self.student_hidden[0].shape[:-1])

    @property
    def feature_space(self) -> bool:
        """Whether features are compared instead of predictions."""
        return self.teacher_weight is None

    def named_floats(self) -> dict[str, Tensor | None]:
        """Name every tensor of floating point as error messages do; None for one not given."""
        named = {
            "student_weight": self.student_weight,
            "student_bias": self.student_bias,
            "teacher_weight": self.teacher_weight,
            "teacher_bias": self.teacher_bias,
        }
        named |= {f"student_hidden[{i}]": h for i, h in enumerate(self.student_hidden)}
        return named | {f"teacher_hidden[{i}]": h for i, h in enumerate(self.teacher_hidden)}

    def shifted(self, ignore_index: int) -> LossInputs:
        """Move each label to the position that predicts it; the last position is ignored."""
        last = torch.full_like(self.labels[..., :1], ignore_index)
        return replace(self, labels=torch.cat([self.labels[..., 1:], last], dim=-1))

    def flattened(
        self, ignore_index: int, students: Sequence[int], teachers: Sequence[int]
    ) -> LensInputs:
        """Return the tensors as the kernels take them, with R rows and the states of all layers.

        Under autocast, heads and the states of the layers `students` and `teachers` that are
        float32 take its dtype, as in `nn.Linear`. Rows are valid where the label is not
        `ignore_index` and the mask is not 0.
        """
        of_student, of_teacher = (
            [
                _autocast(h.reshape(-1, h.shape[-1])) if i in layers else h.reshape(-1, h.shape[-1])
                for i, h in enumerate(states)
            ]
            for states, layers in (
                (self.student_hidden, students),
                (self.teacher_hidden, teachers),
            )
        )
        valid, labels = None, None
        if self.labels is not None:
            labels = self.labels.reshape(-1)
            valid = labels != ignore_index
        if self.mask is not None:
            unmasked = self.mask.reshape(-1) != 0
            valid = unmasked if valid is None else valid & unmasked
        return LensInputs(
            of_student,
            _autocast(self.student_weight),
            _autocast(self.student_bias),
            of_teacher,
            _autocast(self.teacher_weight),
            _autocast(self.teacher_bias),
            valid,
            labels,
        )

    def weighted(self, rows: LensInputs) -> tuple[LensInputs, Tensor | None]:
        """Return the flattened inputs without the rows of weight 0, and the weights (R,).

        Neither changes the divisor, which is to be taken before.
        """
        if self.token_weights is None:
            return rows, None
        weights = self.token_weights.reshape(-1).to(rows.statistics_dtype)
        counted = weights != 0
        return rows._replace(valid=counted if rows.valid is None else rows.valid & counted), weights


def _autocast(tensor: Tensor | None) -> Tensor | None:
    """Convert a float32 tensor to autocast's dtype where it is enabled."""
    if tensor is None or tensor.dtype != torch.float32:
        return tensor
    if not torch.is_autocast_enabled(tensor.device.type):
        return tensor
    return tensor.to(torch.get_autocast_dtype(tensor.device.type))
