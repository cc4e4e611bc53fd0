"""What a Distiller needs of a teacher, and the live model that gives it; `teacher_cache` is the other one that does."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fdd_kernels.config import FDDConfig
from fdd_kernels.lens import LogitTransform, ModelLens
from fdd_kernels.parallel import inside_forward

# The column of a batch that says which windows of a teacher cache its rows are.
TEACHER_INDEX = "teacher_index"
_NOT_MODEL_INPUTS = ("labels", "num_items_in_batch", TEACHER_INDEX)


class Teacher(ABC):
    """The teacher's side of the loss: its head, and its states at the positions of a batch.

    Attributes:
        depth: blocks of the teacher, from which a grid of layers follows.
        transform: what its logits are of its head's output.
        batch_columns: what it reads from a batch beside a model's inputs; collators must keep it.
    """

    depth: int
    transform: LogitTransform
    batch_columns: tuple[str, ...] = ()

    @property
    @abstractmethod
    def weight(self) -> Tensor:
        """The head's weight, (V, Dt)."""

    @property
    @abstractmethod
    def bias(self) -> Tensor | None:
        """The head's bias, (V,)."""

    @abstractmethod
    def states(self, batch: Mapping[str, Tensor], layers: tuple[int, ...], *, apply_final_norm: bool) -> list[Tensor]:
        """The states of `layers`, ready for the head, and the final state: tensors (batch, sequence, Dt).

        What stands at positions that do not count is not defined, but finite.
        """

    def require(self, config: FDDConfig, layers: tuple[int, ...]) -> None:  # noqa: B027
        """Raise ValueError if `states` cannot give `layers` as `config` asks for them."""

    def place(self, device: torch.device) -> None:  # noqa: B027
        """Put the head where the loss is computed; a live model stays where its owner put it."""


class LiveTeacher(Teacher):
    """A causal LM that is run for every batch; put in evaluation mode, never trained."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model  # as given: perhaps data-parallel
        self.lens = ModelLens(model, "teacher")
        model.eval()
        self.depth, self.transform = self.lens.depth, self.lens.transform

    @property
    def model(self) -> nn.Module:
        """The transformers model inside wrappers."""
        return self.lens.model

    @property
    def weight(self) -> Tensor:
        return self.lens.weight

    @property
    def bias(self) -> Tensor | None:
        return self.lens.bias

    @torch.no_grad()
    def states(self, batch: Mapping[str, Tensor], layers: tuple[int, ...], *, apply_final_norm: bool) -> list[Tensor]:
        if self.model.training:
            self.model.eval()
        with inside_forward(self._model, model_states) as states:
            return states(self.lens, batch, layers, apply_final_norm=apply_final_norm)


def model_states(
    lens: ModelLens, batch: Mapping[str, Tensor], layers: tuple[int, ...], *, apply_final_norm: bool
) -> list[Tensor]:
    """Run a model's backbone on a batch: the states of `layers` as its head would see them, and the final one."""
    inputs = {key: value for key, value in batch.items() if key not in _NOT_MODEL_INPUTS}
    sampled, final = lens.states(inputs, layers)
    return [lens.read(state, apply_final_norm=apply_final_norm) for state in sampled] + [final]


def as_teacher(teacher: nn.Module | Teacher) -> Teacher:
    """The teacher's side of the loss for a model or for a teacher cache.

    Raises:
        TypeError: it is neither.
    """
    if isinstance(teacher, Teacher):
        return teacher
    if isinstance(teacher, nn.Module):
        return LiveTeacher(teacher)
    raise TypeError(f"teacher must be a causal LM or a TeacherCache, got {type(teacher).__name__}")
