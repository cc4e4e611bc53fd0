"""The backends: each is the two operations of `ops.py` plus the reason why it cannot run, if there is one."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch

from fdd_kernels.backends import cpu, torch_stream, triton


@dataclass(frozen=True)
class Backend:
    """Two functions and a check; `unavailable(device)` returns the reason and the remedy, or None.

    A backend may do both operations at once, block of rows by block of rows, with `stats_and_grad`; `kept_rows` says how
    many rows a block has, 0 where that does not pay.
    """

    stats: Callable
    grad: Callable
    unavailable: Callable[[torch.device], str | None]
    kept_rows: Callable | None = None
    stats_and_grad: Callable | None = None


BACKENDS: dict[str, Backend] = {
    "cpu": Backend(cpu.stats, cpu.grad, cpu.unavailable, cpu.kept_rows, cpu.stats_and_grad),
    "torch": Backend(torch_stream.stats, torch_stream.grad, unavailable=lambda device: None),
    "triton": Backend(triton.stats, triton.grad, triton.unavailable),
}
# What "auto" prefers on a device, first to last.
PREFERENCE = {"cuda": ("triton", "torch"), "cpu": ("cpu", "torch")}
_warned: set[str] = set()


def why_unavailable(name: str, device: torch.device) -> str | None:
    """Why the backend `name` cannot run on `device` and what to do about it; None if it can."""
    if name == "reference":
        return None
    if name not in BACKENDS:
        return f'this version of fdd_kernels contains no "{name}" kernels; use backend="auto" or backend="torch"'
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
        warnings.warn(f'fdd_kernels: the "{preferred}" backend is not used on "{device}": {reason}', stacklevel=2)
    return next(other for other in others if why_unavailable(other, device) is None)
