"""The one place that launches a kernel, or records the launch so that it can be compiled ahead of time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Launch:
    """A kernel with everything that decides how it is compiled."""

    kernel: Any
    arguments: dict[str, Any]
    num_warps: int
    num_stages: int


_recording: list[Launch] | None = None


def is_recording() -> bool:
    return _recording is not None


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Within the context nothing is launched; the launches are collected. For tensors on the device "meta"."""
    global _recording
    before, _recording = _recording, []
    try:
        yield _recording
    finally:
        _recording = before


def launch(kernel: Any, grid: tuple[int, ...], num_warps: int, num_stages: int, **arguments: Any) -> None:
    """Launch `kernel` on the current device and stream."""
    if _recording is not None:
        _recording.append(Launch(kernel, arguments, num_warps, num_stages))
        return
    kernel[grid](**arguments, num_warps=num_warps, num_stages=num_stages)
