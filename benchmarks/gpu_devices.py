"""Devices, and the time of single kernels on them; see `gpu_model.py`."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fdd_kernels.common.sizes import MIB

OVERLAP = 0.15  # of the shorter of arithmetic and memory traffic


@dataclass(frozen=True)
class Device:
    """Published peaks, and the fractions of them that kernels of each kind reach.

    `gemms`: 16-bit operations a second; `memory`, `l2`: bytes a second; `units`: multiprocessors;
    `lanes`: float32 instructions a clock and multiprocessor; `tile`: the larger side of a GEMM's
    tiles is 256, the other is this. Fractions: `gemm` of the vendor's GEMMs; `dot` of `tl.dot` in
    tiles of 128 x 128; `eager` of memory by PyTorch's elementwise kernels; `stream` by kernels that
    read and write once. `gap`: seconds between dependent kernels.
    """

    name: str
    gemms: float
    memory: float
    l2: float
    l2_bytes: float
    units: int
    lanes: int
    clock: float
    gemm: float
    dot: float
    eager: float
    stream: float
    tile: int
    capacity: float
    gap: float = 2e-6


# The fractions of the H200 are guesses between its neighbours: no figure in gpu_calibration.py is
# of one. Columns: TFLOP/s, memory and L2 in TB/s, MiB of L2, units, lanes, GHz; fractions; tile,
# GB.
_DEVICES = """
A100  312 2.039 4.5  40 108  64 1.41   0.84 0.66 0.82 0.86   128  80
H100  989 3.35  5.5  50 132 128 1.75   0.73 0.50 0.87 0.89   128  80
H200  989 4.80  5.5  50 132 128 1.75   0.74 0.50 0.85 0.88   128 141
B200 2250 8.0  10   126 148 128 1.85   0.72 0.38 0.72 0.80   256 180
"""
_UNITS = (1e12, 1e12, 1e12, MIB, 1, 1, 1e9, 1, 1, 1, 1, 1, 1e9)


def _device(line: str) -> Device:
    name, *numbers = line.split()
    return Device(name, *[float(number) * unit for number, unit in zip(numbers, _UNITS)])


DEVICES = {d.name: d for d in map(_device, _DEVICES.strip().splitlines())}


def _kernel(arithmetic: float, traffic: float, gaps: float) -> float:
    return max(arithmetic, traffic) + OVERLAP * min(arithmetic, traffic) + gaps


def gemm(
    d: Device, m: int, n: int, k: int, *, out: int = 2, accumulate: bool = False, odd: float = 1.0
) -> float:
    """Predict seconds of one (m, k) x (k, n) GEMM of 16-bit operands; an output element has `out`
    bytes, and is read too if accumulated.
    """
    tiles = min(math.ceil(a / d.tile) * math.ceil(b / 256) for a, b in ((m, n), (n, m)))
    split = max(1, min(d.units // tiles, k // 1024)) if tiles < d.units else 1
    waves = tiles * split / d.units
    full = waves / math.ceil(waves) if waves < 8 else 1.0
    fraction = d.gemm * odd * full * (k / split) / (k / split + 96)
    moved = 2 * (m * k + n * k) + m * n * out * (2 if accumulate else 1)
    moved += 8 * split * m * n if split > 1 else 0
    return _kernel(2 * m * n * k / (d.gemms * fraction), moved / (d.memory * 0.92), d.gap)


def elementwise(
    d: Device,
    elements: float,
    moved: float,
    *,
    instructions: float = 0.0,
    kernels: int = 1,
    fraction: float | None = None,
) -> float:
    """Predict seconds of `kernels` kernels that together move `moved` bytes and issue
    `instructions` an element.
    """
    traffic = elements * moved / (d.memory * (fraction or d.stream))
    issue = elements * instructions / (d.units * d.lanes * d.clock * 0.75)
    return _kernel(issue, traffic, kernels * d.gap)


def softmax_misses(d: Device, columns: int, item: int) -> float:
    """Return the part of the later passes of PyTorch's softmax that finds its row no longer in
    L2.
    """
    return max(0.0, 1 - 0.7 * d.l2_bytes / (2 * d.units * columns * item))
