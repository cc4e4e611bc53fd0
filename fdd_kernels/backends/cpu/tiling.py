"""How the C++ kernels cut the work: tile sizes, row blocks of cached logits, and the memory they
take.

FDD_KERNELS_HEAD_SUM_BYTES bounds what the sum of a 16-bit head's gradient over several row blocks
takes beside the gradient. The sum is float32 and rounded once, at the last block: the gradient
holds the upper halves of its numbers, and HALF bytes for each of them the lower ones. No order of
the loops needs less without computing logits twice: a row block of dL/dlogits exists only once its
statistics do, and that of all rows, L R V float32 numbers, is larger where 2 L R > D.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from fdd_kernels.backends.call_shape import FLOAT, CallShape
from fdd_kernels.common import processor
from fdd_kernels.common.environment import byte_limit
from fdd_kernels.common.sizes import MIB

TILE_COLUMNS = 128
# of a tile of cached logits: the sums of hidden gradients, which may exceed a core's L2, are loaded
# and stored once per tile
MAX_CACHED_COLUMNS = 512
TILE_BYTES = MIB // 2  # of both models' logits of a tile, all layers: well inside a core's L2
PACK_BYTES = 8 * MIB  # of both heads' rows of a panel
GRADIENT_BYTES = 24 * MIB  # of dL/dlogits of a panel for all rows and layers
# Of the cached logits of a row block, all layers and columns. Every block moves both heads and the
# head's gradient through memory again.
CACHED_BYTES = 200 * MIB
COLUMN_PADDING = 16  # columns of logits are padded to a multiple of this (kPadding)
ROW_PADDING = 8  # rows of a block are padded to a multiple of this (CachedLogits::kRowPadding)
# Rows x layers of a block, of the model with more layers: more would leave the L2; fewer were
# slower than streaming (45, V = 262144).
MAX_GEMM_ROWS = 512
MIN_GEMM_ROWS = 32
# The same where GEMMs are of whole blocks, of at most so many columns. Measured beside tiles on
# Emerald Rapids: fewer rows or more columns are no faster (V = 32000 with one layer: 6% slower),
# and more rows need memory.
MIN_WHOLE_ROWS, MAX_WHOLE_ROWS = 640, 1280
MAX_WHOLE_COLUMNS = 8192
BLAS_BYTES = 4 * MIB  # of MKL in GEMMs of whole blocks; 0 to 7 were measured
HIDDEN_BYTES = 48 * MIB  # of float32 sums of the hidden states' gradients
HEAD_SUM = "FDD_KERNELS_HEAD_SUM_BYTES"
HEAD_SUM_BYTES = 1024 * MIB  # its default: Llama 3 8B (V = 128256, D = 4096) needs 1002
HALF = 2  # bytes of half a float32 number
RUNTIME_BYTES = 2 * MIB  # of generated code and buffers of the GEMM library


def head_sum_limit() -> int:
    """Return the bytes that a sum of the head's gradient may take beside it."""
    return byte_limit(HEAD_SUM, HEAD_SUM_BYTES)


@dataclass(frozen=True)
class CpuTiles:
    """Rows and columns of a tile, and columns of a panel; whether GEMMs are of whole blocks."""

    rows: int
    columns: int
    panel: int
    whole: bool = False


def choose_tiles(
    layers: tuple[int, int],
    rows: int,
    columns: int,
    packed_width: int,
    threads: int,
    *,
    backward: bool,
) -> CpuTiles:
    """Choose tiles whose logits stay in a core's L2, with work for every thread and every buffer
    within its budget.

    `layers` are numbers of layers, the student's and the teacher's. A budget is exceeded only by a
    panel of the smallest tile, 16 columns: gradients of more than 78,000 rows of 5 layers. Tiles of
    the same rows are as wide in both passes: a BLAS may round logits of another shape differently.
    """
    tile_columns = min(TILE_COLUMNS, round_up(columns, 16))
    most_columns = GRADIENT_BYTES // (FLOAT * layers[0] * max(rows, 1))
    if most_columns < tile_columns:
        tile_columns = max(16, most_columns // 16 * 16)
    rows_in_cache = TILE_BYTES // (FLOAT * sum(layers) * tile_columns)
    # At least two blocks a thread where there are rows enough: no thread waits long for others.
    tile_rows = max(8, min(rows_in_cache, 128, round_up(-(-rows // (2 * threads)), 8)))
    panel = PACK_BYTES // (FLOAT * max(packed_width, 1))
    if backward:
        panel = min(panel, most_columns)
    # A whole number of tiles for every thread, since dW is reduced tile by tile.
    panel = max(tile_columns, panel // tile_columns * tile_columns)
    return CpuTiles(tile_rows, tile_columns, min(panel, round_up(columns, tile_columns)))


def cached_columns(columns: int, threads: int) -> int:
    """Choose the columns of a tile of cached logits: the widest tiles that give the busiest thread
    within 2% of the fewest columns.
    """
    widths = range(TILE_COLUMNS, MAX_CACHED_COLUMNS + 1, 16)
    busiest = {
        width: round_up(round_up(columns, width) // width, threads) * width for width in widths
    }
    width = max(width for width in widths if busiest[width] <= 1.02 * min(busiest.values()))
    return min(width, round_up(columns, 16))


def cached_tiles(block_rows: int, columns: int, threads: int, whole: bool = False) -> CpuTiles:
    """Return the tiles of cached logits: all rows of a block by `cached_columns` columns, or by all
    columns where GEMMs are `whole`.
    """
    width = round_up(columns, COLUMN_PADDING) if whole else cached_columns(columns, threads)
    return CpuTiles(block_rows, width, columns, whole)


@functools.cache
def fast_blas() -> bool:
    """Say whether torch's BLAS multiplies large matrices faster than brgemm: MKL does on Intel, and
    on others with AVX2 alone, where tiles are multiplied by it too (csrc/gemm.cpp).
    """
    _, flags = processor.processor()
    return torch.backends.mkl.is_available() and (
        processor.vendor() == "GenuineIntel" or ("avx2" in flags and "avx512f" not in flags)
    )


def exact_blas() -> bool:
    """Say whether torch multiplies float32 matrices in float32: it does not after
    `torch.set_float32_matmul_precision("medium")` where there are bf16 instructions.
    """
    settings = getattr(torch.backends.mkldnn, "matmul", None)
    if hasattr(settings, "fp32_precision"):
        return settings.fp32_precision in ("none", "ieee")
    return torch.get_float32_matmul_precision() == "highest"


def whole_rows(
    layers: tuple[int, int], rows: int, columns: int, width: int, *, narrow: bool
) -> int:
    """Choose the rows of a block whose products are one GEMM each; 0 where tiles are faster or
    more exact. The arguments are those of `block_rows`.
    """
    most = min(
        CACHED_BYTES // (FLOAT * sum(layers) * round_up(columns, COLUMN_PADDING)),
        HIDDEN_BYTES // (FLOAT * width * max(layers)),
        MAX_WHOLE_ROWS // max(layers),
    )
    if narrow or columns > MAX_WHOLE_COLUMNS or min(rows, most) == 0:
        return 0
    if not (fast_blas() and exact_blas()):
        return 0
    block = -(-rows // -(-rows // most))  # blocks of nearly equal size
    return block if block * max(layers) >= MIN_WHOLE_ROWS else 0


def in_gradient(
    layers: tuple[int, int], rows: int, columns: int, tile: int, width: int
) -> tuple[bool, bool]:
    """Choose the models whose cached logits lie in the memory of the head's float32 gradient.

    The logits of a tile lie in the rows of the gradient (V, width) that are the tile's columns.
    These are written after the last use of the logits. So all `rows` must be one block: a later
    one would find a sum there.
    """
    each = round_up(rows, ROW_PADDING)
    sizes = {min(tile, columns), columns % tile or min(tile, columns)}  # the last tile's too

    def fit(count: int) -> bool:
        return all(count * each * round_up(n, 16) <= n * width for n in sizes)

    student, teacher = layers
    if fit(student + teacher):
        return True, True
    return fit(student), not fit(student) and fit(teacher)


def round_up(n: int, multiple: int) -> int:
    """Return the smallest multiple that is not below n."""
    return -(-n // multiple) * multiple


def block_rows(
    layers: tuple[int, int],
    rows: int,
    columns: int,
    width: int,
    *,
    head_sum_bytes: int,
    threads: int,
    narrow: bool,
) -> int:
    """Choose the rows of a block whose logits fit the cache budget; 0 means recompute in backward.

    Cached logits save the backward pass's GEMMs of both heads. But the heads are loaded once per
    block and threads divide the vocabulary: blocks of few rows cost more than they save, and few
    columns leave threads idle.

    Args:
        layers: L of the student, and L of the teacher or 0 where its logits are not needed.
        rows: valid rows of the call.
        columns: V.
        width: the student's hidden width.
        head_sum_bytes: bytes that a sum of the head's gradient over several blocks takes beside
            the gradient itself.
        threads: threads of the kernels.
        narrow: an operand of a GEMM is not float32.
    """
    student_layers, most_layers = layers[0], max(layers)
    if whole := whole_rows(layers, rows, columns, width, narrow=narrow):
        return whole
    if rows == 0 or -(-columns // TILE_COLUMNS) < threads:
        return 0
    tiled_columns = round_up(columns, cached_columns(columns, threads))
    most = min(
        CACHED_BYTES // (FLOAT * sum(layers) * tiled_columns),
        # Operands and each thread's sum of the hidden states' gradients.
        HIDDEN_BYTES // (FLOAT * width * (student_layers * threads + 3 * most_layers)),
        MAX_GEMM_ROWS // most_layers,
    )
    most = most // ROW_PADDING * ROW_PADDING
    if most == 0 or (
        rows > most and (most * most_layers < MIN_GEMM_ROWS or head_sum_bytes > head_sum_limit())
    ):
        return 0
    # blocks of nearly equal size
    return min(rows, round_up(-(-rows // -(-rows // most)), ROW_PADDING))


def memory(shape: CallShape) -> dict[str, int]:
    """Count the bytes that a call allocates by part, beside gradients and statistics."""
    if not shape.backward:
        return _memory_of_statistics(shape) | {"runtime": RUNTIME_BYTES}
    head_sum = (
        HALF * shape.columns * shape.student_width if shape.narrow and shape.train_head else 0
    )
    in_place = not shape.teacher_head and not shape.narrow and shape.columns % COLUMN_PADDING == 0
    depths = shape.depths[0], 0 if in_place else shape.depths[1]
    rows = block_rows(
        depths,
        shape.rows,
        shape.columns,
        shape.student_width,
        head_sum_bytes=head_sum,
        threads=shape.threads,
        narrow=shape.narrow,
    )
    if rows == 0:
        parts = _streamed_memory(shape, head_sum)
    elif rows == whole_rows(
        depths, shape.rows, shape.columns, shape.student_width, narrow=shape.narrow
    ):
        parts = _whole_memory(shape, depths, rows)
    else:
        parts = _cached_memory(shape, depths, rows, head_sum)
    return {"runtime": RUNTIME_BYTES} | parts


def _whole_memory(shape: CallShape, depths: tuple[int, int], rows: int) -> dict[str, int]:
    teacher_width = shape.teacher_width if shape.teacher_head else 0
    columns = round_up(shape.columns, COLUMN_PADDING)
    return {
        "cached logits": FLOAT * sum(depths) * rows * columns,
        "hidden states of a block": FLOAT
        * rows
        * (depths[0] * shape.student_width + depths[1] * teacher_width),
        "gradients of rows": FLOAT * shape.threads * depths[0] * columns,
        "runtime": RUNTIME_BYTES + BLAS_BYTES,
    }


def _cached_memory(
    shape: CallShape, depths: tuple[int, int], rows: int, head_sum: int
) -> dict[str, int]:
    width, teacher_width = shape.student_width, shape.teacher_width if shape.teacher_head else 0
    student_rows, teacher_rows = (n * round_up(rows, ROW_PADDING) for n in depths)
    tile = cached_columns(shape.columns, shape.threads)
    beside = student_rows + teacher_rows
    if shape.train_head and not shape.narrow and rows == shape.rows:
        lent = in_gradient(depths, rows, shape.columns, tile, width)
        beside -= student_rows * lent[0] + teacher_rows * lent[1]
    head_rows = tile * max(width, teacher_width) if shape.narrow else 0
    head_gradient = tile * width if shape.narrow and shape.train_head else 0
    states, teacher_states = student_rows * width, teacher_rows * teacher_width
    forward = (
        states
        + teacher_states
        + max(states, teacher_states)
        + shape.threads * (tile * max(student_rows, teacher_rows) + head_rows)
    )
    trained = states if shape.train_head else 0
    backward = (
        states
        + trained
        + shape.threads * (states + 2 * tile * student_rows + head_rows + head_gradient)
    )
    return {
        "cached logits": FLOAT * beside * round_up(shape.columns, tile),
        "operands and sums of a block": FLOAT * max(forward, backward),
        "sum of the head's gradient": head_sum if rows < shape.rows else 0,
    }


def _streamed_memory(shape: CallShape, head_sum: int) -> dict[str, int]:
    (layers, teacher_layers), rows, width = shape.depths, shape.rows, shape.student_width
    teacher_width = shape.teacher_width if shape.teacher_head else 0
    tiles = choose_tiles(
        shape.depths, rows, shape.columns, 2 * width + teacher_width, shape.threads, backward=True
    )
    set_rows = min(rows, max(1, HIDDEN_BYTES // (FLOAT * layers * width)))
    panel = min(tiles.panel, shape.columns)
    tile = (2 * layers + teacher_layers) * tiles.rows * tiles.columns * FLOAT
    if shape.narrow:
        tile += (layers * width + teacher_layers * teacher_width) * tiles.rows * FLOAT
        tile += (256 + tiles.columns) * width * FLOAT if shape.train_head else 0
    return {
        "sums of hidden gradients": FLOAT * layers * set_rows * width
        + (shape.itemsize * set_rows * width if shape.narrow else 0),
        "sum of the head's gradient": head_sum
        if set_rows < rows and head_sum <= head_sum_limit()
        else 0,
        "packed heads": FLOAT * panel * (width + teacher_width + (width if shape.narrow else 0)),
        "gradient of a panel": FLOAT * layers * panel * round_up(set_rows, 16)
        if shape.train_head
        else 0,
        "tiles": shape.threads * tile,
    }


def _memory_of_statistics(shape: CallShape) -> dict[str, int]:
    widths = shape.student_width, shape.teacher_width if shape.teacher_head else 0
    tiles = choose_tiles(
        shape.depths, shape.rows, shape.columns, sum(widths), shape.threads, backward=False
    )
    tile = sum(shape.depths) * tiles.rows * tiles.columns
    if shape.narrow:
        tile += tiles.rows * sum(n * width for n, width in zip(shape.depths, widths))
    return {
        "packed heads": FLOAT * min(tiles.panel, shape.columns) * sum(widths),
        "tiles": FLOAT * shape.threads * tile,
    }
