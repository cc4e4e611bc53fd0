"""Row blocks of attention: every group, one head of one sequence, has queries and keys of its own.

A block is some groups as a whole, or some rows of one group; of a causal one, the columns that
those rows see. Where a tensor has fewer groups than the queries, each of its groups stands for as
many consecutive ones: grouped keys, and what a sequence has for all of its heads.

Shape suffixes: G groups of queries, g groups of a block, r rows of each, c columns, T positions of
a sequence, d a width.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fdd_kernels.lens.inputs import LensInputs
from fdd_kernels.lens.row_blocks import RowBlock, RowSpec


class Place(NamedTuple):
    """Where a block lies: groups, and rows and columns within each of them."""

    groups: slice
    rows: slice
    columns: slice


class AttentionWalk:
    """The blocks of one call; `columns` is T."""

    def __init__(
        self, inputs: LensInputs, per_row: list[Tensor], shared: list[Tensor], spec: RowSpec
    ):
        self.inputs, self.head, self.causal = inputs, spec.head, spec.is_causal
        self.columns = self.length = spec.head.columns
        self.dtype, self.groups = inputs.statistics_dtype, inputs.rows // self.length
        self.per_row, self.per_column = per_row, shared
        # Groups of queries for each group of keys; no block has parts of several of those.
        self.share = max(1, inputs.rows // max(1, len(inputs.student_weight)))

    def places(self, size: int) -> Iterator[tuple[slice, Place]]:
        """Yield blocks of at most `size` rows, and which rows (G * T) they are."""
        length, many = self.length, size // self.length
        if many:
            unit = self.groups if many >= self.share else self.share
            many = many - many % self.share if many >= self.share else many
            for start in range(0, self.groups, max(1, unit)):
                for first in range(start, start + unit, many):
                    groups = slice(first, min(first + many, start + unit))
                    rows = slice(groups.start * length, groups.stop * length)
                    yield rows, Place(groups, slice(0, length), slice(0, length))
            return
        for group in range(self.groups):
            for first in range(0, length, size):
                last = min(first + size, length)
                rows = slice(group * length + first, group * length + last)
                columns = slice(0, last if self.causal else length)
                yield rows, Place(slice(group, group + 1), slice(first, last), columns)

    def block(self, place: Place, asks_gradient: bool) -> RowBlock:
        """Compute the scores of a block."""
        inputs, groups, rows, columns = self.inputs, *place
        scores = [
            self._scores(queries, keys, scale, place)
            for queries, keys, scale in (
                (inputs.student_hidden[0], inputs.student_weight, self.head.student_logit_scale),
                (inputs.teacher_hidden[0], inputs.teacher_weight, self.head.teacher_logit_scale),
            )
        ]
        per_row = [self._part(t, groups, rows) for t in self.per_row]
        per_column = [self._part(t, groups, columns) for t in self.per_column]
        return RowBlock(*scores, tuple(per_row), tuple(per_column), (), asks_gradient)

    def add_gradients(
        self, place: Place, grad: Tensor, grad_queries: Tensor | None, grad_keys: Tensor | None, _
    ) -> None:
        """Add a block's gradients, from dL/ds (g * r, c), to those that are needed."""
        groups, rows, columns = place
        count = groups.stop - groups.start
        grad_grc = grad.mul_(self.head.student_logit_scale).view(count, -1, grad.shape[-1])
        if grad_queries is not None:
            keys = self._operand(self.inputs.student_weight, groups, columns)
            self._split(grad_queries)[groups, rows] = grad_grc @ keys
        if grad_keys is not None:
            queries = self._operand(self.inputs.student_hidden[0], groups, rows)
            first, many = groups.start // self.share, max(1, count // self.share)
            of_keys = self._split(grad_keys)[first : first + many, columns]
            # The rows of all queries that share keys, one after another.
            of_keys += grad_grc.reshape(many, -1, grad.shape[-1]).mT @ queries.reshape(
                many, -1, queries.shape[-1]
            )

    def _scores(self, queries: Tensor, keys: Tensor, scale: float, place: Place) -> Tensor:
        """Compute scale * q . k of a block, (g * r, c)."""
        q_grd = self._operand(queries, place.groups, place.rows)
        k_gcd = self._operand(keys, place.groups, place.columns)
        scores = torch.bmm(q_grd, k_gcd.mT)
        return scores.mul_(scale).view(-1, scores.shape[-1])

    def _operand(self, tensor: Tensor, groups: slice, rows: slice) -> Tensor:
        return self._part(tensor, groups, rows).to(self.dtype)

    def _part(self, tensor: Tensor, groups: slice, rows: slice) -> Tensor:
        """Select rows of every group from a flat tensor, (g, r, ...)."""
        split = self._split(tensor)
        if len(split) == self.groups:
            return split[groups, rows]
        return split[self._of(split, groups), rows]

    def _split(self, tensor: Tensor) -> Tensor:
        return tensor.view(-1, self.length, *tensor.shape[1:])

    def _of(self, split: Tensor, groups: slice) -> Tensor:
        """Return the index of each group of a block among those of a tensor."""
        every = torch.arange(groups.start, groups.stop, device=split.device)
        return every // (self.groups // len(split))
