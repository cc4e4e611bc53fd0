"""Means of loss terms: over tokens, for logs and evaluations, and over the micro-batches and
processes of an optimizer step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

Reduce = Callable[[Tensor, str], Tensor]


class WeightedSums:
    """Sums of weight * term by name, float64 on their device, and of the weights."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._weight: Tensor | float = 0.0

    def add(self, terms: Mapping[str, Tensor], weight: Tensor) -> None:
        """Add this process's weight * terms."""
        for name, term in terms.items():
            self._sums[name] = self._sums.get(name, 0.0) + term.detach().double() * weight.to(
                term.device
            )
        self._weight = self._weight + weight.to(term.device, torch.float64)

    def means(self, reduce: Reduce) -> tuple[dict[str, float], float]:
        """The mean of each term over all processes, 0 where nothing has weight, and the weight in
        all.
        """
        if not self._sums:
            return {}, 0.0
        *sums, weight = reduce(torch.stack([*self._sums.values(), self._weight]), "sum").tolist()
        return {
            name: value / weight if weight else 0.0 for name, value in zip(self._sums, sums)
        }, weight


class StepSums:
    """The micro-batches of one optimizer step in this process, whose terms are shares that add up
    to the step's mean.

    Attributes:
        returned: the losses of micro-batches that the trainer has been given.
    """

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
            terms: sums over its positions, divided by `items`.
            positions: how many of its positions count.
        """
        for name, term in terms.items():
            self._sums[name] = self._sums.get(name, 0.0) + term.detach().double()
        self._positions = self._positions + positions.to(term.device, torch.float64)
        self._items = items

    def finish(self, reduce: Reduce) -> tuple[dict[str, Tensor], float, bool]:
        """The step over all processes.

        Returns:
            The means of the terms over the positions that were used; what a gradient is to be
                multiplied by to be the mean's:
            1 unless `items` are not those positions; and whether the loss is finite.
        """
        *sums, positions = reduce(torch.stack([*self._sums.values(), self._positions]), "sum")
        means = dict(zip(self._sums, sums))
        items, used, loss = torch.stack(
            [torch.as_tensor(self._items).to(positions), positions, means["loss"]]
        ).tolist()
        scale = items / used if used else 1.0
        return {name: scale * value for name, value in means.items()}, scale, math.isfinite(loss)
