"""The backend "cpu": the two operations in C++ (csrc/), for float32, bfloat16 and float16 inputs.

Rows are cut into blocks and columns into panels of tiles. A panel's head rows are converted to float32 and packed once
for all rows and layers; then row blocks run in parallel, each recomputing its tiles of both models for every layer.
Products are float32 with float32 sums, whatever the inputs are. This file cuts the work and owns all memory that grows
with the problem.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fdd_kernels import _extension
from fdd_kernels.backends import torch_stream
from fdd_kernels.spec import MOMENT_STATS, NLL, READ_STATS, LensInputs, LensSpec

MIB = 2**20
FLOAT = 4
TILE_COLUMNS = 128
TILE_BYTES = MIB // 2  # both models' values of all layers: well inside the second cache level of a core
PACK_BYTES = 8 * MIB  # both heads' rows of a panel
GRADIENT_BYTES = 24 * MIB  # dL/dlogits of a panel for all rows and layers
HIDDEN_BYTES = 48 * MIB  # float32 sums of the hidden states' gradients where their dtype is narrower
WEIGHT_BYTES = 32 * MIB  # float32 sums of the head's gradient where its dtype is narrower


@dataclass(frozen=True)
class Tiles:
    """Rows and columns of a tile, and columns of a panel."""

    rows: int
    columns: int
    panel: int


def choose_tiles(layers: int, rows: int, columns: int, packed_width: int, threads: int, *, backward: bool) -> Tiles:
    """Tile sizes that keep values in a core's cache, every thread busy and every buffer within its budget.

    A budget is exceeded only by a panel of the smallest tile, 16 columns: gradients of more than 78,000 rows of 5 layers.
    """
    tile_columns = min(TILE_COLUMNS, _round_up(columns, 16))
    most_columns = GRADIENT_BYTES // (FLOAT * layers * max(rows, 1)) if backward else columns
    if most_columns < tile_columns:
        tile_columns = max(16, most_columns // 16 * 16)
    cached_rows = TILE_BYTES // (2 * FLOAT * layers * tile_columns)
    # At least two blocks a thread where there are rows enough, so that none waits long for the others.
    tile_rows = max(8, min(cached_rows, 128, _round_up(-(-rows // (2 * threads)), 8)))
    panel = min(PACK_BYTES // (FLOAT * max(packed_width, 1)), most_columns)
    # A whole number of tiles for every thread, since dW is reduced tile by tile.
    panel = max(tile_columns, panel // tile_columns * tile_columns)
    return Tiles(tile_rows, tile_columns, min(panel, _round_up(columns, tile_columns)))


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def unavailable(device: torch.device) -> str | None:
    """Why these kernels cannot run on `device`, and the remedy."""
    if device.type != "cpu":
        return f'its kernels run on the CPU, not on "{device}"; use backend="auto"'
    return _extension.why_missing


def _problem(inputs: LensInputs, spec: LensSpec, rows: Tensor, *, backward: bool):
    """The C++ side's view of one call, restricted to the given rows."""
    student_width = inputs.student_hidden[0].shape[1]
    teacher_width = inputs.teacher_hidden[0].shape[1] if spec.needs_teacher and inputs.teacher_weight is not None else 0
    tiles = choose_tiles(
        len(inputs.student_hidden),
        len(rows),
        spec.columns,
        student_width * (2 if backward else 1) + teacher_width,
        torch.get_num_threads(),
        backward=backward,
    )
    student_scale = (spec.student_logit_scale, spec.student_softcap or 0.0)
    teacher_scale = (spec.teacher_logit_scale, spec.teacher_softcap or 0.0)
    return _extension.kernels.Problem(
        (inputs.student_hidden, inputs.student_weight, inputs.student_bias, *student_scale),
        (inputs.teacher_hidden, inputs.teacher_weight, inputs.teacher_bias, *teacher_scale),
        spec.needs_teacher,
        spec.columns,
        rows,
        inputs.labels if any(read.divergence == NLL for read in spec.reads) else None,
        [(read.layer, read.temperature, read.divergence or "") for read in spec.reads],
        list(spec.moments),
        spec.moment_temperature,
        (tiles.rows, tiles.columns, tiles.panel),
    )


def _valid_rows(inputs: LensInputs) -> Tensor:
    return torch.arange(inputs.rows) if inputs.valid is None else inputs.valid.nonzero().squeeze(1)


def stats(inputs: LensInputs, spec: LensSpec) -> tuple[Tensor, Tensor, Tensor]:
    """Statistics: pivots (2, L, R), reads (reads, 4, R), moments (moments, 7, R); see `spec.py`."""
    if inputs.statistics_dtype == torch.float64:
        return torch_stream.stats(inputs, spec)
    pivots = torch.zeros(2, len(inputs.student_hidden), inputs.rows)
    reads = torch.zeros(len(spec.reads), READ_STATS, inputs.rows)
    moments = torch.zeros(len(spec.moments), MOMENT_STATS, inputs.rows)
    _extension.kernels.stats(_problem(inputs, spec, _valid_rows(inputs), backward=False), pivots, reads, moments)
    return pivots, reads, moments


def grad(inputs: LensInputs, spec: LensSpec, per_row: tuple[Tensor, ...], needed: list[bool]) -> list[Tensor]:
    """Gradients of [*student_hidden, student_weight, student_bias] marked in `needed`.

    Rows are taken in sets whose float32 sums fit the budget. The head's gradient of one set is rounded once; of several
    sets it is summed in float32, or, where that does not fit, computed in a walk of its own over all rows.
    """
    if inputs.statistics_dtype == torch.float64:
        return torch_stream.grad(inputs, spec, per_row, needed)
    per_row = tuple(t.contiguous() for t in per_row)
    *needs_hidden, needs_weight, needs_bias = needed
    rows, layers, width = _valid_rows(inputs), len(inputs.student_hidden), inputs.student_hidden[0].shape[1]
    grad_hidden = [
        torch.zeros_like(h, memory_format=torch.contiguous_format) if need else None
        for h, need in zip(inputs.student_hidden, needs_hidden)
    ]
    grad_weight = None
    if needs_weight:
        grad_weight = torch.zeros_like(inputs.student_weight, memory_format=torch.contiguous_format)
    grad_bias = torch.zeros(len(inputs.student_bias)) if needs_bias else None

    def walk(some_rows: Tensor, sums: Tensor | None, weight: Tensor | None, bias: Tensor | None) -> None:
        problem = _problem(inputs, spec, some_rows, backward=True)
        _extension.kernels.grad(problem, *per_row, sums, weight, bias)

    def walk_sets(weight: Tensor | None, bias: Tensor | None) -> None:
        for some_rows in row_sets:
            sums = torch.zeros(layers, len(some_rows), width)
            walk(some_rows, sums, weight, bias)
            for total, out in zip(sums, grad_hidden):
                if out is not None:
                    out[some_rows] = total.to(out.dtype)

    most_rows = max(1, HIDDEN_BYTES // (FLOAT * layers * width))
    row_sets = rows.split(most_rows) if any(needs_hidden) else ()
    if not row_sets:
        if needs_weight or needs_bias:
            walk(rows, None, grad_weight, grad_bias)
    elif not needs_weight or grad_weight.dtype == torch.float32 or len(row_sets) == 1:
        walk_sets(grad_weight, grad_bias)
    elif grad_weight.numel() * FLOAT <= WEIGHT_BYTES:
        total = torch.zeros(grad_weight.shape)
        walk_sets(total, grad_bias)
        grad_weight.copy_(total)
    else:
        walk_sets(None, None)
        walk(rows, None, grad_weight, grad_bias)
    if grad_bias is not None:
        grad_bias = grad_bias.to(inputs.student_bias.dtype)
    return [g for g in (*grad_hidden, grad_weight, grad_bias) if g is not None]
