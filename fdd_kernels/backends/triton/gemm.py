"""GEMMs with float32 results for operands of any dtype: the vendor's, or a plain one elsewhere.

PyTorch multiplies 16-bit matrices into a float32 result on NVIDIA devices where it has
`aten::mm.dtype_out` (seen in 2.11 and 2.13). On AMD devices, and with an older PyTorch,
`product_kernel` does. Elsewhere (Triton's interpreter) operands are converted to float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import triton
import triton.language as tl
from torch import Tensor

from fdd_kernels.backends.triton.launch import Launch, launch, record

OPTIONS = {"num_warps": 8, "num_stages": 3}


def vendor_writes_float32(device: torch.device) -> bool:
    """Tell whether PyTorch multiplies 16-bit matrices into a float32 result on `device`."""
    ops = torch.ops.aten
    return (
        device.type == "cuda"
        and torch.version.hip is None
        and hasattr(ops.mm, "dtype_out")
        and hasattr(ops.addmm, "dtype_out")
    )


def multiply(out_MN: Tensor, a_MK: Tensor, b_KN: Tensor, *, accumulate: bool = False) -> None:
    """Compute out = a b, or out += a b, with one GEMM.

    `out` is float32 and may have padded rows. Operands of two dtypes are converted to float32.
    """
    arguments = {"out": out_MN, "a": a_MK, "b": b_KN, "accumulate": accumulate}
    if record(Launch(multiply, (), {}, arguments)):
        return
    if a_MK.dtype != b_KN.dtype:
        a_MK, b_KN = a_MK.float(), b_KN.float()
    if a_MK.dtype == torch.float32:
        with full_float32(out_MN.device):
            _multiply_in(out_MN, a_MK, b_KN, accumulate)
    elif vendor_writes_float32(out_MN.device):
        if accumulate:
            torch.ops.aten.addmm.dtype_out(out_MN, a_MK, b_KN, torch.float32, out=out_MN)
        else:
            torch.ops.aten.mm.dtype_out(a_MK, b_KN, torch.float32, out=out_MN)
    elif out_MN.device.type == "cuda":
        launch_product(out_MN, a_MK, b_KN, accumulate)
    else:
        _multiply_in(out_MN, a_MK.float(), b_KN.float(), accumulate)


def _multiply_in(out_MN: Tensor, a_MK: Tensor, b_KN: Tensor, accumulate: bool) -> None:
    if accumulate:
        out_MN.addmm_(a_MK, b_KN)
    else:
        torch.mm(a_MK, b_KN, out=out_MN)


@contextmanager
def full_float32(device: torch.device) -> Iterator[None]:
    """Multiply float32 matrices in float32 within the context, not in TF32 or bfloat16."""
    if device.type != "cuda":
        yield
        return
    # Newer versions of PyTorch refuse to read the older setting once the newer one was used.
    settings = torch.backends.cuda.matmul
    name, exact = (
        ("fp32_precision", "ieee") if hasattr(settings, "fp32_precision") else ("allow_tf32", False)
    )
    before = getattr(settings, name)
    if before == exact:
        yield
        return
    setattr(settings, name, exact)
    try:
        yield
    finally:
        setattr(settings, name, before)


@triton.jit(do_not_specialize=["m", "n", "k"])
def product_kernel(
    out,
    a,
    b,
    m,
    n,
    k,
    out_stride,
    a_row_stride,
    a_column_stride,
    b_row_stride,
    b_column_stride,
    ACCUMULATE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Compute a tile of out (m, n) = a (m, k) b (k, n), or out += a b, summed in float32."""
    rows_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inner_k = tl.arange(0, BLOCK_K)
    # Rows and columns beyond the last are clamped to it: their results are not stored.
    a += tl.minimum(rows_m, m - 1).to(tl.int64)[:, None] * a_row_stride
    b += tl.minimum(columns_n, n - 1).to(tl.int64)[None, :] * b_column_stride
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, k, BLOCK_K):
        at_k = (start + inner_k).to(tl.int64)
        inside = inner_k < k - start
        tile_a = tl.load(a + at_k[None, :] * a_column_stride, mask=inside[None, :], other=0.0)
        tile_b = tl.load(b + at_k[:, None] * b_row_stride, mask=inside[:, None], other=0.0)
        total = tl.dot(tile_a, tile_b, total)
    at = out + rows_m.to(tl.int64)[:, None] * out_stride + columns_n[None, :]
    stored = (rows_m < m)[:, None] & (columns_n < n)[None, :]
    if ACCUMULATE:
        total += tl.load(at, mask=stored, other=0.0)
    tl.store(at, total, mask=stored)


def launch_product(out_MN: Tensor, a_MK: Tensor, b_KN: Tensor, accumulate: bool) -> None:
    """Do `multiply` by `product_kernel`, for 16-bit operands of any strides."""
    (m, k), n = a_MK.shape, b_KN.shape[1]
    arguments = {
        "out": out_MN,
        "a": a_MK,
        "b": b_KN,
        "m": m,
        "n": n,
        "k": k,
        "out_stride": out_MN.stride(0),
        "a_row_stride": a_MK.stride(0),
        "a_column_stride": a_MK.stride(1),
        "b_row_stride": b_KN.stride(0),
        "b_column_stride": b_KN.stride(1),
        "ACCUMULATE": accumulate,
        "BLOCK_M": 128,
        "BLOCK_N": 128,
        "BLOCK_K": 32,
    }
    grid = (triton.cdiv(m, 128), triton.cdiv(n, 128))
    launch(Launch(product_kernel, grid, OPTIONS, arguments))
