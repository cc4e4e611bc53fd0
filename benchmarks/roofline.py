"""An analytic roofline of the Triton kernels: what bounds them on which device, and what dense and chunked losses move.

    python -m benchmarks.roofline [--rows 4096] [--layers 5] [--json FILE]

NOTHING HERE IS MEASURED. Every figure follows from the published peaks below and these assumptions:

- A phase takes the longest of its five times, products, exponentials, elementwise work, second-cache traffic and memory
  traffic, as if they overlapped perfectly, plus nothing for launches. Real kernels reach perhaps half to two thirds of that.
- Tiles are those of `fdd_kernels/backends/triton/config.py`. A tile of rows x columns fetches (rows + columns) * width
  elements a model from the second cache level for 2 * rows * columns * width operations, parks both models' values in
  float32 scratch, and reads them back 1 (log-sum-exps) + 2 (deltas) times in the statistics, 3 times in the gradient (the
  layer and its neighbours; what one strip reads again is in the first level).
- The second cache level holds scratch first, then the hidden states of the rows at work: the part of either that does not
  fit goes to memory, scratch at every access and hidden states once for every column tile that is walked in step. The heads
  come once for each wave of row tiles, dL/dx is written once and read once a product.
- An exponential takes one operation of the special-function units, 16 a clock and multiprocessor; the kernels take
  EXPONENTIALS an element and layer, counted in Triton's interpreter by the tests, soft caps none. The rest of the
  elementwise work is about ELEMENTWISE float32 instructions an element, layer and pass, none of them fused into two
  operations or packed: so one lane and clock each, half of NVIDIA's published float32 peak and a quarter of AMD's.
- What the multiprocessors fetch from the second level is no published figure for NVIDIA: estimates. AMD's is the Infinity
  Cache, which is what all multiprocessors share; the 4 MiB before it in every die are taken to hold nothing.
- Vendor's products (dH, dW, dense, chunked) are held to the same rate of the second level, with tiles of 128 x 256, or
  256 x 256 where two multiprocessors share operands (sm_90, sm_100) or one has the registers (CDNA3).
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

from fdd_kernels.backends.triton.config import LaunchConfig, choose
from fdd_kernels.backends.triton.operations import GRAD_BYTES, HEAD_BYTES

GIB, MIB = 2**30, 2**20


@dataclass(frozen=True)
class Device:
    """Published peaks. `l2`: bytes a second that all multiprocessors together fetch from it, an estimate."""

    name: str
    architecture: str
    units: int
    clock: float  # that the peak of the products implies
    lanes: int  # float32 instructions a clock and multiprocessor
    products: float  # dense 16-bit operations a second
    l2: float
    memory: float
    l2_bytes: int
    vendor_tile: tuple[int, int]

    @property
    def instructions(self) -> float:
        return self.units * self.lanes * self.clock

    @property
    def exponentials(self) -> float:
        return self.units * 16 * self.clock


DEVICES = (
    Device("A100", "sm_80", 108, 1.41e9, 64, 312e12, 4.5e12, 2.04e12, 40 * MIB, (128, 256)),
    Device("H100", "sm_90", 132, 1.83e9, 128, 989e12, 7.0e12, 3.35e12, 50 * MIB, (256, 256)),
    Device("B200", "sm_100", 148, 1.85e9, 128, 2250e12, 12e12, 8.0e12, 126 * MIB, (256, 256)),
    Device("MI300X", "gfx942", 304, 2.1e9, 64, 1307e12, 17.2e12, 5.3e12, 256 * MIB, (256, 256)),
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
SCRATCH_READS = 3
ELEMENTWISE = 50
EXPONENTIALS = {"statistics": 2.125, "gradient": 2.0}  # of both models; the statistics rescale each row once a strip of 16


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


def tile_of(device: Device, pair: Pair, rows: int) -> LaunchConfig:
    return choose((rows, pair.columns, pair.student_width, pair.teacher_width), torch.bfloat16, device.architecture)


def scratch_bytes(device: Device, pair: Pair, rows: int, ring: int) -> int:
    """What all programs at work park: `ring` layers of both models' tiles each; 2 in the statistics, 3 in the gradient."""
    tile = tile_of(device, pair, rows)
    return tile.programs * device.units * ring * 2 * tile.block_rows * tile.block_columns * F32


def tile_phase(device: Device, pair: Pair, rows: int, layers: int, name: str) -> Phase:
    """Both models' tiles once, every layer: the statistics, or the part of the gradient that forms dL/dx."""
    ring, out_bytes = {"statistics": (2, 0), "gradient": (3, ITEM)}[name]
    tile = tile_of(device, pair, rows)
    width = pair.student_width + pair.teacher_width
    elements = layers * rows * pair.columns
    operands = ITEM * width * (1 / tile.block_rows + 1 / tile.block_columns)
    parked = 2 * F32 * (1 + SCRATCH_READS)
    row_tiles = -(-rows // tile.block_rows)
    programs = tile.programs * device.units
    # Row tiles that run at the same time share what they fetch of the heads; column tiles, what they fetch of the states.
    heads = -(-row_tiles // programs) * pair.columns * width * ITEM
    in_step = max(1, programs // row_tiles)
    scratch = scratch_bytes(device, pair, rows, ring)
    scratch_missed = max(0.0, 1 - device.l2_bytes / scratch)
    at_work = layers * min(row_tiles, programs) * tile.block_rows * width * ITEM
    hidden_missed = 1 - min(1.0, max(0, device.l2_bytes - scratch) / at_work)
    sweeps = pair.columns / tile.block_columns / in_step
    hidden = layers * rows * width * ITEM * max(1.0, hidden_missed * sweeps)
    return Phase(
        products=2 * elements * width / device.products,
        exponentials=EXPONENTIALS[name] * elements / device.exponentials,
        elementwise=ELEMENTWISE * elements / device.instructions,
        l2=elements * (operands + parked + out_bytes) / device.l2,
        memory=(heads + hidden + elements * (out_bytes + scratch_missed * parked)) / device.memory,
    )


def vendor_bytes(device: Device, operations: float) -> float:
    """What the vendor's 16-bit products of so many operations fetch from the second cache level."""
    return operations / 2 * ITEM * sum(1 / side for side in device.vendor_tile)


def product_phase(device: Device, pair: Pair, rows: int, layers: int, trained_head: bool) -> Phase:
    """dH = G W and dW = G^T H by the vendor's matrix product, from G in 16 bits."""
    elements = layers * rows * pair.columns
    count = 2 if trained_head else 1
    operations = count * 2 * elements * pair.student_width
    # dH is summed in float32 over the chunks of columns whose G and whose rows of the head the two budgets hold; dW is zeroed,
    # summed, scaled and rounded.
    chunks = max(1, elements * ITEM // GRAD_BYTES, pair.columns * pair.student_width * (ITEM + F32) // HEAD_BYTES)
    sums = layers * rows * pair.student_width * 2 * F32 * chunks
    sums += (count - 1) * pair.columns * pair.student_width * (6 * F32 + ITEM)
    return Phase(
        products=operations / device.products,
        exponentials=0.0,
        elementwise=0.0,
        l2=vendor_bytes(device, operations) / device.l2,
        memory=(count * elements * ITEM + sums) / device.memory,
    )


def atomics_seconds(device: Device, pair: Pair, rows: int, layers: int) -> float:
    """What accumulating dH in the kernel would take instead: a float32 read-modify-write a column tile, in the cache."""
    tile = tile_of(device, pair, rows)
    return layers * rows * pair.student_width * 2 * F32 * (pair.columns / tile.block_columns) / device.l2


def streamed(device: Device, pair: Pair, rows: int, layers: int, trained_head: bool = True) -> dict:
    """The whole loss and its gradients with the Triton kernels."""
    phases = {
        "statistics": tile_phase(device, pair, rows, layers, "statistics"),
        "gradient": tile_phase(device, pair, rows, layers, "gradient"),
        "dH and dW": product_phase(device, pair, rows, layers, trained_head),
    }
    return {
        "seconds": sum(phase.seconds for phase in phases.values()),
        "phases": {
            name: {"seconds": phase.seconds, "bound by": phase.bottleneck, "times": asdict(phase)}
            for name, phase in phases.items()
        },
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
    products = max(operations / device.products, vendor_bytes(device, operations) / device.l2)
    memory = traffic / device.memory
    return {
        "seconds": max(products, memory),
        "bound by": "memory" if memory > products else "products",
        "memory_bytes": traffic,
        "kept_bytes": kept,
    }


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
                    "scratch_bytes": scratch_bytes(device, pair, rows, ring=3), "l2_bytes": device.l2_bytes,
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
    line = "{:18} {:7} {:>24} {:>28} {:>7} {:>16} {:>16} {:>14} {:>11} {:>8}"
    names = (
        "pair",
        "device",
        "streamed ms",
        "bound by",
        "GiB",
        "dense ms (GiB)",
        "chunked (GiB)",
        "kept",
        "scratch/L2",
        "atomics",
    )
    print(line.format(*names))
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
                f"{plain['kept_bytes'] / GIB:.0f}, {chunked['kept_bytes'] / GIB:.0f}",
                f"{entry['scratch_bytes'] / MIB:.0f}/{entry['l2_bytes'] / MIB:.0f}", f"{ours['atomics_seconds'] * 1e3:.0f}",
            )
        )  # fmt: skip
    print("\nscratch/L2: MiB that the gradient's programs park, and that the second cache level has.")
    print("atomics: ms that accumulating dH in the kernel would add instead of G and a matrix product.")
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
