"""What a step is given: the card, problems of the pairs' shapes, and a place for its results."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from benchmarks.gpu.card import Card
from benchmarks.gpu_model import DEVICES, PAIRS, Call, Device
from benchmarks.inputs import build_problem
from benchmarks.workloads import Workload
from fdd_kernels.testing import Problem

LAYERS = 5


class WrongNumbersError(Exception):
    """A result that is wrong: nothing that comes after it is worth measuring."""


class NotHere(Exception):
    """A step that cannot be taken here; the message says why."""


@dataclass
class Bench:
    """`report(key, value)` records a result of the running step at once; `compiled` is for the
    workload being measured.
    """

    card: Card
    report: Callable[[str, Any], None]
    compiled: Callable | None = None
    _problem: tuple[Any, Problem] | None = field(default=None, repr=False)

    @property
    def model(self) -> Device:
        """The modelled device that the card is, or is nearest to."""
        return next((d for name, d in DEVICES.items() if name in self.card.name), DEVICES["H100"])

    def workload(
        self, pair: str, rows: int = 4096, *, trained: bool = True, layers: int = LAYERS
    ) -> Workload:
        """A pair's shapes in bfloat16; in a dry run, a few of everything, the same for all pairs of
        the same options.
        """
        full = replace(PAIRS[pair], rows=rows, layers=layers, train_head=trained, dtype="bfloat16")
        if not self.card.dry:
            return full
        return replace(
            full,
            name="toy",
            text="",
            rows=2,
            columns=21,
            student_width=4,
            teacher_width=6,
            layers=min(layers, 3),
        )

    def call(self, workload: Workload) -> Call:
        """The same for the model."""
        return Call(workload, workload.rows, workload.layers, workload.train_head)

    def problem(self, workload: Workload) -> Problem:
        """Random tensors of a workload on the card; the last one asked for stays there until
        another is.
        """
        key = (workload, self.card.device)
        if self._problem is None or self._problem[0] != key:
            self.forget()
            self._problem = key, build_problem(workload, self.card.device, draw_on=self.card.device)
        return self._problem[1]

    def forget(self) -> None:
        """Free the last problem."""
        if self._problem is not None:
            self._problem = None
            self.card.free()
