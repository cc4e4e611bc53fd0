"""Predictions of classifiers and of models for question answering, for Trainer's metrics."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor

from fdd_kernels.hf.distiller import Distiller
from fdd_kernels.hf.observer import Observer, observing
from fdd_kernels.hf.targets import StudentSide, Targets
from fdd_kernels.hf.tasks import Task
from fdd_kernels.objectives.fdd.options import LossOptions


class Predictions(Observer):
    """The student's predictions of the last batch.

    Attributes:
        logits: as Trainer takes them: a tensor, a tuple of several, or None without a batch.
    """

    layers = False

    def __init__(self, parts: int) -> None:
        self.logits: Tensor | tuple[Tensor, ...] | None = None
        self._parts = parts

    def __call__(
        self,
        student: StudentSide,
        targets: Targets,
        batch: Mapping[str, Tensor],
        options: LossOptions,
    ) -> None:
        found = student.states[-1].detach()
        self.logits = found if self._parts == 1 else found.unbind(1)


@contextmanager
def predictions_of(distiller: Distiller, wanted: bool) -> Iterator[Predictions]:
    """Store the predictions of a batch that a distiller sees while the block runs; nothing if they
    are not `wanted`, or of a task without logits of its own.
    """
    names = _labels_of(distiller.task)
    found = Predictions(len(names))
    with observing(distiller, found if wanted and names else None):
        yield found


def labels_of(task: Task, inputs: Mapping[str, Tensor]) -> Tensor | tuple[Tensor, ...] | None:
    """Return the labels of a batch as Trainer takes them; None if one is missing."""
    found = tuple(inputs.get(name) for name in _labels_of(task))
    if not found or any(labels is None for labels in found):
        return None
    return found if len(found) > 1 else found[0]


def require_logits(trainer: str, task: Task, compute_metrics: Callable | None) -> None:
    """Raise ValueError if metrics are asked for that need logits which there are none of."""
    if compute_metrics is not None and not _labels_of(task):
        raise ValueError(
            f"{trainer} computes no logits of the task {task}, which compute_metrics needs: leave "
            "compute_metrics=None"
        )


def _labels_of(task: Task) -> tuple[str, ...]:
    return () if task.has_lens else task.targets
