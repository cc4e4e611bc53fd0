"""Opt-in search over launch configurations, kept on disk.

FDD_KERNELS_TRITON_AUTOTUNE=1 times every candidate the first time a shape is met (rows rounded up to a power of two) and
stores the best under FDD_KERNELS_CACHE (default ~/.cache/fdd_kernels). Without it the plain function of `config.py`
decides, nothing is timed and nothing is read.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import triton

from fdd_kernels.backends.triton import launch
from fdd_kernels.backends.triton.config import LaunchConfig, candidates, choose
from fdd_kernels.environment import cache_folder

SWITCH = "FDD_KERNELS_TRITON_AUTOTUNE"
REPEATS = 3


def cache_file() -> Path:
    return cache_folder() / "triton_configurations.json"


def _read() -> dict[str, dict]:
    try:
        return json.loads(cache_file().read_text())
    except (OSError, ValueError):
        return {}


def _write(key: str, config: LaunchConfig) -> None:
    """Add an entry; the file is replaced as a whole, so that a reader never sees half of it."""
    path = cache_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        json.dump(_read() | {key: vars(config)}, file, indent=1)
    os.replace(file.name, path)


def seconds(run: Callable[[LaunchConfig], object], config: LaunchConfig) -> float:
    """The shortest of a few timed runs; infinity for a configuration that the device has no room for."""
    try:
        run(config)
    except (triton.runtime.errors.OutOfResources, triton.compiler.errors.CompilationError):
        return float("inf")
    best = float("inf")
    for _ in range(REPEATS):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run(config)
        stop.record()
        stop.synchronize()
        best = min(best, start.elapsed_time(stop) / 1000)
    return best


def tuned(operation: str, shape: tuple[int, ...], dtype: torch.dtype, architecture: str,
          run: Callable[[LaunchConfig], object], timer: Callable = seconds, mixed: bool = False) -> LaunchConfig:  # fmt: skip
    """The configuration for `shape` = (rows, columns, widths): the default, or the fastest found by timing `run`."""
    rows = shape[0]
    if os.environ.get(SWITCH, "0") in ("", "0") or not rows:
        return choose(shape, dtype, architecture, mixed)
    rounded = (triton.next_power_of_2(rows), *shape[1:])
    key = "/".join([operation, architecture, str(dtype) + "+" * mixed, "x".join(map(str, rounded)), triton.__version__])
    known = _read().get(key)
    if known is not None:
        return LaunchConfig(**known)
    if launch.is_recording():
        return choose(shape, dtype, architecture, mixed)
    best = min(candidates(shape, dtype, architecture, mixed), key=lambda config: timer(run, config))
    _write(key, best)
    return best
