"""The backend "triton": the operations on GPUs, by one of three strategies.

Importing this package needs no triton: the kernels are imported when an operation runs. The files,
in order of use:

    operations.py   the operations: which strategy a call takes, and its fallback
    strategy.py     the rule, a plain function of shape, device and memory; memory.py: what a call
    allocates by each problem.py      a call as every strategy sees it; gather_rows.py: valid rows
    side by side, gradients put back work_table.py   a LensSpec as a small integer table that the
    kernels walk elementwise.py  the mathematics of elements and rows, shared by all kernels
    gemm.py         products with float32 results; scaling.py: dL/dlogits through float16
    config.py       launch configurations; autotune.py: opt-in search; launch.py: the one place that
    launches or records cached/         logits by GEMM into bounded scratch, row kernels over them
    ("cached" and "slabbed") one_pass/       the GEMM inside the kernels, no scratch of the
    vocabulary's size ("one_pass")
"""

from __future__ import annotations

import importlib.util
import os

import torch
from torch import Tensor

from fdd_kernels.lens.inputs import LensInputs
from fdd_kernels.lens.spec import LensSpec


def interpreting() -> bool:
    """Whether Triton's interpreter was asked for, which runs the kernels on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")


def unavailable(device: torch.device) -> str | None:
    """Why the kernels cannot run on `device` and what to do about it; None if they can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: pip install triton (Linux)"
    if interpreting():
        return None
    if device.type != "cuda":
        return (
            "the Triton kernels need an NVIDIA or AMD GPU: move the tensors to one, or use another "
            "backend; to try the "
            "kernels slowly on a CPU, set TRITON_INTERPRET=1 before Python starts"
        )
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        return "the Triton kernels need compute capability 8.0 (Ampere) or newer"
    return None


def stats(inputs: LensInputs, spec: LensSpec) -> tuple[Tensor, Tensor, Tensor]:
    """Statistics: shifts (2, L, R), requests (requests, 4, R), moments (moments, 7, R); see
    `spec.py`.
    """
    from fdd_kernels.backends.triton import operations

    return operations.stats(inputs, spec)


def grad(
    inputs: LensInputs, spec: LensSpec, per_row: tuple[Tensor, ...], needed: list[bool]
) -> list[Tensor]:
    """Gradients of [*student_hidden, student_weight, student_bias] marked in `needed`."""
    from fdd_kernels.backends.triton import operations

    return operations.grad(inputs, spec, per_row, needed)


def cached_rows(inputs: LensInputs, spec: LensSpec, needed: list[bool]) -> int:
    """Rows a block whose logits are cached between statistics and gradients; 0: not at all."""
    from fdd_kernels.backends.triton import operations

    return operations.cached_rows(inputs, spec, needed)


def stats_and_grad(
    inputs: LensInputs,
    spec: LensSpec,
    block_rows: int,
    upstream_of,
    needed: list[bool],
    refine: bool,
):
    """Gradients and statistics with cached logits; see `backends.Backend`."""
    from fdd_kernels.backends.triton import operations

    return operations.stats_and_grad(inputs, spec, block_rows, upstream_of, needed, refine)
