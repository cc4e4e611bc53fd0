"""The one place that launches a kernel, or records the launch so that it can be compiled ahead of
time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

SMALL = {"num_warps": 4, "num_stages": 1}  # options of a kernel that only moves


@dataclass(frozen=True)
class Launch:
    """A kernel with everything that decides how it is compiled; or a GEMM, whose kernel is
    `gemm.multiply`.
    """

    kernel: Any
    arguments: dict[str, Any]
    options: dict[str, int]
    grid: tuple[int, ...] = ()


_recording: list[Launch] | None = None


def is_recording() -> bool:
    return _recording is not None


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Within the context nothing is launched; the launches are collected. For tensors on the device
    "meta".
    """
    global _recording
    before, _recording = _recording, []
    try:
        yield _recording
    finally:
        _recording = before


def record(
    kernel: Any, grid: tuple[int, ...] = (), options: dict[str, int] | None = None, **arguments: Any
) -> bool:
    """Whether launches are being recorded; if so, this one is now among them."""
    if _recording is None:
        return False
    _recording.append(Launch(kernel, arguments, options or {}, grid))
    return True


def launch(kernel: Any, grid: tuple[int, ...], options: dict[str, int], **arguments: Any) -> None:
    """Launch `kernel` on the current device and stream; `options` are the compiler's, as
    `LaunchConfig.options`.
    """
    if not record(kernel, grid, options, **arguments):
        kernel[grid](**arguments, **options)
