"""Published times of kernels and losses of this kind, with their sources: `gpu_model.py` is fitted
to them.

A fit, no validation: the fractions of the devices were chosen with these figures in view, the bytes
of Liger-Kernel's compiled chunks (66 and 30 an element) were fitted to its own rows, and rows that
differ only in the number of tokens are one configuration. Only the bytes of the eager losses are
independent of them: they were counted from their operators.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace

from benchmarks.gpu_devices import DEVICES, Device, elementwise, gemm, softmax_misses

LIGER = "linkedin/Liger-Kernel, benchmark/data/all_benchmark_data.csv"
LIGER_1339 = "linkedin/Liger-Kernel, pull request 1339"
CCE = "cut-cross-entropy's paper, table 1, quoted from memory: weak"
A100, H100, B200 = DEVICES["A100"], DEVICES["H100"], DEVICES["B200"]
H100_PCIE = replace(H100, name="H100 PCIe", memory=2.04e12)
VOCABULARY, WIDTH = 128256, 4096  # of Llama 3 8B, which most of the rows are of
HALF = WIDTH // 2
CHUNK = 1024  # tokens


@dataclass(frozen=True)
class Row:
    """One published time and the model's of the same work, in seconds."""

    name: str
    device: str
    source: str
    measured: float
    predicted: float


@dataclass(frozen=True)
class Eager:
    """Eager losses over linear heads: forward and backward as (bytes an element, bytes in the
    softmax's later passes, kernels).

    `widths` are of the heads multiplied, of which the last has dH; `heads` of them have dW.
    """

    name: str
    device: Device
    widths: tuple[int, ...]
    heads: int
    item: int
    forward: tuple[float, float, int]
    backward: tuple[float, float, int]
    measured: tuple[tuple[int, float, float], ...]  # tokens, ms forward, ms of both

    def rows(self) -> list[Row]:
        d, student, found = self.device, self.widths[-1], []
        for tokens, *measured in self.measured:
            forward = sum(gemm(d, tokens, VOCABULARY, width) for width in self.widths)
            forward += self._elementwise(tokens, self.forward)
            backward = self._elementwise(tokens, self.backward)
            backward += gemm(d, tokens, student, VOCABULARY)
            backward += self.heads * gemm(d, VOCABULARY, student, tokens)
            times = ("forward", forward), ("full", forward + backward)
            for (what, seconds), ms in zip(times, measured):
                name = f"{self.name} {what}, {tokens} tokens"
                found.append(Row(name, d.name, LIGER, ms / 1e3, seconds))
        return found

    def _elementwise(self, tokens: int, work: tuple[float, float, int]) -> float:
        (moved, later, kernels), d = work, self.device
        moved += later * softmax_misses(d, VOCABULARY, self.item)
        return elementwise(d, tokens * VOCABULARY, moved, kernels=kernels, fraction=d.eager)


_HEAD_CE = (
    (4096, 20.91, 55.97),
    (8192, 37.97, 111.46),
    (16384, 76.39, 220.78),
    (32768, 151.9, 452.5),
)
_JSD = (1024, 9.557, 25.98), (4096, 37.83, 98.3), (8192, 75.15, 195.3)
_JSD_CE = (1024, 10.9, 28.7), (4096, 42.96, 107.1), (8192, 85.4, 213.2)
_COSINE_CE = (1024, 16.46, 37.45), (4096, 59.2, 145.7), (8192, 118.4, 291.5)
_BOTH, _TEACHER = (WIDTH, WIDTH), (WIDTH, HALF)
_JSD_NAME, _COSINE_NAME = "torch distillation JSD + CE", "torch distillation cosine + CE"
EAGER = (
    Eager("Hugging Face head + CE", A100, (WIDTH,), 1, 2, (6, 4, 3), (10, 2, 5), _HEAD_CE),
    Eager("torch head + JSD", H100, _BOTH, 2, 2, (144, 8, 26), (228, 4, 32), _JSD),
    Eager(_JSD_NAME, H100, _TEACHER, 1, 4, (180, 24, 32), (178, 8, 27), _JSD_CE),
    Eager(_COSINE_NAME, A100, _TEACHER, 1, 4, (104, 8, 30), (222, 4, 38), _COSINE_CE),
)
# Compiled chunks: name, device, fitted bytes an element, (tokens, ms of both passes).
_CHUNKS = "Liger chunked, compiled"
CHUNKS = (
    (f"{_CHUNKS}: JSD + CE", H100, 66, ((1024, 8.31), (4096, 30.92), (8192, 60.7))),
    (f"{_CHUNKS}: cosine + CE", A100, 30, ((1024, 14.65), (4096, 55.97), (8192, 111.4))),
)
# Elementwise losses alone: name, device, elements, ms forward and of both, bytes an element of each
# pass.
BARE = (
    ("torch JSD", H100_PCIE, 8192 * 131072, 75.38, 167.9, (116, 148)),
    ("torch KL", H100_PCIE, 16384 * 131072, 40.82, 92.06, (36, 32)),
    ("torch JSD", B200, 8192 * 128256, 20.03, 50.45, (116, 148)),
)
# Cross-entropy with cached 16-bit logits, a chunk at a time: columns, tokens, ms.
CACHED = ((32000, 8192, 4.52), (128256, 8192, 17.51), (262144, 8192, 36.30))
CACHED += ((128256, 1024, 2.52), (128256, 2048, 4.85))


def _chunks(
    d: Device, columns: int, tokens: int, width: int, head: float, work: Callable[[int], float]
) -> float:
    """Time chunks of CHUNK tokens: `head` for the head's gradient, dH of `width`,
    `work(elements)`.
    """
    return tokens / CHUNK * (work(CHUNK * columns) + gemm(d, CHUNK, width, columns) + head)


def calibration() -> list[Row]:
    """List every published time, and the model's."""
    found = [row for loss in EAGER for row in loss.rows()]
    for name, d, moved, measured in CHUNKS:
        head = gemm(d, CHUNK, VOCABULARY, WIDTH) + gemm(d, CHUNK, VOCABULARY, HALF)
        head += gemm(d, VOCABULARY, HALF, CHUNK)
        head += elementwise(d, VOCABULARY * HALF, 6, fraction=d.eager)
        for tokens, ms in measured:
            work = lambda n, d=d, b=moved: elementwise(d, n, b, kernels=12)  # noqa: E731
            seconds = _chunks(d, VOCABULARY, tokens, HALF, head, work)
            about = f"{name} (fitted {moved} B), {tokens} tokens"
            found.append(Row(about, d.name, LIGER, ms / 1e3, seconds))
    for name, d, n, *measured, moved in BARE:
        passes = [elementwise(d, n, b, kernels=18, fraction=d.eager) for b in moved]
        for what, ms, seconds in zip(("forward", "full"), measured, (passes[0], sum(passes))):
            found.append(Row(f"{name} {what}", d.name, LIGER, ms / 1e3, seconds))
    for columns, tokens, ms in CACHED:
        d, adds = B200, tokens > CHUNK
        head = gemm(d, CHUNK, columns, WIDTH) + gemm(d, columns, WIDTH, CHUNK, accumulate=adds)
        work = lambda n, d=d: elementwise(d, n, 4 + 2, instructions=20)  # noqa: E731
        seconds = _chunks(d, columns, tokens, WIDTH, head, work)
        about = f"Liger cached chunks, CE, V={columns}, {tokens} tokens"
        found.append(Row(about, d.name, LIGER_1339, ms / 1e3, seconds))
    return found + _cut_cross_entropy()


def _cut_cross_entropy() -> list[Row]:
    """List the times of cut-cross-entropy: Gemma 2 2B, 8192 tokens, on an A100."""
    d, tokens, columns, width = A100, 8192, 256000, 2304
    n = tokens * columns
    gemms = gemm(d, tokens, columns, width) + gemm(d, tokens, width, columns)
    gemms += gemm(d, columns, width, tokens)
    dot = 2 * n * width / (d.gemms * d.dot) + n * 12 / (d.units * d.lanes * d.clock * 0.6)
    eager = elementwise(d, n, 44, kernels=8, fraction=d.eager)
    compiled = "torch.compile loss + gradient"
    return [
        Row(compiled, d.name, CCE, 0.143, gemms + elementwise(d, n, 12)),
        Row("baseline loss + gradient", d.name, CCE, 0.207, gemms + eager),
        Row("cut-cross-entropy's loss, by tl.dot", d.name, CCE, 0.046, dot),
    ]


def fit(rows: list[Row]) -> dict[str, float]:
    """Summarise predicted over measured: median, least, most, root mean square of its logarithm."""
    ratios = [row.predicted / row.measured for row in rows]
    spread = math.sqrt(sum(math.log(r) ** 2 for r in ratios) / len(ratios))
    ends = {"least": min(ratios), "most": max(ratios), "rms": math.exp(spread)}
    return {"median": statistics.median(ratios)} | ends


def printed() -> str:
    """Format the calibration as a table."""
    rows = calibration()
    lines = ["Calibration: measured by others, and this model of the same; ms.\n"]
    for row in rows:
        times = f"{row.measured * 1e3:7.1f} {row.predicted * 1e3:7.1f}"
        ratio = f"{row.predicted / row.measured:5.2f}"
        lines.append(f"{row.name:56} {row.device:10} {times} {ratio}  {row.source}")
    found = fit(rows)
    ends = f"from {found['least']:.2f} to {found['most']:.2f}"
    return "\n".join([*lines, f"\nmedian ratio {found['median']:.2f}, {ends}\n"])
