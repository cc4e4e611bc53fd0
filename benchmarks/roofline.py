"""An analytic roofline of the Triton kernels: what bounds them on which device, and what dense and chunked losses move.

    python -m benchmarks.roofline [--rows 4096] [--layers 5] [--json FILE]

NOTHING HERE IS MEASURED. Every figure follows from the published peaks below and these assumptions:

- A phase takes the longest of its four times, products, exponentials, second-cache traffic and memory traffic, as if they
  overlapped perfectly, plus nothing for launches. Real kernels reach perhaps half to two thirds of that.
- Tiles are those of `fdd_kernels/backends/triton/config.py`. A tile of rows x columns fetches (rows + columns) * width
  elements a model from the second cache level for 2 * rows * columns * width operations, parks both models' values in
  float32 scratch, and reads them back 1 (log-sum-exps) + 2 (deltas) times in the statistics, 3 times in the gradient.
- Scratch and operands stay in the second cache level; memory sees the heads once for each wave of row tiles that runs at
  the same time, the hidden states once a column range, and dL/dx written once and read once a product.
- An exponential takes one operation of the special-function units (16 a clock and multiprocessor on NVIDIA, 64 lanes / 4
  on CDNA); the rest of the elementwise work is counted at 40 float32 operations an element, layer and pass.
- Vendor's products (dH, dW, dense, chunked) are taken with 128 x 256 tiles, under the same rate of the second cache level.
- Dense PyTorch: 16-bit products, float32 log-softmax; tensors of (layers x rows x columns) written and read:
  two logits in 16 bits, their float32 copies, two log-softmaxes, two deltas, products of these for KL and cosine, and as
  much again in the backward pass: 20 float32 passes forward, 24 backward; what autograd keeps is 10 such tensors.
- Chunked (Liger-style): the same passes over chunks of rows, so nothing of that size is kept, but every pass still goes
  through memory; the gradient is formed in the forward pass, the head is read once a chunk (1024 rows) and product.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from fdd_kernels.backends.triton.config import choose

GIB, MIB = 2**30, 2**20


@dataclass(frozen=True)
class Device:
    """Published peaks, in operations or bytes a second. `l2`: what all multiprocessors together fetch from it, an estimate."""

    name: str
    architecture: str
    units: int
    products: float
    f32: float
    exponentials: float
    l2: float
    memory: float
    l2_bytes: int


# products: dense 16-bit tensor-core peak. exponentials: units * 16 * clock (CDNA3: units * 16 * clock).
DEVICES = (
    Device("A100", "sm_80", 108, 312e12, 19.5e12, 108 * 16 * 1.41e9, 4.5e12, 2.0e12, 40 * MIB),
    Device("H100", "sm_90", 132, 989e12, 67e12, 132 * 16 * 1.75e9, 7.0e12, 3.35e12, 50 * MIB),
    Device("B200", "sm_100", 148, 2250e12, 80e12, 148 * 16 * 1.85e9, 12e12, 8.0e12, 126 * MIB),
    Device("MI300X", "gfx942", 304, 1307e12, 163e12, 304 * 16 * 2.1e9, 17e12, 5.3e12, 256 * MIB),
)


@dataclass(frozen=True)
class Pair:
    """A student and its teacher: columns compared and hidden widths."""

    name: str
    columns: int
    student_width: int
    teacher_width: int


PAIRS = (
    Pair("GPT-2 / GPT-2 XL", 50257, 768, 1600),
    Pair("Llama 1.1B / 13B", 32000, 2048, 5120),
    Pair("Qwen 0.5B / 7B", 151936, 896, 3584),
)
ITEM = 2  # bytes of a 16-bit number
F32 = 4
ELEMENTWISE = 40


@dataclass(frozen=True)
class Phase:
    """Times of one phase by what it could be bound by, in seconds."""

    products: float
    exponentials: float
    elementwise: float
    l2: float
    memory: float

    @property
    def seconds(self) -> float:
        return max(vars(self).values())

    @property
    def bottleneck(self) -> str:
        return max(vars(self), key=vars(self).get)


def _tile(device: Device, rows: int):
    return choose((rows, 1024, 1024, 1024), torch.bfloat16, device.architecture)


def tile_phase(device: Device, pair: Pair, rows: int, layers: int, *, scratch_reads: int, out_bytes: int) -> Phase:
    """Both models' tiles once, every layer: the statistics, or the part of the gradient that forms dL/dx."""
    tile = _tile(device, rows)
    width = pair.student_width + pair.teacher_width
    elements = layers * rows * pair.columns
    operands = ITEM * width * (1 / tile.block_rows + 1 / tile.block_columns)
    parked = 2 * F32 * (1 + scratch_reads)
    row_tiles = -(-rows // tile.block_rows)
    # Row tiles that run at the same time share what they fetch of the heads.
    waves = -(-row_tiles // device.units)
    heads = waves * pair.columns * width * ITEM
    ranges = max(1, device.units // row_tiles)
    hidden = ranges * layers * rows * width * ITEM
    return Phase(
        products=2 * elements * width / device.products,
        exponentials=2 * elements / device.exponentials,
        elementwise=ELEMENTWISE * elements / device.f32,
        l2=elements * (operands + parked + out_bytes) / device.l2,
        memory=(heads + hidden + elements * out_bytes) / device.memory,
    )


def product_phase(device: Device, pair: Pair, rows: int, layers: int, trained_head: bool) -> Phase:
    """dH = G W and dW = G^T H by the vendor's matrix product, from G in 16 bits; its tiles are taken as 128 x 256."""
    elements = layers * rows * pair.columns
    count = 2 if trained_head else 1
    sums = layers * rows * pair.student_width * F32 * 2 * max(1, pair.columns // 2048)
    return Phase(
        products=count * 2 * elements * pair.student_width / device.products,
        exponentials=0.0,
        elementwise=0.0,
        l2=count * elements * ITEM * pair.student_width * (1 / 128 + 1 / 256) / device.l2,
        memory=(count * elements * ITEM + sums) / device.memory,
    )


def atomics_seconds(device: Device, pair: Pair, rows: int, layers: int) -> float:
    """What accumulating dH in the kernel would take instead: a float32 read-modify-write a column tile, in the cache."""
    tile = _tile(device, rows)
    return layers * rows * pair.student_width * 2 * F32 * (pair.columns / tile.block_columns) / device.l2


def streamed(device: Device, pair: Pair, rows: int, layers: int, trained_head: bool = True) -> dict:
    """The whole loss and its gradients with the Triton kernels."""
    phases = {
        "statistics": tile_phase(device, pair, rows, layers, scratch_reads=3, out_bytes=0),
        "gradient": tile_phase(device, pair, rows, layers, scratch_reads=3, out_bytes=ITEM),
        "dH and dW": product_phase(device, pair, rows, layers, trained_head),
    }
    return {
        "seconds": sum(phase.seconds for phase in phases.values()),
        "phases": {name: {"seconds": phase.seconds, "bound by": phase.bottleneck} for name, phase in phases.items()},
        "atomics_seconds": atomics_seconds(device, pair, rows, layers),
        "memory_bytes": sum(phase.memory for phase in phases.values()) * device.memory,
    }


def dense(device: Device, pair: Pair, rows: int, layers: int, chunk_rows: int | None = None) -> dict:
    """Plain PyTorch, or with `chunk_rows` the same by chunks of rows: time, memory traffic and what it keeps."""
    elements = layers * rows * pair.columns
    width = pair.student_width + pair.teacher_width
    operations = 2 * elements * (width + 2 * pair.student_width)
    chunks = 1 if chunk_rows is None else -(-rows // chunk_rows)
    traffic = elements * F32 * (20 + 24) + chunks * pair.columns * (width + pair.student_width * 2) * ITEM
    if chunk_rows is not None:  # the head's gradient is read and written by every chunk, in float32
        traffic += chunks * pair.columns * pair.student_width * 2 * F32
    kept = elements * F32 * 10 * (1 if chunk_rows is None else min(1.0, chunk_rows / rows))
    # The vendor's product is held to the same rate of the second cache level as the kernels here, with its larger tiles.
    products = max(operations / device.products, operations / 2 * ITEM * (1 / 128 + 1 / 256) / device.l2)
    memory = traffic / device.memory
    return {
        "seconds": max(products, memory),
        "bound by": "memory" if memory > products else "products",
        "memory_bytes": traffic,
        "kept_bytes": kept,
    }


def scratch_bytes(device: Device, rows: int) -> int:
    """The statistics kernel's scratch: two layers of both models' tiles a program, one program a multiprocessor at work."""
    tile = _tile(device, rows)
    return device.units * 4 * tile.block_rows * tile.block_columns * F32


def table(rows: int, layers: int) -> list[dict]:
    """One entry a device and pair."""
    found = []
    for pair in PAIRS:
        for device in DEVICES:
            found.append(
                {
                    "pair": asdict(pair), "device": device.name, "rows": rows, "layers": layers,
                    "streamed": streamed(device, pair, rows, layers), "dense": dense(device, pair, rows, layers),
                    "chunked": dense(device, pair, rows, layers, chunk_rows=1024),
                    "scratch_bytes": scratch_bytes(device, rows), "l2_bytes": device.l2_bytes,
                }
            )  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=4096, help="tokens of a step")
    parser.add_argument("--layers", type=int, default=5)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    found = table(arguments.rows, arguments.layers)
    print(f"Predicted, not measured: lower bounds for {arguments.rows} tokens, {arguments.layers} layers, bf16, head trained.")
    print("ms: statistics + gradient + dH and dW, with what bounds each; GiB: traffic of memory;")
    print("kept: GiB held for the backward pass, dense and chunked.\n")
    line = "{:18} {:7} {:>24} {:>28} {:>7} {:>16} {:>16} {:>20} {:>9}"
    print(
        line.format(
            "pair",
            "device",
            "streamed ms",
            "bound by",
            "GiB",
            "dense ms (GiB)",
            "chunked (GiB)",
            "dense, chunked kept",
            "atomics",
        )
    )
    for entry in found:
        ours, plain, chunked = entry["streamed"], entry["dense"], entry["chunked"]
        phases = ours["phases"].values()
        parts = " + ".join(f"{phase['seconds'] * 1e3:.1f}" for phase in phases)
        bounds = ", ".join(phase["bound by"] for phase in phases)
        print(
            line.format(
                entry["pair"]["name"], entry["device"], f"{parts} = {ours['seconds'] * 1e3:.1f}", bounds,
                f"{ours['memory_bytes'] / GIB:.1f}", f"{plain['seconds'] * 1e3:.0f} ({plain['memory_bytes'] / GIB:.0f})",
                f"{chunked['seconds'] * 1e3:.0f} ({chunked['memory_bytes'] / GIB:.0f})",
                f"{plain['kept_bytes'] / GIB:.0f}, {chunked['kept_bytes'] / GIB:.0f}", f"{ours['atomics_seconds'] * 1e3:.0f}",
            )
        )  # fmt: skip
    print("\natomics: ms that accumulating dH in the kernel would add instead of G and a matrix product.")
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
