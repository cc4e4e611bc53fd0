"""The backend "triton": the two operations as Triton kernels that stream all layers in one launch.

Importing this package needs no triton: the kernels are imported when an operation runs. The files, in order of use:

    config.py       launch configurations, a plain function of operation, shape, dtype and architecture
    memory.py       byte budgets, how they cut the work, what a call allocates
    autotune.py     opt-in search over configurations, kept on disk
    launch.py       the one place that launches, or records launches for ahead-of-time compilation
    tables.py       a LensSpec as a small integer table that the kernels walk
    rows.py         rows that count, gathered into contiguous blocks; gradients put back
    tiles.py        one tile of u = softcap(scale * (h W^T + b))
    divergences.py  the elementwise pair of each divergence
    stats.py        first pass: log-sum-exps, expectations, moments, per range of columns
    divergence.py   second pass of the divergences that need both log-sum-exps
    merge.py        ranges merged, statistics finished
    grad.py         dL/dx of a block of rows x columns
    operations.py   the operations: `stats` and `grad`
"""

from __future__ import annotations

import importlib.util
import os

import torch
from torch import Tensor

from fdd_kernels.spec import LensInputs, LensSpec


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
            "the Triton kernels need an NVIDIA or AMD GPU: move the tensors to one, or use another backend; to try the "
            "kernels slowly on a CPU, set TRITON_INTERPRET=1 before Python starts"
        )
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        return "the Triton kernels need compute capability 8.0 (Ampere) or newer"
    return None


def stats(inputs: LensInputs, spec: LensSpec) -> tuple[Tensor, Tensor, Tensor]:
    """Statistics: pivots (2, L, R), reads (reads, 4, R), moments (moments, 7, R); see `spec.py`."""
    from fdd_kernels.backends.triton import operations

    return operations.stats(inputs, spec)


def grad(inputs: LensInputs, spec: LensSpec, per_row: tuple[Tensor, ...], needed: list[bool]) -> list[Tensor]:
    """Gradients of [*student_hidden, student_weight, student_bias] marked in `needed`."""
    from fdd_kernels.backends.triton import operations

    return operations.grad(inputs, spec, per_row, needed)
