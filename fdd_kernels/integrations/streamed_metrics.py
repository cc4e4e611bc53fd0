"""Metrics of an evaluation, gathered batch by batch beside the loss."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping

from torch import Tensor

from fdd_kernels.evaluation.metrics import observed_sums, pairs_by_rank, with_perplexity
from fdd_kernels.hf.distiller import Distiller
from fdd_kernels.hf.observer import Observer, observing
from fdd_kernels.hf.targets import StudentSide, Targets
from fdd_kernels.integrations.sums import Reduce, WeightedSums
from fdd_kernels.objectives.fdd.options import LossOptions


class StreamedMetrics(Observer):
    """Perplexity, accuracy and KL to the teacher over all batches that `distiller` sees: means over
    valid positions, weighted by `token_weights`.
    """

    def __init__(self, distiller: Distiller) -> None:
        self._distiller, self._sums = distiller, WeightedSums()

    @functools.cached_property
    def layers(self) -> bool:
        """Whether student and teacher have sampled layers that can be compared."""
        return pairs_by_rank(self._distiller) and _gives_layers(self._distiller)

    def __call__(
        self,
        student: StudentSide,
        targets: Targets,
        batch: Mapping[str, Tensor],
        options: LossOptions,
    ) -> None:
        found = observed_sums(self._distiller, student, targets, batch, options)
        sums = {name: value.sum() for name, value in found.sums.items()}
        self._sums.add_sums(sums, found.weight.sum())

    def results(self, reduce: Reduce) -> dict[str, float]:
        """Return the metrics over all processes by name; none without a valid position."""
        means, weight = self._sums.means(reduce)
        return with_perplexity(means) if weight else {}


@contextlib.contextmanager
def watching(
    distiller: Distiller, wanted: bool = True, metrics: StreamedMetrics | None = None
) -> Iterator[StreamedMetrics]:
    """Gather the metrics of all batches that a distiller sees while the block runs; nothing if they
    are not `wanted`, or for a task without a head over a vocabulary.

    Args:
        metrics: those to add to; new ones if not given.
    """
    metrics = metrics or StreamedMetrics(distiller)
    with observing(distiller, metrics if wanted and distiller.task.has_lens else None):
        yield metrics


def _gives_layers(distiller: Distiller) -> bool:
    """Say whether the teacher has its sampled layers: a cache may be without them."""
    try:
        for options in distiller.schedules.possible:
            distiller.teacher.require(distiller.config, options, distiller.teacher_layers)
    except ValueError:
        return False
    return True
