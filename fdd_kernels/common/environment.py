"""Settings from environment variables."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """The folder for compiled kernels and tuning results: FDD_KERNELS_CACHE, or
    ~/.cache/fdd_kernels.
    """
    named = os.environ.get("FDD_KERNELS_CACHE")
    return Path(named).expanduser() if named else Path.home() / ".cache" / "fdd_kernels"


def byte_limit(variable: str, default: int) -> int:
    """Return the bytes that an environment variable allows, or `default` where it is not set.

    Raises:
        ValueError: it is no number of bytes.
    """
    asked = os.environ.get(variable)
    if not asked:
        return default
    if not asked.isdigit():
        raise ValueError(f"{variable}={asked!r} is not a number of bytes, such as {default}")
    return int(asked)
