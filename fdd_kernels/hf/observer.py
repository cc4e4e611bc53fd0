"""Look at what a loss compares: both models' states, without running them again."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

from torch import Tensor

from fdd_kernels.hf.targets import StudentSide, Targets
from fdd_kernels.objectives.fdd.options import LossOptions

if TYPE_CHECKING:
    from fdd_kernels.hf.distiller import Distiller


class Observer(ABC):
    """Gets both sides of every batch before its loss: set it as `distiller.observer`. Both models
    then run to their final states, also for a loss that does not need these.

    Attributes:
        layers: both models run for their sampled layers too, also for a loss without dynamics.
    """

    layers = True

    @abstractmethod
    def __call__(
        self,
        student: StudentSide,
        targets: Targets,
        batch: Mapping[str, Tensor],
        options: LossOptions,
    ) -> None:
        """Look at one batch, as the loss sees it (`Task.loss_view`). `options` are the full options
        of the loss, with the models' soft caps and scales.
        """


@contextmanager
def observing(distiller: Distiller, observer: Observer | None) -> Iterator[None]:
    """Show an observer the batches that a distiller sees in the `with` block; None changes
    nothing.
    """
    before = distiller.observer
    distiller.observer = before if observer is None else observer
    try:
        yield
    finally:
        distiller.observer = before
