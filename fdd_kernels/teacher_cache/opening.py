"""A cache of whatever kind lies in a directory."""

from __future__ import annotations

from pathlib import Path

from fdd_kernels.teacher_cache.cache import TeacherCache, WindowCache
from fdd_kernels.teacher_cache.index import read_index
from fdd_kernels.teacher_cache.statistics import StatisticsCache


def open_teacher_cache(path: str | Path) -> WindowCache:
    """`TeacherCache` or `StatisticsCache`, as the index says; for the errors see `WindowCache`."""
    index = read_index(Path(path))
    statistics = index is not None and index["contents"]["kind"] == StatisticsCache.kind
    return StatisticsCache(path) if statistics else TeacherCache(path)
