"""The operations of the backend "triton", each by the strategy that fits the call; float64 inputs
go to "torch".
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from fdd_kernels.backends import torch_stream
from fdd_kernels.backends.triton.cached import host as cached
from fdd_kernels.backends.triton.one_pass import host as one_pass
from fdd_kernels.backends.triton.strategy import (
    CACHE_BYTES,
    MIB,
    Shape,
    Slabs,
    cache_bytes,
    chosen_strategy,
    rows_of_cache,
    scratch_elements,
    slabs_of,
)
from fdd_kernels.lens.inputs import LensInputs
from fdd_kernels.lens.spec import LensSpec

Statistics = tuple[Tensor, Tensor, Tensor]
_warned: set[str] = set()


def shape_of(inputs: LensInputs, spec: LensSpec, *, trains_head: bool) -> Shape:
    has_teacher_head = spec.needs_teacher and inputs.teacher_weight is not None
    return Shape(
        layers=len(inputs.student_hidden),
        rows=inputs.rows,
        columns=spec.columns,
        student_width=inputs.student_hidden[0].shape[1],
        teacher_width=inputs.teacher_hidden[0].shape[1] if has_teacher_head else 0,
        trained_head=trains_head,
        narrow=inputs.student_weight.dtype != torch.float32,
    )


def _on(device: torch.device):
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _slabs(inputs: LensInputs, spec: LensSpec, *, trains_head: bool) -> Slabs | None:
    """How the two operations cut the work; None: by the one-pass kernels."""
    if chosen_strategy() == "one_pass":
        return None
    return slabs_of(shape_of(inputs, spec, trains_head=trains_head), cache_bytes(inputs.device))


def stats(inputs: LensInputs, spec: LensSpec) -> Statistics:
    """Statistics: shifts (2, L, R), requests (requests, 4, R), moments (moments, 7, R)."""
    if inputs.statistics_dtype == torch.float64:
        return torch_stream.stats(inputs, spec)
    slabs = _slabs(inputs, spec, trains_head=False)
    with _on(inputs.device):
        return one_pass.stats(inputs, spec) if slabs is None else cached.stats(inputs, spec, slabs)


def grad(
    inputs: LensInputs, spec: LensSpec, per_row: tuple[Tensor, ...], needed: list[bool]
) -> list[Tensor]:
    """Gradients of [*student_hidden, student_weight, student_bias] marked in `needed`.

    `per_row` are the three statistics and the upstream gradients of the last two.
    """
    if inputs.statistics_dtype == torch.float64:
        return torch_stream.grad(inputs, spec, per_row, needed)
    slabs = _slabs(inputs, spec, trains_head=needed[-2])
    with _on(inputs.device):
        if slabs is None:
            return one_pass.grad(inputs, spec, per_row, needed)
        return cached.grad(inputs, spec, per_row, needed, slabs)


def new_scratch(elements: int, device: torch.device) -> Tensor:
    return torch.empty(elements, dtype=torch.float32, device=device)


def cached_rows(inputs: LensInputs, spec: LensSpec, needed: list[bool]) -> int:
    """Rows a block whose logits are cached between statistics and gradients; 0: the two operations
    are the way.

    So they are for float16 gradients, which would underflow before a loss scaler has scaled them.
    """
    wanted = [
        t
        for t, n in zip(
            (*inputs.student_hidden, inputs.student_weight, inputs.student_bias), needed
        )
        if n
    ]
    if (
        not wanted
        or inputs.statistics_dtype == torch.float64
        or any(t.dtype == torch.float16 for t in wanted)
    ):
        return 0
    if chosen_strategy() not in ("auto", "cached"):
        return 0
    return rows_of_cache(shape_of(inputs, spec, trains_head=needed[-2]), cache_bytes(inputs.device))


def stats_and_grad(
    inputs: LensInputs,
    spec: LensSpec,
    block_rows: int,
    upstream_of: Callable,
    needed: list[bool],
    refine: bool,
) -> tuple[list[Tensor], Statistics]:
    """Both operations with cached logits; where the scratch does not fit, one after the other, with
    one warning.
    """
    with _on(inputs.device):
        shape = shape_of(inputs, spec, trains_head=needed[-2])
        elements = scratch_elements(shape, block_rows)
        try:
            scratch = new_scratch(elements, inputs.device)
        except torch.OutOfMemoryError:
            _warn_of_scratch(elements * 4)
            return _one_after_the_other(inputs, spec, block_rows, upstream_of, needed)
        return cached.stats_and_grad(inputs, spec, block_rows, upstream_of, needed, refine, scratch)


def _one_after_the_other(
    inputs: LensInputs,
    spec: LensSpec,
    block_rows: int,
    upstream_of: Callable,
    needed: list[bool],
) -> tuple[list[Tensor], Statistics]:
    """Both operations over all rows; `upstream_of` is asked block by block as with cached logits:
    others may wait for it.
    """
    statistics = stats(inputs, spec)
    per_row = (*statistics, *[torch.zeros_like(t) for t in statistics[1:]])
    for rows in cached.valid_blocks(inputs, spec, block_rows):
        found = upstream_of(rows, *[t.index_select(-1, rows) for t in statistics])
        for whole, of_block in zip(per_row, found):
            whole.index_copy_(-1, rows, of_block)
    return grad(inputs, spec, per_row, needed), per_row[:3]


def _warn_of_scratch(asked: int) -> None:
    if "scratch" not in _warned:
        _warned.add("scratch")
        warnings.warn(
            f"fdd_kernels: {asked / MIB:.0f} MiB of scratch for cached logits do not fit the "
            "device; they are computed twice "
            f"instead, slab by slab. Set {CACHE_BYTES} to a smaller number of bytes, or free "
            "memory",
            stacklevel=2,
        )
