"""How a call is cut into tiles, splits of the vocabulary and blocks of rows.

Shape suffixes: L layers, r rows of a block, D a hidden width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import triton
from torch import Tensor

from fdd_kernels.backends.triton import config
from fdd_kernels.backends.triton.autotune import tuned
from fdd_kernels.backends.triton.memory import rows_of_a_block
from fdd_kernels.backends.triton.problem import Head, Problem
from fdd_kernels.lens.inputs import LensInputs
from fdd_kernels.lens.spec import LensSpec


def configuration(
    operation: str, inputs: LensInputs, spec: LensSpec, run: Callable
) -> config.LaunchConfig:
    """Choose the launch configuration of a call: the default, or the one that autotuning found.

    `run(config)` is timed for the latter.
    """
    tensors = [*inputs.student_hidden, inputs.student_weight]
    if spec.needs_teacher:
        tensors += inputs.teacher_hidden
        tensors += () if inputs.teacher_weight is None else (inputs.teacher_weight,)
    mixed = len({t.dtype for t in tensors}) > 1
    widths = (
        inputs.student_hidden[0].shape[-1],
        inputs.teacher_hidden[0].shape[-1] if spec.needs_teacher else 0,
    )
    return tuned(
        operation,
        (inputs.rows, spec.columns, *widths),
        torch.float32 if mixed else tensors[0].dtype,
        config.architecture_of(inputs.device),
        run,
        mixed=mixed,
        work=f"{len(inputs.student_hidden)}:{spec.encode()[0]}",
    )


def _head_arguments(head: Head, side: str, block_hidden: Tensor, filler: Tensor) -> dict:
    """Return a head as the kernels take it; in feature space its hidden states stand in."""
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

    def __init__(self, inputs: LensInputs, spec: LensSpec, launch_config: config.LaunchConfig):
        super().__init__(inputs, spec)
        self.config = launch_config
        self.architecture = config.architecture_of(self.device)
        self.units = config.multiprocessors(self.device)
        self.zero = torch.zeros(1, dtype=torch.float32, device=self.device)
        self.tiles = triton.cdiv(spec.columns, launch_config.block_columns)
        teacher = (self.teacher.width, self.teacher.dtype.itemsize) if spec.needs_teacher else None
        student = (self.student.width, self.student.dtype.itemsize)
        self.block_rows = rows_of_a_block(
            self.rows, self.layers, student, teacher, launch_config.block_rows
        )

    def blocks(self) -> Iterator[RowBlock]:
        """Walk over the blocks of rows."""
        for first in range(0, self.rows, max(self.block_rows, 1)):
            yield RowBlock(self, first)


class RowBlock:
    """A block of rows: hidden states of its valid rows side by side, then zeros to whole tiles."""

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
        # Splits of the vocabulary, so that the device is full however few the rows.
        wanted = triton.cdiv(self.config.programs * problem.units, self.row_tiles)
        self.tiles_per_split = triton.cdiv(problem.tiles, min(wanted, problem.tiles))
        self.splits = triton.cdiv(problem.tiles, self.tiles_per_split)

    def programs(self, parts: int) -> int:
        """Count the programs for row tiles x `parts` of the vocabulary: each walks its share."""
        return min(self.row_tiles * parts, self.config.programs * self.problem.units)

    def scratch(self, parts: int, ring: int) -> Tensor:
        """Allocate tiles of both models for `ring` layers, for every program."""
        tile = self.config.block_rows * self.config.block_columns
        elements = self.programs(parts) * ring * 2 * tile
        return torch.empty(elements, dtype=torch.float32, device=self.problem.device)

    def arguments(self) -> dict:
        """Return the arguments that the three heavy kernels have in common."""
        problem, launch_config = self.problem, self.config
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
            "PRECISION": config.f32_precision(problem.architecture) if wide else "ieee",
            "BLOCK_R": launch_config.block_rows,
            "BLOCK_C": launch_config.block_columns,
            "BLOCK_D": launch_config.block_depth,
            "BLOCK_E": launch_config.block_strip,
        }

    def merge_arguments(self) -> dict:
        """Return the arguments that the kernels over splits have in common."""
        return {
            "table": self.table.values,
            "table_width": self.table.width,
            "count": self.count,
            "order": self.order,
            "first": self.first,
            "rows": self.rows,
        }
