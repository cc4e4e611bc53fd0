"""The tensors of one call that compares features, checked, and its result."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fdd_kernels.objectives.inputs import LossInputs
from fdd_kernels.objectives.numbers import check_numbers
from fdd_kernels.objectives.option_checks import REDUCTIONS, require_choice
from fdd_kernels.objectives.reduction import loss_denominator, reduce_rows
from fdd_kernels.objectives.tensors import require_float
from fdd_kernels.objectives.validation import check_num_items, check_tokens


@dataclass(frozen=True)
class FeatureInputs(LossInputs):
    """The features of two models at the same positions, (..., Ds) and (..., Dt)."""

    def named_floats(self) -> dict[str, Tensor | None]:
        """Name both tensors of features as the public functions do."""
        return {
            "student_features": self.student_hidden[0],
            "teacher_features": self.teacher_hidden[0],
        }

    @staticmethod
    def of(
        student: Tensor,
        teacher: Tensor,
        *,
        mask: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | float | None = None,
        reduction: str = "mean",
        dimensions: int = 2,
        equal_widths: bool = False,
    ) -> FeatureInputs:
        """Check the tensors of a call before any work; they have at least `dimensions` dimensions.

        Raises:
            TypeError, ValueError: naming the argument, its value and the remedy.
        """
        inputs = FeatureInputs(
            student_hidden=(student,),
            student_weight=None,
            teacher_hidden=(teacher,),
            teacher_weight=None,
            labels=labels,
            mask=mask,
            num_items_in_batch=num_items_in_batch,
        )
        for name, tensor in inputs.named_floats().items():
            require_float(name, tensor)
            if tensor.ndim < dimensions or tensor.shape[-1] == 0:
                raise ValueError(
                    f"{name} has shape {tuple(tensor.shape)}: it must have at least {dimensions} "
                    "dimensions, the last of which is its width"
                )
        for what, ours, theirs in (
            ("leading shape", tuple(student.shape[:-1]), tuple(teacher.shape[:-1])),
            ("device", student.device, teacher.device),
            *([("width", student.shape[-1], teacher.shape[-1])] if equal_widths else []),
        ):
            if ours != theirs:
                remedy = {
                    "leading shape": "both models must have seen the same positions",
                    "device": "move one of them",
                    "width": "project the student's to the teacher's with a learned nn.Linear",
                }[what]
                raise ValueError(
                    f"teacher_features has {what} {theirs}, student_features {ours}: {remedy}"
                )
        if torch.is_grad_enabled() and teacher.requires_grad:
            raise ValueError(
                "teacher_features requires grad, but the loss never sends gradient to the teacher: "
                "run the teacher under torch.no_grad(), or pass .detach()"
            )
        check_tokens(inputs)
        require_choice("reduction", reduction, REDUCTIONS)
        check_num_items(reduction, num_items_in_batch)
        check_numbers(inputs)
        return inputs

    @property
    def student(self) -> Tensor:
        """The student's features (..., Ds)."""
        return self.student_hidden[0]

    @property
    def teacher(self) -> Tensor:
        """The teacher's features (..., Dt)."""
        return self.teacher_hidden[0]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the result: float64 if either side is, else float32."""
        wide = torch.float64 in (self.student.dtype, self.teacher.dtype)
        return torch.float64 if wide else torch.float32

    def valid(self, ignore_index: int | None = None) -> Tensor | None:
        """Say which positions (...) are valid; None for all."""
        valid = None if self.mask is None else self.mask != 0
        if self.labels is not None and ignore_index is not None:
            labelled = self.labels != ignore_index
            valid = labelled if valid is None else valid & labelled
        return valid

    def reduced(self, values: Tensor, valid: Tensor | None, reduction: str) -> Tensor:
        """Reduce values of any shape, in float64 or float32, over those that are valid.

        With reduction="none" the values come back in their shape, 0 where they are not valid.
        """
        flat = values.reshape(-1)
        counted = None if valid is None else valid.reshape(-1)
        denominator = loss_denominator(
            reduction, len(flat), counted, flat.device, self.num_items_in_batch
        )
        shape = tuple(values.shape) if reduction == "none" else None
        return reduce_rows(flat, counted, shape, denominator).to(self.dtype)
