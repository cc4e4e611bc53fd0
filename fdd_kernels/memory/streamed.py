"""Predict the memory of the objectives that stream their matrices, from shapes alone: one call
without masks in float32, forward and backward; gradients are counted, inputs are not.

The largest part is a block of bounded bytes (`backends/torch_stream/blocks.py`), or one row. The
rest grows as the inputs do. Every function returns bytes by part; their sum is not exceeded.
"""

from __future__ import annotations

FLOAT = 4
# Matrices of a block at the peak, the search for the largest score among them.
MATRICES = {"infonce": 1.25, "kl": 4, "margin_mse": 2.25, "attention": 4}
ROW_FUNCTIONS = {"kl": "contrastive_kl", "attention": "attention_rows"}
NUMBERS = 64  # bytes a row: positions, tags, sums


def contrastive_memory(
    rows: int,
    columns: int,
    student_width: int,
    teacher_width: int = 0,
    *,
    loss: str = "infonce",
    device: str = "cpu",
) -> dict[str, int]:
    """Count the bytes of `fused_contrastive_kd` in one direction, with one teacher or none::

        4 (m r C + N (3 D + 2 Dt) + C (2 D + Dt) + r (3 D + Dt))     r rows of a block, m matrices

    Vectors are normalised, rows also scaled, and gradients of the student's are added up; of a
    block there are its rows and two products with heads. Without normalisation there is one of each
    vector less. While gradients pass through lengths it is 4 D max(6 N + 2 C, 3 N + 5 C) instead,
    if that is more.
    """
    width, normal = student_width, loss != "margin_mse"
    block, r = _block(loss, columns, rows, device)
    of_rows = (2 + normal) * width + (1 + normal) * teacher_width
    of_columns = (1 + normal) * width + normal * teacher_width
    parts = {
        "block of scores": block,
        "vectors": FLOAT * (rows * of_rows + columns * of_columns),
        "rows of a block": FLOAT * r * (3 * width + teacher_width),
    }
    passing = FLOAT * width * max(6 * rows + 2 * columns, 3 * rows + 5 * columns)
    more = max(0, passing - sum(parts.values())) if normal else 0
    return parts | {"through lengths": more, "numbers": NUMBERS * (rows + columns)}


def attention_memory(
    sequences: int,
    heads: int,
    positions: int,
    student_width: int,
    teacher_width: int,
    *,
    as_heads: bool = True,
    device: str = "cpu",
) -> dict[str, int]:
    """Count the bytes of `fused_attention_kd` and `fused_relation_kd`, by KL, widths of a head::

        4 (m r T + 2 B H T D)                    r rows of a block, m matrices
        4 (m r T + 2 B H T (2 D + Dt))           where heads are no tensor of their own

    `as_heads`: tensors are (B, H, T, d) without gaps. Those of `fused_relation_kd`, and heads that
    are views of (B, T, H * d), are copied.
    """
    count = sequences * heads * positions
    block, _ = _block("attention", positions, count, device)
    copies = 0 if as_heads else 2 * (student_width + teacher_width)
    return {
        "block of scores": block,
        "gradients": FLOAT * count * 2 * student_width,
        "copies of heads": FLOAT * count * copies,
        "numbers": NUMBERS * count,
    }


def sinkhorn_memory(
    rows: int, columns: int, student_width: int, *, iterations: int = 20, device: str = "cpu"
) -> dict[str, int]:
    """Count the bytes of `fused_sinkhorn_kd` with one group of b rows, frozen or trained head::

    4 (6 b c + 2 D (V + b) + 4 b^2)    c tokens of a tile; or, if it is more,
        4 b^2 (2 iterations + 6)
    """
    from fdd_kernels.backends.torch_stream.pair_costs import TILES, tile_columns

    tile = FLOAT * TILES * rows * tile_columns(TILES * rows, columns, FLOAT, device)
    costs = FLOAT * 4 * rows**2
    walk = {
        "tiles": tile,
        "costs": costs,
        "gradients": 2 * FLOAT * student_width * (columns + rows),
    }
    plan = FLOAT * rows**2 * (2 * iterations + 6)
    missing = max(0, plan - sum(walk.values()))
    return walk | {"iterations": missing, "numbers": NUMBERS * rows}


def layer_costs_memory(
    rows: int,
    columns: int,
    student_width: int,
    teacher_width: int,
    layers: int,
    teacher_layers: int,
    *,
    device: str = "cpu",
) -> dict[str, int]:
    """Count the bytes of `layer_costs` by KL with gradients, by the backend "torch"; see its
    `memory` for the tiles, which are bounded::

        tiles + 4 D (2 Ls R + V) + 12 R (2 max(Ls, Lt) + 4 Ls Lt)
    """
    from fdd_kernels.backends import BACKENDS, CallShape
    from fdd_kernels.lens.layout import REQUEST_STATS
    from fdd_kernels.objectives.alignment.objective import cost_spec
    from fdd_kernels.objectives.alignment.options import CostOptions

    depths = layers, teacher_layers
    spec = cost_spec(CostOptions(), columns, *depths)
    sizes = layers, rows, columns, student_width, teacher_width, FLOAT
    call = CallShape(*sizes, spec=spec, device=device, teacher_layers=teacher_layers)
    numbers = 2 * max(depths) + REQUEST_STATS * layers * teacher_layers
    parts = BACKENDS["torch"].memory(call)
    del parts["runtime"]  # of libraries
    return parts | {
        "gradients": FLOAT * student_width * (layers * rows + columns),
        "statistics": 3 * FLOAT * rows * numbers,
    }


def _block(kind: str, columns: int, rows: int, device: str) -> tuple[int, int]:
    """Count the bytes of a block of scores, and its rows."""
    import fdd_kernels.objectives.contrastive.formulas
    import fdd_kernels.objectives.relations.formulas  # noqa: F401  both register row functions
    from fdd_kernels.backends.torch_stream import blocks
    from fdd_kernels.lens import row_blocks

    function = row_blocks.ROW_FUNCTIONS[ROW_FUNCTIONS.get(kind, kind)]
    least = blocks.ATTENTION_ROWS if function.of_attention else blocks.GEMM_ROWS
    r = min(rows, blocks.block_rows(columns, FLOAT, device, function.matrices, least))
    if function.of_attention and r > columns:
        r -= r % columns  # groups as a whole
    return int(FLOAT * r * columns * MATRICES[kind]), r
