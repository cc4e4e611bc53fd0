"""How much memory the loss and a training step around it will take, from shapes alone. Needs no model and no transformers.

The loss: gradients it returns, plus buffers whose sizes follow from the byte budgets of the backends, plus constants. The
buffers of "cpu" are those that the code allocates, of "torch" and the dense loss those that are alive at its peak. What an
allocator keeps of freed memory comes on top: with glibc's defaults up to 1.7 times as much resident memory was measured
where one (rows x columns) tensor of the dense loss has less than 32 MiB. `python -m benchmarks` prints how far every
prediction of a run is off.
"""

from __future__ import annotations

from dataclasses import dataclass

from fdd_kernels.backends import cpu, torch_stream
from fdd_kernels.config import LossOptions
from fdd_kernels.plan import Plan, lay_out
from fdd_kernels.sizes import MIB, show
from fdd_kernels.spec import MOMENT_STATS, READ_STATS

FLOAT = 4
RUNTIME_BYTES = {"cpu": 2 * MIB, "torch": 6 * MIB, "dense": 4 * MIB}  # generated code, buffers of the matrix library
HEAD_PRODUCT_BYTES = 16 * MIB  # MKL's own buffers in the product that is the head's gradient, of 10 to 31 MiB that were seen
# Tiles of one layer that the torch backend holds while it forms gradients: for each layer (the student's values before and
# after the pivot, the teacher's, their gradient, and that of the tile before), for a read's temporaries, for a moment's.
TORCH_LAYER_TILES, TORCH_READ_TILES, TORCH_MOMENT_TILES = 5, 6, 4


@dataclass(frozen=True)
class LossShape:
    """One call of the loss: shapes as in `fused_fdd_loss`, `layers` counting the final state; None: no such term."""

    rows: int
    columns: int
    student_width: int
    teacher_width: int
    layers: int = 5
    itemsize: int = 4
    train_head: bool = True
    feature_space: bool = False
    output_in_dynamics: bool = False
    trajectory: str | None = "kl"
    derivative: str | None = "cosine"
    softcap: bool = False

    def plan(self) -> Plan:
        """What the call reads and sums."""
        options = LossOptions(
            alpha=float(self.trajectory is not None), trajectory=self.trajectory or "kl", derivative=self.derivative,
            beta=float(self.derivative is not None), output_in_dynamics=self.output_in_dynamics,
        )  # fmt: skip
        return lay_out(options, self.columns, self.layers, (self.rows,), self.feature_space, "torch")


@dataclass(frozen=True)
class LossMemory:
    """Predicted bytes of one forward and backward pass by part; `inputs` are the caller's and not in `total`."""

    parts: dict[str, int]
    inputs: int

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    def arithmetic(self) -> str:
        """The sum in words, largest first."""
        parts = sorted([*self.parts.items(), ("inputs", self.inputs)], key=lambda item: -item[1])
        return " + ".join(f"{name} {show(size)}" for name, size in parts if size >= MIB)


def input_bytes(shape: LossShape) -> int:
    """Hidden states and heads of both models."""
    width = shape.student_width + shape.teacher_width
    heads = shape.columns * (shape.student_width if shape.feature_space else width)
    return shape.itemsize * (shape.layers * shape.rows * width + heads)


def _gradients(shape: LossShape) -> dict[str, int]:
    hidden = shape.itemsize * shape.layers * shape.rows * shape.student_width
    head = shape.itemsize * shape.columns * shape.student_width if shape.train_head else 0
    return {"gradients of hidden states": hidden, "gradient of the head": head}


def _statistics(plan: Plan, rows: int) -> int:
    """Statistics, their gradients and what autograd keeps between them and the loss."""
    numbers = 2 * len(plan.layers) + READ_STATS * len(plan.spec.reads) + MOMENT_STATS * len(plan.spec.moments)
    return 3 * FLOAT * rows * numbers


def _cpu(shape: LossShape, threads: int) -> dict[str, int]:
    plan = shape.plan()
    narrow = shape.itemsize < FLOAT
    head_sum = FLOAT * shape.columns * shape.student_width if narrow and shape.train_head else 0
    rows = cpu.block_rows(
        len(plan.layers), shape.rows, shape.columns, shape.student_width, models=2, head_sum_bytes=head_sum, threads=threads
    )
    parts = _cpu_kept(shape, threads, rows, head_sum) if rows else _cpu_streamed(shape, threads, head_sum)
    return parts | {"statistics": _statistics(plan, shape.rows)}


def _cpu_kept(shape: LossShape, threads: int, rows: int, head_sum: int) -> dict[str, int]:
    layers, width = len(shape.plan().layers), shape.student_width
    teacher_width = 0 if shape.feature_space else shape.teacher_width
    all_rows, tile = layers * -(-rows // cpu.KEPT_ROWS) * cpu.KEPT_ROWS, min(cpu.TILE_COLUMNS, shape.columns)
    head_rows = tile * max(width, teacher_width) if shape.itemsize < FLOAT else 0
    forward = all_rows * (width + teacher_width + max(width, teacher_width)) + threads * (tile * all_rows + head_rows)
    trained = all_rows * width if shape.train_head else 0
    backward = all_rows * width + trained + threads * (all_rows * width + 2 * tile * all_rows + head_rows)
    return {
        "kept values": FLOAT * 2 * all_rows * (-(-shape.columns // tile) * tile),
        "operands and sums of a block": FLOAT * max(forward, backward),
        "sum of the head's gradient": head_sum if rows < shape.rows else 0,
    }


def _cpu_streamed(shape: LossShape, threads: int, head_sum: int) -> dict[str, int]:
    layers, rows, width = len(shape.plan().layers), shape.rows, shape.student_width
    teacher_width = 0 if shape.feature_space else shape.teacher_width
    tiles = cpu.choose_tiles(layers, rows, shape.columns, 2 * width + teacher_width, threads, backward=True)
    set_rows = min(rows, max(1, cpu.HIDDEN_BYTES // (FLOAT * layers * width)))
    padded = -(-set_rows // 16) * 16
    narrow = shape.itemsize < FLOAT
    panel = min(tiles.panel, shape.columns)
    tile = 3 * layers * tiles.rows * tiles.columns * FLOAT
    if narrow:
        tile += layers * tiles.rows * (width + teacher_width) * FLOAT
        tile += (256 + tiles.columns) * width * FLOAT if shape.train_head else 0
    return {
        "sums of hidden gradients": FLOAT * layers * set_rows * width + (shape.itemsize * set_rows * width if narrow else 0),
        "sum of the head's gradient": head_sum if set_rows < rows and head_sum <= cpu.WEIGHT_BYTES else 0,
        "packed heads": FLOAT * panel * (width + teacher_width + (width if narrow else 0)),
        "gradient of a panel": FLOAT * layers * panel * padded if shape.train_head else 0,
        "tiles": threads * tile,
    }


def _torch(shape: LossShape, device: str) -> dict[str, int]:
    plan = shape.plan()
    layers, rows, width = len(plan.layers), shape.rows, shape.student_width
    tiles = torch_stream.choose_tiles(layers, rows, shape.columns, width, shape.teacher_width, FLOAT, device)
    block = min(tiles.rows, rows)
    resident = min(rows, tiles.resident_rows)
    narrow = shape.itemsize < FLOAT
    converted = width + (0 if shape.feature_space else shape.teacher_width) if narrow else 0
    head_sum = FLOAT * shape.columns * width
    several = narrow and shape.train_head and rows > resident
    count = TORCH_LAYER_TILES * layers + TORCH_READ_TILES + (TORCH_MOMENT_TILES if plan.spec.moments else 0)
    return {
        "sums of hidden gradients": FLOAT * layers * resident * width,
        "sum of the head's gradient": head_sum if several and head_sum <= torch_stream.ACCUMULATOR_BYTES else 0,
        "operands": FLOAT * layers * block * (width + shape.teacher_width)
        + FLOAT * tiles.columns * ((width if shape.train_head else 0) + converted),
        "tiles": FLOAT * block * tiles.columns * count,
        "statistics": _statistics(plan, rows),
    }


def dense_tensors(shape: LossShape) -> int:
    """How many float32 tensors of (rows x columns) the dense loss in plain PyTorch holds before the head's gradient."""
    plan = shape.plan()
    layers = len(plan.layers)
    if shape.feature_space:
        return 3 * layers + 1
    return (5 * layers - 1 if plan.derivative else 2 * layers + 3) + (layers if shape.softcap else 0)


def _dense(shape: LossShape) -> dict[str, int]:
    """The larger of two moments: all layers' logits are there, but no gradient; or, later, few of them, none in feature space,
    and the head's gradient as the sum so far, one layer's, and their new sum."""
    tensor, layers = FLOAT * shape.rows * shape.columns, len(shape.plan().layers)
    gradients = _gradients(shape)
    head = gradients["gradient of the head"]
    early = dense_tensors(shape) * tensor - sum(gradients.values())
    few = 0 if shape.feature_space else 2 * (layers - 2)
    late = (few * tensor + 2 * head if layers > 1 else tensor) + HEAD_PRODUCT_BYTES
    return {"logits and what is made of them": max(early, late, 0)}


def loss_memory(shape: LossShape, provider: str, *, threads: int = 1, device: str = "cpu") -> LossMemory | None:
    """Predicted memory of one forward and backward pass of the loss.

    Args:
        provider: "cpu", "torch" or "dense".
        threads: of the cpu backend.

    Returns:
        The parts, or None for a provider that is not modelled.
    """
    if provider == "cpu":
        parts, runtime = _cpu(shape, threads), RUNTIME_BYTES["cpu"]
    elif provider == "torch":
        parts, runtime = _torch(shape, device), RUNTIME_BYTES["torch"]
    elif provider == "dense":
        parts, runtime = _dense(shape), RUNTIME_BYTES["dense"]
    else:
        return None
    return LossMemory(_gradients(shape) | parts | {"runtime": runtime}, input_bytes(shape))
