"""Both operations at once: the logits of one row block after another are cached between statistics
and gradients, so that each head GEMM runs once.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fdd_kernels.backends.cpu import extension, tiling
from fdd_kernels.backends.cpu.problem import (
    F32,
    low_halves,
    new_gradients,
    place,
    problem_of,
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
    student_layers, teacher_layers = inputs.depths
    return tiling.block_rows(
        (student_layers, teacher_layers if spec.needs_teacher else 0),
        inputs.rows if inputs.valid is None else int(inputs.valid.sum()),
        spec.columns,
        weight.shape[1],
        head_sum_bytes=tiling.HALF * weight.numel()
        if needed[-2] and weight.dtype != torch.float32
        else 0,
        threads=torch.get_num_threads(),
    )


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
    rows, layers = valid_rows(inputs), len(inputs.student_hidden)
    width = inputs.student_hidden[0].shape[1]
    grad_hidden, grad_weight, grad_bias = new_gradients(inputs, spec, needed, rows)
    low = low_halves(grad_weight) if block_rows < len(rows) else None
    tiles = tiling.cached_tiles(block_rows, spec.columns, torch.get_num_threads())
    in_gradient = False, False
    if grad_weight is not None and grad_weight.dtype == torch.float32 and block_rows >= len(rows):
        layers_of_both = layers, inputs.depths[1] if spec.needs_teacher else 0
        in_gradient = tiling.in_gradient(
            layers_of_both, len(rows), spec.columns, tiles.columns, width
        )
    memory = None
    statistics = zero_statistics(inputs, spec)
    per_row = (*statistics, *[torch.zeros_like(t) for t in statistics[1:]])
    blocks = rows.split(block_rows) if len(rows) else ()
    for block in blocks:
        problem = problem_of(inputs, spec, block, tiles, in_gradient)
        if memory is None:  # the first block is the largest
            memory = extension.kernels.cache_memory(problem)
        extension.kernels.stats_and_cache(problem, memory, grad_weight, *statistics)
        of_block = upstream_of(block, *[t[..., block] for t in statistics])
        for whole, part in zip(per_row, of_block, strict=True):
            whole[..., block] = part
        sums = torch.empty(layers, len(block), width, **F32) if any(needed[:layers]) else None
        first, last = block is blocks[0], block is blocks[-1]
        extension.kernels.grad_of_cached(
            problem, memory, *per_row, sums, grad_weight, grad_bias, low, first, last
        )
        if sums is not None:
            place(sums, block, grad_hidden)
    return wanted(inputs, grad_hidden, grad_weight, grad_bias), Statistics(*per_row[:3])
