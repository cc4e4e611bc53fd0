"""The operations of the backend "triton": the strategy of a call, and its walk over row blocks.

Inputs in float64 go to "torch". The kernels are imported when an operation runs, so that importing
this module needs no triton.
"""

from __future__ import annotations

import contextlib
import importlib.util
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from fdd_kernels.backends import torch_stream
from fdd_kernels.backends.call_shape import CallShape
from fdd_kernels.backends.triton.config import interpreting
from fdd_kernels.backends.triton.strategy import (
    CACHE_BYTES,
    Slabs,
    balanced_rows,
    cache_bytes,
    chosen_strategy,
    padded,
    rows_of_cache,
    scratch_elements,
    slabs_of,
)
from fdd_kernels.common.sizes import MIB
from fdd_kernels.lens.inputs import LensInputs
from fdd_kernels.lens.layout import Statistics
from fdd_kernels.lens.spec import LensSpec

_warned: set[str] = set()


def unavailable(device: torch.device) -> str | None:
    """Say why the kernels cannot run on `device` and the remedy; None if they can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: pip install triton (Linux)"
    if interpreting():
        return None
    if device.type != "cuda":
        return (
            "the Triton kernels need an NVIDIA or AMD GPU: move the tensors to one, or use another "
            "backend; to try the kernels slowly on a CPU, set TRITON_INTERPRET=1 before Python "
            "starts"
        )
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        return "the Triton kernels need compute capability 8.0 (Ampere) or newer"
    return None


def shape_of(inputs: LensInputs, spec: LensSpec, *, trains_head: bool) -> CallShape:
    """Describe a call to the rules of `strategy.py`."""
    return CallShape(
        layers=len(inputs.student_hidden),
        rows=inputs.rows,
        columns=spec.columns,
        student_width=inputs.student_hidden[0].shape[1],
        teacher_width=inputs.teacher_hidden[0].shape[1],
        itemsize=inputs.student_weight.dtype.itemsize,
        train_head=trains_head,
        teacher_head=spec.needs_teacher and inputs.teacher_weight is not None,
    )


def _on(device: torch.device):
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _slabs(inputs: LensInputs, spec: LensSpec, *, trains_head: bool) -> Slabs | None:
    """Choose how the two operations cut the work; None: by the one-pass kernels."""
    if chosen_strategy() == "one_pass":
        return None
    return slabs_of(shape_of(inputs, spec, trains_head=trains_head), cache_bytes(inputs.device))


def stats(inputs: LensInputs, spec: LensSpec) -> Statistics:
    """Compute the statistics; see `backends.Backend`."""
    if inputs.statistics_dtype == torch.float64:
        return torch_stream.stats(inputs, spec)
    inputs, _ = inputs.with_equal_layers()
    from fdd_kernels.backends.triton.cached.blocks import blocks_of
    from fdd_kernels.backends.triton.cached.fill_statistics import fill_statistics
    from fdd_kernels.backends.triton.one_pass import host as one_pass
    from fdd_kernels.backends.triton.problem import Problem

    slabs = _slabs(inputs, spec, trains_head=False)
    with _on(inputs.device):
        if slabs is None:
            return one_pass.stats(inputs, spec)
        problem = Problem(inputs, spec)
        statistics = problem.zero_statistics()
        for block in blocks_of(problem, problem.rows, slabs.rows, slabs.tokens, statistics):
            fill_statistics(block)
            del block  # before the next one is allocated
        return problem.at_callers_rows(statistics)


def grad(
    inputs: LensInputs, spec: LensSpec, per_row: tuple[Tensor, ...], needed: list[bool]
) -> list[Tensor]:
    """Compute the gradients marked in `needed`; see `backends.Backend`."""
    if inputs.statistics_dtype == torch.float64:
        return torch_stream.grad(inputs, spec, per_row, needed)
    inputs, needed = inputs.with_equal_layers(needed)
    from fdd_kernels.backends.triton.cached.blocks import blocks_of
    from fdd_kernels.backends.triton.cached.gradients import Gradients
    from fdd_kernels.backends.triton.one_pass import host as one_pass
    from fdd_kernels.backends.triton.problem import Problem

    slabs = _slabs(inputs, spec, trains_head=needed[-2])
    with _on(inputs.device):
        if slabs is None:
            return one_pass.grad(inputs, spec, per_row, needed)
        problem = Problem(inputs, spec)
        gradients = Gradients(problem, needed, slabs.rows)
        per_row, rows = problem.in_order(per_row), problem.rows if any(needed) else 0
        for block in blocks_of(problem, rows, slabs.rows, slabs.tokens, per_row[:3]):
            gradients.add(block, block.of_block(per_row))
            del block  # before the next one is allocated
        return gradients.finished(rows > 0)


def new_scratch(elements: int, device: torch.device) -> Tensor:
    """Allocate scratch for cached logits."""
    return torch.empty(elements, dtype=torch.float32, device=device)


def cached_rows(inputs: LensInputs, spec: LensSpec, needed: list[bool]) -> int:
    """Return the rows of a block whose logits are cached; 0 where two operations are better.

    They are for float16 gradients, which would underflow before a loss scaler has scaled them, and
    where one model has more hidden states than the other.
    """
    outputs = (*inputs.student_hidden, inputs.student_weight, inputs.student_bias)
    wanted = [t for t, need in zip(outputs, needed) if need]
    if len(inputs.student_hidden) != len(inputs.teacher_hidden):
        return 0
    if not wanted or chosen_strategy() not in ("auto", "cached"):
        return 0
    if inputs.statistics_dtype == torch.float64 or any(t.dtype == torch.float16 for t in wanted):
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
    """Compute statistics and gradients with every logit computed once; see `backends.Backend`.

    Where the scratch does not fit, compute one after the other, with one warning.
    """
    from fdd_kernels.backends.triton.cached.blocks import blocks_of
    from fdd_kernels.backends.triton.cached.fill_statistics import fill_statistics
    from fdd_kernels.backends.triton.cached.gradients import Gradients
    from fdd_kernels.backends.triton.problem import Problem

    elements = scratch_elements(shape_of(inputs, spec, trains_head=needed[-2]), block_rows)
    with _on(inputs.device):
        try:
            scratch = new_scratch(elements, inputs.device)
        except torch.OutOfMemoryError:
            scratch = None
        problem = Problem(inputs, spec)
        rows = problem.count_valid()
        step = max(balanced_rows(rows, block_rows, problem.layers), 1)
        order = problem.order.long()
        if scratch is None:
            _warn_of_scratch(elements * 4)
            blocks = order[:rows].split(step) if rows else ()
            return _one_after_the_other(inputs, spec, blocks, upstream_of, needed)
        statistics = problem.zero_statistics()
        gradients = Gradients(problem, needed, step)
        tokens = padded(spec.columns)
        for block in blocks_of(problem, rows, step, tokens, statistics, scratch):
            fill_statistics(block)
            per_row = upstream_of(order[block.first :][: block.rows], *block.statistics)
            gradients.add(block, per_row, block.statistics[1] if refine else None)
            for own, returned in zip(block.statistics, per_row):
                if returned is not own:  # those of all shards' tokens
                    own.copy_(returned)
            del block  # before the next one is allocated
        return gradients.finished(rows > 0), problem.at_callers_rows(statistics)


def _one_after_the_other(
    inputs: LensInputs,
    spec: LensSpec,
    blocks: tuple[Tensor, ...],
    upstream_of: Callable,
    needed: list[bool],
) -> tuple[list[Tensor], Statistics]:
    """Do both operations over all rows, and ask `upstream_of` by block: others may wait for it."""
    statistics = stats(inputs, spec)
    per_row = (*statistics, *[torch.zeros_like(t) for t in statistics[1:]])
    for rows in blocks:
        found = upstream_of(rows, *[t.index_select(-1, rows) for t in statistics])
        for whole, of_block in zip(per_row, found):
            whole.index_copy_(-1, rows, of_block)
    return grad(inputs, spec, per_row, needed), Statistics(*per_row[:3])


def _warn_of_scratch(asked: int) -> None:
    if "scratch" not in _warned:
        _warned.add("scratch")
        warnings.warn(
            f"fdd_kernels: {asked / MIB:.0f} MiB of scratch for cached logits do not fit the "
            f"device; they are computed twice instead, slab by slab. Set {CACHE_BYTES} to a "
            "smaller number of bytes, or free memory",
            stacklevel=2,
        )
