"""The gradients of a call, added up over its row blocks.

Shape suffixes: L layers, r rows of a block, m = L r, C the vocabulary, c tokens of a slab, D the
student's hidden width.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from fdd_kernels.backends.triton.cached.blocks import Block
from fdd_kernels.backends.triton.cached.coefficients import ITEM_FIELDS, coefficients_kernel
from fdd_kernels.backends.triton.cached.fill_statistics import merge_values_launch
from fdd_kernels.backends.triton.cached.grad import cached_grad_kernel
from fdd_kernels.backends.triton.cached.logits import Slab
from fdd_kernels.backends.triton.config import row_launch
from fdd_kernels.backends.triton.gemm import multiply
from fdd_kernels.backends.triton.launch import SMALL, Launch, launch
from fdd_kernels.backends.triton.problem import Problem, zero_gradients
from fdd_kernels.backends.triton.scaling import gradient_scale
from fdd_kernels.backends.triton.strategy import gradient_tokens

COEFFICIENT_ROWS = 128


class Gradients:
    """The gradients of a call, zero at first; `add` adds a block's, `finished` returns them."""

    def __init__(self, problem: Problem, needed: list[bool], block_rows: int):
        self.problem, self.found = problem, zero_gradients(problem.inputs, needed)
        *self.hidden, self.weight, self.bias = self.found
        columns, head = problem.spec.columns, problem.student
        self.dtype = head.block_dtype
        self.weight_CD = self.bias_C = None
        self.one = torch.ones(1, dtype=torch.float32, device=problem.device)
        if self.weight is not None:
            if self.weight.dtype == torch.float32:
                self.weight_CD = self.weight[:columns]
            elif block_rows < problem.rows:
                # With one block each slab is complete at once, and is rounded there.
                self.weight_CD = torch.empty(
                    (columns, head.width), dtype=torch.float32, device=problem.device
                )
        if self.bias is not None:
            self.bias_C = torch.zeros(columns, dtype=torch.float32, device=problem.device)

    def add(
        self, block: Block, per_row: tuple[Tensor, ...], refined_requests: Tensor | None = None
    ) -> None:
        """Add a block's gradients.

        `per_row` are the block's shifts, requests and moments, and the upstream gradients of the
        last two. Where `refined_requests` is given, small values of KL are replaced there by the
        accurate ones.
        """
        problem, spec, table = self.problem, block.spec, block.table
        head, layers, rows = problem.student, block.layers, block.rows
        shifts, requests, moments, grad_requests, grad_moments = per_row
        scale = self.one
        if self.dtype == torch.float16:
            scale = gradient_scale(self.dtype, spec, requests, moments, grad_requests, grad_moments)
        coefficients = torch.empty(
            (table.slots + len(spec.moments), ITEM_FIELDS.value, rows),
            dtype=torch.float32,
            device=problem.device,
        )
        launch(self._coefficients_launch(block, coefficients, per_row, scale))
        shape = row_launch("grad")
        tokens = gradient_tokens(rows, layers, spec.columns, self.dtype.itemsize)
        tokens = min(tokens, block.logits.slab_tokens)
        tiles = triton.cdiv(spec.columns, shape.block)
        want_values = refined_requests is not None and table.has_kl
        values = coefficients
        if want_values:
            values = torch.empty(
                (table.slots, rows, tiles), dtype=torch.float32, device=problem.device
            )
        grad_Lrc = torch.empty((layers, rows, tokens), dtype=self.dtype, device=problem.device)
        sum_mD = None
        if any(g is not None for g in self.hidden):
            sum_mD = torch.empty(
                (layers * rows, head.width), dtype=torch.float32, device=problem.device
            )
        for slab in block.logits.slabs(tokens):
            for one in block.tile_launches(
                cached_grad_kernel,
                shape,
                slab,
                grad=grad_Lrc,
                values=values,
                shifts=shifts,
                coefficients=coefficients,
                labels=block.labels,
                grad_ld=tokens,
                slots=table.slots,
                tiles=tiles,
                first_column=slab.start,
                stride=shifts.stride(1),
                TEACHER=spec.needs_teacher,
                SOFTMAX=table.slots > 0,
                MOMENTS=bool(spec.moments),
                WEIGHTED=table.has_weights,
                MIXED=table.has_mixtures,
                VALUES=want_values,
                LABELS=table.has_labels,
                DIVERGENCE=table.divergence,
            ):
                launch(one)
            grad_mc = grad_Lrc.flatten(0, 1)[:, : slab.stop - slab.start]
            if sum_mD is not None:
                part_cD = head.weight[slab.start : slab.stop].to(self.dtype)
                multiply(sum_mD, grad_mc, part_cD, accumulate=slab.start > 0)
            self._add_head(block, slab, grad_mc, scale)
        if sum_mD is not None:
            problem.put_back(self.hidden, sum_mD.view(layers, rows, -1), block.first, scale)
        if want_values:
            launch(merge_values_launch(block, values, refined_requests, seconds=False))

    def _coefficients_launch(
        self, block: Block, coefficients: Tensor, per_row: tuple[Tensor, ...], scale: Tensor
    ) -> Launch:
        """Fill `coefficients` (slots + pairs, 9, r), times `scale`."""
        _, requests, moments, grad_requests, grad_moments = per_row
        arguments = {
            "coefficients": coefficients,
            "requests": requests,
            "moments": moments,
            "grad_requests": grad_requests,
            "grad_moments": grad_moments,
            "grad_scale": scale,
            "count": block.count,
            "table": block.table.values,
            "table_width": block.table.width,
            "rows": block.rows,
            "slots": block.table.slots,
            "stride": requests.stride(1),
            "grad_stride": grad_requests.stride(1),
            "moment_stride": moments.stride(1),
            "grad_moment_stride": grad_moments.stride(1),
            "WEIGHTED": block.table.has_weights,
            "student_scale": self.problem.student.scale,
            "BLOCK_R": COEFFICIENT_ROWS,
        }
        grid = (triton.cdiv(block.rows, COEFFICIENT_ROWS), coefficients.shape[0])
        return Launch(coefficients_kernel, grid, SMALL, arguments)

    def _add_head(self, block: Block, slab: Slab, grad_mc: Tensor, scale: Tensor) -> None:
        """Add a slab's gradient of the head and the bias.

        `scale` differs between blocks, so it is divided out at once.
        """
        hidden_mD = block.student_LrD.flatten(0, 1)
        scaled = self.dtype == torch.float16
        if self.weight is not None:
            out = None if self.weight_CD is None else self.weight_CD[slab.start : slab.stop]
            if out is None or scaled:
                part = torch.empty(
                    (slab.stop - slab.start, hidden_mD.shape[1]),
                    dtype=torch.float32,
                    device=grad_mc.device,
                )
                multiply(part, grad_mc.t(), hidden_mD)
                if scaled:
                    part /= scale
                if out is None:
                    self.weight[slab.start : slab.stop] = part
                elif block.first == 0:
                    out.copy_(part)
                else:
                    out += part
            else:
                multiply(out, grad_mc.t(), hidden_mD, accumulate=block.first > 0)
        if self.bias_C is not None:
            part_c = grad_mc.sum(0, dtype=torch.float32)
            self.bias_C[slab.start : slab.stop] += part_c / scale if scaled else part_c

    def finished(self, any_rows: bool) -> list[Tensor]:
        """Return the gradients that were needed, in their order; `any_rows`: a block was added."""
        columns = self.problem.spec.columns
        if self.weight_CD is not None and any_rows and self.weight.dtype != torch.float32:
            self.weight[:columns] = self.weight_CD
        if self.bias_C is not None:
            self.bias[:columns] = self.bias_C
        return [g for g in self.found if g is not None]
