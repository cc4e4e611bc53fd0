"""The teacher interface, and its implementation by a live model; `teacher_cache` has others."""

from __future__ import annotations

import contextlib
import functools
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from fdd_kernels.hf.batches import check_positions, check_tokens
from fdd_kernels.hf.compiled import compile_blocks
from fdd_kernels.hf.model_reader import ModelReader
from fdd_kernels.hf.offload import has_place
from fdd_kernels.hf.sharing import as_teacher_of_itself, shares_modules
from fdd_kernels.hf.targets import HiddenTargets, States, Targets
from fdd_kernels.hf.targets import StudentSide as StudentSide
from fdd_kernels.hf.task_reader import make_reader
from fdd_kernels.hf.tasks import CAUSAL_LM, Task
from fdd_kernels.hf.transform import LogitTransform
from fdd_kernels.hf.wrappers import inside_forward, unwrap
from fdd_kernels.objectives.fdd.options import FDDConfig, LossOptions

_LOADING = "AutoModelForCausalLM.from_pretrained(...)"


class Teacher(ABC):
    """What a student is compared with. It gives targets; `DistillationLoss` computes the loss.

    Attributes:
        name: for model cards: what the teacher was loaded by (perhaps a path), or words.
        depth: number of blocks, which a grid of layers follows from.
        vocabulary: rows of its head.
        transform: soft cap and scale of its logits.
        task: what it predicts; a cache holds a causal LM's states.
        batch_columns: columns of a batch that it needs beside a model's inputs; collators must
            pass them on.
    """

    name: str
    depth: int
    vocabulary: int
    transform: LogitTransform
    task: Task = CAUSAL_LM
    batch_columns: tuple[str, ...] = ()

    @abstractmethod
    def targets(
        self,
        batch: Mapping[str, Tensor],
        layers: tuple[int, ...],
        *,
        apply_final_norm: bool,
        final: bool = True,
    ) -> Targets:
        """Return the targets of `layers`, and of the final state if `final`."""

    def head(self, device: torch.device | None = None) -> tuple[Tensor, Tensor | None] | None:
        """Return weight (V, Dt) and bias (V,) for hidden targets, as tensors without gradient.

        None for a teacher of summaries. The tensors may be on any device and may be made for this
        call; `device` says where they will be used.
        """
        return None

    def states(self, *args, **kwargs) -> Targets:
        """The name of `targets` in earlier releases."""
        return self.targets(*args, **kwargs)

    def require(  # noqa: B027
        self, config: FDDConfig, options: LossOptions, layers: tuple[int, ...]
    ) -> None:
        """Raise ValueError if it cannot give targets of `layers` as `config` asks for them.

        `options` are the full options of the loss, with the models' soft caps and scales.
        """


class TeacherWithHead(Teacher):
    """The name of earlier releases for a teacher of hidden targets: one that overrides `head`."""

    @classmethod
    def __subclasshook__(cls, other: type) -> bool:
        if cls is not TeacherWithHead:
            return NotImplemented
        return (Teacher in other.__mro__ and other.head is not Teacher.head) or NotImplemented


TeacherStates = Targets  # the name of earlier releases


class LiveTeacher(Teacher):
    """A causal LM that runs for every batch; in evaluation mode, never trained.

    Args:
        model: the teacher, perhaps data-parallel.
        split_head: the head may be a DTensor.
        student: the student. If the teacher shares its modules (one peft model), the teacher is the
            student without its adapters, and in evaluation mode during its own pass only.
    """

    def __init__(
        self, model: nn.Module, *, split_head: bool = False, student: nn.Module | None = None
    ) -> None:
        self._model = model
        self._student = student if student is not None and shares_modules(model, student) else None
        if self._student is None:
            model.eval()
        with self._as_teacher():
            self.reader = make_reader(model, "teacher", split_head=split_head)
        compile_blocks(model, self.reader.all_blocks)
        self.depth, self.vocabulary = self.reader.depth, self.reader.vocabulary
        self.transform, self.task = self.reader.transform, self.reader.task

    @property
    def model(self) -> nn.Module:
        """The transformers model inside wrappers."""
        return self.reader.model

    @property
    def lens(self) -> ModelReader:
        """The name of `reader` in earlier releases."""
        warnings.warn("LiveTeacher.lens is now .reader", DeprecationWarning, stacklevel=2)
        return self.reader

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
    def head(self, device: torch.device | None = None) -> tuple[Tensor, Tensor | None]:
        with self._as_teacher():
            weight, bias, *_ = self.reader.read_head()
        return weight.detach(), None if bias is None else bias.detach()

    @torch.no_grad()
    def targets(
        self,
        batch: Mapping[str, Tensor],
        layers: tuple[int, ...],
        *,
        apply_final_norm: bool,
        final: bool = True,
        features: bool = False,
    ) -> HiddenTargets:
        """See `Teacher` and, of `features`, `model_states`."""
        options = {"apply_final_norm": apply_final_norm, "final": final, "features": features}
        with self._as_teacher(), inside_forward(self._model, model_states) as states:
            return states(self.reader, batch, layers, **options)


def model_states(
    reader: ModelReader,
    batch: Mapping[str, Tensor],
    layers: tuple[int, ...],
    *,
    apply_final_norm: bool,
    final: bool = True,
    features: bool = False,
) -> list[Tensor | None]:
    """Run a model's backbone on a batch. Return the states (batch, sequence, width) of `layers`,
    ready for its head or as its `features`, and the final state or None.

    Raises:
        ValueError: tokens or positions that the model does not have.
    """
    inputs = reader.task.inputs(reader.model, batch)
    check_tokens(reader.name, reader.model, inputs)
    of_state = reader.features if features else reader.read
    read = functools.partial(of_state, apply_final_norm=apply_final_norm)
    encoder = reader.encoder
    try:
        with contextlib.nullcontext([]) if encoder is None else encoder.capturing() as of_encoder:
            sampled, output = reader.states(inputs, layers, final=final, read=read)
    except IndexError:
        check_positions(reader.name, reader.model, inputs)
        raise
    states = States([*sampled, output])
    states.encoder = of_encoder
    return states


def as_teacher(
    teacher: nn.Module | Teacher, *, split_head: bool = False, student: nn.Module | None = None
) -> Teacher:
    """Wrap a model as a `LiveTeacher`; return a teacher cache as it is.

    Raises:
        TypeError: it is neither.
    """
    if isinstance(teacher, Teacher):
        return teacher
    if isinstance(teacher, nn.Module):
        return LiveTeacher(teacher, split_head=split_head, student=student)
    raise TypeError(
        f"teacher must be a causal LM or a teacher cache, got {_shown(teacher)}: load it first, "
        f"with {_LOADING} or fdd_kernels.teacher_cache.open_teacher_cache(...)"
    )


def require_model(name: str, value: object) -> None:
    """Raise TypeError unless `value` is a model; a name or path is not."""
    if not isinstance(value, nn.Module):
        raise TypeError(
            f"{name} must be a causal LM, got {_shown(value)}: load it first, with {_LOADING}"
        )


def _shown(value: object) -> str:
    return f"the string {value!r}" if isinstance(value, str) else type(value).__name__


def place_teacher(teacher: nn.Module | Teacher, device: torch.device) -> None:
    """Move a teacher model to `device`, unless it has a placement of its own (`has_place`). A cache
    stays: it loads its rows to the batch's device.
    """
    if isinstance(teacher, nn.Module) and not has_place(unwrap(teacher)):
        teacher.to(device)
