"""Row blocks of attention: every group, one head of one sequence, has queries and keys of its own.

A block is some groups as a whole, or some rows of one group; of a causal one, the columns up to
those rows. Of packed sequences a block has one, or several short ones, and no column of others.
Where a tensor has fewer groups than the queries, each of its groups stands for as many consecutive
ones: grouped keys, and what a sequence has for all of its heads.

Shape suffixes: G groups of queries, g groups of a block, r rows of each, c columns, T positions of
a sequence, d a width.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fdd_kernels.lens.inputs import LensInputs
from fdd_kernels.lens.row_blocks import CAUSAL, PACKED, RowBlock, RowSpec

# Scores of a block below which it takes longer than it saves to leave out other sequences; that of
# accelerators has not been measured.
SCORES = {"cpu": 2**14}
ACCELERATOR_SCORES = 2**22


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
        self.inputs, self.head = inputs, spec.head
        self.causal, self.packed = spec.leaves_out(CAUSAL), spec.leaves_out(PACKED)
        self.columns = self.length = spec.head.columns
        self.dtype, self.groups = inputs.statistics_dtype, inputs.rows // self.length
        self.per_row, self.per_column = per_row, shared
        # Groups of queries for each group of keys; no block has parts of several of those.
        self.share = max(1, inputs.rows // max(1, len(inputs.student_weight)))

    def places(self, size: int) -> Iterator[tuple[slice | Tensor, Place]]:
        """Yield blocks of at most `size` rows, and which rows (G * T) they are.

        For packed sequences a host waits once for the device.
        """
        for groups, span in self._spans():
            for place in self._places(groups, span, size):
                yield self._rows(place), place

    def _spans(self) -> Iterator[tuple[slice, slice]]:
        """Yield groups, and positions of theirs that see none but one another."""
        if not self.packed:
            yield slice(0, self.groups), slice(0, self.length)
            return
        ids = self.per_row[1].view(-1, self.length)
        is_last = torch.nn.functional.pad(ids[:, 1:] != ids[:, :-1], (0, 1), value=True)
        ends: list[list[int]] = [[] for _ in ids]
        for sequence, last in is_last.nonzero().tolist():
            ends[sequence].append(last + 1)
        heads = self.groups // max(1, len(ids))
        least = math.isqrt(SCORES.get(ids.device.type, ACCELERATOR_SCORES) // max(1, heads))
        first = 0
        for runs, alike in itertools.groupby([_runs(of_row, least) for of_row in ends]):
            groups = slice(first, first + heads * len(list(alike)))
            yield from ((groups, run) for run in runs)
            first = groups.stop

    def _places(self, groups: slice, span: slice, size: int) -> Iterator[Place]:
        """Cut groups and a span of their positions into blocks."""
        many = size // (span.stop - span.start)
        if many:
            unit = groups.stop - groups.start if many >= self.share else self.share
            many = many - many % self.share if many >= self.share else many
            for start in range(groups.start, groups.stop, max(1, unit)):
                for first in range(start, start + unit, many):
                    yield Place(slice(first, min(first + many, start + unit)), span, span)
            return
        for group in range(groups.start, groups.stop):
            for first in range(span.start, span.stop, size):
                last = min(first + size, span.stop)
                columns = slice(span.start, last if self.causal else span.stop)
                yield Place(slice(group, group + 1), slice(first, last), columns)

    def _rows(self, place: Place) -> slice | Tensor:
        """Return which rows (G * T) a block has, group after group."""
        length, (groups, rows, _) = self.length, place
        first, last = groups.start * length, (groups.stop - 1) * length
        if first == last or rows == slice(0, length):
            return slice(first + rows.start, last + rows.stop)
        device = self.inputs.device
        starts = torch.arange(groups.start, groups.stop, device=device)[:, None] * length
        return (starts + torch.arange(rows.start, rows.stop, device=device)).flatten()

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
        hidden_from = rows.start + 1 - columns.start if self.causal else 0
        return RowBlock(*scores, tuple(per_row), tuple(per_column), (), asks_gradient, hidden_from)

    def add_gradients(
        self, place: Place, grad: Tensor, grad_queries: Tensor | None, grad_keys: Tensor | None, _
    ) -> None:
        """Add a block's gradients, from dL/ds (g * r, c), to those that are needed."""
        groups, rows, columns = place
        count = groups.stop - groups.start
        grad_grc, scale = grad.view(count, -1, grad.shape[-1]), self.head.student_logit_scale
        if grad_queries is not None:
            keys = self._operand(self.inputs.student_weight, groups, columns)
            of_queries = self._split(grad_queries)[groups, rows]
            of_queries.baddbmm_(grad_grc, keys, beta=0, alpha=scale)
        if grad_keys is not None:
            queries = self._operand(self.inputs.student_hidden[0], groups, rows)
            first, many = groups.start // self.share, max(1, count // self.share)
            of_keys = self._split(grad_keys)[first : first + many, columns]
            # The rows of all queries that share keys, one after another.
            of_keys.baddbmm_(
                grad_grc.reshape(many, -1, grad.shape[-1]).mT,
                queries.reshape(many, -1, queries.shape[-1]),
                alpha=scale,
            )

    def _scores(self, queries: Tensor, keys: Tensor, scale: float, place: Place) -> Tensor:
        """Compute scale * q . k of a block, (g * r, c)."""
        q_grd = self._operand(queries, place.groups, place.rows)
        k_gcd = self._operand(keys, place.groups, place.columns)
        nothing = q_grd.new_zeros(())
        scores = torch.baddbmm(nothing, q_grd, k_gcd.mT, beta=0, alpha=scale)
        return scores.view(-1, scores.shape[-1])

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


def _runs(ends: list[int], least: int) -> list[slice]:
    """Join packed sequences, which end at `ends`, while they have at most `least` positions."""
    starts = [0]
    for end, following in zip(ends, ends[1:]):
        if following - starts[-1] > least:
            starts.append(end)
    return [slice(*span) for span in zip(starts, [*starts[1:], ends[-1]])]
