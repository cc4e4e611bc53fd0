"""A model of the loss with its gradients on a GPU: the time of every kernel, added up.

    python -m benchmarks.gpu_model [--rows 4096] [--layers 5] [--frozen] [--device H100] [--json
    FILE]

EVERY FIGURE FOR THIS PACKAGE IS PREDICTED: no GPU has run it. The model is fitted to measurements
by others (`gpu_calibration.py`): the fractions of `DEVICES` were chosen with those figures in view.
`python -m benchmarks gpu` measures the same shapes and prints this model's figure beside each.

- A kernel takes the longer of its arithmetic and its memory traffic, plus OVERLAP of the shorter,
  plus a gap. Kernels do not overlap one another.
- A GEMM reaches the device's fraction of the peak, times the fill of its last wave of tiles, times
  K / (K + 96). With fewer tiles than multiprocessors the inner dimension is split. A vocabulary
  that 8 does not divide slows GEMMs that read or write it unpadded: 0.8 in eager PyTorch, 0.9 under
  torch.compile, which pads some.
counted: DENSE_BYTES from the operators that eager PyTorch dispatches, COMPILED_BYTES from the code
that torch.compile generates. The latter is the least certain: 40 to 56.
float32), reads 8 for the statistics and 8 for the gradient, writes the gradient's 2 and reads it
twice in GEMMs. "slabbed" computes the logits of a slab of the vocabulary twice. "one_pass"
multiplies twice in tl.dot and leaves tiles in L2.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.gpu_devices import DEVICES, Device, elementwise, gemm, softmax_misses
from benchmarks.workloads import GEMMA, GPT2, QWEN, TINYLLAMA, Workload
from fdd_kernels.common.sizes import GIB, MIB

PAIRS: dict[str, Workload] = {"GPT-2": GPT2, "Llama": TINYLLAMA, "Qwen": QWEN, "Gemma": GEMMA}

# Bytes an element of forward and backward, each with those of the softmax's later passes where a
# row has left L2.
DENSE_BYTES = {"float": (102.4, 16.0, 118.0, 4.0), "log_softmax": (86.4, 8.0, 110.0, 4.0)}
COMPILED_BYTES = 48.0
CHUNK_ROWS = 1024
# Of the strategies: most bytes of dL/dlogits at a time, most rows x layers of a block, and kernels
# of a block's per-row mathematics.
SLAB_BYTES, MOST_BLOCK_ROWS, PER_ROW_KERNELS = 96 * MIB, 4480, 40
CACHE_BYTES, SLABBED_BYTES = 2 * GIB, 256 * MIB


@dataclass(frozen=True)
class Call:
    """One loss with its gradients: the pair's shapes, rows, layers, and whether the head is
    trained.
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

    @property
    def head(self) -> int:
        """Count the elements of the head's gradient; 0 where it is frozen."""
        return self.columns * self.student if self.trained else 0


@dataclass(frozen=True)
class Prediction:
    """Seconds, bytes in use beside inputs and gradients (`kept`), and the seconds of each part."""

    seconds: float
    kept: float
    parts: dict[str, float] = field(default_factory=dict)
    blocks: int = 1
    block_rows: int = 0  # rows x layers of a block


def _gemms(d: Device, call: Call, rows: int, odd: float = 1.0) -> float:
    """Sum both models' logits, dH and a trained head's dW, one GEMM a layer each."""
    one = sum(gemm(d, rows, call.columns, width, odd=odd) for width in (call.student, call.teacher))
    one += gemm(d, rows, call.student, call.columns, odd=odd)
    if call.trained:
        one += gemm(d, call.columns, call.student, rows, odd=odd)
    return call.layers * one


def _odd(call: Call, slowed: float) -> float:
    return slowed if call.columns % 8 else 1.0


def dense(d: Device, call: Call, how: str = "log_softmax") -> Prediction:
    """Predict plain PyTorch: `log_softmax(dtype=float32)` as in dense.py, or `.float()` ("float")
    before it.
    """
    forward, forward_later, backward, backward_later = DENSE_BYTES[how]
    forward += forward_later * softmax_misses(d, call.columns, 4 if how == "float" else 2)
    backward += backward_later * softmax_misses(d, call.columns, 4)
    seconds = _gemms(d, call, call.rows, _odd(call, 0.8))
    seconds += elementwise(d, call.elements, forward, kernels=105, fraction=d.eager)
    seconds += elementwise(d, call.elements, backward, kernels=88, fraction=d.eager)
    if call.trained:  # gradients of the layers added up
        later = call.layers - 1
        seconds += elementwise(d, call.head * later, 6, kernels=later, fraction=d.eager)
    # Log-probabilities, the teacher's probabilities, deltas and the cosine's saved tensors, and two
    # gradients in flight.
    return Prediction(seconds, call.elements * (8 + 4 + 0.6 * 8 + 8))


def compiled(d: Device, call: Call, moved: float = COMPILED_BYTES) -> Prediction:
    """Predict torch.compile of dense.py, which holds two 16-bit logits and float32 deltas."""
    fraction = min(d.stream, d.eager + 0.03)
    seconds = _gemms(d, call, call.rows, _odd(call, 0.9))
    seconds += elementwise(d, call.elements, moved, kernels=20, fraction=fraction)
    if call.trained:
        seconds += elementwise(d, call.head * (call.layers - 1), 6, fraction=d.eager)
    return Prediction(seconds, call.elements * 11)


def chunked(d: Device, call: Call, moved: float = COMPILED_BYTES) -> Prediction:
    """Predict the same by chunks of rows whose head gradients are added up, as Liger-Kernel does
    it.
    """
    rows, fraction = min(CHUNK_ROWS, call.rows), min(d.stream, d.eager + 0.03)
    elements = call.layers * rows * call.columns
    one = _gemms(d, call, rows, _odd(call, 0.9))
    one += elementwise(d, elements, moved, kernels=20, fraction=fraction)
    if call.trained:
        one += elementwise(d, call.head * call.layers, 6, kernels=2, fraction=d.eager)
    return Prediction(one * math.ceil(call.rows / rows), elements * 11)


def one_pass(d: Device, call: Call) -> Prediction:
    """Predict tiles of both models by `tl.dot`, for the statistics and again for the gradient, in
    L2.
    """
    operations = 2 * call.elements * (call.student + call.teacher)
    issue = call.elements * 50 / (d.units * d.lanes * d.clock * 0.6)
    tiles = operations / (d.gemms * d.dot) + issue + call.elements * 8 * 4 / d.l2
    m = call.layers * call.rows
    slabs = math.ceil(call.columns / max(128, 128 * MIB // (m * 2)))
    slab = math.ceil(call.columns / slabs)
    one = gemm(d, m, call.student, slab, out=4, accumulate=True)
    one += elementwise(d, slab * call.student, 4, kernels=2)
    if call.trained:
        one += gemm(d, slab, call.student, m, out=4)
        one += elementwise(d, slab * call.student, 8 + 10, kernels=3)
    seconds = 2 * tiles + call.elements * 2 / (d.memory * d.stream) + slabs * one
    return Prediction(seconds, 384 * MIB + 4 * call.head)


def rows_a_block(call: Call, budget: float) -> int:
    """Choose rows a block: as many as `budget` bytes of both models' logits hold, just under whole
    tiles of 128 rows of a GEMM.
    """
    padded = math.ceil(call.columns / 8) * 8
    fitting = int(budget // (8 * call.layers * padded))
    most = max(1, min(fitting, MOST_BLOCK_ROWS // call.layers, call.rows))
    even = math.ceil(call.rows / math.ceil(call.rows / most))
    tiles = max(1, math.ceil(even * call.layers / 128))
    rows = min(call.rows, 128 * tiles // call.layers)
    if rows > most:
        rows = max(1, 128 * (tiles - 1) // call.layers) if tiles > 1 else most
    return rows


def cached(d: Device, call: Call, budget: float = CACHE_BYTES) -> Prediction:
    """Predict logits of a block of rows that stay in float32 between statistics and gradient: every
    GEMM runs once.
    """
    rows = rows_a_block(call, budget)
    blocks, m = math.ceil(call.rows / rows), call.layers * rows
    filled = call.rows / (blocks * rows)  # the last block is shorter
    padded = math.ceil(call.columns / 8) * 8
    slabs = math.ceil(padded / max(1024, SLAB_BYTES // (2 * m)))
    slab, elements = math.ceil(padded / slabs), m * call.columns * filled
    widths = call.student, call.teacher
    gemms = {"logits": sum(gemm(d, m, call.columns, w, out=4) for w in widths)}
    gemms["dH"] = elementwise(d, m * call.student, 6) + slabs * (
        gemm(d, m, call.student, slab, out=4, accumulate=True)
        + elementwise(d, slab * call.student, 4)
    )
    if call.trained:
        gemms["dW"] = slabs * gemm(d, slab, call.student, m, out=4, accumulate=blocks > 1)
    parts = {name: blocks * filled * seconds for name, seconds in gemms.items()}
    parts["statistics"] = blocks * elementwise(d, elements, 8, instructions=38)
    parts["gradient"] = blocks * slabs * elementwise(d, elements / slabs, 8 + 2, instructions=24)
    state = elementwise(d, rows * (call.columns / 4096), 66 * 4 * 2)
    parts["per row"] = blocks * ((3 + PER_ROW_KERNELS) * d.gap + state)
    gathered = call.layers * call.rows * (call.student + call.teacher)
    parts["gather"] = elementwise(d, gathered, 4, kernels=2 * call.layers)
    if call.trained:
        parts["dW rounded"] = elementwise(d, call.head, 6)
    seconds = sum(parts.values())
    kept = 8 * m * padded + 2 * m * slab + 4 * m * call.student + 2 * slab * call.student
    return Prediction(seconds, kept + (4 * call.head if blocks > 1 else 0), parts, blocks, m)


def slabbed(d: Device, call: Call, budget: float = SLABBED_BYTES) -> Prediction:
    """Predict the two operations apart: the logits of a slab of the vocabulary for the statistics,
    and again for dL/dlogits.
    """
    blocks = max(1, math.ceil(call.layers * call.rows / 16384))
    m = math.ceil(call.layers * call.rows / blocks)
    slabs = math.ceil(call.columns / max(512, budget // (8 * m)))
    slab = math.ceil(call.columns / slabs)
    elements = m * slab
    misses = 0.0 if 8 * elements < 0.6 * d.l2_bytes else 1.0
    one = 2 * sum(gemm(d, m, slab, width, out=4) for width in (call.student, call.teacher))
    one += elementwise(d, elements, 8 * misses + 0.5, instructions=38)
    one += elementwise(d, elements, 8 * misses + 2, instructions=24)
    one += gemm(d, m, call.student, slab, out=4, accumulate=True)
    one += elementwise(d, slab * call.student, 4)
    if call.trained:
        one += gemm(d, slab, call.student, m, out=4, accumulate=blocks > 1)
    seconds = one * slabs * blocks + (elementwise(d, call.head, 6) if call.trained else 0.0)
    kept = 10 * elements + 4 * m * call.student + (4 * call.head if blocks > 1 else 0)
    return Prediction(seconds, kept, blocks=blocks, block_rows=m)


WAYS: dict[str, Callable[[Device, Call], Prediction]] = {
    "dense .float()": lambda d, call: dense(d, call, "float"),
    "dense": dense,
    "torch.compile": compiled,
    "chunked": chunked,
    "one_pass": one_pass,
    "slabbed": slabbed,
    "cached": cached,
}


def predictions(devices: list[Device], rows: int, layers: int, trained: bool) -> list[dict]:
    """List predicted milliseconds and bytes in use, one entry a pair, device and way."""
    found, about = [], {"rows": rows, "layers": layers, "head": "trained" if trained else "frozen"}
    for name, pair in PAIRS.items():
        for d in devices:
            for way, predict in WAYS.items():
                prediction = predict(d, Call(pair, rows, layers, trained))
                entry = {"status": "predicted", "pair": name, "device": d.name, "way": way, **about}
                entry |= {"ms": round(prediction.seconds * 1e3, 3)}
                kept = round(prediction.kept)
                found.append(entry | {"kept_bytes": kept, "fits": kept < d.capacity})
    return found


def main() -> None:
    import pandas as pd

    from benchmarks.gpu_calibration import printed

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=4096, help="tokens of a step (%(default)s)")
    parser.add_argument("--layers", type=int, default=5)
    parser.add_argument("--frozen", action="store_true", help="the head is not trained")
    only = {"action": "append", "help": "only this one; may repeat"}
    parser.add_argument("--device", choices=DEVICES, **only)
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    print(printed())
    devices = [DEVICES[name] for name in arguments.device or DEVICES]
    found = predictions(devices, arguments.rows, arguments.layers, not arguments.frozen)
    about = f"{arguments.rows} tokens, {arguments.layers} layers, bf16, head {found[0]['head']}"
    print(f"PREDICTED, NOT MEASURED: {about}.")
    print("ms, and GB in use beside inputs and gradients; *: more than the device has.\n")
    table = pd.DataFrame(found)
    full = table.fits.map({True: "", False: "*"})
    table["cell"] = [
        f"{ms:.1f} ({b / 1e9:.1f}{f})" for ms, b, f in zip(table.ms, table.kept_bytes, full)
    ]
    cells = table.pivot(index=["pair", "device"], columns="way", values="cell")
    print(cells.loc[list(PAIRS), list(WAYS)].to_string())
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
