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
