"""Both operations at once: the logits of one row block after another are cached between statistics
and gradients, so that each head GEMM runs once.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fdd_kernels.backends.cpu import extension, tiling
from fdd_kernels.backends.cpu.problem import (
    low_halves,
    new_gradients,
    place,
    problem_of,
    teacher_in_place,
    valid_rows,
    wanted,
    zero_statistics,
)
from fdd_kernels.lens.inputs import LensInputs
from fdd_kernels.lens.layout import Statistics
from fdd_kernels.lens.spec import LensSpec


def cached_rows(inputs: LensInputs, spec: LensSpec, needed: list[bool]) -> int:
    """Choose the rows of a block (`tiling.block_rows`); 0 where the call streams.

    0 also for float16: its gradients would underflow before a loss scaler has scaled them.
    """
    weight = inputs.student_weight
    trained = [
        t for t, need in zip((*inputs.student_hidden, weight, inputs.student_bias), needed) if need
    ]
    if (
        not trained
        or inputs.statistics_dtype == torch.float64
        or any(t.dtype == torch.float16 for t in trained)
    ):
        return 0
    return tiling.block_rows(
        _depths(inputs, spec),
        inputs.rows if inputs.valid is None else int(inputs.valid.sum()),
        spec.columns,
        weight.shape[1],
        head_sum_bytes=tiling.HALF * weight.numel()
        if needed[-2] and weight.dtype != torch.float32
        else 0,
        threads=torch.get_num_threads(),
        narrow=_narrow(inputs, spec),
    )


def _depths(inputs: LensInputs, spec: LensSpec) -> tuple[int, int]:
    """Count the layers of both models whose logits are cached."""
    student, teacher = inputs.depths
    return student, 0 if not spec.needs_teacher or teacher_in_place(inputs, spec) else teacher


def _narrow(inputs: LensInputs, spec: LensSpec) -> bool:
    """Say whether an operand of a GEMM is not float32."""
    operands = [*inputs.student_hidden, inputs.student_weight]
    if spec.needs_teacher and inputs.teacher_weight is not None:
        operands += [*inputs.teacher_hidden, inputs.teacher_weight]
    return any(t.dtype != torch.float32 for t in operands)


def stats_and_grad(
    inputs: LensInputs,
    spec: LensSpec,
    block_rows: int,
    upstream_of: Callable[..., tuple[Tensor, ...]],
    needed: list[bool],
    refine: bool,
) -> tuple[list[Tensor], Statistics]:
    """Compute statistics, upstream gradients and gradients of one block of valid rows after
    another.

    See `Backend` for `upstream_of` and the return values. `refine` changes nothing: no VALUE here
    is replaced by a better one.
    """
    rows, width = valid_rows(inputs), inputs.student_hidden[0].shape[1]
    wants_hidden = any(needed[: len(inputs.student_hidden)])
    grad_hidden, grad_weight, grad_bias = new_gradients(inputs, spec, needed, rows)
    low = low_halves(grad_weight) if block_rows < len(rows) else None
    depths = _depths(inputs, spec)
    whole_rows = tiling.whole_rows(
        depths, len(rows), spec.columns, width, narrow=_narrow(inputs, spec)
    )
    tiles = tiling.cached_tiles(
        block_rows, spec.columns, torch.get_num_threads(), whole=block_rows == whole_rows
    )
    in_gradient = False, False
    if (
        grad_weight is not None
        and grad_weight.dtype == torch.float32
        and block_rows >= len(rows)
        and not tiles.whole
    ):
        in_gradient = tiling.in_gradient(depths, len(rows), spec.columns, tiles.columns, width)
    in_place = teacher_in_place(inputs, spec)
    memory = None
    statistics = zero_statistics(inputs, spec)
    per_row = (*statistics, *[torch.zeros_like(t) for t in statistics[1:]])
    blocks = rows.split(block_rows) if len(rows) else ()
    for block in blocks:
        problem = problem_of(inputs, spec, block, tiles, in_gradient, in_place=in_place)
        if memory is None:  # the first block is the largest
            memory = extension.kernels.logits_memory(problem)
        extension.kernels.stats_and_cache(problem, memory, grad_weight, *statistics)
        of_block = upstream_of(block, *[t[..., block] for t in statistics])
        for of_rows, part in zip(per_row, of_block, strict=True):
            of_rows[..., block] = part
        first, last = block is blocks[0], block is blocks[-1]
        sums = extension.kernels.grad_of_cached(
            problem, memory, *per_row, wants_hidden, grad_weight, grad_bias, low, first, last
        )
        if sums is not None:
            place(sums, block, grad_hidden)
            del sums  # before the next block's are allocated
    return wanted(inputs, grad_hidden, grad_weight, grad_bias), Statistics(*per_row[:3])
