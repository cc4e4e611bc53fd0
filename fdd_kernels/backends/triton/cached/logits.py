"""The logits of a row block: all of them in scratch, or a slab of the vocabulary at a time.

They are both models' h W^T in float32, (L, rows, ld) each. In feature space the teacher's "logits"
are its hidden states.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fdd_kernels.backends.triton.gemm import multiply
from fdd_kernels.backends.triton.problem import Head, Problem
from fdd_kernels.backends.triton.strategy import padded

WIDENED_BYTES = 64 * 2**20  # of a head whose dtype is not that of the GEMM, converted at a time


@dataclass(frozen=True)
class Slab:
    """Logits of a block's tokens start .. stop, (L, rows, ld) each; teacher None if not needed."""

    start: int
    stop: int
    student: Tensor
    teacher: Tensor | None

    def tokens(self, start: int, stop: int) -> Slab:
        """Take a part of the slab."""
        first, last = start - self.start, stop - self.start
        teacher = None if self.teacher is None else self.teacher[..., first:last]
        return Slab(start, stop, self.student[..., first:last], teacher)


class BlockLogits:
    """The logits of a row block, from its hidden states (L, rows, D), teacher None if not needed.

    With scratch for the whole vocabulary they are computed once. With fewer `tokens` they are
    computed as often as they are asked for.
    """

    def __init__(
        self,
        problem: Problem,
        scratch: Tensor,
        tokens: int,
        student_LrD: Tensor,
        teacher_LrD: Tensor | None,
    ):
        self.problem, self.scratch = problem, scratch
        self.student_LrD, self.teacher_LrD = student_LrD, teacher_LrD
        self.layers, self.rows, _ = student_LrD.shape
        self.columns = problem.spec.columns
        self.slab_tokens = min(tokens, padded(self.columns))
        self._all: Slab | None = None

    def slabs(self, most: int) -> Iterator[Slab]:
        """Walk over the vocabulary in slabs of at most `most` tokens."""
        for start in range(0, self.columns, step := min(most, self.slab_tokens)):
            stop = min(start + step, self.columns)
            if self.slab_tokens < self.columns:
                yield self._computed(start, stop)
                continue
            if self._all is None:
                self._all = self._computed(0, self.columns)
            yield self._all.tokens(start, stop)

    def _computed(self, start: int, stop: int) -> Slab:
        ld = padded(stop - start)
        elements = self.layers * self.rows * ld

        def logits(head: Head, hidden_LrD: Tensor, scratch: Tensor) -> Tensor:
            out = scratch[:elements].view(self.layers * self.rows, ld)
            fill_logits(out[:, : stop - start], hidden_LrD.flatten(0, 1), head, start, stop)
            return out.view(self.layers, self.rows, ld)

        student = logits(self.problem.student, self.student_LrD, self.scratch)
        if self.teacher_LrD is None:
            return Slab(start, stop, student, None)
        if self.problem.teacher.weight is None:
            return Slab(start, stop, student, self.teacher_LrD[..., start:stop])
        return Slab(
            start,
            stop,
            student,
            logits(self.problem.teacher, self.teacher_LrD, self.scratch[elements:]),
        )


def fill_logits(out_MC: Tensor, hidden_MD: Tensor, head: Head, start: int, stop: int) -> None:
    """Compute out = h W^T for the rows start .. stop of the head.

    One GEMM, unless the head has to be converted part by part.
    """
    if head.weight.dtype == hidden_MD.dtype:
        multiply(out_MC, hidden_MD, head.weight[start:stop].t())
        return
    step = max(1, WIDENED_BYTES // (head.width * hidden_MD.dtype.itemsize))
    for first in range(start, stop, step):
        last = min(first + step, stop)
        part = head.weight[first:last].to(hidden_MD.dtype)
        multiply(out_MC[:, first - start : last - start], hidden_MD, part.t())


def new_scratch(problem: Problem, rows: int, tokens: int) -> Tensor:
    """Allocate float32 scratch for the logits of `rows` rows and `tokens` tokens."""
    models = 2 if problem.spec.needs_teacher and problem.teacher.weight is not None else 1
    return torch.empty(
        models * problem.layers * rows * padded(tokens), dtype=torch.float32, device=problem.device
    )
