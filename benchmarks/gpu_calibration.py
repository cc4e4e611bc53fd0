"""What `gpu_model.py` was fitted to: published times of kernels and losses of this kind, with their
sources.

A fit, no validation: the fractions of the devices were chosen with these figures in view, the bytes
of Liger-Kernel's compiled chunks (66 and 30 an element) were fitted to its own rows, and rows that
differ in the number of tokens alone are one configuration. Independent of them are the bytes of the
eager losses, which were counted from their operators.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace

from benchmarks.gpu_model import DEVICES, Device, elementwise, gemm, softmax_misses

LIGER = "linkedin/Liger-Kernel, benchmark/data/all_benchmark_data.csv"
LIGER_1339 = "linkedin/Liger-Kernel, pull request 1339"
CCE = "cut-cross-entropy's paper, table 1, quoted from memory: weak"
A100, H100, B200 = DEVICES["A100"], DEVICES["H100"], DEVICES["B200"]
H100_PCIE = replace(H100, name="H100 PCIe", memory=2.04e12)
VOCABULARY, WIDTH = 128256, 4096  # of Llama 3 8B, which most of the rows are of


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
    """Eager losses over a linear head: products forward, (bytes, of them in later softmax passes,
    kernels) of both passes.

    `students`: widths of the heads multiplied; only the first is a student's with dH, `heads` have
    dW.
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
        later = softmax_misses(d, VOCABULARY, self.item)
        for tokens, forward_ms, full_ms in self.measured:
            n = tokens * VOCABULARY
            forward = sum(gemm(d, tokens, VOCABULARY, width) for width in self.widths)
            forward += _eager(d, n, self.forward, later)
            backward = _eager(d, n, self.backward, later) + gemm(d, tokens, student, VOCABULARY)
            backward += self.heads * gemm(d, VOCABULARY, student, tokens)
            for what, ms, seconds in (
                ("forward", forward_ms, forward),
                ("full", full_ms, forward + backward),
            ):
                found.append(
                    Row(f"{self.name} {what}, {tokens} tokens", d.name, LIGER, ms / 1e3, seconds)
                )
        return found


def _eager(d: Device, n: int, work: tuple[float, float, int], later: float) -> float:
    moved, in_later_passes, kernels = work
    return elementwise(d, n, moved + in_later_passes * later, kernels=kernels, fraction=d.eager)


EAGER = (
    Eager(
        "Hugging Face head + CE",
        A100,
        (WIDTH,),
        1,
        2,
        (6, 4, 3),
        (10, 2, 5),
        (
            (4096, 20.91, 55.97),
            (8192, 37.97, 111.46),
            (16384, 76.39, 220.78),
            (32768, 151.9, 452.5),
        ),
    ),
    Eager(
        "torch head + JSD",
        H100,
        (WIDTH, WIDTH),
        2,
        2,
        (144, 8, 26),
        (228, 4, 32),
        ((1024, 9.557, 25.98), (4096, 37.83, 98.3), (8192, 75.15, 195.3)),
    ),
    Eager(
        "torch distillation JSD + CE",
        H100,
        (WIDTH, WIDTH // 2),
        1,
        4,
        (180, 24, 32),
        (178, 8, 27),
        ((1024, 10.9, 28.7), (4096, 42.96, 107.1), (8192, 85.4, 213.2)),
    ),
    Eager(
        "torch distillation cosine + CE",
        A100,
        (WIDTH, WIDTH // 2),
        1,
        4,
        (104, 8, 30),
        (222, 4, 38),
        ((1024, 16.46, 37.45), (4096, 59.2, 145.7), (8192, 118.4, 291.5)),
    ),
)
# Compiled chunks of 1024 tokens: name, device, fitted bytes an element, (tokens, ms of both
# passes).
CHUNKS = (
    ("Liger chunked, compiled: JSD + CE", H100, 66, ((1024, 8.31), (4096, 30.92), (8192, 60.7))),
    (
        "Liger chunked, compiled: cosine + CE",
        A100,
        30,
        ((1024, 14.65), (4096, 55.97), (8192, 111.4)),
    ),
)
# Elementwise losses alone: name, device, elements, ms forward and of both, bytes an element of each
# pass.
BARE = (
    ("torch JSD", H100_PCIE, 8192 * 131072, 75.38, 167.9, (116, 148)),
    ("torch KL", H100_PCIE, 16384 * 131072, 40.82, 92.06, (36, 32)),
    ("torch JSD", B200, 8192 * 128256, 20.03, 50.45, (116, 148)),
)
# Cross-entropy whose 16-bit logits are kept a chunk at a time: columns, tokens, ms.
KEPT = (
    (32000, 8192, 4.52),
    (128256, 8192, 17.51),
    (262144, 8192, 36.30),
    (128256, 1024, 2.52),
    (128256, 2048, 4.85),
)


def _chunk(
    d: Device, columns: int, tokens: int, work: Callable[[int], float], head: float, width: int
) -> float:
    """Chunks of 1024 tokens: `work(elements)` between the products, `head` for the head's gradient,
    dX and dW of `width`.
    """
    chunk = 1024
    return tokens / chunk * (work(chunk * columns) + gemm(d, chunk, width, columns) + head)


def calibration() -> list[Row]:
    """Every published time, and the model's."""
    found = [row for loss in EAGER for row in loss.rows()]
    half = WIDTH // 2
    for name, d, moved, measured in CHUNKS:
        for tokens, ms in measured:
            products = (
                gemm(d, 1024, VOCABULARY, WIDTH)
                + gemm(d, 1024, VOCABULARY, half)
                + gemm(d, VOCABULARY, half, 1024)
            )
            head = products + elementwise(d, VOCABULARY * half, 6, fraction=d.eager)
            seconds = _chunk(
                d,
                VOCABULARY,
                tokens,
                lambda n, d=d, b=moved: elementwise(d, n, b, kernels=12),
                head,
                half,
            )
            found.append(
                Row(f"{name} (fitted {moved} B), {tokens} tokens", d.name, LIGER, ms / 1e3, seconds)
            )
    for name, d, n, forward_ms, full_ms, (forward_bytes, backward_bytes) in BARE:
        forward = elementwise(d, n, forward_bytes, kernels=18, fraction=d.eager)
        full = forward + elementwise(d, n, backward_bytes, kernels=18, fraction=d.eager)
        for what, ms, seconds in (("forward", forward_ms, forward), ("full", full_ms, full)):
            found.append(Row(f"{name} {what}", d.name, LIGER, ms / 1e3, seconds))
    for columns, tokens, ms in KEPT:
        d = B200
        head = gemm(d, 1024, columns, WIDTH) + gemm(
            d, columns, WIDTH, 1024, accumulate=tokens > 1024
        )
        seconds = _chunk(
            d,
            columns,
            tokens,
            lambda n, d=d: elementwise(d, n, 4 + 2, instructions=20),
            head,
            WIDTH,
        )
        found.append(
            Row(
                f"Liger kept chunks, CE, V={columns}, {tokens} tokens",
                d.name,
                LIGER_1339,
                ms / 1e3,
                seconds,
            )
        )
    return found + _cut_cross_entropy()


def _cut_cross_entropy() -> list[Row]:
    """Gemma 2 2B, 8192 tokens, on an A100."""
    d, tokens, columns, width = A100, 8192, 256000, 2304
    n = tokens * columns
    products = (
        gemm(d, tokens, columns, width)
        + gemm(d, tokens, width, columns)
        + gemm(d, columns, width, tokens)
    )
    dot = 2 * n * width / (d.products * d.dot) + n * 12 / (d.units * d.lanes * d.clock * 0.6)
    return [
        Row("torch.compile loss + gradient", d.name, CCE, 0.143, products + elementwise(d, n, 12)),
        Row(
            "baseline loss + gradient",
            d.name,
            CCE,
            0.207,
            products + elementwise(d, n, 44, kernels=8, fraction=d.eager),
        ),
        Row("cut-cross-entropy's loss, by tl.dot", d.name, CCE, 0.046, dot),
    ]


def fit(rows: list[Row]) -> dict[str, float]:
    """Predicted over measured: the median, the least, the most, and the root mean square of its
    logarithm.
    """
    ratios = [row.predicted / row.measured for row in rows]
    spread = math.sqrt(sum(math.log(r) ** 2 for r in ratios) / len(ratios))
    return {
        "median": statistics.median(ratios),
        "least": min(ratios),
        "most": max(ratios),
        "rms": math.exp(spread),
    }
