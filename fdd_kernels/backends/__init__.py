"""The backends: each is the two operations of `ops.py` plus the reason why it cannot run, if there
is one.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch

from fdd_kernels.backends import cpu, torch_stream, triton
from fdd_kernels.backends.call_shape import CallShape
from fdd_kernels.backends.triton.memory import memory as triton_memory


@dataclass(frozen=True)
class Backend:
    """Two functions and a check; `unavailable(device)` returns the reason and the remedy, or None.

    A backend may do both operations at once, one block of rows after another, and keep a block's
    logits in between:

        kept_rows(inputs, spec, needed) -> rows a block; 0 where that does not pay
        stats_and_grad(inputs, spec, rows_at_a_time, upstream_of, needed, refine) -> gradients,
        (shifts, reads, moments)

    For each block `upstream_of(rows, shifts, reads, moments)` is given its rows, int64 positions
    among the caller's on their device, and their statistics (..., r). It returns what `grad` takes
    as `per_row` for these rows: the statistics to form the gradients with, which are those of all
    columns where `inputs` has some of them, and the upstream gradients of requests and moments.
    Rows that are not valid may be among a block's, with statistics of 0; what is returned for them
    is to be ignored.

    The gradients are those of `grad`; a backend whose sums are in a wider dtype may return these,
    which are then rounded once, after the upstream gradient is known. The statistics are those that
    `upstream_of` returned, of all rows in the caller's order, 0 where a row is not valid. With
    `refine` the backend may have replaced each VALUE by a more accurate one, since the gradient
    kernel knows both log-sum-exps: KL = sum p (expm1(x) - x) with x = log q - log p has no term
    below 0. Without `refine` (`inputs` has some of the columns) it must not. Neither function is
    traced or differentiated.

    `memory(shape)` says what a call allocates by part, beside gradients and statistics.
    """

    stats: Callable
    grad: Callable
    unavailable: Callable[[torch.device], str | None]
    cached_rows: Callable | None = None
    stats_and_grad: Callable | None = None
    memory: Callable[[CallShape], dict[str, int]] | None = None


BACKENDS: dict[str, Backend] = {
    "cpu": Backend(
        cpu.stats, cpu.grad, cpu.unavailable, cpu.cached_rows, cpu.stats_and_grad, cpu.memory
    ),
    "torch": Backend(
        torch_stream.stats,
        torch_stream.grad,
        unavailable=lambda device: None,
        memory=torch_stream.memory,
    ),
    "triton": Backend(
        triton.stats,
        triton.grad,
        triton.unavailable,
        triton.cached_rows,
        triton.stats_and_grad,
        triton_memory,
    ),
}
# What "auto" prefers on a device, first to last.
PREFERENCE = {"cuda": ("triton", "torch"), "cpu": ("cpu", "torch")}
_warned: set[str] = set()


def why_unavailable(name: str, device: torch.device) -> str | None:
    """Why the backend `name` cannot run on `device` and what to do about it; None if it can."""
    if name == "reference":
        return None
    if name not in BACKENDS:
        return (
            f'this version of fdd_kernels contains no "{name}" kernels; '
            'use backend="auto" or backend="torch"'
        )
    return BACKENDS[name].unavailable(device)


def resolve_backend(name: str, device: torch.device) -> str:
    """The backend to run for the option `backend=name` on `device`.

    Raises:
        RuntimeError: a backend was named that cannot run here; says why and what to do.
    """
    if name != "auto":
        reason = why_unavailable(name, device)
        if reason is not None:
            raise RuntimeError(f'backend="{name}" cannot run on device "{device}": {reason}')
        return name
    preferred, *others = PREFERENCE.get(device.type, ("torch",))
    reason = why_unavailable(preferred, device)
    if reason is None:
        return preferred
    if reason not in _warned:
        _warned.add(reason)
        warnings.warn(
            f'fdd_kernels: the "{preferred}" backend is not used on "{device}": {reason}',
            stacklevel=2,
        )
    return next(other for other in others if why_unavailable(other, device) is None)
