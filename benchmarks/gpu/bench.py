"""A step's context: card, problems of the pairs' shapes, strategies, and a place for results."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from benchmarks import objectives
from benchmarks.call import LOSS, Call, objective_of
from benchmarks.gpu.card import Card
from benchmarks.gpu_devices import DEVICES, Device
from benchmarks.gpu_model import PAIRS
from benchmarks.gpu_model import Call as ModelCall
from benchmarks.inputs import build_problem
from benchmarks.providers import gradients_of
from benchmarks.recorded import CACHE_BYTES, STRATEGY, environment
from benchmarks.workloads import TINYLLAMA, Workload
from benchmarks.workloads import objectives as objectives_of
from benchmarks.workloads import streamed as streamed_of
from fdd_kernels.testing import Problem

LAYERS = 5
PAIR = replace(TINYLLAMA, rows=4096)
STREAMED = streamed_of(rows=32768, positions=8192, costs=replace(TINYLLAMA, rows=2048))
OBJECTIVES = {
    f"objective {w.name}": w for w in (*objectives_of(PAIR, PAIR), *STREAMED) if w.in_overview
}
STRATEGIES = ("auto", "cached", "slabbed", "one_pass")
Gradients = tuple[Tensor, list[Tensor]]


class WrongNumbersError(Exception):
    """A result that is wrong: nothing after it is worth measuring."""


class NotHere(Exception):
    """A step that cannot be taken here; the message says why."""


@contextmanager
def chosen(strategy: str, cache_bytes: int | None = None) -> Iterator[None]:
    """Use this strategy within, with this many bytes of scratch (None: the default)."""
    scratch = None if cache_bytes is None else str(cache_bytes)
    with environment({STRATEGY: strategy, CACHE_BYTES: scratch}):
        yield


def ours(problem: Problem, options: dict[str, Any]) -> Tensor:
    """Compute the objective by this package: by the Triton backend, if it can."""
    by_triton = objective_of(problem) == LOSS and options.get("teacher_mix", 1.0) == 1
    backend = "triton" if by_triton else "auto"
    return objectives.fused(problem, options | {"backend": backend, "reduction": "mean"}).mean()


def gradients(loss_of: Callable, problem: Problem, options: dict[str, Any]) -> Gradients:
    """Run one forward and backward pass: the loss and the gradients of `problem.leaves`."""
    loss, found = gradients_of(loss_of, problem, options)
    return loss, list(found.values())


@dataclass
class Bench:
    """`report(key, value)` records a result of the running step at once; `compiled` is the dense
    loss compiled for the workload being measured.
    """

    card: Card
    report: Callable[[str, Any], None]
    compiled: Callable | None = None
    _problem: tuple[Any, Call] | None = field(default=None, repr=False)

    @property
    def model(self) -> Device:
        """Return the modelled device that the card is, or is nearest to."""
        return next((d for name, d in DEVICES.items() if name in self.card.name), DEVICES["H100"])

    def workload(
        self, pair: str, rows: int = 4096, *, trained: bool = True, layers: int = LAYERS
    ) -> Workload:
        """Take the shapes of a pair, or of an objective with its own rows and layers, in bfloat16;
        in a dry run tiny shapes, the same for all pairs of the same options.
        """
        full = OBJECTIVES.get(pair)
        if full is None:
            full = replace(PAIRS[pair], rows=rows, layers=layers)
        layers = full.layers
        full = replace(full, train_head=trained, dtype="bfloat16")
        if not self.card.dry:
            return full
        toy = full.resized(2, 21, 4, 6)
        return replace(toy, name="toy", text="", layers=min(layers, 3))

    def call(self, workload: Workload) -> ModelCall:
        """Describe the call for the model."""
        return ModelCall(workload, workload.rows, workload.layers, workload.train_head)

    def problem(self, workload: Workload) -> Call:
        """Draw a workload's tensors on the card; they stay there until another is asked for."""
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
