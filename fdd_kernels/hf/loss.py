"""Compute the loss from a student's side and a teacher's targets, hidden states or summary."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fdd_kernels.engine.evaluate import evaluate
from fdd_kernels.hf.heads import head_digest
from fdd_kernels.hf.positions import next_labels, token_shape, valid_positions
from fdd_kernels.hf.targets import HiddenTargets, StudentSide, SummaryTargets, Targets
from fdd_kernels.hf.teachers import Teacher
from fdd_kernels.hf.wrappers import own_rows
from fdd_kernels.objectives.fdd.loss import fdd_call
from fdd_kernels.objectives.fdd.options import FDDLossTerms, LossOptions
from fdd_kernels.objectives.fdd.summary import SummaryLoss
from fdd_kernels.objectives.inputs import LossInputs


class DistillationLoss:
    """`loss(student, targets, batch, num_items_in_batch)` -> `FDDLossTerms`.

    Args:
        options: the loss options, soft caps and scales included.
        teacher: whose head hidden targets are multiplied by.
        vocab_group: the process group that splits the rows of both heads, or None.
    """

    def __init__(self, options: LossOptions, teacher: Teacher, vocab_group) -> None:
        self.options, self.teacher, self.vocab_group = options, teacher, vocab_group
        self._summary_loss: SummaryLoss | None = None
        self._summary_key: tuple | None = None  # the student's head and cache that it is for

    def __call__(
        self,
        student: StudentSide,
        targets: Targets,
        batch: Mapping[str, Tensor],
        num_items_in_batch: Tensor | float | None,
    ) -> FDDLossTerms:
        """Compute the loss of one batch.

        Raises:
            ValueError: hidden targets without the final state, where the loss needs it; a summary
                of another student's head, or with `vocab_group`.
        """
        of = self._of_summary if isinstance(targets, SummaryTargets) else self._of_hidden
        return of(student, targets, batch, num_items_in_batch)

    def _of_hidden(
        self, student: StudentSide, targets: HiddenTargets, batch, num_items_in_batch
    ) -> FDDLossTerms:
        options, device = self.options, student.weight.device
        targets = targets[-len(student.states) :]
        if targets[-1] is None and options.compares_output:
            raise ValueError(
                "teacher_states has no final state, which output_kd_weight or output_in_dynamics "
                "asks for: take the teacher_states of this distiller, or of one whose loss needs "
                "the final state too"
            )
        weight, bias = self._teacher_head(device, student.vocabulary)
        inputs = LossInputs(
            _complete(student.states, batch, student.weight),
            student.weight,
            _complete(targets, batch, weight),
            weight,
            next_labels(batch, options.ignore_index),
            student_bias=student.bias,
            teacher_bias=bias,
            mask=valid_positions(batch, options.ignore_index).to(device),
            num_items_in_batch=num_items_in_batch,
        )
        return FDDLossTerms(*evaluate(fdd_call(inputs, options, self.vocab_group)))

    @torch.no_grad()
    def _teacher_head(self, device: torch.device, vocabulary: int) -> tuple[Tensor, Tensor | None]:
        """Fetch the teacher's head for this call, dequantised and merged. It is not stored between
        calls, to save memory.
        """
        head = self.teacher.head(device)
        if self.vocab_group is not None:
            group = self.vocab_group
            head = [own_rows("the teacher's head", t, group, vocabulary) for t in head]
        weight, bias = head
        return weight.to(device), None if bias is None else bias.to(device)

    def _of_summary(
        self, student: StudentSide, targets: SummaryTargets, batch, num_items_in_batch
    ) -> FDDLossTerms:
        if self.vocab_group is not None:
            raise ValueError(
                "vocab_group splits the student's head, which a cache of statistics needs whole: "
                "use a cache of states"
            )
        loss, ignore = self._loss_of_summary(student, targets), self.options.ignore_index
        *sampled, final = student.states
        # Without trajectory and derivative no layer is sampled, and the loss uses none of these.
        sampled = sampled or [final] * (targets.layers - 1)
        states = [*sampled, sampled[-1] if final is None else final]
        places, summary = targets.places, targets.summary
        valid = valid_positions(batch, ignore).flatten()[places]
        if not bool(valid.all()):  # the batch may have fewer labels than the cache
            places, summary = places[valid], {name: t[valid] for name, t in summary.items()}
        hidden = [state.flatten(0, 1)[places].to(student.weight.device) for state in states]
        labels = next_labels(batch, ignore).flatten()[places]
        return loss(hidden, summary, labels, num_items_in_batch=num_items_in_batch)

    def _loss_of_summary(self, student: StudentSide, targets: SummaryTargets) -> SummaryLoss:
        """Return the loss for the student's head. Compares its SHA-256 with the summary's at the
        first call, and again whenever the head has moved or changed.
        """
        key = (targets.head, student.weight.data_ptr(), student.weight._version)
        if self._summary_loss is None or self._summary_key != key:
            if head_digest(student.weight, student.bias) != targets.head:
                raise ValueError(
                    f"the student's head is not the one that the statistics in {targets.source} "
                    "were made for (SHA-256 differs): statistics serve one frozen head. Freeze the "
                    "head and cache the teacher again, or use a cache of states"
                )
            self._summary_loss = SummaryLoss(
                self.options, targets.layers, student.weight, student.bias
            )
            self._summary_key = key
        return self._summary_loss


def _complete(
    states: list[Tensor | None], batch: Mapping[str, Tensor], weight: Tensor
) -> list[Tensor]:
    """Return the states on the device of their head, expanded zeros (no memory) for a missing final
    state, which the loss does not use.
    """
    if states[-1] is None:
        states = [*states[:-1], weight.new_zeros(()).expand(*token_shape(batch), weight.shape[1])]
    return [state.to(weight.device) for state in states]
