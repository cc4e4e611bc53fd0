"""One call as every strategy sees it: both models' heads and states, the work table, the row order.

Shape suffixes: L layers, R rows, r rows of a block, C the vocabulary, D a hidden width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fdd_kernels.backends.triton.config import interpreting
from fdd_kernels.backends.triton.gather_rows import move_rows, order_of_rows
from fdd_kernels.backends.triton.work_table import Table, table_for
from fdd_kernels.lens.inputs import LensInputs
from fdd_kernels.lens.layout import MOMENT_STATS, REQUEST_STATS, Statistics
from fdd_kernels.lens.spec import LensSpec


class Head:
    """One model's head as the kernels take it, and its hidden states; `weight` None: features are
    compared.
    """

    def __init__(
        self,
        hidden: list[Tensor],
        weight: Tensor | None,
        bias: Tensor | None,
        scale: float,
        cap: float | None,
    ):
        self.hidden, self.width = hidden, hidden[0].shape[-1]
        self.dtype = hidden[0].dtype
        for tensor in (*hidden[1:], *(() if weight is None else (weight,))):
            self.dtype = torch.promote_types(self.dtype, tensor.dtype)
        # Triton's interpreter multiplies the bit patterns of bfloat16. In float32 the GEMM is the
        # same.
        self.block_dtype = (
            torch.float32 if interpreting() and self.dtype == torch.bfloat16 else self.dtype
        )
        # The kernels walk a head along its width. Any other layout is copied once a call.
        self.weight = weight if weight is None or weight.stride(1) == 1 else weight.contiguous()
        self.bias = None if bias is None else bias.to(torch.float32).contiguous()
        self.scale, self.cap = float(scale), float(cap or 0.0)


class Problem:
    """A call's inputs and the order in which its rows are taken: valid ones first."""

    def __init__(self, inputs: LensInputs, spec: LensSpec):
        self.inputs, self.spec, self.device = inputs, spec, inputs.device
        self.rows, self.layers = inputs.rows, len(inputs.student_hidden)
        self.student = Head(
            inputs.student_hidden,
            inputs.student_weight,
            inputs.student_bias,
            spec.student_logit_scale,
            spec.student_softcap,
        )
        self.teacher = Head(
            inputs.teacher_hidden,
            inputs.teacher_weight,
            inputs.teacher_bias,
            spec.teacher_logit_scale,
            spec.teacher_softcap,
        )
        self.table: Table = table_for(spec, self.layers, self.device)
        self.order, self.count = order_of_rows(inputs.valid, self.rows, self.device)
        # Without labels any integers do: no request looks at them.
        self.labels = (
            self.order if inputs.labels is None else inputs.labels.to(torch.int32)[self.order]
        )

    def gather(self, head: Head, first: int, rows: int) -> Tensor:
        """Gather the hidden states (L, rows, D) of the rows from `first` on, in order.

        Rows beyond the valid ones are zeros.
        """
        block_LrD = torch.empty(
            (self.layers, rows, head.width), dtype=head.block_dtype, device=self.device
        )
        move_rows(head.hidden, block_LrD, self.order, self.count, first, into_block=True)
        return block_LrD

    def put_back(
        self, found: list[Tensor | None], block_LrD: Tensor, first: int, scale: Tensor | None = None
    ) -> None:
        """Write a block's gradients, divided by `scale`, at the caller's rows.

        `found` is None for a layer that wants no gradient.
        """
        move_rows(found, block_LrD, self.order, self.count, first, into_block=False, scale=scale)

    def zero_statistics(self) -> Statistics:
        """Allocate the statistics of all rows, zero."""

        def zeros(*shape: int) -> Tensor:
            return torch.zeros((*shape, self.rows), dtype=torch.float32, device=self.device)

        return Statistics(
            zeros(2, self.layers),
            zeros(len(self.spec.requests), REQUEST_STATS),
            zeros(len(self.spec.moments), MOMENT_STATS),
        )

    def in_order(self, per_row: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Take tensors (..., R) of the caller's rows in the order of this call."""
        if self.inputs.valid is None:
            return tuple([t.contiguous() for t in per_row])
        order = self.order.long()
        return tuple([t.index_select(-1, order) for t in per_row])

    def at_callers_rows(self, statistics: Statistics) -> Statistics:
        """Put statistics in the order of this call back at the caller's rows."""
        if self.inputs.valid is None:
            return statistics
        order = self.order.long()
        return Statistics(*[torch.empty_like(t).index_copy_(-1, order, t) for t in statistics])

    def count_valid(self) -> int:
        """Count the valid rows, so that no others are multiplied: the one wait for the device.

        While a CUDA graph is captured, count all rows.
        """
        if self.inputs.valid is None or (
            self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        ):
            return self.rows
        return int(self.count)


def zero_gradients(inputs: LensInputs, needed: list[bool]) -> list[Tensor | None]:
    """Allocate the gradients of [*student_hidden, student_weight, student_bias] that are needed."""
    outputs = (*inputs.student_hidden, inputs.student_weight, inputs.student_bias)
    return [
        torch.zeros_like(t, memory_format=torch.contiguous_format) if n else None
        for t, n in zip(outputs, needed)
    ]
