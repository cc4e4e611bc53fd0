"""Blocks of rows on the host: GEMMs into scratch, the row kernels, GEMMs of the gradients.

One implementation serves both strategies: a block asks `BlockLogits` for slabs of the vocabulary,
which are parts of cached logits or computed anew. Beyond inputs, outputs and statistics a call
allocates the scratch for logits, dL/dlogits of a slab (GRADIENT_BYTES), the block's hidden states
with their float32 gradient, the tiles' state, and, where a 16-bit head is trained over several
blocks, a float32 gradient of it. No atomics: results are the same from run to run.

Shape suffixes: L layers, R rows, r rows of a block, m = L r, C the vocabulary, c tokens of a slab,
D a hidden width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import triton
from torch import Tensor

from fdd_kernels.backends.triton import interpreting
from fdd_kernels.backends.triton.cached.grad import (
    ITEM_FIELDS,
    cached_grad_kernel,
    coefficients_kernel,
)
from fdd_kernels.backends.triton.cached.logits import BlockLogits, Slab, new_scratch
from fdd_kernels.backends.triton.cached.merge import cached_merge_kernel, merge_values_kernel
from fdd_kernels.backends.triton.cached.second_pass import cached_second_pass_kernel
from fdd_kernels.backends.triton.cached.stats import cached_stats_kernel, fields_of
from fdd_kernels.backends.triton.config import RowLaunch, architecture_of, row_launch
from fdd_kernels.backends.triton.gemm import multiply
from fdd_kernels.backends.triton.launch import SMALL, launch
from fdd_kernels.backends.triton.problem import Problem
from fdd_kernels.backends.triton.scaling import gradient_scale
from fdd_kernels.backends.triton.strategy import Slabs, balanced_rows, gradient_tokens, padded
from fdd_kernels.lens.inputs import LensInputs
from fdd_kernels.lens.layout import MOMENT_STATS, REQUEST_STATS
from fdd_kernels.lens.spec import LensSpec

# shifts (2, L, R), requests (requests, 4, R), moments (moments, 7, R)
Statistics = tuple[Tensor, Tensor, Tensor]
COEFFICIENT_ROWS = 128


class Block:
    """A block of rows, `count` of them valid: hidden states and logits, its part of the statistics
    (in the order of rows).

    `scratch` holds the logits of `tokens` tokens.
    """

    def __init__(
        self,
        problem: Problem,
        scratch: Tensor,
        tokens: int,
        first: int,
        rows: int,
        count: Tensor,
        statistics: Statistics,
    ):
        self.problem, self.spec, self.table = problem, problem.spec, problem.table
        self.first, self.rows, self.layers = first, rows, problem.layers
        self.student_LrD = problem.gather(problem.student, first, rows)
        teacher_LrD = (
            problem.gather(problem.teacher, first, rows) if self.spec.needs_teacher else None
        )
        self.logits = BlockLogits(problem, scratch, tokens, self.student_LrD, teacher_LrD)
        self.statistics = tuple([t[..., first : first + rows] for t in statistics])
        self.count = count
        self.labels = problem.labels[first : first + rows]

    def arguments(self) -> dict:
        """What the row kernels have in common."""
        return {
            "count": self.count,
            "table": self.table.values,
            "table_width": self.table.width,
            "rows": self.rows,
            "layers": self.layers,
        }

    def launch_tiles(
        self, kernel, shape: RowLaunch, slab: Slab, *, extra_axis: tuple[int, ...] = (), **arguments
    ) -> None:
        """Launch a kernel over the rows and tiles of a slab: the full tiles without a mask, then
        the ragged last one.
        """
        student, teacher = self.problem.student, self.problem.teacher
        tokens = slab.stop - slab.start
        logits_t = slab.student if slab.teacher is None else slab.teacher

        def of_slab(bias: Tensor | None) -> Tensor:
            return slab.student if bias is None else bias[slab.start : slab.stop]

        full = tokens // shape.block
        architecture = architecture_of(self.problem.device, interpreting())
        common = {
            **self.arguments(),
            "logits_s": slab.student,
            "logits_t": logits_t,
            "bias_s": of_slab(student.bias),
            "bias_t": of_slab(teacher.bias),
            "columns": tokens,
            "ld_s": slab.student.stride(1),
            "ld_t": logits_t.stride(1),
            "state_tile": slab.start // shape.block,
            "scale_s": student.scale,
            "scale_t": teacher.scale,
            "cap_s": student.cap,
            "cap_t": teacher.cap,
            "BIAS_S": student.bias is not None,
            "BIAS_T": slab.teacher is not None and teacher.bias is not None,
            "SCALE_S": student.scale != 1.0,
            "SCALE_T": teacher.scale != 1.0,
            "CAP_S": student.cap > 0,
            "CAP_T": teacher.cap > 0,
            "BLOCK_C": shape.block,
            **arguments,
        }
        for first, tiles in ((0, full), (full, triton.cdiv(tokens, shape.block) - full)):
            if tiles:
                grid = (self.rows, tiles, *extra_axis)
                is_full = first < full
                masked = not is_full or common["BIAS_S"] or common["BIAS_T"]
                launch(
                    kernel,
                    grid,
                    shape.options(masked, architecture),
                    first_tile=first,
                    FULL=is_full,
                    **common,
                )


def _merge_block(tiles: int) -> int:
    return triton.next_power_of_2(max(tiles, 1))


def block_statistics(block: Block) -> None:
    """Fill the block's statistics from its logits."""
    spec, table = block.spec, block.table
    shifts, requests, moments = block.statistics
    shape = row_launch("stats")
    tiles = triton.cdiv(spec.columns, shape.block)
    fields = fields_of(block.layers, table.slots, len(spec.moments))
    state = torch.empty((fields, block.rows, tiles), dtype=torch.float32, device=shifts.device)
    for slab in block.logits.slabs(spec.columns):
        block.launch_tiles(
            cached_stats_kernel,
            shape,
            slab,
            state=state,
            labels=block.labels,
            slots=table.slots,
            tiles=tiles,
            first_column=slab.start,
            moment_inverse=1.0 / spec.moment_temperature,
            TEACHER=spec.needs_teacher,
            SOFTMAX=table.slots > 0,
            MOMENTS=bool(spec.moments),
            LABELS=table.has_labels,
            DIVERGENCE=table.divergence,
        )
    launch(
        cached_merge_kernel,
        (block.rows, block.layers),
        SMALL,
        state=state,
        shifts=shifts,
        requests=requests,
        moments=moments,
        stride=shifts.stride(1),
        slots=table.slots,
        tiles=tiles,
        moment_inverse=1.0 / spec.moment_temperature,
        TEACHER=spec.needs_teacher,
        DIVERGENCE=table.divergence,
        BLOCK_T=_merge_block(tiles),
        **block.arguments(),
    )
    if table.second_pass:
        shape = row_launch("second_pass")
        tiles = triton.cdiv(spec.columns, shape.block)
        sums = torch.empty(
            (table.second_pass, 2, block.rows, tiles), dtype=torch.float32, device=shifts.device
        )
        for slab in block.logits.slabs(spec.columns):
            block.launch_tiles(
                cached_second_pass_kernel,
                shape,
                slab,
                extra_axis=(table.second_pass,),
                sums=sums,
                shifts=shifts,
                requests=requests,
                tiles=tiles,
                stride=shifts.stride(1),
                DIVERGENCE=table.divergence,
            )
        _merge_values(block, sums, requests, seconds=True)


def _merge_values(block: Block, sums: Tensor, requests: Tensor, *, seconds: bool) -> None:
    launch(
        merge_values_kernel,
        (block.rows, sums.shape[0]),
        SMALL,
        sums=sums,
        requests=requests,
        count=block.count,
        table=block.table.values,
        table_width=block.table.width,
        rows=block.rows,
        stride=requests.stride(1),
        tiles=sums.shape[-1],
        SECONDS=seconds,
        BLOCK_T=_merge_block(sums.shape[-1]),
    )


class Gradients:
    """The gradients of a call, over its blocks of rows."""

    def __init__(self, problem: Problem, inputs: LensInputs, needed: list[bool], block_rows: int):
        outputs = (*inputs.student_hidden, inputs.student_weight, inputs.student_bias)
        found = [
            torch.zeros_like(t, memory_format=torch.contiguous_format) if n else None
            for t, n in zip(outputs, needed)
        ]
        self.problem, self.found = problem, found
        self.hidden, (self.weight, self.bias) = found[:-2], found[-2:]
        columns, head = problem.spec.columns, problem.student
        self.several = block_rows < problem.rows
        self.dtype = head.block_dtype
        self.weight_CD = self.bias_C = None
        self.one = torch.ones(1, dtype=torch.float32, device=problem.device)
        if self.weight is not None:
            if self.weight.dtype == torch.float32:
                self.weight_CD = self.weight[:columns]
            elif self.several:  # over one block each slab is complete at once and is rounded there
                self.weight_CD = torch.empty(
                    (columns, head.width), dtype=torch.float32, device=problem.device
                )
        if self.bias is not None:
            self.bias_C = torch.zeros(columns, dtype=torch.float32, device=problem.device)

    def add(
        self, block: Block, per_row: tuple[Tensor, ...], refined_requests: Tensor | None
    ) -> None:
        """Add a block's gradients; `per_row`: shifts, reads, moments of the block and upstream
        gradients of the last two.

        Writes the accurate value of KL into `refined_reads` if given.
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
        launch(
            coefficients_kernel,
            (triton.cdiv(rows, COEFFICIENT_ROWS), coefficients.shape[0]),
            SMALL,
            coefficients=coefficients,
            requests=requests,
            moments=moments,
            grad_requests=grad_requests,
            grad_moments=grad_moments,
            grad_scale=scale,
            count=block.count,
            table=table.values,
            table_width=table.width,
            rows=rows,
            slots=table.slots,
            stride=requests.stride(1),
            grad_stride=grad_requests.stride(1),
            moment_stride=moments.stride(1),
            grad_moment_stride=grad_moments.stride(1),
            moment_inverse=1.0 / spec.moment_temperature,
            student_scale=head.scale,
            BLOCK_R=COEFFICIENT_ROWS,
        )
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
            block.launch_tiles(
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
                moment_inverse=1.0 / spec.moment_temperature,
                TEACHER=spec.needs_teacher,
                SOFTMAX=table.slots > 0,
                MOMENTS=bool(spec.moments),
                VALUES=want_values,
                LABELS=table.has_labels,
                DIVERGENCE=table.divergence,
            )
            grad_mc = grad_Lrc.flatten(0, 1)[:, : slab.stop - slab.start]
            if sum_mD is not None:
                part_cD = head.weight[slab.start : slab.stop].to(self.dtype)
                multiply(sum_mD, grad_mc, part_cD, accumulate=slab.start > 0)
            self._add_head(block, slab, grad_mc, scale)
        if sum_mD is not None:
            problem.put_back(self.hidden, sum_mD.view(layers, rows, -1), block.first, scale)
        if want_values:
            _merge_values(block, values, refined_requests, seconds=False)

    def _add_head(self, block: Block, slab: Slab, grad_mc: Tensor, scale: Tensor) -> None:
        """The head's and the bias's gradient of a slab. A scale differs between blocks: it is taken
        out at once.
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
        """The gradients that were wanted, in the order of `needed`."""
        columns = self.problem.spec.columns
        if self.weight_CD is not None and any_rows and self.weight.dtype != torch.float32:
            self.weight[:columns] = self.weight_CD
        if self.bias_C is not None:
            self.bias[:columns] = self.bias_C
        return [g for g in self.found if g is not None]


def new_statistics(problem: Problem) -> Statistics:
    """Statistics of all rows, zero, in the order of the rows."""

    def zeros(*shape: int) -> Tensor:
        return torch.zeros((*shape, problem.rows), dtype=torch.float32, device=problem.device)

    spec = problem.spec
    return (
        zeros(2, problem.layers),
        zeros(len(spec.requests), REQUEST_STATS),
        zeros(len(spec.moments), MOMENT_STATS),
    )


def at_callers_rows(problem: Problem, inputs: LensInputs, statistics: Statistics) -> Statistics:
    """Statistics in the order of rows, put back at the rows of the caller."""
    if inputs.valid is None:
        return statistics
    order = problem.order.long()
    return tuple([torch.empty_like(t).index_copy_(-1, order, t) for t in statistics])


def blocks_of(problem: Problem, rows: int, step: int) -> Iterator[tuple[int, int, Tensor]]:
    """Of each block of `step` rows: the first, how many they are, and how many of them are valid,
    (1,) on the device.
    """
    starts = torch.arange(0, rows, step, dtype=torch.int32, device=problem.device)
    # Four of each: Triton compiles a kernel once more for a pointer that 16 does not divide.
    counts = (problem.count - starts).clamp(max=step).unsqueeze(1).repeat(1, 4)
    for i, first in enumerate(range(0, rows, step)):
        yield first, min(step, rows - first), counts[i, :1]


def stats(inputs: LensInputs, spec: LensSpec, slabs: Slabs) -> Statistics:
    """The statistics, slab by slab."""
    problem = Problem(inputs, spec)
    statistics = new_statistics(problem)
    if problem.rows:
        scratch = new_scratch(problem, slabs.rows, slabs.tokens)
        for first, rows, count in blocks_of(problem, problem.rows, slabs.rows):
            block_statistics(Block(problem, scratch, slabs.tokens, first, rows, count, statistics))
    return at_callers_rows(problem, inputs, statistics)


def grad(
    inputs: LensInputs,
    spec: LensSpec,
    per_row: tuple[Tensor, ...],
    needed: list[bool],
    slabs: Slabs,
) -> list[Tensor]:
    """The gradients marked in `needed`, slab by slab. `per_row`: the statistics, upstream gradients
    of the last two.
    """
    problem = Problem(inputs, spec)
    gradients = Gradients(problem, inputs, needed, slabs.rows)
    if problem.rows and any(needed):
        order = problem.order.long()
        per_row = tuple(
            [t.contiguous() if inputs.valid is None else t.index_select(-1, order) for t in per_row]
        )
        scratch = new_scratch(problem, slabs.rows, slabs.tokens)
        for first, rows, count in blocks_of(problem, problem.rows, slabs.rows):
            block = Block(problem, scratch, slabs.tokens, first, rows, count, per_row[:3])
            gradients.add(block, tuple([t[..., first : first + block.rows] for t in per_row]), None)
    return gradients.finished(problem.rows > 0)


def stats_and_grad(
    inputs: LensInputs,
    spec: LensSpec,
    block_rows: int,
    upstream_of: Callable,
    needed: list[bool],
    refine: bool,
    scratch: Tensor,
) -> tuple[list[Tensor], Statistics]:
    """Statistics and gradients, block by block, with every logit computed once; see
    `backends.Backend.stats_and_grad`.
    """
    problem = Problem(inputs, spec)
    statistics = new_statistics(problem)
    valid_rows = count_valid(problem, inputs)
    block_rows = balanced_rows(valid_rows, block_rows, problem.layers)
    gradients = Gradients(problem, inputs, needed, block_rows)
    order = problem.order.long()
    for first, rows, count in blocks_of(problem, valid_rows, max(block_rows, 1)):
        block = Block(problem, scratch, padded(spec.columns), first, rows, count, statistics)
        block_statistics(block)
        per_row = upstream_of(order[first : first + rows], *block.statistics)
        gradients.add(block, per_row, block.statistics[1] if refine else None)
        for own, returned in zip(block.statistics, per_row):
            if returned is not own:  # those of all shards' tokens
                own.copy_(returned)
    return gradients.finished(valid_rows > 0), at_callers_rows(problem, inputs, statistics)


def valid_blocks(inputs: LensInputs, spec: LensSpec, block_rows: int) -> Iterator[Tensor]:
    """The caller's rows of each block that `stats_and_grad` takes, (r,) int64."""
    problem = Problem(inputs, spec)
    valid_rows = count_valid(problem, inputs)
    step = max(balanced_rows(valid_rows, block_rows, problem.layers), 1)
    yield from problem.order[:valid_rows].long().split(step)


def count_valid(problem: Problem, inputs: LensInputs) -> int:
    """Valid rows, so that no others are multiplied: the one wait for the device. While a CUDA graph
    is captured, all rows.
    """
    if inputs.valid is None or (
        problem.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    ):
        return problem.rows
    return int(problem.count)
