"""GEMMs in tiles, one at a time on every thread, as a limit beside torch.mm on all threads: by
ATen's brgemm, and by torch.mm where the C++ kernels multiply by it.

ATen has no Python entry for brgemm: `multiply` of the C++ kernels runs either library alone.

Shape suffixes: m rows, k inner, n columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from fdd_kernels.backends.cpu import extension

BRGEMM, MM = "brgemm", "torch.mm"  # as records name them
TILINGS = "blocks", "rows"
# Rows or columns of the output that a thread computes at a time, and the depth of a partial sum.
BLOCK, DEPTH = 256, 1024
UNIT = 2.0**-24  # the unit roundoff of float32
# A sum of k products, rounded k times, is off by at most this many sqrt(k) UNIT |a| |b| but for a
# probability of 2 k exp(-DEVIATIONS^2 / 2) (Higham and Mary, 2019, theorem 2.4).
DEVIATIONS = 10


def why_no_brgemm(device: torch.device) -> str | None:
    """Say why there is no brgemm; None if there is."""
    if device.type != "cpu":
        return "runs on a CPU"
    if extension.kernels is None:
        return extension.why_missing
    return None if extension.kernels.has_brgemm(False) else "does not run on this processor"


def libraries(device: torch.device, dtype: torch.dtype) -> list[str]:
    """List the libraries that multiply a dtype in tiles, by instructions of this processor."""
    kernels = extension.kernels
    if device.type != "cpu" or kernels is None:
        return []
    if dtype == torch.bfloat16:
        return [BRGEMM] if kernels.bf16_gemm() and kernels.has_brgemm(True) else []
    if dtype != torch.float32:
        return []
    found = {BRGEMM: kernels.has_brgemm(False), MM: kernels.gemm_library() == "blas"}
    return [name for name, multiplies in found.items() if multiplies]


def _even(a: Tensor, dim: int) -> Tensor:
    """Pad a dimension of bfloat16 with zeros to an even size."""
    if a.dtype != torch.bfloat16 or a.shape[dim] % 2 == 0:
        return a
    return torch.cat([a, torch.zeros_like(a.narrow(dim, 0, 1))], dim)


def operands(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Pack a (m, k) and b (k, n) as `multiply` takes them; bfloat16 b as (k / 2, n, 2)."""
    a, b = _even(a, 1).contiguous(), _even(b, 0)
    if b.dtype == torch.bfloat16:
        b = b.unflatten(0, (-1, 2)).transpose(1, 2)
    return a, b.contiguous()


def tiles(m: int, n: int, k: int, threads: int) -> dict[str, tuple[int, int, int]]:
    """Name ways to share the output among threads: (rows, columns, depth) of a tile."""
    parts = threads * -(-m // (threads * BLOCK))  # as many for each thread
    return dict(zip(TILINGS, ((BLOCK, BLOCK, k), (-(-m // parts), n, DEPTH)), strict=True))


def products(a: Tensor, b: Tensor) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """Yield names of ways to compute a b, as A B and as (B^T A^T)^T, and functions that return it
    in float32. Operands are packed before; the result is overwritten by the next function.
    """
    found = libraries(a.device, a.dtype)
    for orientation in ("ab", "ba") if found else ():
        left, right = (a, b) if orientation == "ab" else (b.mT, a.mT)
        m, n = left.shape[0], right.shape[1]
        left, right = operands(left, right)
        out = torch.empty(m, n).zero_()  # no page is touched for the first time while it is timed
        shown = out if orientation == "ab" else out.mT

        for name, tile in tiles(m, n, left.shape[1], torch.get_num_threads()).items():
            for library in found:
                run = partial(_multiply, left, right, out, tile, library, shown)
                yield f"{library} {orientation} {name}", run


def _multiply(
    a: Tensor, b: Tensor, out: Tensor, tile: tuple[int, int, int], library: str, shown: Tensor
) -> Tensor:
    extension.kernels.multiply(a, b, out, tile, library == BRGEMM)
    return shown


def check(got: Tensor, a: Tensor, b: Tensor, expected: Tensor) -> None:
    """Compare a product with torch.mm of the same operands, both summed in float32.

    Raises:
        ValueError: they differ by more than both can be off.
    """
    norms = a.float().norm(dim=1, keepdim=True) * b.float().norm(dim=0, keepdim=True)
    bound = norms.mul_(2 * DEVIATIONS * math.sqrt(a.shape[1]) * UNIT)
    worst = (got - expected).abs_().sub_(bound).max()
    if not worst <= 0:
        raise ValueError(
            f"a product in tiles and one by torch.mm differ by {worst:.3g} more than rounding "
            "explains: run with another FDD_KERNELS_GEMM (brgemm, blas)"
        )
