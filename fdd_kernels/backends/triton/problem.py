"""One call as every strategy sees it: both models' heads and hidden states, the table of work, the
order of the rows.

Shape suffixes: L layers, R rows, r rows of a block, C the vocabulary, D a hidden width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fdd_kernels.backends.triton import interpreting
from fdd_kernels.backends.triton.gather_rows import move_rows, order_of_rows
from fdd_kernels.backends.triton.work_table import Table, table_for
from fdd_kernels.lens.inputs import LensInputs
from fdd_kernels.lens.spec import LensSpec


class Head:
    """One model's head as the kernels read it, and its hidden states; `weight` None: features are
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
        # Triton's interpreter multiplies the bit patterns of bfloat16; in float32 the products are
        # the same.
        self.block_dtype = (
            torch.float32 if interpreting() and self.dtype == torch.bfloat16 else self.dtype
        )
        # The kernels read a head along its width; any other layout is copied once a call.
        self.weight = weight if weight is None or weight.stride(1) == 1 else weight.contiguous()
        self.bias = None if bias is None else bias.to(torch.float32).contiguous()
        self.scale, self.cap = float(scale), float(cap or 0.0)


class Problem:
    """A call's inputs and the order in which its rows are taken: valid ones first."""

    def __init__(self, inputs: LensInputs, spec: LensSpec):
        self.spec, self.device = spec, inputs.device
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
        """The hidden states (L, rows, D) of the rows from `first` on, in order; zeros beyond the
        valid ones.
        """
        block_LrD = torch.empty(
            (self.layers, rows, head.width), dtype=head.block_dtype, device=self.device
        )
        move_rows(head.hidden, block_LrD, self.order, self.count, first, into_block=True)
        return block_LrD

    def put_back(
        self, found: list[Tensor | None], block_LrD: Tensor, first: int, scale: Tensor | None = None
    ) -> None:
        """Write a block's gradients, divided by `scale`, at the rows of the caller, for the layers
        that want one.
        """
        move_rows(found, block_LrD, self.order, self.count, first, into_block=False, scale=scale)
