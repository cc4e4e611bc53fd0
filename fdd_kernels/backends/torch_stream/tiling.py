"""How the backend "torch" cuts the work: tiles within byte budgets, and the memory they take."""

from __future__ import annotations

from dataclasses import dataclass

from fdd_kernels.backends.call_shape import FLOAT, CallShape
from fdd_kernels.common.sizes import MIB
from fdd_kernels.lens.spec import NLL, LensSpec

# Tiles of logits: inside a CPU's last-level cache; large enough to fill an accelerator.
TILE_BYTES = {"cpu": 32 * MIB}
ACCELERATOR_TILE_BYTES = 128 * MIB
OPERAND_BYTES = 48 * MIB  # of a row block's hidden states, and of a tile's head rows
ACCUMULATOR_BYTES = 96 * MIB  # of a gradient that is accumulated in a wider dtype than its own
RUNTIME_BYTES = 6 * MIB  # of generated code and buffers of the GEMM library
# Tiles of one layer that are held while gradients are formed: the student's logits before and after
# the shift, their gradient, and that of the tile before; the teacher's logits.
STUDENT_TILES, TEACHER_TILES = 4, 1
# Besides, the temporaries of one request or one pair at a time; a mask of a tile is a quarter.
# Every gradient takes FEWEST_TILES; the formulas in `lens/divergences.py` take more, by name, and
# one that is not listed is taken for the largest.
FEWEST_TILES, WEIGHTED_TILES, MIXED_TILES = 4, 5.25, 5.25
DIVERGENCE_TILES = {
    None: FEWEST_TILES,
    NLL: FEWEST_TILES,
    "kl": FEWEST_TILES,
    "reverse_kl": 5.25,
    "tv": 6.25,
    "alpha_beta": 8.25,
    "skew_kl": 10.25,
    "jsd": 14.5,
    "skew_reverse_kl": 13.5,
}
# The same while statistics alone are computed, and of moments of logits.
STATISTICS_TILES = {
    **dict.fromkeys((None, NLL, "kl", "reverse_kl", "tv"), 8.25),
    "alpha_beta": 14.5,
    "skew_kl": 15.5,
    "skew_reverse_kl": 15.5,
    "jsd": 19.5,
}
MOMENT_TILES = 4


@dataclass(frozen=True)
class TorchTiles:
    """Rows and columns of a tile, and the number of resident rows: a set of rows whose gradient is
    accumulated in one walk over the vocabulary.
    """

    rows: int
    columns: int
    resident_rows: int


def choose_tiles(
    layers: tuple[int, int],
    rows: int,
    columns: int,
    student_width: int,
    teacher_width: int,
    itemsize: int,
    device_type: str,
) -> TorchTiles:
    """Choose tiles that keep every buffer within the byte budgets of this file.

    `layers` are numbers of layers, the student's and the teacher's.
    """
    student_layers, teacher_layers = layers
    # For every layer the student's logits twice (before and after the shift) and their gradient, or
    # the teacher's logits; and about twelve temporaries of one layer.
    tiles = 3 * student_layers + teacher_layers + 12
    elements = TILE_BYTES.get(device_type, ACCELERATOR_TILE_BYTES) // (itemsize * tiles)
    most_columns = max(1, OPERAND_BYTES // (itemsize * (student_width + teacher_width)))
    states = student_layers * student_width + teacher_layers * teacher_width
    most_rows = max(1, OPERAND_BYTES // (itemsize * states))
    tile_columns = max(1, min(columns, 2048, most_columns))
    tile_rows = max(1, min(rows, most_rows, elements // tile_columns))
    tile_columns = max(1, min(columns, most_columns, max(tile_columns, elements // tile_rows)))
    resident = max(tile_rows, ACCUMULATOR_BYTES // (itemsize * student_layers * student_width))
    return TorchTiles(tile_rows, tile_columns, resident)


def temporary_tiles(spec: LensSpec | None) -> float:
    """Count the tiles of one layer that temporaries take at the peak; None stands for KL alone."""
    found = [float(FEWEST_TILES)]
    for request in spec.requests if spec else ():
        found.append(DIVERGENCE_TILES.get(request.divergence, max(DIVERGENCE_TILES.values())))
        if request.teacher_mix < 1 and request.temperature != 1:
            found.append(MIXED_TILES)
    if spec and any(pair.weighted for pair in spec.moments):
        found.append(WEIGHTED_TILES)
    return max(found)


def memory(shape: CallShape) -> dict[str, int]:
    """Count the bytes in use at the peak of a call by part, beside gradients and statistics."""
    (layers, teacher_layers), rows, width = shape.depths, shape.rows, shape.student_width
    tiles = choose_tiles(
        shape.depths, rows, shape.columns, width, shape.teacher_width, FLOAT, shape.device
    )
    block, resident = min(tiles.rows, rows), min(rows, tiles.resident_rows)
    if not shape.backward:
        return _memory_of_statistics(shape, tiles, block)
    converted = width + (shape.teacher_width if shape.teacher_head else 0) if shape.narrow else 0
    head_sum = FLOAT * shape.columns * width
    several = shape.narrow and shape.train_head and rows > resident
    count = STUDENT_TILES * layers + TEACHER_TILES * teacher_layers + temporary_tiles(shape.spec)
    return {
        "sums of hidden gradients": FLOAT * layers * resident * width,
        "sum of the head's gradient": head_sum if several and head_sum <= ACCUMULATOR_BYTES else 0,
        "operands": FLOAT * block * (layers * width + teacher_layers * shape.teacher_width)
        + FLOAT * tiles.columns * ((width if shape.train_head else 0) + converted),
        "tiles": round(FLOAT * block * tiles.columns * count),
        "runtime": RUNTIME_BYTES,
    }


def _memory_of_statistics(shape: CallShape, tiles: TorchTiles, block: int) -> dict[str, int]:
    """Count the bytes of a call without gradients, at the larger of two peaks.

    While a tile's requests or moments are summed; or while the student's logits of the next tile
    are computed, with those of the tile before, and with two vectors of moments, still there.
    """
    (layers, teacher_layers), requests = shape.depths, shape.spec.requests if shape.spec else ()
    most = max(STATISTICS_TILES.values())
    temporaries = [MOMENT_TILES, *(STATISTICS_TILES.get(r.divergence, most) for r in requests)]
    tile = FLOAT * block * tiles.columns
    summed = tile * (layers + teacher_layers + max(temporaries))
    converted = FLOAT * tiles.columns * shape.student_width if shape.narrow else 0
    vectors = 2 if shape.spec and shape.spec.moments else 0
    computed = tile * (2 * layers + teacher_layers + vectors) + converted
    states = layers * shape.student_width + teacher_layers * shape.teacher_width
    return {
        "operands": FLOAT * block * states,
        "tiles": round(max(summed, computed)),
        "runtime": RUNTIME_BYTES,
    }
