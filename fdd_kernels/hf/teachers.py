"""What a Distiller needs of a teacher, and the live model that gives it; `teacher_cache` has others
that do.
"""

from __future__ import annotations

import contextlib
import functools
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fdd_kernels.hf.batches import check_positions, check_tokens
from fdd_kernels.hf.compiled import compile_blocks
from fdd_kernels.hf.model_reader import LogitTransform, ModelLens, unwrap
from fdd_kernels.hf.offload import has_place
from fdd_kernels.hf.positions import SHIFT_LABELS, counted_positions, next_labels, token_shape
from fdd_kernels.hf.sharing import as_teacher_of_itself, shares_modules
from fdd_kernels.hf.wrappers import inside_forward, own_rows
from fdd_kernels.objectives.fdd.api import fused_fdd_loss
from fdd_kernels.objectives.fdd.options import FDDConfig, FDDLossTerms, LossOptions

# The column of a batch that says which windows of a teacher cache its rows are.
TEACHER_INDEX = "teacher_index"
_NOT_MODEL_INPUTS = ("labels", SHIFT_LABELS, "num_items_in_batch", TEACHER_INDEX)
_LOADING = "AutoModelForCausalLM.from_pretrained(...)"
# L tensors (batch, sequence, Dt), the last None where the final state is not needed; or what else
# `compare` takes.
TeacherStates = list[Tensor | None] | Any


class StudentSide(NamedTuple):
    """The student's states (batch, sequence, Ds) as its head would see them, the last perhaps None,
    and its head.

    `weight` and `bias` are this process's rows where a group of processes splits the `vocabulary`
    rows of the whole.
    """

    states: list[Tensor | None]
    weight: Tensor
    bias: Tensor | None
    vocabulary: int


class Teacher(ABC):
    """The teacher's side of the loss.

    Attributes:
        name: of the teacher, as a model card gives it: what it was loaded by (perhaps a path), or
            words.
        depth: blocks of the teacher, from which a grid of layers follows.
        vocabulary: rows of its head.
        transform: what its logits are of its head's output.
        batch_columns: what it reads from a batch beside a model's inputs; collators must keep it.
    """

    name: str
    depth: int
    vocabulary: int
    transform: LogitTransform
    batch_columns: tuple[str, ...] = ()

    @abstractmethod
    def states(
        self,
        batch: Mapping[str, Tensor],
        layers: tuple[int, ...],
        *,
        apply_final_norm: bool,
        final: bool = True,
    ) -> TeacherStates:
        """What `compare` needs of `layers`, and of the final state if `final`.

        What stands at positions that do not count is not defined, but finite.
        """

    @abstractmethod
    def compare(
        self,
        student: StudentSide,
        states: TeacherStates,
        batch: Mapping[str, Tensor],
        options: LossOptions,
        num_items_in_batch: Tensor | float | None,
        vocab_group,
    ) -> FDDLossTerms:
        """The loss of the student's states against those that `states` gave for the same batch."""

    def require(self, config: FDDConfig, options: LossOptions, layers: tuple[int, ...]) -> None:  # noqa: B027
        """Raise ValueError if it cannot give `layers` as `config` asks for them; `options` are the
        loss's in full.
        """


class TeacherWithHead(Teacher):
    """A teacher whose states are read through its own head."""

    @abstractmethod
    def head(self) -> tuple[Tensor, Tensor | None]:
        """Weight (V, Dt) and bias (V,) as plain tensors without gradient, on any device; perhaps
        made for this one call.
        """

    @torch.no_grad()
    def _head_on(
        self, device: torch.device, vocab_group, vocabulary: int
    ) -> tuple[Tensor, Tensor | None]:
        """The head for one loss. A quantised, adapted, offloaded or distant one is made plain here,
        every time: that is little work beside the loss, and in between nothing of its size is held.
        """
        found = self.head()
        if vocab_group is not None:
            found = [own_rows("the teacher's head", t, vocab_group, vocabulary) for t in found]
        weight, bias = found
        return weight.to(device), None if bias is None else bias.to(device)

    def compare(
        self,
        student: StudentSide,
        states: list[Tensor | None],
        batch: Mapping[str, Tensor],
        options: LossOptions,
        num_items_in_batch: Tensor | float | None,
        vocab_group,
    ) -> FDDLossTerms:
        states = states[-len(student.states) :]
        if states[-1] is None and options.compares_output:
            raise ValueError(
                "teacher_states has no final state, which output_kd_weight or output_in_dynamics "
                "asks for: take the "
                "teacher_states of this distiller, or of one whose loss needs the final state too"
            )
        weight, bias = self._head_on(student.weight.device, vocab_group, student.vocabulary)
        labels = next_labels(batch, options.ignore_index)
        mask = counted_positions(batch, options.ignore_index).to(student.weight.device)
        return fused_fdd_loss(
            _complete(student.states, batch, student.weight),
            student.weight,
            _complete(states, batch, weight),
            weight,
            labels,
            mask=mask,
            student_bias=student.bias,
            teacher_bias=bias,
            num_items_in_batch=num_items_in_batch,
            return_terms=True,
            vocab_group=vocab_group,
            **{f.name: getattr(options, f.name) for f in fields(LossOptions)},
        )


def _complete(
    states: list[Tensor | None], batch: Mapping[str, Tensor], weight: Tensor
) -> list[Tensor]:
    """States on the device of their head; zeros that take no memory stand in for a final state that
    the loss does not read.
    """
    if states[-1] is None:
        states = [*states[:-1], weight.new_zeros(()).expand(*token_shape(batch), weight.shape[1])]
    return [state.to(weight.device) for state in states]


class LiveTeacher(TeacherWithHead):
    """A causal LM that is run for every batch; put in evaluation mode, never trained.

    Args:
        student: of whose modules it may be made. Then it is the student without its adapters, and
            in evaluation mode for its own pass alone.
    """

    def __init__(
        self, model: nn.Module, *, split_head: bool = False, student: nn.Module | None = None
    ) -> None:
        self._model = model  # as given: perhaps data-parallel
        self._student = student if student is not None and shares_modules(model, student) else None
        if self._student is None:
            model.eval()
        with self._as_teacher():
            self.lens = ModelLens(model, "teacher", split_head=split_head)
        compile_blocks(model, self.lens.blocks)
        self.depth, self.vocabulary, self.transform = (
            self.lens.depth,
            self.lens.vocabulary,
            self.lens.transform,
        )

    @property
    def model(self) -> nn.Module:
        """The transformers model inside wrappers."""
        return self.lens.model

    @property
    def name(self) -> str:
        return getattr(self.model.config, "_name_or_path", "") or type(self.model).__name__

    @contextlib.contextmanager
    def _as_teacher(self) -> Iterator[None]:
        if self._student is not None:
            with as_teacher_of_itself(self._model, self._student):
                yield
        else:
            if unwrap(self._model).training:
                unwrap(self._model).eval()
            yield

    @torch.no_grad()
    def head(self) -> tuple[Tensor, Tensor | None]:
        with self._as_teacher():
            weight, bias, *_ = self.lens.read_head()
        return weight.detach(), None if bias is None else bias.detach()

    @torch.no_grad()
    def states(
        self,
        batch: Mapping[str, Tensor],
        layers: tuple[int, ...],
        *,
        apply_final_norm: bool,
        final: bool = True,
    ) -> list[Tensor | None]:
        with self._as_teacher(), inside_forward(self._model, model_states) as states:
            return states(self.lens, batch, layers, apply_final_norm=apply_final_norm, final=final)


def model_states(
    lens: ModelLens,
    batch: Mapping[str, Tensor],
    layers: tuple[int, ...],
    *,
    apply_final_norm: bool,
    final: bool = True,
) -> list[Tensor | None]:
    """Run a model's backbone on a batch: the states of `layers` as its head would see them, and the
    final one or None.

    Raises:
        ValueError: tokens or positions that the model does not have.
    """
    check_tokens(lens.name, lens.model, batch)
    inputs = {key: value for key, value in batch.items() if key not in _NOT_MODEL_INPUTS}
    read = functools.partial(lens.read, apply_final_norm=apply_final_norm)
    try:
        sampled, output = lens.states(inputs, layers, final=final, read=read)
    except IndexError:
        check_positions(lens.name, lens.model, batch)
        raise
    return [*sampled, output]


def as_teacher(
    teacher: nn.Module | Teacher, *, split_head: bool = False, student: nn.Module | None = None
) -> Teacher:
    """The teacher's side of the loss for a model, perhaps the student without its adapters, or for
    a teacher cache.

    Raises:
        TypeError: it is neither.
    """
    if isinstance(teacher, Teacher):
        return teacher
    if isinstance(teacher, nn.Module):
        return LiveTeacher(teacher, split_head=split_head, student=student)
    raise TypeError(
        f"teacher must be a causal LM or a teacher cache, got {_shown(teacher)}: load it first, "
        f"with {_LOADING} or "
        "fdd_kernels.teacher_cache.open_teacher_cache(...)"
    )


def require_model(name: str, value: object) -> None:
    """Raise TypeError unless `value` is a model, and not, say, what one is loaded by."""
    if not isinstance(value, nn.Module):
        raise TypeError(
            f"{name} must be a causal LM, got {_shown(value)}: load it first, with {_LOADING}"
        )


def _shown(value: object) -> str:
    return f"the string {value!r}" if isinstance(value, str) else type(value).__name__


def place_teacher(teacher: nn.Module | Teacher, device: torch.device) -> None:
    """Move a model to the device it is to run on, unless it has a place of its own; a cache gives
    its rows wherever asked.
    """
    if isinstance(teacher, nn.Module) and not has_place(unwrap(teacher)):
        teacher.to(device)
