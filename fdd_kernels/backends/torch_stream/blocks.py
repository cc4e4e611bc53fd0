"""Row blocks in plain PyTorch: logits of a block, the row function, gradients added up.

Shape suffixes: R rows, r rows of a block, V tokens compared, c tokens of a tile, D a hidden width.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from fdd_kernels.backends.torch_stream import tiling
from fdd_kernels.backends.torch_stream.attention_blocks import AttentionWalk
from fdd_kernels.backends.torch_stream.problem import TorchModel, TorchProblem
from fdd_kernels.common.sizes import GIB, MIB
from fdd_kernels.lens.inputs import LensInputs
from fdd_kernels.lens.row_blocks import MATRICES, RowBlock, RowSpec

# Of all matrices (r, V) of a row block; at least one row.
BLOCK_BYTES = {"cpu": 128 * MIB}
ACCELERATOR_BLOCK_BYTES = GIB
# Matrices of these bytes stay in a CPU's cache from one elementwise pass to the next. A block of
# fewer than GEMM_ROWS rows would read its head, and add to its gradient, too often.
CACHED_BYTES = {"cpu": 8 * MIB}
GEMM_ROWS, ATTENTION_ROWS = 256, 64
# Beside a row function's: the student's logits before it, for the derivative of a soft cap.
_OWN_MATRICES = 1


def block_rows(
    columns: int,
    itemsize: int,
    device_type: str,
    matrices: float = MATRICES,
    least: int = GEMM_ROWS,
) -> int:
    """Choose the rows of a block, for a row function that holds `matrices` of them.

    They fit the cache, but are not fewer than `least`; they always fit `BLOCK_BYTES`.
    """
    row_bytes = (matrices + _OWN_MATRICES) * columns * itemsize
    budget = BLOCK_BYTES.get(device_type, ACCELERATOR_BLOCK_BYTES)
    cached = CACHED_BYTES.get(device_type, budget)
    return max(1, int(min(budget // row_bytes, max(least, cached // row_bytes))))


def row_blocks(
    inputs: LensInputs,
    per_row: list[Tensor],
    shared: list[Tensor],
    spec: RowSpec,
    upstream: Tensor | None,
    needed: list[bool],
) -> list[Tensor]:
    """Compute the row function of every valid row.

    Beside one block it allocates the results, and a tile of a 16-bit head in the working dtype.

    Args:
        inputs: one hidden state of the student; of the teachers one each, or none. The heads of
            several teachers lie side by side along their widths.
        per_row, shared: tensors (R, ...) and whole tensors for the row function.
        upstream: (R, outputs), with which gradients are formed; None for none.
        needed: which gradients of [student_hidden, student_weight, student_bias] are formed.

    Returns:
        The values (R, outputs), 0 where a row is not valid, and the gradients of
        sum(upstream * values) in the dtype of sums, unrounded.
    """
    walk = (AttentionWalk if spec.of_attention else _HeadWalk)(inputs, per_row, shared, spec)
    dtype = inputs.statistics_dtype
    values = inputs.student_weight.new_zeros((inputs.rows, spec.outputs), dtype=dtype)
    student = (*inputs.student_hidden, inputs.student_weight, inputs.student_bias)
    gradients = [
        torch.zeros_like(t, dtype=dtype, memory_format=torch.contiguous_format) if need else None
        for t, need in zip(student, needed if upstream is not None else [False] * 3)
    ]
    least = ATTENTION_ROWS if spec.of_attention else GEMM_ROWS
    size = block_rows(walk.columns, dtype.itemsize, inputs.device.type, spec.matrices, least)
    for rows, place in walk.places(size):
        block = walk.block(place, upstream is not None)
        values[rows], grad_of = spec.of_block(block)
        if upstream is None:
            continue
        grad_u = grad_of(upstream[rows])
        del block, grad_of
        walk.add_gradients(place, grad_u, *gradients)
        del grad_u  # before the next block
    return [values, *[g for g in gradients if g is not None]]


class _HeadWalk:
    """The blocks of rows of which heads make logits; `columns` is the largest vocabulary."""

    def __init__(
        self, inputs: LensInputs, per_row: list[Tensor], shared: list[Tensor], spec: RowSpec
    ):
        self.problem, self.per_row, self.shared = TorchProblem(inputs, spec.head), per_row, shared
        self.models = [self.problem.student, *_teachers(self.problem)]
        self.widths = [spec.head.columns, *[len(model.weight) for model in self.models[1:]]]
        self.columns, self.before = max(self.widths), None

    def places(self, size: int) -> Iterator[tuple[Tensor | slice, Tensor | slice]]:
        """Yield blocks of at most `size` rows: which rows of the results, and where it lies."""
        for rows, _, _ in self.problem.row_blocks(size):
            yield rows, rows

    def block(self, rows: Tensor | slice, asks_gradient: bool) -> RowBlock:
        """Compute the logits of a block."""
        compute = [
            functools.partial(_logits, model, rows, columns)
            for model, columns in zip(self.models, self.widths)
        ]
        logits = [of_model() for of_model in compute[:2]]
        if self.problem.student.softcap is not None and asks_gradient:
            self.before = logits[0].clone()
        more = tuple([t[rows] for t in self.per_row]), tuple(self.shared), tuple(compute[2:])
        return RowBlock(*(*logits, None)[:2], *more, asks_gradient)

    def add_gradients(
        self, rows: Tensor | slice, grad_u: Tensor, *gradients: Tensor | None
    ) -> None:
        """Add a block's gradients, from dL/du (r, V), to those that are needed."""
        student = self.problem.student
        grad_x, self.before = student.chain(grad_u, self.before), None
        _add_gradients(student, rows, grad_x, *gradients)


def _teachers(problem: TorchProblem) -> list[TorchModel]:
    """List the teachers, one per hidden state; several have plain scores, without bias or cap."""
    teacher, start, models = problem.teacher, 0, []
    if len(teacher.hidden) == 1:
        return [teacher]
    for hidden in teacher.hidden:
        stop = start + hidden.shape[1]
        weight = teacher.weight[:, start:stop]
        models.append(TorchModel([hidden], weight, None, 1.0, None, teacher.dtype))
        start = stop
    return models


def _tiles(model: TorchModel, columns: int) -> Iterator[slice]:
    """Yield the tiles of a head: one where it need not be converted."""
    size = columns
    if model.weight.dtype != model.dtype:
        size = max(1, tiling.OPERAND_BYTES // (model.dtype.itemsize * model.weight.shape[1]))
    for first in range(0, columns, size):
        yield slice(first, min(first + size, columns))


def logits_of_rows(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    dtype: torch.dtype,
) -> Tensor:
    """Compute the logits (r, V) of hidden states (r, D), a model beside the call's two."""
    model = TorchModel([hidden], weight, bias, logit_scale, softcap, dtype)
    return _logits(model, slice(None), len(weight))


def _logits(model: TorchModel, rows: Tensor | slice, columns: int) -> Tensor:
    """Compute the logits of a row block, (r, V), a new tensor."""
    hidden_1rD = model.rows(rows)
    tiles = list(_tiles(model, columns))
    if len(tiles) == 1:
        return model.logits(hidden_1rD, model.weight_tile(tiles[0]), tiles[0])[0]
    logits = hidden_1rD.new_empty((hidden_1rD.shape[1], columns))
    for tile in tiles:
        logits[:, tile] = model.logits(hidden_1rD, model.weight_tile(tile), tile)[0]
    return logits


def _add_gradients(
    student: TorchModel,
    rows: Tensor | slice,
    grad_x: Tensor,
    grad_hidden: Tensor | None,
    grad_weight: Tensor | None,
    grad_bias: Tensor | None,
) -> None:
    """Add a block's gradients, from dL/dx (r, V) with x = h W^T + b, to those that are needed."""
    columns = grad_x.shape[1]
    if grad_bias is not None:
        grad_bias[:columns] += grad_x.sum(0)
    if grad_hidden is None and grad_weight is None:
        return
    hidden_rD, of_block = student.rows(rows)[0], 0.0
    for tile in _tiles(student, columns):
        if grad_hidden is not None:
            of_block = of_block + grad_x[:, tile] @ student.weight_tile(tile)
        if grad_weight is not None:
            grad_weight[tile].addmm_(grad_x[:, tile].T, hidden_rD)
    if grad_hidden is not None:
        grad_hidden[rows] = of_block
