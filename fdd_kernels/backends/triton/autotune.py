"""Opt-in search over launch configurations, stored on disk.

FDD_KERNELS_TRITON_AUTOTUNE=1 times every candidate the first time that a device meets a shape (rows
rounded up to a power of two) with these layers, divergences and moments. It stores the best under
FDD_KERNELS_CACHE (default ~/.cache/fdd_kernels). Without it the plain function of `config.py`
decides, and nothing is timed or loaded.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import filelock
import torch
import triton

from fdd_kernels.backends.triton import launch
from fdd_kernels.backends.triton.config import LaunchConfig, candidates, choose
from fdd_kernels.common.atomic import write_text
from fdd_kernels.common.environment import cache_folder

SWITCH = "FDD_KERNELS_TRITON_AUTOTUNE"


def cache_file() -> Path:
    """Return the path of the stored configurations."""
    return cache_folder() / "triton_configurations.json"


def _read() -> dict[str, dict]:
    try:
        return json.loads(cache_file().read_text())
    except (OSError, ValueError):
        return {}


def _write(key: str, config: LaunchConfig) -> None:
    """Add an entry, one process at a time, and replace the file as a whole."""
    path = cache_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(path.with_suffix(".lock")):
        write_text(path, json.dumps(_read() | {key: vars(config)}, indent=1))


def seconds(run: Callable[[LaunchConfig], object], config: LaunchConfig) -> float:
    """Time `run`: the median of runs that each start with an empty L2, in seconds.

    Infinity for a configuration that does not fit the device.
    """
    try:
        return triton.testing.do_bench(lambda: run(config), return_mode="median") / 1000
    except (triton.runtime.errors.OutOfResources, triton.compiler.errors.CompilationError):
        return float("inf")


def tuned(
    operation: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    architecture: str,
    run: Callable[[LaunchConfig], object],
    timer: Callable = seconds,
    mixed: bool = False,
    work: str = "",
) -> LaunchConfig:
    """Choose the configuration for `shape` = (R, V, widths): the default, or the fastest `run`.

    `work` tells calls of the same shape apart: the number of layers and the structure of the spec.
    """
    rows = shape[0]
    if os.environ.get(SWITCH, "0") in ("", "0") or not rows:
        return choose(shape, dtype, architecture, mixed)
    rounded = (triton.next_power_of_2(rows), *shape[1:])
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else architecture
    kind = str(dtype) + "+" * mixed
    key = "/".join(
        [
            operation,
            architecture,
            device,
            kind,
            "x".join(map(str, rounded)),
            work,
            triton.__version__,
        ]
    )
    known = _read().get(key)
    if known is not None:
        return LaunchConfig(**known)
    if launch.is_recording():
        return choose(shape, dtype, architecture, mixed)
    best = min(candidates(shape, dtype, architecture, mixed), key=lambda config: timer(run, config))
    _write(key, best)
    return best
