"""The two operations of the one-pass kernels, over blocks of rows.

Nothing here waits for the device: the number of valid rows stays there. Beyond inputs, outputs and
statistics a call allocates

    of a block of rows: its hidden states, their float32 gradient, the state of the statistics, a
        ring of scratch tiles a program, and dL/dlogits of a chunk of tokens
    of the head's gradient, float32: a chunk of tokens, and all of it where a 16-bit head is trained
        over several blocks; and that of the bias

as `memory.py` adds up. G = dL/dlogits goes to a bounded buffer, and GEMMs make dH and dW of it.
To accumulate dH in the kernel would send a float32 row of the hidden width through atomics for
every tile: several times the traffic of G itself. No atomics: results are the same from run to run.

Shape suffixes: L layers, r rows of a block, m = L r, C the vocabulary, c tokens of a chunk, D a
hidden width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fdd_kernels.backends.triton.config import LaunchConfig
from fdd_kernels.backends.triton.gemm import multiply
from fdd_kernels.backends.triton.launch import launch
from fdd_kernels.backends.triton.memory import tiles_of_a_chunk
from fdd_kernels.backends.triton.one_pass.blocks import TiledProblem, configuration
from fdd_kernels.backends.triton.one_pass.grad import grad_launch
from fdd_kernels.backends.triton.one_pass.second_pass import divergence_launch
from fdd_kernels.backends.triton.one_pass.splits import merge_divergence_launch, merge_launch
from fdd_kernels.backends.triton.one_pass.stats import fields_of, stats_launch
from fdd_kernels.backends.triton.problem import zero_gradients
from fdd_kernels.backends.triton.scaling import gradient_scale
from fdd_kernels.lens.inputs import LensInputs
from fdd_kernels.lens.layout import Statistics
from fdd_kernels.lens.spec import LensSpec


def stats(inputs: LensInputs, spec: LensSpec, config: LaunchConfig | None = None) -> Statistics:
    """Compute the statistics; `config` None: with the configuration that is best for the call."""
    if config is None:
        run = lambda candidate: stats(inputs, spec, candidate)  # noqa: E731
        config = configuration("stats", inputs, spec, run)
    problem = TiledProblem(inputs, spec, config)
    shifts, requests, moments = statistics = problem.zero_statistics()
    table = problem.table
    fields = fields_of(problem.layers, table.slots, len(spec.moments))
    for block in problem.blocks():
        state = torch.empty(
            (block.splits, fields, block.rows), dtype=torch.float32, device=problem.device
        )
        launch(stats_launch(block, state))
        launch(merge_launch(block, state, shifts, requests, moments))
        if table.second_pass:
            sums = state.new_empty((block.splits, table.second_pass, 2, block.rows))
            launch(divergence_launch(block, sums, requests, shifts))
            launch(merge_divergence_launch(block, sums, requests))
    return statistics


def grad(
    inputs: LensInputs,
    spec: LensSpec,
    per_row: tuple[Tensor, ...],
    needed: list[bool],
    config: LaunchConfig | None = None,
) -> list[Tensor]:
    """Compute the gradients marked in `needed`; `config` as for `stats`."""
    per_row = tuple([t.contiguous() for t in per_row])
    if config is None:
        run = lambda candidate: grad(inputs, spec, per_row, needed, candidate)  # noqa: E731
        config = configuration("grad", inputs, spec, run)
    found = zero_gradients(inputs, needed)
    if not inputs.rows or not any(needed):
        return [g for g in found if g is not None]
    problem = TiledProblem(inputs, spec, config)
    *grad_hidden, grad_weight, grad_bias = found
    columns, head, device = spec.columns, problem.student, problem.device
    dtype = head.block_dtype
    scale = gradient_scale(dtype, spec, *per_row[1:])
    weight_CD = None if grad_weight is None else grad_weight[:columns]
    several = problem.block_rows < problem.rows
    if weight_CD is not None and weight_CD.dtype != torch.float32 and several:
        # Summed over blocks of rows, and rounded once.
        weight_CD = torch.zeros_like(weight_CD, dtype=torch.float32)
    bias_C = None
    if grad_bias is not None:
        bias_C = torch.zeros(columns, dtype=torch.float32, device=device)
    tiles_a_chunk = tiles_of_a_chunk(
        problem.block_rows,
        problem.layers,
        columns,
        head.width,
        dtype.itemsize,
        config.block_columns,
    )
    for block in problem.blocks():
        hidden_mD = block.student_LrD.flatten(0, 1)
        sum_mD = None
        if any(g is not None for g in grad_hidden):
            sum_mD = torch.zeros(
                (problem.layers * block.rows, head.width), dtype=torch.float32, device=device
            )
        # Zero where no row is valid: the kernel writes the tiles that have one.
        grad_Lrc = torch.zeros(
            (problem.layers, block.rows, tiles_a_chunk * config.block_columns),
            dtype=dtype,
            device=device,
        )
        for first_tile in range(0, problem.tiles, tiles_a_chunk):
            tiles = min(tiles_a_chunk, problem.tiles - first_tile)
            start = first_tile * config.block_columns
            stop = min(start + tiles * config.block_columns, columns)
            launch(grad_launch(block, grad_Lrc, per_row, scale, first_tile, tiles))
            grad_mc = grad_Lrc.flatten(0, 1)[:, : stop - start]
            if sum_mD is not None:
                multiply(sum_mD, grad_mc, head.weight[start:stop].to(dtype), accumulate=True)
            if weight_CD is not None:
                _add_head_gradient(weight_CD[start:stop], grad_mc, hidden_mD, scale)
            if bias_C is not None:
                bias_C[start:stop] += grad_mc.sum(0, dtype=torch.float32)
        if sum_mD is not None:
            sum_LrD = sum_mD.view(problem.layers, block.rows, -1)
            problem.put_back(grad_hidden, sum_LrD, block.first, scale)
            del sum_LrD
        # Before those of the next block are allocated.
        del block, hidden_mD, sum_mD, grad_Lrc, grad_mc
    if weight_CD is not None and weight_CD.dtype != grad_weight.dtype:
        grad_weight[:columns] = weight_CD
    if bias_C is not None:
        grad_bias[:columns] = bias_C.div_(scale)
    return [g for g in found if g is not None]


def _add_head_gradient(
    weight_cD: Tensor, grad_mc: Tensor, hidden_mD: Tensor, scale: Tensor
) -> None:
    """Add a chunk of tokens of a block's gradient of the head."""
    sum_cD = torch.empty(weight_cD.shape, dtype=torch.float32, device=weight_cD.device)
    multiply(sum_cD, grad_mc.t(), hidden_mD)
    weight_cD += sum_cD.div_(scale)
