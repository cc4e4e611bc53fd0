"""How a student and a teacher are compared: what runs of each model, and the loss of its states."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from fdd_kernels.hf.alignment import LayerAlignment
from fdd_kernels.hf.heads import Head
from fdd_kernels.hf.model_reader import ModelReader
from fdd_kernels.hf.observer import Observer
from fdd_kernels.hf.positions import valid_positions
from fdd_kernels.hf.targets import StudentSide, Targets
from fdd_kernels.hf.teachers import Teacher, model_states
from fdd_kernels.hf.unreached import parameters_outside
from fdd_kernels.hf.wrappers import own_rows
from fdd_kernels.objectives.fdd.options import FDDConfig, FDDLossTerms, LossOptions


class Comparison(ABC):
    """What `Distiller` asks about one way to compare; here that of predictions at sampled layers.

    A subclass computes the loss in `__call__`.

    Args:
        config: layers and loss.
        student: the student without its head.
        teacher: the teacher at the start; each call gets the one that it is to use.
        layers: the sampled layers of student and teacher.
        alignment: pairs the sampled layers; None: the options say how.
        vocab_group: the process group that splits the rows of both heads.

    Attributes:
        observer: gets both sides of every batch before its loss; None without one.
        projection: makes the student's states as wide as the teacher's; None where nothing does.
    """

    observer: Observer | None = None
    projection: nn.Linear | None = None
    # Options of `model_states`, for both models.
    _reading: ClassVar[Mapping[str, bool]] = {}

    def __init__(
        self,
        config: FDDConfig,
        student: ModelReader,
        teacher: Teacher,
        layers: tuple[tuple[int, ...], tuple[int, ...]],
        alignment: LayerAlignment | None = None,
        vocab_group: torch.distributed.ProcessGroup | None = None,
    ) -> None:
        self.config, self.student, self.vocab_group = config, student, vocab_group
        self._student_layers, self._teacher_layers = layers
        self._alignment = alignment

    @abstractmethod
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
        """Compute the loss of one batch.

        Args:
            teacher: whose head hidden targets are multiplied by.
            options: soft caps and scales included.
            step: optimizer steps done so far; see `LayerAlignment`.
        """

    def require(self, teacher: Teacher, possible: Iterable[LossOptions]) -> None:
        """Raise ValueError if the models cannot give what the loss needs at every step."""
        self._require_trainable(self.student.read_head())
        for options in possible:
            teacher.require(self.config, options, self._sampled(self._teacher_layers, options))

    def student_side(
        self, batch: Mapping[str, Tensor], options: LossOptions, *, whole: bool = False
    ) -> StudentSide:
        """Run the student. With `whole` up to its last block, also if the loss needs less."""
        states = model_states(
            self.student,
            batch,
            self._seen(self._student_layers, options),
            apply_final_norm=self.config.apply_final_norm,
            final=whole or self.observer is not None or self._needs_final(options),
            **self._reading,
        )
        return self._with_head(states)

    def targets(
        self, teacher: Teacher, batch: Mapping[str, Tensor], *options: LossOptions
    ) -> Targets:
        """Run the teacher for what the loss needs with any of the options."""
        return teacher.targets(
            batch,
            self._seen(self._teacher_layers, *options),
            apply_final_norm=self.config.apply_final_norm,
            final=self.observer is not None or any(map(self._compares_final, options)),
            **self._reading,
        )

    def without_gradient(self, options: LossOptions, *, whole: bool = False) -> list[str]:
        """Return the names of the student's parameters that train but get no gradient from the
        loss. With `whole` every block gets one.
        """
        idle, head = self._idle(options, whole), self.student.head
        # The transform before BERT's head holds the head's bias too.
        bias = getattr(head, "bias", None) if head in idle else None
        return parameters_outside(self.student.model, idle, [] if bias is None else [bias])

    def _idle(self, options: LossOptions, whole: bool) -> list[nn.Module]:
        """Return the modules that get no gradient, but for what they share with others."""
        idle = [] if self.config.train_head else [self.student.head]
        if not (whole or self._needs_final(options)):
            last = max(self._sampled(self._student_layers, options), default=0)
            idle.extend({*self.student.blocks[last:]} - {*self.student.blocks[:last]})
        return idle

    def trains_projection(self, options: LossOptions) -> bool:
        """Whether the loss gives the projection a gradient."""
        return self.projection is not None and options.compares_dynamics

    def valid_rows(self, view: Mapping[str, Tensor]) -> Tensor:
        """Return which rows of a batch the loss is a mean over, a bool tensor."""
        return valid_positions(view, self.config.ignore_index)

    def _needs_final(self, options: LossOptions) -> bool:
        """Whether the loss needs the student's final state."""
        return self._compares_final(options) or bool(options.ce_weight)

    def _compares_final(self, options: LossOptions) -> bool:
        """Whether it compares that state with the teacher's."""
        return options.compares_output

    def _sampled(self, layers: tuple[int, ...], *options: LossOptions) -> tuple[int, ...]:
        """Return those of a model's sampled layers that the loss uses with any of the options."""
        return layers if any(o.compares_dynamics for o in options) else ()

    def _seen(self, layers: tuple[int, ...], *options: LossOptions) -> tuple[int, ...]:
        """Return those of a model's sampled layers that the loss uses, or the observer."""
        observed = self.observer is not None and self.observer.layers
        return layers if observed else self._sampled(layers, *options)

    def _with_head(self, states: list[Tensor | None]) -> StudentSide:
        """Read the student's head: anew in each step, since it may have been resized, replaced or
        adapted.
        """
        head = self.student.read_head()
        self._require_trainable(head)
        weight, bias, vocabulary = head.weight, head.bias, len(head.weight)
        if not self.config.train_head:
            weight, bias = weight.detach(), None if bias is None else bias.detach()
        if self.vocab_group is not None:
            weight, bias = (
                own_rows("the student's head", t, self.vocab_group, vocabulary)
                for t in (weight, bias)
            )
        return StudentSide(states, weight, bias, vocabulary)

    def _require_trainable(self, head: Head) -> None:
        if self.config.train_head and head.requires_grad and head.storage != "parameter":
            raise ValueError(
                f"the student's head is {head.storage} and asks for gradient, which cannot reach "
                "it: pass FDDConfig(train_head=False), freeze it (requires_grad_(False)), or train "
                "a LoRA adapter on it"
            )
