"""The registry of backends: who computes the operations of `fdd_kernels.engine.ops`, and where."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch

from fdd_kernels.backends import cpu, torch_stream, triton
from fdd_kernels.backends.call_shape import CallShape
from fdd_kernels.backends.triton.launch import is_recording
from fdd_kernels.backends.triton.memory import memory as triton_memory
from fdd_kernels.lens.spec import LensSpec

__all__ = [
    "BACKENDS",
    "Backend",
    "CallShape",
    "backend_names",
    "check_spec",
    "is_recording",
    "preference",
    "resolve_backend",
    "resolve_row_backend",
    "why_unavailable",
]


def _nothing(_) -> None:
    return None


@dataclass(frozen=True)
class Backend:
    """An entry of the registry.

    Attributes:
        stats: `stats(inputs, spec)` -> `Statistics` of R rows.
        grad: `grad(inputs, spec, per_row, needed)` -> gradients of [*student_hidden,
            student_weight, student_bias] that are marked in `needed`. `per_row` are the three
            statistics and the upstream gradients of the last two.
        unavailable: `unavailable(device)` -> why it cannot run there and the remedy, or None.
        refusal: `refusal(spec)` -> which part of the spec it cannot compute, or None.
        devices: the device types that "auto" takes it for; empty for none.
        priority: "auto" takes the available backend of the highest priority.
        color: of its curves and bars in plots.
        memory: `memory(shape)` -> bytes that a call allocates by part, beside gradients and
            statistics.
        cached_rows: `cached_rows(inputs, spec, needed)` -> rows of a row block for
            `stats_and_grad`; 0 where two operations are faster.
        stats_and_grad: both operations at once, one row block after another, with the block's
            logits cached in between.
        row_blocks: `row_blocks(inputs, per_row, shared, spec, upstream, needed)` -> values and
            gradients of a row function (`lens/row_blocks.py`); None where the backend has none.

    `stats_and_grad(inputs, spec, block_rows, upstream_of, needed, refine)` returns gradients and
    `Statistics`. Per block it calls `upstream_of(rows, shifts, requests, moments)` with the block's
    rows, int64 positions among the caller's on their device, and their statistics (..., r). The
    call returns `per_row` of `grad` for these rows: the statistics to form gradients with (those of
    the whole vocabulary where `inputs` has a shard of it) and the upstream gradients. A block may
    have rows that are not valid, with statistics of 0; what is returned for them is ignored.

    The gradients are those of `grad`, or in the wider dtype of its sums: they are then rounded
    once, after the upstream gradient is known. The statistics are those that `upstream_of`
    returned, in the caller's order, 0 where a row is not valid. With `refine` the backend may have
    replaced a VALUE by a more accurate one; without (`inputs` has a shard) it must not. Neither
    function is traced or differentiated.
    """

    stats: Callable
    grad: Callable
    unavailable: Callable[[torch.device], str | None]
    refusal: Callable[[LensSpec], str | None] = _nothing
    devices: tuple[str, ...] = ()
    priority: int = 0
    color: str = "#888888"
    memory: Callable[[CallShape], dict[str, int]] | None = None
    cached_rows: Callable | None = None
    stats_and_grad: Callable | None = None
    row_blocks: Callable | None = None


BACKENDS: dict[str, Backend] = {
    "cpu": Backend(
        cpu.stats,
        cpu.grad,
        cpu.unavailable,
        cpu.refusal,
        devices=("cpu",),
        priority=2,
        color="#d1495b",
        memory=cpu.memory,
        cached_rows=cpu.cached_rows,
        stats_and_grad=cpu.stats_and_grad,
    ),
    "torch": Backend(
        torch_stream.stats,
        torch_stream.grad,
        _nothing,
        devices=("cpu", "cuda", "mps", "xpu"),
        priority=1,
        color="#edae49",
        memory=torch_stream.memory,
        row_blocks=torch_stream.row_blocks,
    ),
    "triton": Backend(
        triton.stats,
        triton.grad,
        triton.unavailable,
        triton.refusal,
        devices=("cuda",),
        priority=2,
        color="#8d0801",
        memory=triton_memory,
        cached_rows=triton.cached_rows,
        stats_and_grad=triton.stats_and_grad,
    ),
}
_warned: set[str] = set()


def backend_names() -> tuple[str, ...]:
    """List the values of the option `backend`."""
    return ("auto", "reference", *BACKENDS)


def preference(device_type: str) -> list[str]:
    """List the backends that "auto" considers on a type of device, first to last."""
    considered = [name for name, entry in BACKENDS.items() if device_type in entry.devices]
    return sorted(considered, key=lambda name: -BACKENDS[name].priority) or ["torch"]


def why_unavailable(name: str, device: torch.device) -> str | None:
    """Say why the backend `name` cannot run on `device` and what to do about it; None if it can."""
    if name == "reference":
        return None
    return BACKENDS[name].unavailable(device)


def resolve_backend(name: str, device: torch.device, spec: LensSpec | None = None) -> str:
    """Choose the backend that runs on `device`, and computes `spec`, for the option `backend=name`.

    "auto" warns once about each backend of higher priority that is passed over.

    Raises:
        RuntimeError: a backend was named that cannot run here; says why and what to do.
        ValueError: a backend was named that cannot compute `spec`; names those that can.
    """
    if name != "auto":
        reason = why_unavailable(name, device)
        if reason is not None:
            raise RuntimeError(f'backend="{name}" cannot run on device "{device}": {reason}')
        if spec is not None:
            check_spec(name, spec)
        return name
    for preferred in preference(device.type):
        reason = why_unavailable(preferred, device)
        if reason is None and spec is not None:
            reason = BACKENDS[preferred].refusal(spec)
        if reason is None:
            return preferred
        if reason not in _warned:
            _warned.add(reason)
            warnings.warn(
                f'fdd_kernels: the "{preferred}" backend is not used on "{device}": {reason}',
                stacklevel=2,
            )
    return "torch"


def resolve_row_backend(name: str) -> str:
    """Choose the backend of row blocks for the option `backend=name`.

    Raises:
        ValueError: a backend was named that has no row blocks; names those that have.
    """
    able = [other for other, entry in BACKENDS.items() if entry.row_blocks is not None]
    if name == "auto":
        return able[0]
    if name not in ("reference", *able):
        raise ValueError(
            f'backend="{name}" does not compute this objective. Backends that can: '
            f"{', '.join(['auto', 'reference', *able])}"
        )
    return name


def check_spec(name: str, spec: LensSpec) -> None:
    """Refuse a spec that the backend `name` cannot compute.

    Raises:
        ValueError: names the part of the spec, and the backends that can compute it.
    """
    reason = None if name == "reference" else BACKENDS[name].refusal(spec)
    if reason is not None:
        able = [other for other, entry in BACKENDS.items() if entry.refusal(spec) is None]
        raise ValueError(
            f'backend="{name}" cannot compute this: {reason}. Backends that can: '
            f"{', '.join(['reference', *able])}"
        )
