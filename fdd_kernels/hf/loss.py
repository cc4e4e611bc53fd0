"""Compute the loss from a student's side and a teacher's targets, hidden states or summary."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace

import torch
from torch import Tensor

from fdd_kernels.engine.evaluate import evaluate
from fdd_kernels.hf.comparison import Comparison
from fdd_kernels.hf.heads import head_digest
from fdd_kernels.hf.positions import TOKEN_WEIGHTS, next_labels, token_shape, valid_positions
from fdd_kernels.hf.targets import HiddenTargets, StudentSide, SummaryTargets, Targets
from fdd_kernels.hf.teachers import Teacher
from fdd_kernels.hf.wrappers import own_rows
from fdd_kernels.objectives.fdd.loss import fdd_call
from fdd_kernels.objectives.fdd.options import FDDLossTerms, LossOptions
from fdd_kernels.objectives.fdd.scheduled import WEIGHT_OF_TERM
from fdd_kernels.objectives.fdd.summary import SummaryLoss
from fdd_kernels.objectives.inputs import LossInputs

# The options that may change from call to call of one `SummaryLoss`.
_WEIGHTS = frozenset(WEIGHT_OF_TERM.values())


class DistillationLoss(Comparison):
    """`loss(student, teacher, targets, batch, options)` -> `FDDLossTerms` of predictions.

    Between calls it stores the `SummaryLoss` of the last summary alone.
    """

    _summary_loss: SummaryLoss | None = None
    _summary_key: tuple | None = None  # the student's head and summary that it is for

    def __call__(
        self,
        student: StudentSide,
        teacher: Teacher,
        targets: Targets,
        batch: Mapping[str, Tensor],
        options: LossOptions,
        num_items_in_batch: Tensor | float | None = None,
        step: int | None = None,
    ) -> FDDLossTerms:
        """See `Comparison`.

        Raises:
            ValueError: hidden targets without the final state, where the loss needs it, or of a
                teacher without a head; a summary of another student's head, or with `vocab_group`.
        """
        if not isinstance(targets, SummaryTargets):
            inputs = hidden_inputs(
                student, teacher, targets, batch, options, num_items_in_batch, self.vocab_group
            )
            if self._alignment is not None:
                options = self._alignment.paired_options(options, inputs, step)
            return FDDLossTerms(*evaluate(fdd_call(inputs, options, self.vocab_group)))
        if self.vocab_group is not None:
            raise ValueError(
                "vocab_group splits the student's head, which a cached summary needs whole: use a "
                "cache of states"
            )
        return self._of_summary(student, targets, batch, options, num_items_in_batch)

    def _of_summary(
        self, student: StudentSide, targets: SummaryTargets, batch, options, num_items_in_batch
    ) -> FDDLossTerms:
        loss, ignore = self._loss_of_summary(student, targets, options), options.ignore_index
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
        weights = token_weights_of(batch, student.weight.device)
        return loss(
            hidden,
            summary,
            labels,
            token_weights=None if weights is None else weights.flatten()[places],
            num_items_in_batch=num_items_in_batch,
        )

    def _loss_of_summary(
        self, student: StudentSide, targets: SummaryTargets, options: LossOptions
    ) -> SummaryLoss:
        """Return the loss for the student's head. Compares its SHA-256 with the summary's at the
        first call, and again whenever the head has moved or changed.
        """
        head = student.weight
        others = [getattr(options, f.name) for f in fields(options) if f.name not in _WEIGHTS]
        key = (targets.head, targets.layers, *others, head.data_ptr(), head._version)
        if self._summary_loss is None or self._summary_key != key:
            if head_digest(head, student.bias) != targets.head:
                raise ValueError(
                    f"the student's head is not the one that the summary in {targets.source} was "
                    "made for (SHA-256 differs): a summary serves one frozen head. Freeze the head "
                    "and cache the teacher again, or use a cache of states"
                )
            self._summary_loss = SummaryLoss(options, targets.layers, head, student.bias)
            self._summary_key = key
        self._summary_loss.options = options
        return self._summary_loss


def hidden_inputs(
    student: StudentSide,
    teacher: Teacher,
    targets: HiddenTargets,
    batch: Mapping[str, Tensor],
    options: LossOptions,
    num_items_in_batch: Tensor | float | None = None,
    vocab_group: torch.distributed.ProcessGroup | None = None,
) -> LossInputs:
    """Check hidden targets and put both sides together, on the device of the student's head.

    Raises:
        ValueError: targets without the final state, where the loss needs it, or of a teacher
            without a head.
    """
    device = student.weight.device
    if len(student.states) == 1:  # the targets may have layers that this loss does not compare
        targets = targets[-1:]
    if targets[-1] is None and options.compares_output:
        raise ValueError(
            "teacher_states has no final state, which output_kd_weight or output_in_dynamics "
            "asks for: take the teacher_states of this distiller, or of one whose loss needs the "
            "final state too"
        )
    weight, bias = _teacher_head(teacher, device, vocab_group, student.vocabulary)
    return replace(
        student_inputs(student, batch, options),
        teacher_hidden=_complete(targets, batch, weight),
        teacher_weight=weight,
        teacher_bias=bias,
        num_items_in_batch=num_items_in_batch,
    )


def student_inputs(
    student: StudentSide, batch: Mapping[str, Tensor], options: LossOptions
) -> LossInputs:
    """Put a student's side together, on the device of its head, without a teacher."""
    device = student.weight.device
    return LossInputs(
        _complete(student.states, batch, student.weight),
        student.weight,
        (),
        None,
        next_labels(batch, options.ignore_index),
        student_bias=student.bias,
        mask=valid_positions(batch, options.ignore_index).to(device),
        token_weights=token_weights_of(batch, device),
    )


def token_weights_of(batch: Mapping[str, Tensor], device: torch.device) -> Tensor | None:
    """Return the batch's weights of positions (batch, sequence), or None."""
    weights = batch.get(TOKEN_WEIGHTS)
    return None if weights is None else weights.to(device)


@torch.no_grad()
def _teacher_head(
    teacher: Teacher, device: torch.device, vocab_group, vocabulary: int
) -> tuple[Tensor, Tensor | None]:
    """Fetch the teacher's head for this call, dequantised and merged. It is not stored between
    calls, to save memory.

    Raises:
        ValueError: the teacher has none.
    """
    head = teacher.head(device)
    if head is None:
        raise ValueError(
            "teacher_states are hidden states, which need the teacher's head, but the teacher "
            f"({teacher.name}) is a summary without one: take the teacher_states of this "
            "distiller, or make the Distiller with the teacher or a cache of its states"
        )
    if vocab_group is not None:
        head = [own_rows("the teacher's head", t, vocab_group, vocabulary) for t in head]
    weight, bias = head
    return weight.to(device), None if bias is None else bias.to(device)


def _complete(
    states: list[Tensor | None], batch: Mapping[str, Tensor], weight: Tensor
) -> list[Tensor]:
    """Return the states on the device of their head, expanded zeros (no memory) for a missing final
    state, which the loss does not use.
    """
    if states[-1] is None:
        states = [*states[:-1], weight.new_zeros(()).expand(*token_shape(batch), weight.shape[1])]
    return [state.to(weight.device) for state in states]
