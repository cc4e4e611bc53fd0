"""The backend "cpu": the two operations in C++ (csrc/), for float32, bfloat16 and float16 inputs.

Two ways through the same row kernels. `stats` and `grad` stream: rows are cut into blocks and
columns into panels of tiles, a panel's head rows are converted to float32 and packed once for all
rows and layers, then row blocks run in parallel, and `grad` computes every tile anew.
`stats_and_grad` keeps the values of as many rows as a budget holds between the two, so that each
product is done once; see `block_rows` for when that is better. Products are float32 with float32
sums, whatever the inputs are. This file cuts the work and owns all memory that grows with the
problem.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fdd_kernels.backends import torch_stream
from fdd_kernels.backends.call_shape import FLOAT, CallShape
from fdd_kernels.backends.cpu import extension
from fdd_kernels.lens.divergences import DIVERGENCES
from fdd_kernels.lens.inputs import LensInputs
from fdd_kernels.lens.layout import MOMENT_STATS, REQUEST_STATS
from fdd_kernels.lens.spec import NLL, LensSpec

MIB = 2**20
TILE_COLUMNS = 128
# both models' values of all layers: well inside the second cache level of a core
TILE_BYTES = MIB // 2
PACK_BYTES = 8 * MIB  # both heads' rows of a panel
GRADIENT_BYTES = 24 * MIB  # dL/dlogits of a panel for all rows and layers
# values of all layers and columns of a block of rows, kept from the statistics to the gradients
KEPT_BYTES = 96 * MIB
KEPT_ROWS = 8  # a block's rows are padded to a multiple of this (csrc/lens.h: kRowPadding)
MOST_PRODUCT_ROWS = 512  # rows x layers of a block: more would leave the second cache level
# rows x layers of a block: the fewest at which it was measured to be faster (45, at V = 262144)
KEPT_PRODUCT_ROWS = 32
# float32 sums of the hidden states' gradients where their dtype is narrower
HIDDEN_BYTES = 48 * MIB
WEIGHT_BYTES = 32 * MIB  # float32 sums of the head's gradient where its dtype is narrower
RUNTIME_BYTES = 2 * MIB  # generated code, buffers of the matrix library

F32 = {"dtype": torch.float32, "device": "cpu"}  # whatever torch's defaults are
# (rows, shifts, reads, moments) -> shifts, reads, moments, upstream gradients of requests and
# moments
UpstreamOf = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Tiles:
    """Rows and columns of a tile, and columns of a panel."""

    rows: int
    columns: int
    panel: int


def choose_tiles(
    layers: int, rows: int, columns: int, packed_width: int, threads: int, *, backward: bool
) -> Tiles:
    """Tile sizes that keep values in a core's cache, every thread busy and every buffer within its
    budget.

    A budget is exceeded only by a panel of the smallest tile, 16 columns: gradients of more than
    78,000 rows of 5 layers.
    """
    tile_columns = min(TILE_COLUMNS, _round_up(columns, 16))
    most_columns = GRADIENT_BYTES // (FLOAT * layers * max(rows, 1)) if backward else columns
    if most_columns < tile_columns:
        tile_columns = max(16, most_columns // 16 * 16)
    cached_rows = TILE_BYTES // (2 * FLOAT * layers * tile_columns)
    # At least two blocks a thread where there are rows enough, so that none waits long for the
    # others.
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
    return extension.missing_reason() or missing_divergences()


def missing_divergences() -> str | None:
    """What to do about kernels that were built before the registry got its last divergence; None if
    they know them all.
    """
    known = getattr(extension.kernels, "divergences", None)
    missing = sorted(DIVERGENCES.keys() - known()) if known else []
    if not missing:
        return None
    return (
        f"its kernels were built from other sources and know no divergence {missing}: install "
        "the package again"
    )


# As of `extension.missing_reason`.
missing_divergences._dynamo_marked_constant = True


def _streamed(inputs: LensInputs, spec: LensSpec, rows: Tensor, *, backward: bool):
    """The C++ side's view of one call, restricted to the given rows, for the operations that stream
    over panels.
    """
    student_width = inputs.student_hidden[0].shape[1]
    teacher_width = (
        inputs.teacher_hidden[0].shape[1]
        if spec.needs_teacher and inputs.teacher_weight is not None
        else 0
    )
    tiles = choose_tiles(
        len(inputs.student_hidden),
        len(rows),
        spec.columns,
        student_width * (2 if backward else 1) + teacher_width,
        torch.get_num_threads(),
        backward=backward,
    )
    return _problem(inputs, spec, rows, tiles)


def _problem(inputs: LensInputs, spec: LensSpec, rows: Tensor, tiles: Tiles):
    student_scale = (spec.student_logit_scale, spec.student_softcap or 0.0)
    teacher_scale = (spec.teacher_logit_scale, spec.teacher_softcap or 0.0)
    return extension.kernels.Problem(
        (inputs.student_hidden, inputs.student_weight, inputs.student_bias, *student_scale),
        (inputs.teacher_hidden, inputs.teacher_weight, inputs.teacher_bias, *teacher_scale),
        spec.needs_teacher,
        spec.columns,
        rows,
        inputs.labels if any(request.divergence == NLL for request in spec.requests) else None,
        [
            (request.student_layer, request.temperature, request.divergence or "")
            for request in spec.requests
        ],
        [(-1 if m.first is None else m.first.student, m.second.student) for m in spec.moments],
        spec.moment_temperature,
        (tiles.rows, tiles.columns, tiles.panel),
    )


def _valid_rows(inputs: LensInputs) -> Tensor:
    return (
        torch.arange(inputs.rows, device="cpu")
        if inputs.valid is None
        else inputs.valid.nonzero().squeeze(1)
    )


def _no_statistics(inputs: LensInputs, spec: LensSpec) -> tuple[Tensor, Tensor, Tensor]:
    shifts = torch.zeros(2, len(inputs.student_hidden), inputs.rows, **F32)
    requests = torch.zeros(len(spec.requests), REQUEST_STATS, inputs.rows, **F32)
    moments = torch.zeros(len(spec.moments), MOMENT_STATS, inputs.rows, **F32)
    return shifts, requests, moments


def _no_gradients(
    inputs: LensInputs, needed: list[bool]
) -> tuple[list[Tensor | None], Tensor | None, Tensor | None]:
    """Zeros for the gradients wanted: one a layer, the head's, and the bias's in float32."""
    *needs_hidden, needs_weight, needs_bias = needed
    grad_hidden = [
        torch.zeros_like(h, memory_format=torch.contiguous_format) if need else None
        for h, need in zip(inputs.student_hidden, needs_hidden)
    ]
    grad_weight = (
        torch.zeros_like(inputs.student_weight, memory_format=torch.contiguous_format)
        if needs_weight
        else None
    )
    return (
        grad_hidden,
        grad_weight,
        torch.zeros(len(inputs.student_bias), **F32) if needs_bias else None,
    )


def stats(inputs: LensInputs, spec: LensSpec) -> tuple[Tensor, Tensor, Tensor]:
    """Statistics: shifts (2, L, R), requests (requests, 4, R), moments (moments, 7, R); see
    `spec.py`.
    """
    if inputs.statistics_dtype == torch.float64:
        return torch_stream.stats(inputs, spec)
    shifts, requests, moments = _no_statistics(inputs, spec)
    extension.kernels.stats(
        _streamed(inputs, spec, _valid_rows(inputs), backward=False), shifts, requests, moments
    )
    return shifts, requests, moments


def grad(
    inputs: LensInputs, spec: LensSpec, per_row: tuple[Tensor, ...], needed: list[bool]
) -> list[Tensor]:
    """Gradients of [*student_hidden, student_weight, student_bias] marked in `needed`.

    Rows are taken in sets whose float32 sums fit the budget. The head's gradient of one set is
    rounded once; of several sets it is summed in float32, or, where that does not fit, computed in
    a walk of its own over all rows.
    """
    if inputs.statistics_dtype == torch.float64:
        return torch_stream.grad(inputs, spec, per_row, needed)
    per_row = tuple(t.contiguous() for t in per_row)
    *needs_hidden, needs_weight, needs_bias = needed
    rows, layers, width = (
        _valid_rows(inputs),
        len(inputs.student_hidden),
        inputs.student_hidden[0].shape[1],
    )
    grad_hidden, grad_weight, grad_bias = _no_gradients(inputs, needed)

    def walk(
        some_rows: Tensor, sums: Tensor | None, weight: Tensor | None, bias: Tensor | None
    ) -> None:
        problem = _streamed(inputs, spec, some_rows, backward=True)
        extension.kernels.grad(problem, *per_row, sums, weight, bias)

    def walk_sets(weight: Tensor | None, bias: Tensor | None) -> None:
        for some_rows in row_sets:
            sums = torch.zeros(layers, len(some_rows), width, **F32)
            walk(some_rows, sums, weight, bias)
            _place(sums, some_rows, grad_hidden)

    most_rows = max(1, HIDDEN_BYTES // (FLOAT * layers * width))
    row_sets = rows.split(most_rows) if any(needs_hidden) else ()
    if not row_sets:
        if needs_weight or needs_bias:
            walk(rows, None, grad_weight, grad_bias)
    elif not needs_weight or grad_weight.dtype == torch.float32 or len(row_sets) == 1:
        walk_sets(grad_weight, grad_bias)
    elif grad_weight.numel() * FLOAT <= WEIGHT_BYTES:
        total = torch.zeros(grad_weight.shape, **F32)
        walk_sets(total, grad_bias)
        grad_weight.copy_(total)
    else:
        walk_sets(None, None)
        walk(rows, None, grad_weight, grad_bias)
    return _wanted(inputs, grad_hidden, grad_weight, grad_bias)


def _place(sums: Tensor, rows: Tensor, grad_hidden: list[Tensor | None]) -> None:
    """Round the float32 sums (L, rows, width) into the gradients of those rows."""
    for total, out in zip(sums, grad_hidden):
        if out is not None:
            out[rows] = total.to(out.dtype)


def _wanted(
    inputs: LensInputs, grad_hidden: list, grad_weight: Tensor | None, grad_bias: Tensor | None
) -> list[Tensor]:
    if grad_bias is not None:
        grad_bias = grad_bias.to(inputs.student_bias.dtype)
    return [g for g in (*grad_hidden, grad_weight, grad_bias) if g is not None]


def block_rows(
    layers: int,
    rows: int,
    columns: int,
    width: int,
    *,
    models: int,
    head_sum_bytes: int,
    threads: int,
) -> int:
    """Rows a block whose values are kept; 0: recomputing them is better, or all that can be done.

    Keeping saves the backward pass's products of both heads, but reads the heads once per block,
    and divides columns among the threads: few rows in the budget cost more than they save, few
    columns leave threads idle. `width` is the student's; `head_sum_bytes` is what a float32 sum of
    the head's gradient over several blocks needs beyond the gradient itself.
    """
    tiles = -(-columns // TILE_COLUMNS)
    if rows == 0 or tiles < threads:
        return 0
    most = min(
        KEPT_BYTES // (FLOAT * models * layers * tiles * TILE_COLUMNS),
        # Operands and each thread's sum of the hidden states' gradients.
        HIDDEN_BYTES // (FLOAT * layers * width * (threads + 3)),
        MOST_PRODUCT_ROWS // layers,
    )
    most = most // KEPT_ROWS * KEPT_ROWS
    if most == 0 or (
        rows > most and (most * layers < KEPT_PRODUCT_ROWS or head_sum_bytes > WEIGHT_BYTES)
    ):
        return 0
    # blocks of nearly equal size
    return min(rows, _round_up(-(-rows // -(-rows // most)), KEPT_ROWS))


def cached_rows(inputs: LensInputs, spec: LensSpec, needed: list[bool]) -> int:
    """`block_rows` of a call; 0 also for float16, whose gradients would underflow before a loss
    scaler has scaled them.
    """
    weight = inputs.student_weight
    wanted = [
        t for t, need in zip((*inputs.student_hidden, weight, inputs.student_bias), needed) if need
    ]
    if (
        not wanted
        or inputs.statistics_dtype == torch.float64
        or any(t.dtype == torch.float16 for t in wanted)
    ):
        return 0
    return block_rows(
        len(inputs.student_hidden),
        inputs.rows if inputs.valid is None else int(inputs.valid.sum()),
        spec.columns,
        weight.shape[1],
        models=2 if spec.needs_teacher else 1,
        head_sum_bytes=weight.numel() * FLOAT
        if needed[-2] and weight.dtype != torch.float32
        else 0,
        threads=torch.get_num_threads(),
    )


def stats_and_grad(
    inputs: LensInputs,
    spec: LensSpec,
    block_rows: int,
    upstream_of: UpstreamOf,
    needed: list[bool],
    refine: bool,
) -> tuple[list[Tensor], tuple[Tensor, Tensor, Tensor]]:
    """`stats`, then `grad`, for one block of valid rows after another, of which all values are kept
    in between.

    See `Backend` for `upstream_of` and what is returned.
    """
    rows, layers, width = (
        _valid_rows(inputs),
        len(inputs.student_hidden),
        inputs.student_hidden[0].shape[1],
    )
    grad_hidden, grad_weight, grad_bias = _no_gradients(inputs, needed)
    weight = grad_weight
    if weight is not None and weight.dtype != torch.float32 and block_rows < len(rows):
        weight = torch.zeros(weight.shape, **F32)
    tiles = Tiles(block_rows, min(TILE_COLUMNS, _round_up(spec.columns, 16)), spec.columns)
    memory = None
    statistics = _no_statistics(inputs, spec)
    per_row = *statistics, *(torch.zeros_like(t) for t in statistics[1:])
    for block in rows.split(block_rows):
        problem = _problem(inputs, spec, block, tiles)
        if memory is None:  # the first block is the largest
            memory = torch.empty(extension.kernels.kept_size(problem), **F32)
        extension.kernels.stats_and_keep(problem, memory, *statistics)
        for whole, of_block in zip(
            per_row, upstream_of(block, *(t[..., block] for t in statistics)), strict=True
        ):
            whole[..., block] = of_block
        sums = torch.zeros(layers, len(block), width, **F32) if any(needed[:layers]) else None
        extension.kernels.grad_of_kept(problem, memory, *per_row, sums, weight, grad_bias)
        if sums is not None:
            _place(sums, block, grad_hidden)
    if weight is not grad_weight:
        grad_weight.copy_(weight)
    return _wanted(inputs, grad_hidden, grad_weight, grad_bias), per_row[:3]


def memory(shape: CallShape) -> dict[str, int]:
    """Bytes that a call allocates by part, beside gradients and statistics."""
    head_sum = (
        FLOAT * shape.columns * shape.student_width if shape.narrow and shape.train_head else 0
    )
    rows = block_rows(
        shape.layers,
        shape.rows,
        shape.columns,
        shape.student_width,
        models=2,
        head_sum_bytes=head_sum,
        threads=shape.threads,
    )
    parts = _kept_memory(shape, rows, head_sum) if rows else _streamed_memory(shape, head_sum)
    return parts | {"runtime": RUNTIME_BYTES}


def _kept_memory(shape: CallShape, rows: int, head_sum: int) -> dict[str, int]:
    width, teacher_width = shape.student_width, shape.teacher_width if shape.teacher_head else 0
    all_rows, tile = shape.layers * _round_up(rows, KEPT_ROWS), min(TILE_COLUMNS, shape.columns)
    head_rows = tile * max(width, teacher_width) if shape.narrow else 0
    forward = all_rows * (width + teacher_width + max(width, teacher_width)) + shape.threads * (
        tile * all_rows + head_rows
    )
    trained = all_rows * width if shape.train_head else 0
    backward = (
        all_rows * width
        + trained
        + shape.threads * (all_rows * width + 2 * tile * all_rows + head_rows)
    )
    return {
        "kept values": FLOAT * 2 * all_rows * _round_up(shape.columns, tile),
        "operands and sums of a block": FLOAT * max(forward, backward),
        "sum of the head's gradient": head_sum if rows < shape.rows else 0,
    }


def _streamed_memory(shape: CallShape, head_sum: int) -> dict[str, int]:
    layers, rows, width = shape.layers, shape.rows, shape.student_width
    teacher_width = shape.teacher_width if shape.teacher_head else 0
    tiles = choose_tiles(
        layers, rows, shape.columns, 2 * width + teacher_width, shape.threads, backward=True
    )
    set_rows = min(rows, max(1, HIDDEN_BYTES // (FLOAT * layers * width)))
    panel = min(tiles.panel, shape.columns)
    tile = 3 * layers * tiles.rows * tiles.columns * FLOAT
    if shape.narrow:
        tile += layers * tiles.rows * (width + teacher_width) * FLOAT
        tile += (256 + tiles.columns) * width * FLOAT if shape.train_head else 0
    return {
        "sums of hidden gradients": FLOAT * layers * set_rows * width
        + (shape.itemsize * set_rows * width if shape.narrow else 0),
        "sum of the head's gradient": head_sum
        if set_rows < rows and head_sum <= WEIGHT_BYTES
        else 0,
        "packed heads": FLOAT * panel * (width + teacher_width + (width if shape.narrow else 0)),
        "gradient of a panel": FLOAT * layers * panel * _round_up(set_rows, 16)
        if shape.train_head
        else 0,
        "tiles": shape.threads * tile,
    }
