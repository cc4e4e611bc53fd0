"""A model of the loss and its gradients on a GPU: the time of every kernel, added up, beside what
others have measured.

    python -m benchmarks.gpu_model [--rows 4096] [--layers 5] [--frozen] [--device H100] [--json
    FILE]

EVERY FIGURE FOR THIS PACKAGE IS PREDICTED: no GPU has run it. What is measured, by others, is
`gpu_calibration.py`, and the model is fitted to it: the fractions of `DEVICES` were chosen with
those figures in view. `python -m benchmarks gpu` measures the same shapes and puts this model's
figure beside each.

- A kernel takes the longer of its arithmetic and its traffic of memory, plus OVERLAP of the
  shorter, plus a gap. Kernels do not overlap one another.
- A product (GEMM) reaches the device's fraction of the peak, times how full its last wave of tiles
  is, times K / (K + 96); with fewer tiles than multiprocessors the inner dimension is split. A
  vocabulary that 8 does not divide slows products that read or write it unpadded: 0.8 in eager
  PyTorch, 0.9 under torch.compile, which pads some.
- Bytes an element (row x column x layer) are counted, from the operators that eager PyTorch
  dispatches and from the code that torch.compile generates: DENSE_BYTES, COMPILED_BYTES. The latter
  is the least certain: 40 to 56.
- "cached" writes 8 bytes an element (both models' logits in float32), reads 8 for the statistics
  and 8 for the gradient, writes the gradient's 2 and requests it twice in its products. "slabbed"
  forms a slab of columns twice. "one_pass" multiplies twice in tl.dot and keeps tiles in the second
  cache level.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.workloads import GEMMA, GPT2, QWEN, TINYLLAMA, Workload

MIB, GIB = 2**20, 2**30
OVERLAP = 0.15


@dataclass(frozen=True)
class Device:
    """Published peaks, and the fractions of them that kernels of each kind reach.

    `products`: 16-bit operations a second; `memory`, `l2`: bytes a second; `lanes`: float32
    instructions a clock and multiprocessor; `gemm`: of the vendor's products; `dot`: of `tl.dot` in
    tiles of 128 x 128; `eager`: of memory by PyTorch's elementwise kernels; `stream`: by kernels
    that read and write once; `gap`: seconds between dependent kernels.
    """

    name: str
    products: float
    memory: float
    l2: float
    l2_bytes: int
    units: int
    lanes: int
    clock: float
    gemm: float
    dot: float
    eager: float
    stream: float
    tile: tuple[int, int]
    capacity: float
    gap: float = 2e-6


# The fractions of the H200 are guesses between its neighbours: no figure in gpu_calibration.py is
# of one.
DEVICES = {
    d.name: d
    for d in (
        Device(
            "A100",
            312e12,
            2.039e12,
            4.5e12,
            40 * MIB,
            108,
            64,
            1.41e9,
            0.84,
            0.66,
            0.82,
            0.86,
            (128, 256),
            80e9,
        ),
        Device(
            "H100",
            989e12,
            3.35e12,
            5.5e12,
            50 * MIB,
            132,
            128,
            1.75e9,
            0.73,
            0.50,
            0.87,
            0.89,
            (128, 256),
            80e9,
        ),
        Device(
            "H200",
            989e12,
            4.80e12,
            5.5e12,
            50 * MIB,
            132,
            128,
            1.75e9,
            0.74,
            0.50,
            0.85,
            0.88,
            (128, 256),
            141e9,
        ),
        Device(
            "B200",
            2250e12,
            8.0e12,
            10e12,
            126 * MIB,
            148,
            128,
            1.85e9,
            0.72,
            0.38,
            0.72,
            0.80,
            (256, 256),
            180e9,
        ),
    )
}
PAIRS: dict[str, Workload] = {"GPT-2": GPT2, "Llama": TINYLLAMA, "Qwen": QWEN, "Gemma": GEMMA}

# Bytes an element forward and backward, and those of the softmax's later passes where a row has
# left the second cache level.
DENSE_BYTES = {"float": (102.4, 16.0, 118.0, 4.0), "log_softmax": (86.4, 8.0, 110.0, 4.0)}
COMPILED_BYTES = 48.0
CHUNK_ROWS = 1024
# Of the strategies: most bytes of dL/dx at a time, most rows x layers of a block, and kernels of a
# block's per-row mathematics.
SLAB_BYTES, MOST_PRODUCT_ROWS, PER_ROW_KERNELS = 96 * MIB, 4480, 40
CACHE_BYTES, SLABBED_BYTES = 2 * GIB, 256 * MIB


@dataclass(frozen=True)
class Call:
    """One call of the loss with its gradients: the pair's shapes, rows, layers, and whether the
    head is trained.
    """

    pair: Workload
    rows: int = 4096
    layers: int = 5
    trained: bool = True

    @property
    def columns(self) -> int:
        return self.pair.columns

    @property
    def student(self) -> int:
        return self.pair.student_width

    @property
    def teacher(self) -> int:
        return self.pair.teacher_width

    @property
    def elements(self) -> int:
        return self.layers * self.rows * self.columns


@dataclass(frozen=True)
class Prediction:
    """Seconds, bytes held beside inputs and gradients, and the seconds of each part."""

    seconds: float
    kept: float
    parts: dict[str, float] = field(default_factory=dict)
    blocks: int = 1
    product_rows: int = 0  # rows x layers of a block


def _kernel(arithmetic: float, traffic: float, gaps: float) -> float:
    return max(arithmetic, traffic) + OVERLAP * min(arithmetic, traffic) + gaps


def gemm(
    d: Device, m: int, n: int, k: int, *, out: int = 2, accumulate: bool = False, odd: float = 1.0
) -> float:
    """Seconds of one (m, k) x (k, n) product of 16-bit operands; `out` bytes an output element,
    read too if accumulated.
    """
    rows, columns = d.tile
    tiles = min(
        math.ceil(m / rows) * math.ceil(n / columns), math.ceil(m / columns) * math.ceil(n / rows)
    )
    split = max(1, min(d.units // tiles, k // 1024)) if tiles < d.units else 1
    waves = tiles * split / d.units
    fraction = (
        d.gemm
        * odd
        * (waves / math.ceil(waves) if waves < 8 else 1.0)
        * (k / split)
        / (k / split + 96)
    )
    moved = (
        2 * (m * k + n * k)
        + m * n * out * (2 if accumulate else 1)
        + (8 * split * m * n if split > 1 else 0)
    )
    return _kernel(2 * m * n * k / (d.products * fraction), moved / (d.memory * 0.92), d.gap)


def elementwise(
    d: Device,
    elements: float,
    moved: float,
    *,
    instructions: float = 0.0,
    kernels: int = 1,
    fraction: float | None = None,
) -> float:
    """Seconds of `kernels` kernels that together move `moved` bytes and issue `instructions` an
    element.
    """
    traffic = elements * moved / (d.memory * (fraction or d.stream))
    issue = elements * instructions / (d.units * d.lanes * d.clock * 0.75)
    return _kernel(issue, traffic, kernels * d.gap)


def softmax_misses(d: Device, columns: int, item: int) -> float:
    """The part of the second and third pass of PyTorch's softmax over a row that has left the
    second cache level.
    """
    return max(0.0, 1 - 0.7 * d.l2_bytes / (2 * d.units * columns * item))


def _products(d: Device, call: Call, rows: int, odd: float = 1.0) -> float:
    """Both models' logits, dH and a trained head's dW, each one product a layer."""
    one = gemm(d, rows, call.columns, call.student, odd=odd) + gemm(
        d, rows, call.columns, call.teacher, odd=odd
    )
    one += gemm(d, rows, call.student, call.columns, odd=odd)
    if call.trained:
        one += gemm(d, call.columns, call.student, rows, odd=odd)
    return call.layers * one


def dense(d: Device, call: Call, how: str = "log_softmax") -> Prediction:
    """Plain PyTorch: `log_softmax(dtype=float32)` as in dense.py, or "float": `.float()` before
    it.
    """
    forward, forward_later, backward, backward_later = DENSE_BYTES[how]
    forward += forward_later * softmax_misses(d, call.columns, 4 if how == "float" else 2)
    backward += backward_later * softmax_misses(d, call.columns, 4)
    seconds = _products(d, call, call.rows, 0.8 if call.columns % 8 else 1.0)
    seconds += elementwise(d, call.elements, forward, kernels=105, fraction=d.eager)
    seconds += elementwise(d, call.elements, backward, kernels=88, fraction=d.eager)
    if call.trained:  # gradients of the layers added up
        later = call.layers - 1
        seconds += elementwise(
            d, call.columns * call.student * later, 6, kernels=later, fraction=d.eager
        )
    # Log-probabilities, the teacher's probabilities, deltas and what the cosine saves, and two
    # gradients in flight.
    return Prediction(seconds, call.elements * (8 + 4 + 0.6 * 8 + 8))


def compiled(d: Device, call: Call, moved: float = COMPILED_BYTES) -> Prediction:
    """torch.compile of dense.py; keeps two 16-bit logits and float32 deltas."""
    seconds = _products(d, call, call.rows, 0.9 if call.columns % 8 else 1.0)
    seconds += elementwise(
        d, call.elements, moved, kernels=20, fraction=min(d.stream, d.eager + 0.03)
    )
    if call.trained:
        seconds += elementwise(
            d, call.columns * call.student * (call.layers - 1), 6, fraction=d.eager
        )
    return Prediction(seconds, call.elements * 11)


def chunked(d: Device, call: Call, moved: float = COMPILED_BYTES) -> Prediction:
    """The same by chunks of rows whose head gradients are added up, as Liger-Kernel does it."""
    rows = min(CHUNK_ROWS, call.rows)
    elements = call.layers * rows * call.columns
    one = _products(d, call, rows, 0.9 if call.columns % 8 else 1.0)
    one += elementwise(d, elements, moved, kernels=20, fraction=min(d.stream, d.eager + 0.03))
    if call.trained:
        one += elementwise(
            d, call.columns * call.student * call.layers, 6, kernels=2, fraction=d.eager
        )
    return Prediction(one * math.ceil(call.rows / rows), elements * 11)


def one_pass(d: Device, call: Call) -> Prediction:
    """Tiles of both models by `tl.dot`, for the statistics and again for the gradient, parked in
    the second cache level.
    """
    operations = 2 * call.elements * (call.student + call.teacher)
    tiles = operations / (d.products * d.dot) + call.elements * 50 / (
        d.units * d.lanes * d.clock * 0.6
    )
    tiles += call.elements * 8 * 4 / d.l2
    m = call.layers * call.rows
    slabs = math.ceil(call.columns / max(128, 128 * MIB // (m * 2)))
    slab = math.ceil(call.columns / slabs)
    seconds = 2 * tiles + call.elements * 2 / (d.memory * d.stream)
    seconds += slabs * gemm(d, m, call.student, slab, out=4, accumulate=True)
    seconds += slabs * elementwise(d, slab * call.student, 4, kernels=2)
    if call.trained:
        seconds += slabs * (
            gemm(d, slab, call.student, m, out=4)
            + elementwise(d, slab * call.student, 8 + 10, kernels=3)
        )
    return Prediction(seconds, 384 * MIB + (4 * call.columns * call.student if call.trained else 0))


def block_rows(call: Call, budget: float) -> int:
    """Rows a block: what `budget` bytes of both models' logits hold, just under whole tiles of 128
    product rows.
    """
    padded = math.ceil(call.columns / 8) * 8
    most = max(
        1,
        min(int(budget // (8 * call.layers * padded)), MOST_PRODUCT_ROWS // call.layers, call.rows),
    )
    even = math.ceil(call.rows / math.ceil(call.rows / most))
    tiles = max(1, math.ceil(even * call.layers / 128))
    rows = min(call.rows, 128 * tiles // call.layers)
    if rows > most:
        rows = max(1, 128 * (tiles - 1) // call.layers) if tiles > 1 else most
    return rows


def cached(
    d: Device,
    call: Call,
    budget: float = CACHE_BYTES,
    *,
    per_row_kernels: int = PER_ROW_KERNELS,
    float32_out: float = 1.0,
    hidden: float = 0.0,
) -> Prediction:
    """Logits of a block of rows kept in float32 between the statistics and the gradient: every
    product is done once.

    `float32_out`: how fast a product with float32 output is beside one with 16-bit output;
    `hidden`: the part of the elementwise kernels that a second stream hides behind products.
    """
    rows = block_rows(call, budget)
    blocks, m = math.ceil(call.rows / rows), call.layers * rows
    filled = call.rows / (blocks * rows)  # the last block is shorter
    padded = math.ceil(call.columns / 8) * 8
    slabs = math.ceil(padded / max(1024, SLAB_BYTES // (2 * m)))
    slab, elements = math.ceil(padded / slabs), m * call.columns * filled
    products = {
        "logits": sum(
            gemm(d, m, call.columns, width, out=4) for width in (call.student, call.teacher)
        )
        / float32_out,
        "dH": slabs
        * (
            gemm(d, m, call.student, slab, out=4, accumulate=True)
            + elementwise(d, slab * call.student, 4)
        )
        + elementwise(d, m * call.student, 6),
    }
    if call.trained:
        products["dW"] = slabs * gemm(d, slab, call.student, m, out=4, accumulate=blocks > 1)
    parts = {name: blocks * filled * seconds for name, seconds in products.items()}
    parts["statistics"] = blocks * elementwise(d, elements, 8, instructions=38)
    parts["gradient"] = blocks * slabs * elementwise(d, elements / slabs, 8 + 2, instructions=24)
    state = elementwise(d, rows * (call.columns / 4096), 66 * 4 * 2)
    parts["per row"] = blocks * ((3 + per_row_kernels) * d.gap + state)
    parts["gather"] = elementwise(
        d, call.layers * call.rows * (call.student + call.teacher), 4, kernels=2 * call.layers
    )
    if call.trained:
        parts["dW rounded"] = elementwise(d, call.columns * call.student, 6)
    seconds = sum(parts.values())
    behind = 0.8 * (parts["logits"] + parts["dH"] + parts.get("dW", 0.0))
    seconds -= hidden * min(parts["statistics"] + parts["gradient"], behind)
    kept = 8 * m * padded + 2 * m * slab + 4 * m * call.student + 2 * slab * call.student
    kept += 4 * call.columns * call.student if call.trained and blocks > 1 else 0
    return Prediction(seconds, kept, parts, blocks, m)


def slabbed(d: Device, call: Call, budget: float = SLABBED_BYTES) -> Prediction:
    """The two operations apart: a slab of columns of all rows, its logits formed for the statistics
    and again for dL/dx.
    """
    blocks = max(1, math.ceil(call.layers * call.rows / 16384))
    m = math.ceil(call.layers * call.rows / blocks)
    slabs = math.ceil(call.columns / max(512, budget // (8 * m)))
    slab = math.ceil(call.columns / slabs)
    elements = m * slab
    misses = 0.0 if 8 * elements < 0.6 * d.l2_bytes else 1.0
    logits = sum(gemm(d, m, slab, width, out=4) for width in (call.student, call.teacher))
    one = 2 * logits + elementwise(d, elements, 8 * misses + 0.5, instructions=38)
    one += elementwise(d, elements, 8 * misses + 2, instructions=24)
    one += gemm(d, m, call.student, slab, out=4, accumulate=True) + elementwise(
        d, slab * call.student, 4
    )
    if call.trained:
        one += gemm(d, slab, call.student, m, out=4, accumulate=blocks > 1)
    seconds = one * slabs * blocks + (
        elementwise(d, call.columns * call.student, 6) if call.trained else 0.0
    )
    kept = (
        10 * elements
        + 4 * m * call.student
        + (4 * call.columns * call.student if call.trained and blocks > 1 else 0)
    )
    return Prediction(seconds, kept, blocks=blocks, product_rows=m)


WAYS = {
    "dense .float()": lambda d, call: dense(d, call, "float"),
    "dense": dense,
    "torch.compile": compiled,
    "chunked": chunked,
    "one_pass": one_pass,
    "slabbed": slabbed,
    "cached": cached,
}


def table(devices: list[Device], rows: int, layers: int, trained: bool) -> list[dict]:
    """One entry a pair, device and way: milliseconds and GB held; nothing of it is measured."""
    found = []
    for name, pair in PAIRS.items():
        for d in devices:
            for way, predict in WAYS.items():
                prediction = predict(d, Call(pair, rows, layers, trained))
                found.append(
                    {
                        "status": "predicted",
                        "pair": name,
                        "device": d.name,
                        "way": way,
                        "rows": rows,
                        "layers": layers,
                        "head": "trained" if trained else "frozen",
                        "ms": round(prediction.seconds * 1e3, 3),
                        "kept_bytes": round(prediction.kept),
                        "fits": prediction.kept < d.capacity,
                    }
                )
    return found


def main() -> None:
    from benchmarks.gpu_calibration import calibration, fit

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=4096, help="tokens of a step (%(default)s)")
    parser.add_argument("--layers", type=int, default=5)
    parser.add_argument("--frozen", action="store_true", help="the head is not trained")
    parser.add_argument(
        "--device", choices=DEVICES, action="append", help="only this one; may repeat"
    )
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    rows = calibration()
    print("Calibration: measured by others, and this model of the same; ms.\n")
    for row in rows:
        ratio = row.predicted / row.measured
        print(
            f"{row.name:56} {row.device:10} {row.measured * 1e3:7.1f} {row.predicted * 1e3:7.1f} "
            f"{ratio:5.2f}  {row.source}"
        )
    print(
        f"\nmedian ratio {fit(rows)['median']:.2f}, from {fit(rows)['least']:.2f} to "
        f"{fit(rows)['most']:.2f}\n"
    )
    devices = [DEVICES[name] for name in arguments.device or DEVICES]
    found = table(devices, arguments.rows, arguments.layers, not arguments.frozen)
    head = "frozen" if arguments.frozen else "trained"
    print(
        f"PREDICTED, NOT MEASURED: {arguments.rows} tokens, {arguments.layers} layers, bf16, head "
        f"{head}."
    )
    print("ms, and GB held beside inputs and gradients; *: more than the device has.\n")
    print(f"{'pair':8}{'device':8}" + "".join(f"{way:>19}" for way in WAYS))
    for i in range(0, len(found), len(WAYS)):
        cells = [
            f"{e['ms']:.1f} ({e['kept_bytes'] / 1e9:.1f}{'' if e['fits'] else '*'})"
            for e in found[i : i + len(WAYS)]
        ]
        print(
            f"{found[i]['pair']:8}{found[i]['device']:8}" + "".join(f"{cell:>19}" for cell in cells)
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
