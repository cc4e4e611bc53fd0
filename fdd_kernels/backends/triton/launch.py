"""The one place that launches a kernel, or records the launch to compile it ahead of time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

SMALL = {"num_warps": 4, "num_stages": 1}  # options of a kernel with little arithmetic


@dataclass(frozen=True)
class Launch:
    """A kernel with everything that decides how it is compiled and started.

    `options` are the compiler's, as `LaunchConfig.options`. Of a GEMM the kernel is
    `gemm.multiply`, without grid and options.
    """

    kernel: Any
    grid: tuple[int, ...]
    options: dict[str, int]
    arguments: dict[str, Any]


_recording: list[Launch] | None = None


def is_recording() -> bool:
    """Tell whether launches are being recorded."""
    return _recording is not None


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Collect launches within the context and start none. For tensors on the device "meta"."""
    global _recording
    before, _recording = _recording, []
    try:
        yield _recording
    finally:
        _recording = before


def record(one: Launch) -> bool:
    """Record a launch if launches are being recorded; tell whether they are."""
    if _recording is None:
        return False
    _recording.append(one)
    return True


def launch(one: Launch) -> None:
    """Start a kernel on the current device and stream."""
    if not record(one):
        one.kernel[one.grid](**one.arguments, **one.options)
