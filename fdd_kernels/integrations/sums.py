"""Means of loss terms: over tokens, for logs and evaluations; over the micro-batches and processes
of an optimizer step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

Reduce = Callable[[Tensor, str], Tensor]


class WeightedSums:
    """Sums of weight * term by name, and of the weights; float64 on the terms' device."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._weight: Tensor | float = 0.0

    def add(self, terms: Mapping[str, Tensor], weight: Tensor) -> None:
        """Add this process's weight * terms."""
        terms = {name: term.detach().double() for name, term in terms.items()}
        self.add_sums({name: t * weight.to(t.device) for name, t in terms.items()}, weight)

    def add_sums(self, sums: Mapping[str, Tensor], weight: Tensor) -> None:
        """Add sums of weight * term that this process has formed, and the sum of the weights."""
        for name, value in sums.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
            weight = weight.to(value.device, torch.float64)
        self._weight = self._weight + weight

    def means(self, reduce: Reduce) -> tuple[dict[str, float], float]:
        """Return the mean of each term over all processes, 0 for a weight of 0, and the total
        weight.
        """
        if not self._sums:
            return {}, 0.0
        *sums, weight = reduce(torch.stack([*self._sums.values(), self._weight]), "sum").tolist()
        means = [value / weight if weight else 0.0 for value in sums]
        return dict(zip(self._sums, means)), weight


class StepSums:
    """The micro-batches of one optimizer step in this process; their terms add up to the step's
    mean.

    Attributes:
        returned: the losses of micro-batches that the trainer has received.
        used: after `finish`, the number of valid positions in all processes.
    """

    used = 0.0

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._positions: Tensor | float = 0.0
        self._items: Tensor | float = 0.0
        self.returned: list[Tensor] = []

    @property
    def has_terms(self) -> bool:
        return bool(self._sums)

    def add(self, terms: Mapping[str, Tensor], positions: Tensor, items: Tensor | float) -> None:
        """Add a micro-batch.

        Args:
            terms: sums over its valid positions, divided by `items`.
            positions: number of its valid positions.
        """
        for name, term in terms.items():
            self._sums[name] = self._sums.get(name, 0.0) + term.detach().double()
        self._positions = self._positions + positions.to(term.device, torch.float64)
        self._items = items

    def finish(self, reduce: Reduce) -> tuple[dict[str, Tensor], float, bool]:
        """Reduce the step over all processes.

        Returns:
            The means of the terms over the valid positions that were used; the factor that makes a
            gradient that of the mean (1 if `items` is their number); whether the loss is finite.
        """
        *sums, positions = reduce(torch.stack([*self._sums.values(), self._positions]), "sum")
        means = dict(zip(self._sums, sums))
        items, self.used, loss = torch.stack(
            [torch.as_tensor(self._items).to(positions), positions, means["loss"]]
        ).tolist()
        scale = items / self.used if self.used else 1.0
        return {name: scale * value for name, value in means.items()}, scale, math.isfinite(loss)
