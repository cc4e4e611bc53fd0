"""The backend "triton": the operations on GPUs, by one of three strategies.

Importing this package needs no triton: the kernels are imported when an operation runs. The files,
in order of use:

    operations.py   the operations: the strategy of a call, and its walk over row blocks
    strategy.py     the rule, a plain function of shape, device and memory
    memory.py       the bytes that a call allocates by each strategy
    refusal.py      specs that the kernels cannot compute
    problem.py      a call as every strategy sees it
    gather_rows.py  valid rows gathered side by side, gradients put back
    work_table.py   a LensSpec as a small integer table that the kernels walk
    elementwise.py  device functions over elements of the vocabulary, which all kernels share
    row_statistics.py  device functions that load and store numbers of rows
    weighted_moments.py  device functions of pair moments whose tokens have weights
    gemm.py         GEMMs with float32 results
    scaling.py      the scale of dL/dlogits in float16
    config.py       launch configurations; autotune.py: opt-in search
    launch.py       the one place that launches a kernel, or records the launch
    cached/         logits by GEMM into bounded scratch, row kernels over them ("cached", "slabbed")
    one_pass/       the GEMM inside the kernels, no scratch of the vocabulary's size ("one_pass")
"""

from fdd_kernels.backends.triton.config import interpreting
from fdd_kernels.backends.triton.operations import (
    cached_rows,
    grad,
    stats,
    stats_and_grad,
    unavailable,
)
from fdd_kernels.backends.triton.refusal import refusal

__all__ = [
    "cached_rows",
    "grad",
    "interpreting",
    "refusal",
    "stats",
    "stats_and_grad",
    "unavailable",
]
