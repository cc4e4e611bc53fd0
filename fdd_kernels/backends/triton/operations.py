"""The two operations: blocks of rows on the host, the kernels within them.

Nothing here waits for the device: how many rows count stays there. Beyond inputs, outputs and statistics a call allocates
the hidden states of a block of rows (BLOCK_BYTES with their float32 gradient), dL/dx of that block and some columns
(GRAD_BYTES), those columns of the head and of its gradient (HEAD_BYTES), one scratch tile ring a program, and, where a
low-precision head is trained over several blocks of rows, a float32 gradient of it. No atomics: results are the same from run
to run.

Shape suffixes: L layers, R rows, r rows of a block, C columns, c columns of a chunk, D a hidden width.
"""

from __future__ import annotations

import contextlib

import torch
import triton
from torch import Tensor

from fdd_kernels.backends import torch_stream
from fdd_kernels.backends.triton import interpreting
from fdd_kernels.backends.triton.autotune import tuned
from fdd_kernels.backends.triton.config import LaunchConfig, architecture_of, f32_precision, multiprocessors
from fdd_kernels.backends.triton.divergence import launch_divergence
from fdd_kernels.backends.triton.grad import launch_grad
from fdd_kernels.backends.triton.merge import launch_merge, launch_merge_divergence
from fdd_kernels.backends.triton.rows import move_rows, order_of_rows
from fdd_kernels.backends.triton.stats import fields_of, launch_stats
from fdd_kernels.backends.triton.tables import Table, table_for
from fdd_kernels.spec import (
    LSE_S,
    M_DD,
    M_SS,
    M_ST,
    M_TT,
    MEAN_S,
    MOMENT_STATS,
    READ_STATS,
    SLOPE,
    VALUE,
    LensInputs,
    LensSpec,
)

MIB = 2**20
BLOCK_BYTES = 256 * MIB
GRAD_BYTES = 128 * MIB
HEAD_BYTES = 128 * MIB
# What the scaled bounds on float16 operands come to: far from overflow, and from underflow.
LARGEST_GRAD = LARGEST_OPERAND = 2.0**8


class Head:
    """One model's head as the kernels read it, and its hidden states."""

    def __init__(self, hidden: list[Tensor], weight: Tensor | None, bias: Tensor | None, scale: float, cap: float | None):
        self.hidden, self.width = hidden, hidden[0].shape[-1]
        self.dtype = hidden[0].dtype
        for tensor in (*hidden[1:], *(() if weight is None else (weight,))):
            self.dtype = torch.promote_types(self.dtype, tensor.dtype)
        self.narrow = self.dtype != torch.float32
        # Triton's interpreter multiplies the bit patterns of bfloat16; in float32 the products are the same.
        self.block_dtype = torch.float32 if interpreting() and self.dtype == torch.bfloat16 else self.dtype
        # The kernels read a head along its width; any other layout is copied once a call.
        self.weight = weight if weight is None or weight.stride(1) == 1 else weight.contiguous()
        self.bias = None if bias is None else bias.to(torch.float32).contiguous()
        self.scale, self.cap = scale, cap

    def arguments(self, side: str, block_hidden: Tensor, filler: Tensor) -> dict:
        weight = block_hidden if self.weight is None else self.weight
        stride = self.width if self.weight is None else self.weight.stride(0)
        return {
            f"{side}_hidden": block_hidden,
            f"{side}_weight": weight,
            f"{side}_bias": filler if self.bias is None else self.bias,
            f"{side}_width": self.width,
            f"{side}_stride": stride,
            f"{side}_scale": float(self.scale),
            f"{side}_cap": float(self.cap or 0.0),
            f"{side}_has_bias": int(self.bias is not None),
        }


class Problem:
    """One call: its inputs, their order, and how the work is cut."""

    def __init__(self, inputs: LensInputs, spec: LensSpec, config: LaunchConfig, architecture: str):
        self.spec, self.config, self.device, self.architecture = spec, config, inputs.device, architecture
        self.rows, self.layers = inputs.rows, len(inputs.student_hidden)
        self.student = Head(
            inputs.student_hidden, inputs.student_weight, inputs.student_bias, spec.student_logit_scale, spec.student_softcap
        )
        self.teacher = Head(
            inputs.teacher_hidden, inputs.teacher_weight, inputs.teacher_bias, spec.teacher_logit_scale, spec.teacher_softcap
        )
        self.table: Table = table_for(spec, self.layers, self.device)
        self.order, self.count = order_of_rows(inputs.valid, self.rows, self.device)
        # Without labels any integers do: no read looks at them.
        self.labels = self.order if inputs.labels is None else inputs.labels.to(torch.int32)[self.order]
        self.units = multiprocessors(self.device, architecture == "interpreter")
        self.zero = torch.zeros(1, dtype=torch.float32, device=self.device)
        self.tiles = triton.cdiv(spec.columns, config.block_columns)
        # The student's also as an operand in float16 and as a float32 sum of their gradient.
        student_bytes = self.student.dtype.itemsize + 4 + (2 if self.student.narrow else 0)
        bytes_a_row = self.layers * (
            self.student.width * student_bytes + (self.teacher.width * self.teacher.dtype.itemsize if spec.needs_teacher else 0)
        )
        largest = max(1, BLOCK_BYTES // (bytes_a_row * config.block_rows))
        row_tiles = triton.cdiv(self.rows, config.block_rows)
        blocks = triton.cdiv(row_tiles, largest)
        self.block_rows = triton.cdiv(row_tiles, blocks) * config.block_rows

    def blocks(self):
        for first in range(0, self.rows, self.block_rows):
            yield Block(self, first)


class Block:
    """A block of rows: the hidden states of those that count, side by side, padded with zeros to whole tiles."""

    def __init__(self, problem: Problem, first: int):
        self.problem, self.first, self.rows = problem, first, problem.block_rows
        self.spec, self.table, self.config = problem.spec, problem.table, problem.config
        self.order, self.count, self.labels = problem.order, problem.count, problem.labels
        self.row_tiles = self.rows // self.config.block_rows
        self.student_LrD = self._gather(problem.student)
        self.teacher_LrD = self._gather(problem.teacher) if self.spec.needs_teacher else self.student_LrD
        # Ranges of columns, so that the device is full however few the rows.
        wanted = triton.cdiv(self.config.programs * problem.units, self.row_tiles)
        self.tiles_per_range = triton.cdiv(problem.tiles, min(wanted, problem.tiles))
        self.ranges = triton.cdiv(problem.tiles, self.tiles_per_range)

    def _gather(self, head: Head) -> Tensor:
        block_LrD = torch.empty(
            (self.problem.layers, self.rows, head.width), dtype=head.block_dtype, device=self.problem.device
        )
        for hidden_RD, block_rD in zip(head.hidden, block_LrD):
            move_rows(hidden_RD, block_rD, self.order, self.count, self.first, into_block=True)
        return block_LrD

    def programs(self, column_parts: int) -> int:
        """Programs for row tiles x `column_parts` items of work: each walks its share."""
        return min(self.row_tiles * column_parts, self.config.programs * self.problem.units)

    def scratch(self, column_parts: int, ring: int) -> Tensor:
        """Tiles of both models for `ring` layers, for every program."""
        elements = self.programs(column_parts) * ring * 2 * self.config.block_rows * self.config.block_columns
        return torch.empty(elements, dtype=torch.float32, device=self.problem.device)

    def arguments(self) -> dict:
        """What the three heavy kernels have in common."""
        problem, config = self.problem, self.config
        teacher = problem.teacher if self.spec.needs_teacher else problem.student
        wide = torch.float32 in (problem.student.dtype, teacher.dtype)
        return {
            **problem.student.arguments("student", self.student_LrD, problem.zero),
            **teacher.arguments("teacher", self.teacher_LrD, problem.zero),
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


def _on(device: torch.device):
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _configured(operation: str, inputs: LensInputs, spec: LensSpec, run):
    """Run `run(config, architecture)` with the default configuration, or the one that autotuning found."""
    architecture = architecture_of(inputs.device, interpreting())
    tensors = [*inputs.student_hidden, inputs.student_weight]
    if spec.needs_teacher:
        tensors += [*inputs.teacher_hidden, *(() if inputs.teacher_weight is None else (inputs.teacher_weight,))]
    mixed = len({t.dtype for t in tensors}) > 1
    dtype = torch.float32 if mixed else tensors[0].dtype
    widths = inputs.student_hidden[0].shape[-1], inputs.teacher_hidden[0].shape[-1] if spec.needs_teacher else 0
    shape = (inputs.rows, spec.columns, *widths)
    with _on(inputs.device):
        config = tuned(operation, shape, dtype, architecture, lambda config: run(config, architecture), mixed=mixed)
        return run(config, architecture)


def stats(inputs: LensInputs, spec: LensSpec) -> tuple[Tensor, Tensor, Tensor]:
    """Statistics: pivots (2, L, R), reads (reads, 4, R), moments (moments, 7, R); float64 inputs go to "torch"."""
    if inputs.statistics_dtype == torch.float64:
        return torch_stream.stats(inputs, spec)

    def new(*shape: int) -> Tensor:
        return torch.zeros((*shape, inputs.rows), dtype=torch.float32, device=inputs.device)

    def run(config: LaunchConfig, architecture: str) -> tuple[Tensor, Tensor, Tensor]:
        layers = len(inputs.student_hidden)
        found = new(2, layers), new(len(spec.reads), READ_STATS), new(len(spec.moments), MOMENT_STATS)
        if inputs.rows:
            _stats(Problem(inputs, spec, config, architecture), *found)
        return found

    return _configured("stats", inputs, spec, run)


def _stats(problem: Problem, pivots: Tensor, reads: Tensor, moments: Tensor) -> None:
    fields = fields_of(problem.layers, problem.table.slots, len(problem.spec.moments))
    for block in problem.blocks():
        state = torch.empty((block.ranges, fields, block.rows), dtype=torch.float32, device=problem.device)
        launch_stats(block, state)
        launch_merge(block, state, pivots, reads, moments)
        if problem.table.second_pass:
            sums = state.new_empty((block.ranges, problem.table.second_pass, 2, block.rows))
            launch_divergence(block, sums, reads, pivots)
            launch_merge_divergence(block, sums, reads)


def grad(inputs: LensInputs, spec: LensSpec, per_row: tuple[Tensor, ...], needed: list[bool]) -> list[Tensor]:
    """Gradients of [*student_hidden, student_weight, student_bias] marked in `needed`; float64 inputs go to "torch".

    `per_row` are the three statistics and the upstream gradients of the last two.
    """
    if inputs.statistics_dtype == torch.float64:
        return torch_stream.grad(inputs, spec, per_row, needed)
    outputs = (*inputs.student_hidden, inputs.student_weight, inputs.student_bias)
    per_row = tuple([t.contiguous() for t in per_row])

    def run(config: LaunchConfig, architecture: str) -> list[Tensor]:
        found = [torch.zeros_like(t, memory_format=torch.contiguous_format) if n else None for t, n in zip(outputs, needed)]
        if inputs.rows and any(needed):
            _grad(Problem(inputs, spec, config, architecture), per_row, found[:-2], *found[-2:])
        return [g for g in found if g is not None]

    return _configured("grad", inputs, spec, run)


def _grad(problem: Problem, per_row, grad_hidden: list[Tensor | None], grad_weight: Tensor | None,
          grad_bias: Tensor | None) -> None:  # fmt: skip
    spec, config = problem.spec, problem.config
    head = problem.student
    grad_dtype = torch.float16 if head.narrow else torch.float32
    scale = _grad_scale(problem, per_row)
    weight = head.weight[: spec.columns]
    weight_scale = _operand_scale(weight) if head.narrow else scale.new_ones(())
    weight_CD = None if grad_weight is None else grad_weight[: spec.columns]
    if weight_CD is not None and head.narrow and problem.block_rows < problem.rows:
        weight_CD = torch.zeros_like(weight, dtype=torch.float32)  # it is summed over blocks of rows, and rounded once
    bias_C = None if grad_bias is None else torch.zeros(spec.columns, dtype=torch.float32, device=problem.device)
    want_hidden = any(g is not None for g in grad_hidden)
    tile_bytes = problem.layers * problem.block_rows * config.block_columns * grad_dtype.itemsize
    head_bytes = head.width * config.block_columns * (4 + (2 if head.narrow else 0))
    tiles_a_chunk = min(max(1, min(GRAD_BYTES // tile_bytes, HEAD_BYTES // head_bytes)), problem.tiles)
    for block in problem.blocks():
        hidden_mD = block.student_LrD.flatten(0, 1)
        hidden_scale = _operand_scale(hidden_mD) if head.narrow else weight_scale
        hidden_mD = _operand(hidden_mD, hidden_scale, grad_dtype) if grad_weight is not None else None
        sum_mD = None
        if want_hidden:
            sum_mD = torch.zeros((problem.layers * block.rows, head.width), dtype=torch.float32, device=problem.device)
        # Zero where no row counts: the kernel writes the tiles that have one.
        grad_Lrc = torch.zeros(
            (problem.layers, block.rows, tiles_a_chunk * config.block_columns), dtype=grad_dtype, device=problem.device
        )
        for first_tile in range(0, problem.tiles, tiles_a_chunk):
            tiles = min(tiles_a_chunk, problem.tiles - first_tile)
            start = first_tile * config.block_columns
            stop = min(start + tiles * config.block_columns, spec.columns)
            launch_grad(block, grad_Lrc, per_row, scale, first_tile, tiles)
            grad_mc = grad_Lrc.flatten(0, 1)[:, : stop - start]
            if sum_mD is not None:
                add_product(sum_mD, grad_mc, _operand(weight[start:stop], weight_scale, grad_dtype))
            if grad_weight is not None:
                sum_cD = torch.zeros((stop - start, head.width), dtype=torch.float32, device=problem.device)
                add_product(sum_cD, grad_mc.T, hidden_mD)
                sum_cD /= scale * hidden_scale
                # One block of rows may write it; several add to it.
                weight_CD[start:stop] += sum_cD
            if bias_C is not None:
                bias_C[start:stop] += grad_mc.sum(0, dtype=torch.float32)
        if sum_mD is not None:
            for grad_RD, sum_rD in zip(grad_hidden, sum_mD.view(problem.layers, block.rows, -1)):
                if grad_RD is not None:
                    move_rows(
                        grad_RD, sum_rD, block.order, block.count, block.first, into_block=False, scale=scale * weight_scale
                    )
    if weight_CD is not None and weight_CD.dtype != grad_weight.dtype:
        grad_weight[: spec.columns] = weight_CD
    if bias_C is not None:
        grad_bias[: spec.columns] = bias_C.div_(scale)


def add_product(sum_mn: Tensor, a_mk: Tensor, b_kn: Tensor) -> None:
    """sum += a b, in float32 whatever a and b are.

    PyTorch multiplies low-precision matrices into a float32 sum on CUDA devices alone; elsewhere they are widened first.
    """
    if a_mk.dtype == b_kn.dtype == torch.float32:
        sum_mn.addmm_(a_mk, b_kn)
    elif sum_mn.is_cuda and torch.version.hip is None and hasattr(torch.ops.aten.addmm, "dtype_out"):
        torch.ops.aten.addmm.dtype_out(sum_mn, a_mk, b_kn, torch.float32, out=sum_mn)
    else:
        sum_mn.addmm_(a_mk.float(), b_kn.float())


def _operand(tensor: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """An operand of a product times the power of two that its dtype asks for; float32 ones are taken as they are."""
    if dtype == torch.float32:
        return tensor
    return torch.mul(tensor, scale, out=torch.empty_like(tensor, dtype=dtype))


def _operand_scale(tensor: Tensor) -> Tensor:
    """A power of two (0-dim, on the device) that takes the largest of a bfloat16 operand to about LARGEST_OPERAND.

    Times it, the operand fits float16: its eight bits are kept wherever it is above 2^-22 of its largest.
    """
    if tensor.dtype == torch.float16:
        return torch.ones((), dtype=torch.float32, device=tensor.device)
    largest = torch.linalg.vector_norm(tensor.detach(), torch.inf).float().nan_to_num(1.0, 1.0)
    return torch.exp2(torch.log2(LARGEST_OPERAND / largest.clamp(min=2.0**-100)).floor())


def _grad_scale(problem: Problem, per_row) -> Tensor:
    """(1,) on the device: the power of two by which dL/dx is multiplied on its way through float16.

    16-bit products see dL/dx as float16, whatever the inputs are: three bits more than bfloat16, at the same speed, and it
    is dL/dx whose rounding the gradients show. But float16 has no room for gradients of 1e-8, so a bound on |dL/dx| from
    the per-row statistics (|s - mean| is at most sqrt(M_SS)) is brought to LARGEST_GRAD.
    """
    one = torch.ones(1, dtype=torch.float32, device=problem.device)
    if problem.student.dtype == torch.float32:
        return one
    _, reads, moments, grad_reads, grad_moments = per_row
    spec = problem.spec
    root = moments.clamp(min=0).sqrt()
    bound_R = (2 * grad_moments[:, M_SS].abs() * root[:, M_SS] + grad_moments[:, M_ST].abs() * root[:, M_TT]).sum(0)
    bound_R += (2 * grad_moments[:, M_DD].abs() * root[:, M_DD] + grad_moments[:, MEAN_S].abs()).sum(0)
    bound_R += (grad_reads[:, VALUE].abs() * (1 + reads[:, SLOPE].abs()) + grad_reads[:, LSE_S].abs()).sum(0)
    steepest = spec.student_logit_scale * max(1 / t for t in (spec.moment_temperature, *(r.temperature for r in spec.reads)))
    bound = (bound_R.amax() * steepest).nan_to_num(1.0, 1.0).clamp(min=2.0**-100)
    return torch.exp2(torch.log2(LARGEST_GRAD / bound).floor()).reshape(1)
