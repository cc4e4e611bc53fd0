"""The two operations with the GEMM inside the kernels: blocks of rows on the host.

The strategy of least memory. Nothing here waits for the device: how many rows are valid stays
there. Beyond inputs, outputs and statistics a call allocates what `memory.py` states: the hidden
states of a block of rows with their float32 gradient, dL/dlogits of that block and some tokens, the
head's gradient of those tokens, one scratch tile ring a program, and, where a 16-bit head is
trained over several blocks of rows, a float32 gradient of it. No atomics: results are the same from
run to run.

Shape suffixes: L layers, R rows, r rows of a block, C the vocabulary, c tokens of a chunk, D a
hidden width.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from fdd_kernels.backends.triton import interpreting
from fdd_kernels.backends.triton.autotune import tuned
from fdd_kernels.backends.triton.config import (
    LaunchConfig,
    architecture_of,
    f32_precision,
    multiprocessors,
)
from fdd_kernels.backends.triton.gemm import multiply
from fdd_kernels.backends.triton.memory import rows_of_a_block, tiles_of_a_chunk
from fdd_kernels.backends.triton.one_pass.grad import launch_grad
from fdd_kernels.backends.triton.one_pass.second_pass import launch_divergence
from fdd_kernels.backends.triton.one_pass.splits import launch_merge, launch_merge_divergence
from fdd_kernels.backends.triton.one_pass.stats import fields_of, launch_stats
from fdd_kernels.backends.triton.problem import Head, Problem
from fdd_kernels.backends.triton.scaling import gradient_scale
from fdd_kernels.lens.inputs import LensInputs
from fdd_kernels.lens.layout import MOMENT_STATS, REQUEST_STATS
from fdd_kernels.lens.spec import LensSpec


def _head_arguments(head: Head, side: str, block_hidden: Tensor, filler: Tensor) -> dict:
    """A head as the kernels take it; without one in feature space its hidden states stand in."""
    return {
        f"{side}_hidden": block_hidden,
        f"{side}_weight": block_hidden if head.weight is None else head.weight,
        f"{side}_bias": filler if head.bias is None else head.bias,
        f"{side}_width": head.width,
        f"{side}_stride": head.width if head.weight is None else head.weight.stride(0),
        f"{side}_scale": head.scale,
        f"{side}_cap": head.cap,
        f"{side}_has_bias": int(head.bias is not None),
    }


class TiledProblem(Problem):
    """A call, and how it is cut into tiles and blocks of rows."""

    def __init__(self, inputs: LensInputs, spec: LensSpec, config: LaunchConfig, architecture: str):
        super().__init__(inputs, spec)
        self.config, self.architecture = config, architecture
        self.units = multiprocessors(self.device, architecture == "interpreter")
        self.zero = torch.zeros(1, dtype=torch.float32, device=self.device)
        self.tiles = triton.cdiv(spec.columns, config.block_columns)
        teacher = (self.teacher.width, self.teacher.dtype.itemsize) if spec.needs_teacher else None
        student = (self.student.width, self.student.dtype.itemsize)
        self.block_rows = rows_of_a_block(
            self.rows, self.layers, student, teacher, config.block_rows
        )

    def blocks(self):
        for first in range(0, self.rows, self.block_rows):
            yield Block(self, first)


class Block:
    """A block of rows: the hidden states of those that count, side by side, padded with zeros to
    whole tiles.
    """

    def __init__(self, problem: TiledProblem, first: int):
        self.problem, self.first, self.rows = problem, first, problem.block_rows
        self.spec, self.table, self.config = problem.spec, problem.table, problem.config
        self.order, self.count, self.labels = problem.order, problem.count, problem.labels
        self.row_tiles = self.rows // self.config.block_rows
        self.student_LrD = problem.gather(problem.student, first, self.rows)
        self.teacher_LrD = (
            problem.gather(problem.teacher, first, self.rows)
            if self.spec.needs_teacher
            else self.student_LrD
        )
        # Ranges of columns, so that the device is full however few the rows.
        wanted = triton.cdiv(self.config.programs * problem.units, self.row_tiles)
        self.tiles_per_range = triton.cdiv(problem.tiles, min(wanted, problem.tiles))
        self.ranges = triton.cdiv(problem.tiles, self.tiles_per_range)

    def programs(self, column_parts: int) -> int:
        """Programs for row tiles x `column_parts` items of work: each walks its share."""
        return min(self.row_tiles * column_parts, self.config.programs * self.problem.units)

    def scratch(self, column_parts: int, ring: int) -> Tensor:
        """Tiles of both models for `ring` layers, for every program."""
        elements = (
            self.programs(column_parts)
            * ring
            * 2
            * self.config.block_rows
            * self.config.block_columns
        )
        return torch.empty(elements, dtype=torch.float32, device=self.problem.device)

    def arguments(self) -> dict:
        """What the three heavy kernels have in common."""
        problem, config = self.problem, self.config
        teacher = problem.teacher if self.spec.needs_teacher else problem.student
        wide = torch.float32 in (problem.student.dtype, teacher.dtype)
        return {
            **_head_arguments(problem.student, "student", self.student_LrD, problem.zero),
            **_head_arguments(teacher, "teacher", self.teacher_LrD, problem.zero),
            "table": self.table.values,
            "table_width": self.table.width,
            "count": self.count,
            "first": self.first,
            "rows": self.rows,
            "columns": self.spec.columns,
            "layers": problem.layers,
            "TEACHER": self.spec.needs_teacher,
            "IDENTITY": teacher.weight is None,
            "PRECISION": f32_precision(problem.architecture) if wide else "ieee",
            "BLOCK_R": config.block_rows,
            "BLOCK_C": config.block_columns,
            "BLOCK_D": config.block_depth,
        }


def _configured(operation: str, inputs: LensInputs, spec: LensSpec, run):
    """Run `run(config, architecture)` with the default configuration, or the one that autotuning
    found.
    """
    architecture = architecture_of(inputs.device, interpreting())
    tensors = [*inputs.student_hidden, inputs.student_weight]
    if spec.needs_teacher:
        tensors += [
            *inputs.teacher_hidden,
            *(() if inputs.teacher_weight is None else (inputs.teacher_weight,)),
        ]
    mixed = len({t.dtype for t in tensors}) > 1
    dtype = torch.float32 if mixed else tensors[0].dtype
    widths = (
        inputs.student_hidden[0].shape[-1],
        inputs.teacher_hidden[0].shape[-1] if spec.needs_teacher else 0,
    )
    shape = (inputs.rows, spec.columns, *widths)
    config = tuned(
        operation,
        shape,
        dtype,
        architecture,
        lambda config: run(config, architecture),
        mixed=mixed,
        work=f"{len(inputs.student_hidden)}:{spec.encode()[0]}",
    )
    return run(config, architecture)


def stats(inputs: LensInputs, spec: LensSpec) -> tuple[Tensor, Tensor, Tensor]:
    """Statistics: shifts (2, L, R), requests (requests, 4, R), moments (moments, 7, R)."""

    def new(*shape: int) -> Tensor:
        return torch.zeros((*shape, inputs.rows), dtype=torch.float32, device=inputs.device)

    def run(config: LaunchConfig, architecture: str) -> tuple[Tensor, Tensor, Tensor]:
        layers = len(inputs.student_hidden)
        found = (
            new(2, layers),
            new(len(spec.requests), REQUEST_STATS),
            new(len(spec.moments), MOMENT_STATS),
        )
        if inputs.rows:
            _stats(TiledProblem(inputs, spec, config, architecture), *found)
        return found

    return _configured("stats", inputs, spec, run)


def _stats(problem: TiledProblem, shifts: Tensor, requests: Tensor, moments: Tensor) -> None:
    fields = fields_of(problem.layers, problem.table.slots, len(problem.spec.moments))
    for block in problem.blocks():
        state = torch.empty(
            (block.ranges, fields, block.rows), dtype=torch.float32, device=problem.device
        )
        launch_stats(block, state)
        launch_merge(block, state, shifts, requests, moments)
        if problem.table.second_pass:
            sums = state.new_empty((block.ranges, problem.table.second_pass, 2, block.rows))
            launch_divergence(block, sums, requests, shifts)
            launch_merge_divergence(block, sums, requests)


def grad(
    inputs: LensInputs, spec: LensSpec, per_row: tuple[Tensor, ...], needed: list[bool]
) -> list[Tensor]:
    """Gradients of [*student_hidden, student_weight, student_bias] marked in `needed`.

    `per_row` are the three statistics and the upstream gradients of the last two.
    """
    outputs = (*inputs.student_hidden, inputs.student_weight, inputs.student_bias)
    per_row = tuple([t.contiguous() for t in per_row])

    def run(config: LaunchConfig, architecture: str) -> list[Tensor]:
        found = [
            torch.zeros_like(t, memory_format=torch.contiguous_format) if n else None
            for t, n in zip(outputs, needed)
        ]
        if inputs.rows and any(needed):
            _grad(
                TiledProblem(inputs, spec, config, architecture), per_row, found[:-2], *found[-2:]
            )
        return [g for g in found if g is not None]

    return _configured("grad", inputs, spec, run)


def _grad(
    problem: TiledProblem,
    per_row: tuple[Tensor, ...],
    grad_hidden: list[Tensor | None],
    grad_weight: Tensor | None,
    grad_bias: Tensor | None,
) -> None:
    spec, config, head = problem.spec, problem.config, problem.student
    dtype = head.block_dtype
    scale = gradient_scale(dtype, spec, *per_row[1:])
    weight = head.weight[: spec.columns]
    weight_CD = None if grad_weight is None else grad_weight[: spec.columns]
    if (
        weight_CD is not None
        and weight_CD.dtype != torch.float32
        and problem.block_rows < problem.rows
    ):
        # summed over blocks of rows, and rounded once
        weight_CD = torch.zeros_like(weight, dtype=torch.float32)
    bias_C = (
        None
        if grad_bias is None
        else torch.zeros(spec.columns, dtype=torch.float32, device=problem.device)
    )
    want_hidden = any(g is not None for g in grad_hidden)
    tiles_a_chunk = tiles_of_a_chunk(
        problem.block_rows,
        problem.layers,
        spec.columns,
        head.width,
        dtype.itemsize,
        config.block_columns,
    )
    for block in problem.blocks():
        hidden_mD = block.student_LrD.flatten(0, 1)
        sum_mD = None
        if want_hidden:
            sum_mD = torch.zeros(
                (problem.layers * block.rows, head.width),
                dtype=torch.float32,
                device=problem.device,
            )
        # Zero where no row is valid: the kernel writes the tiles that have one.
        grad_Lrc = torch.zeros(
            (problem.layers, block.rows, tiles_a_chunk * config.block_columns),
            dtype=dtype,
            device=problem.device,
        )
        for first_tile in range(0, problem.tiles, tiles_a_chunk):
            tiles = min(tiles_a_chunk, problem.tiles - first_tile)
            start = first_tile * config.block_columns
            stop = min(start + tiles * config.block_columns, spec.columns)
            launch_grad(block, grad_Lrc, per_row, scale, first_tile, tiles)
            grad_mc = grad_Lrc.flatten(0, 1)[:, : stop - start]
            if sum_mD is not None:
                multiply(sum_mD, grad_mc, weight[start:stop].to(dtype), accumulate=True)
            if grad_weight is not None:
                _add_head_gradient(weight_CD[start:stop], grad_mc, hidden_mD, scale)
            if bias_C is not None:
                bias_C[start:stop] += grad_mc.sum(0, dtype=torch.float32)
        if sum_mD is not None:
            problem.put_back(
                grad_hidden, sum_mD.view(problem.layers, block.rows, -1), block.first, scale
            )
        del (
            block,
            hidden_mD,
            sum_mD,
            grad_Lrc,
            grad_mc,
        )  # before those of the next block are allocated
    if weight_CD is not None and weight_CD.dtype != grad_weight.dtype:
        grad_weight[: spec.columns] = weight_CD
    if bias_C is not None:
        grad_bias[: spec.columns] = bias_C.div_(scale)


def _add_head_gradient(
    weight_cD: Tensor, grad_mc: Tensor, hidden_mD: Tensor, scale: Tensor
) -> None:
    """Add some tokens' share of a block of rows to the head's gradient: one block may write it,
    several add to it.
    """
    sum_cD = torch.empty(weight_cD.shape, dtype=torch.float32, device=weight_cD.device)
    multiply(sum_cD, grad_mc.t(), hidden_mD)
    weight_cD += sum_cD.div_(scale)
