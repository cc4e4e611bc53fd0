"""A teacher's hidden states or summary, computed once and stored on disk: training then needs no
teacher in memory.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fdd_kernels.teacher_cache.hidden import TeacherCache, write_teacher_cache
    from fdd_kernels.teacher_cache.reader import WindowCache
    from fdd_kernels.teacher_cache.summary import (
        StatisticsCache,
        SummaryCache,
        write_statistics_cache,
        write_summary_cache,
    )

__all__ = [
    "StatisticsCache",
    "SummaryCache",
    "TeacherCache",
    "WindowCache",
    "open_teacher_cache",
    "write_statistics_cache",
    "write_summary_cache",
    "write_teacher_cache",
]

SHARD_SIZE = 512 * 2**20  # bytes of a shard, unless told otherwise

# Imported on first use, so that `fdd-kernels cache-teacher --help` does not import torch.
_HOMES = {
    "StatisticsCache": "summary",
    "SummaryCache": "summary",
    "TeacherCache": "hidden",
    "WindowCache": "reader",
    "write_statistics_cache": "summary",
    "write_summary_cache": "summary",
    "write_teacher_cache": "hidden",
}


def open_teacher_cache(path: str | Path) -> WindowCache:
    """Open a cache directory as `TeacherCache` or `SummaryCache`, whichever its index names.

    Raises:
        FileNotFoundError, ValueError: see `WindowCache`.
    """
    from fdd_kernels.teacher_cache.format import read_index
    from fdd_kernels.teacher_cache.hidden import TeacherCache
    from fdd_kernels.teacher_cache.summary import SummaryCache

    index = read_index(Path(path))
    is_summary = index is not None and index["contents"]["kind"] == SummaryCache.kind
    return SummaryCache(path) if is_summary else TeacherCache(path)


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
